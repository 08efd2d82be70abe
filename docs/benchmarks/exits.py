"""What choosing exit and K for each round loses to the best pair known afterwards: on texts that are drawn.

python docs/benchmarks/exits.py [--texts 8] [--bundle FOLDER]

A text says of each token whether a draft of each exit there would be right: a deeper exit is right more often, and
mostly where a shallower one is; how often changes between segments, or does not. Costs are given. The choice knows
neither rates nor costs, believes at first that a draft of any exit adds 0.35 of a round, measures times that scatter by
3%, and pays for what it looks at. The best pair of exit and K is that of all texts of a kind together; the regret is
how much more time the choice takes.

With a bundle of several exits, its own texts are decoded once more in this way: what each exit would have drafted, and
how sure it would have been, is read off, and the costs are the processor time of its calls, measured one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time_ns
from typing import Any

import numpy as np

from edgeskip.exporter.graphs.probe import Probe
from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.bundle.weights import read_bytes
from edgeskip.runtime.decoding.rounds import distinct_calls, speculative_round
from edgeskip.runtime.drafting.drafters import Source
from edgeskip.runtime.drafting.length import Pace, RoundCosts, slopes_of
from edgeskip.runtime.load import load

LENGTHS = np.arange(MAX_SPECULATIONS + 1)
TOKENS, SCATTER, ALIKE, BELIEVED = 1536, 0.03, 0.7, 0.35

Array = Any

Text = Mapping[int, tuple[Array, Array]]
"""Of each exit: which of its drafts are right, and after which it would draft on."""


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


def drawn_text(case: Case, random: np.random.Generator) -> Text:
    """A text of this kind, of exits that always draft on."""
    order = np.concatenate([random.permutation(len(case.segments)) for _ in range(-(-TOKENS // case.length))])
    which = np.repeat(order, case.length)[:TOKENS]
    alike, sure = random.random(TOKENS), np.ones(TOKENS, bool)
    text = {}
    for exit_layer in case.slopes:
        rates = np.array([segment[exit_layer] for segment in case.segments])[which]
        right = np.where(random.random(TOKENS) < ALIKE, alike, random.random(TOKENS)) < rates
        text[exit_layer] = right, sure
    return text


def round_at(drafting: tuple[Array, Array], at: int, k: int) -> tuple[int, int]:
    """How many drafts a round of up to K makes that begins here, and how many of them are right."""
    right, sure = drafting
    unsure = np.flatnonzero(~sure[at : at + k - 1]) if k else ()
    made = int(unsure[0]) + 1 if len(unsure) else k
    wrong = np.flatnonzero(~right[at : at + made])
    return made, int(wrong[0]) if len(wrong) else min(made, len(right) - at)


def fixed_time(drafting: tuple[Array, Array], costs: Array, k: int) -> float:
    """The time of a text with K drafts in each round."""
    at, time = 0, 0.0
    while at < len(drafting[0]):
        made, accepted = round_at(drafting, at, k)
        time += costs[made]
        at += accepted + 1
    return time


@dataclass
class Count:
    """Looks, and rounds by exit."""

    rounds: dict[int, int]
    looks: int = 0


def chosen_time(
    text: Text, costs: Mapping[int, Array], look: float, pace: Pace, random: np.random.Generator, count: Count
) -> float:
    """The time of a text with exit and K chosen as it comes."""
    at, time = 0, 0.0
    limits: dict[Source, int] = dict.fromkeys(text, MAX_SPECULATIONS)
    pace.begin()
    while at < len(next(iter(text.values()))[0]):
        source, k = pace.chosen(limits)
        assert source != "ngram"
        made, accepted = round_at(text[source], at, k)
        time += (cost := costs[source][made])
        pace.note(source, k, made, accepted, cost * np.exp(SCATTER * random.standard_normal()))
        count.rounds[source if k else 0] = count.rounds.get(source if k else 0, 0) + 1
        if (seen := pace.worth_a_look()) is not None:
            time += look
            count.looks += 1
            right, sure = (part[at : at + accepted + 1].tolist() for part in text[seen])
            pace.looked(seen, right, sure, look)
        at += accepted + 1
    return time


def regret(name: str, texts: Sequence[Text], costs: Mapping[int, Array], look: float, costs_known: RoundCosts) -> str:
    """The best pair, and how much slower the choice is."""
    pairs = [(e, k) for e in costs for k in LENGTHS[:13].tolist()]
    fixed = {(e, k): sum(fixed_time(text[e], costs[e], k) for text in texts) for e, k in pairs}
    best = min(fixed, key=lambda pair: fixed[pair])
    random, count, pace = np.random.default_rng(99), Count({}), Pace(costs_known, lambda: 0.0)
    time = sum(chosen_time(text, costs, look, pace, random, count) for text in texts)
    rounds = sum(count.rounds.values())
    shares = ", ".join(f"{e or 'plain'} {n / rounds:.0%}" for e, n in sorted(count.rounds.items()))
    pair, looks = f"E = {best[0]}, K = {best[1]}" if best[1] else "plain", f"a look in {count.looks / rounds:.0%}"
    return f"{name:28s} {pair:16s} {time / fixed[best] - 1:+6.1%}   rounds: {shares}; {looks}"


def of_a_case(name: str, case: Case, texts: int) -> str:
    """The regret on drawn texts."""
    drawn = [drawn_text(case, np.random.default_rng(seed)) for seed in range(texts)]
    return regret(name, drawn, case.costs, case.look, RoundCosts(dict.fromkeys(case.slopes, BELIEVED)))


def of_a_bundle(folder: str, prompts: int) -> list[str]:
    """The regret on a bundle's own texts, with the CPU's threshold and with none."""
    vars(cpu_session)["perf_counter_ns"] = process_time_ns  # what other programs do does not count
    with load(folder, device="cpu", threads=1) as model:
        manifest, session = model.bundle.manifest, model.session
        splits = {e: manifest.split(e) for e in (manifest.exit_layer, *manifest.other_exits)}
        texts, probed = [], []
        for prompt in load_prompts(None)[:prompts]:
            texts.append(model.complete(prompt, mode="autoregressive", max_new_tokens=256))
        with Probe(model.bundle) as probe:
            probed = [probe.exits(text.prompt_token_ids, text.token_ids) for text in texts]
        calls = distinct_calls(splits.values(), LENGTHS.tolist(), manifest.graphs)
        ms = {call.key: session.time_call_ms(call, 256, 30) for call in calls}
        costs = {
            e: np.array([sum(ms[call.key] for call in speculative_round(split, k).calls) for k in LENGTHS.tolist()])
            for e, split in splits.items()
        }
        slopes, threshold = slopes_of(splits.values(), read_bytes(model.bundle)), session.confidence_threshold
    found = []
    for limit in (threshold, 0.0):
        of_texts = [
            {e: (one.token_ids[e - 1, 1:] == text.token_ids[1:], one.confidences[e - 1, 1:] >= limit) for e in splits}
            for text, one in zip(texts, probed, strict=True)
        ]
        name = f"{manifest.source}, threshold {limit:g}"
        found.append(regret(name, of_texts, costs, ms[splits[manifest.exit_layer].head.graph, 2], RoundCosts(slopes)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=8, help="texts of each kind")
    parser.add_argument("--bundle", help="a bundle of several exits, in place of texts that are drawn")
    given = parser.parse_args()
    if given.bundle:
        print("\n".join(of_a_bundle(given.bundle, given.texts)))
    else:
        for kind, one in CASES.items():
            print(of_a_case(kind, one, given.texts), flush=True)
