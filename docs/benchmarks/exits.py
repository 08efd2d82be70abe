"""What choosing exit and K for each round loses to the best pair known afterwards: on texts that are drawn.

python docs/benchmarks/exits.py [--texts 8]

A text says of each token whether a draft of each exit there would be right: a deeper exit is right more often, and
mostly where a shallower one is; how often changes between segments, or does not. Costs are given. The choice knows
neither rates nor costs, believes at first that a draft of any exit adds 0.35 of a round, measures times that scatter by
3%, and pays for what it looks at. The best pair of exit and K is that of all texts of a kind together; the regret is
how much more time the choice takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.drafting.drafters import Source
from edgeskip.runtime.drafting.length import Pace, RoundCosts

LENGTHS = np.arange(MAX_SPECULATIONS + 1)
TOKENS, SCATTER, ALIKE, BELIEVED = 1536, 0.03, 0.7, 0.35

Array = Any


@dataclass(frozen=True)
class Case:
    """A model and its texts: what a draft of each exit adds to a round and what it takes to look at one, as shares of a
    round without drafts; and the rates of each segment of texts, by exit.
    """

    slopes: Mapping[int, float]
    look: float
    segments: Sequence[Mapping[int, float]]
    length: int = TOKENS

    @property
    def costs(self) -> dict[int, Array]:
        """The costs of rounds with 0, 1, ... drafts, by exit."""
        return {e: 1 + slope * LENGTHS + 0.02 * LENGTHS for e, slope in self.slopes.items()}


TWO, THREE = {3: 0.33, 5: 0.49}, {4: 0.25, 6: 0.33, 10: 0.52}
CASES: dict[str, Case] = {
    "the early exit as good": Case(TWO, 0.1, [{3: 0.84, 5: 0.85}]),
    "the late exit better": Case(TWO, 0.1, [{3: 0.4, 5: 0.85}]),
    "both at a par": Case(TWO, 0.1, [{3: 0.6, 5: 0.77}]),
    "neither pays": Case(TWO, 0.1, [{3: 0.15, 5: 0.25}]),
    "three exits, the middle one": Case(THREE, 0.2, [{4: 0.5, 6: 0.85, 10: 0.88}]),
    "three exits, the first one": Case(THREE, 0.2, [{4: 0.8, 6: 0.83, 10: 0.88}]),
    "three exits, the last one": Case(THREE, 0.2, [{4: 0.2, 6: 0.4, 10: 0.93}]),
    "segments of 256 tokens": Case(TWO, 0.1, [{3: 0.85, 5: 0.87}, {3: 0.3, 5: 0.85}, {3: 0.5, 5: 0.55}], 256),
    "segments of 96 tokens": Case(TWO, 0.1, [{3: 0.85, 5: 0.87}, {3: 0.3, 5: 0.85}, {3: 0.5, 5: 0.55}], 96),
}


def drawn_text(case: Case, random: np.random.Generator) -> dict[int, Array]:
    """For each exit, whether its draft in place of each token would be right."""
    order = np.concatenate([random.permutation(len(case.segments)) for _ in range(-(-TOKENS // case.length))])
    which = np.repeat(order, case.length)[:TOKENS]
    alike = random.random(TOKENS)
    text = {}
    for exit_layer in case.slopes:
        rates = np.array([segment[exit_layer] for segment in case.segments])[which]
        text[exit_layer] = np.where(random.random(TOKENS) < ALIKE, alike, random.random(TOKENS)) < rates
    return text


def accepted_at(right: Array, at: int, k: int) -> int:
    """How many of the K drafts of a round that begins here are right."""
    wrong = np.flatnonzero(~right[at : at + k])
    return int(wrong[0]) if len(wrong) else min(k, len(right) - at)


def fixed_time(right: Array, costs: Array, k: int) -> float:
    """The time of a text with K drafts in each round."""
    at, time = 0, 0.0
    while at < len(right):
        time += costs[k]
        at += accepted_at(right, at, k) + 1
    return time


@dataclass
class Count:
    """Tokens, looks, and rounds by exit."""

    rounds: dict[int, int]
    looks: int = 0


def chosen_time(text: Mapping[int, Array], case: Case, pace: Pace, random: np.random.Generator, count: Count) -> float:
    """The time of a text with exit and K chosen as it comes."""
    pace.begin()
    costs, at, time = case.costs, 0, 0.0
    pace.begin()
    most: dict[Source, int] = dict.fromkeys(text, MAX_SPECULATIONS)
    while at < TOKENS:
        source, k = pace.chosen(most)
        assert source != "ngram"
        accepted = accepted_at(text[source], at, k)
        time += costs[source][k]
        pace.note(source, k, k, accepted, costs[source][k] * np.exp(SCATTER * random.standard_normal()))
        count.rounds[source if k else 0] = count.rounds.get(source if k else 0, 0) + 1
        seen = slice(at, at + accepted + 1)
        if (look := pace.worth_a_look()) is not None:
            time += case.look
            count.looks += 1
            right = text[look][seen].tolist()
            pace.looked(look, right, [True] * len(right), case.look)
        at += accepted + 1
    return time


def regret(name: str, case: Case, texts: int) -> str:
    """The best pair, and how much slower the choice is."""
    drawn = [drawn_text(case, np.random.default_rng(seed)) for seed in range(texts)]
    fixed = {
        (e, k): sum(fixed_time(text[e], costs, k) for text in drawn)
        for e, costs in case.costs.items()
        for k in LENGTHS[:13].tolist()
    }
    best = min(fixed, key=lambda pair: fixed[pair])
    random, count = np.random.default_rng(99), Count({})
    pace = Pace(RoundCosts(dict.fromkeys(case.slopes, BELIEVED)), lambda: 0.0)
    time = sum(chosen_time(text, case, pace, random, count) for text in drawn)
    rounds = sum(count.rounds.values())
    shares = ", ".join(f"{e or 'plain'} {n / rounds:.0%}" for e, n in sorted(count.rounds.items()))
    pair = f"E = {best[0]}, K = {best[1]}" if best[1] else "plain"
    return (
        f"{name:28s} {pair:16s} {time / fixed[best] - 1:+6.1%}   rounds: {shares}; a look in {count.looks / rounds:.0%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=8, help="texts of each kind")
    given = parser.parse_args().texts
    for kind, one in CASES.items():
        print(regret(kind, one, given), flush=True)
