"""What choosing K for each round gains: the choice itself, on texts that are drawn, with costs that are given.

python docs/benchmarks/lengths.py [--texts 12] [--ahead]

A text says of each token whether a draft there would be right. Mixed texts have segments of match 0.3, 0.6 and 0.95,
in any order. Who is clairvoyant knows the rate of each segment, and the costs, and never whether a draft will be right.
The choice knows neither, and measures times that scatter by 3%: from nothing, with each text its first one, and
learned, after as many texts of the kind as are measured. Between them stands the bound: Bayes' rule over the three
rates, by who knows these, how long segments are and the costs, but not when one begins, nor which. The best fixed K is
that of all texts together, known afterwards.

With --ahead, it is as on a GPU: while a round runs, the next one is chosen, without knowing what comes of this one, and
from a few lengths.

An exit also says how sure it is of each draft. The choice that weighs this ends a round where one more draft is not
worth its time. Confidences are drawn so that a draft is right as often as they say, and with the spread that they have
in models of `edgeskip synth`; or, useless, they are the same ones in any order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.drafting.drafters import Source
from edgeskip.runtime.drafting.length import FEW_LENGTHS, Pace, RoundCosts, nearest_length

LENGTHS = np.arange(MAX_SPECULATIONS + 1)
SPREAD = 3.0
"""Of confidences: how many drafts would tell as much of a rate as one of them."""

MIXED, UNIFORM, SEGMENTS, SCATTER = (0.3, 0.6, 0.95), (0.1, 0.3, 0.5, 0.6, 0.8, 0.95), 12, 0.03
TOKENS = (300, 1500)
EXIT = 4
SLOPES: dict[float, Source] = {0.33: EXIT, 0.27: EXIT, 0.15: EXIT, 0.05: "ngram"}
"""What a draft adds to a round, as a share of one without, and what drafts so: an early exit at a third or a sixth of
the model, and the text itself."""

Array = Any


def nothing(*_: Any) -> None:
    """Learns nothing."""


def time_of(right: Array, costs: Array, k_at: Callable[[int], int], learn: Callable[..., None] = nothing) -> float:
    """The time of a text, from the K of the round that begins at each place."""
    runs = np.zeros(len(right) + 1, int)
    for i in reversed(range(len(right))):
        runs[i] = (runs[i + 1] + 1) * right[i]
    at, time = 0, 0.0
    while at < len(right):
        k = k_at(at)
        accepted = int(min(runs[at], k))
        learn(k, accepted, int(runs[at]))
        time += costs[k]
        at += accepted + 1
    return time


class Ahead(Pace):
    """Chooses while a round runs, from a few lengths."""

    _next: tuple[Source, int] | None = None

    def begin(self, *, weighs: bool = False) -> None:
        """Another text begins."""
        super().begin(weighs=weighs)
        self._next = None

    def chosen(self, most: Mapping[Source, int]) -> tuple[Source, int]:
        """What was chosen one round before."""
        now = self._next or self._few(most)
        self._next = self._few(most)
        return now

    def _few(self, most: Mapping[Source, int]) -> tuple[Source, int]:
        source, k = super().chosen(most)
        return source, nearest_length(k, FEW_LENGTHS, most[source])


def confidences_of(right: Array, rates: Array, random: np.random.Generator) -> Array:
    """Of drafts that are right or not, at these rates."""
    return random.beta(SPREAD * rates + right, SPREAD * (1 - rates) + ~right)


def chosen_times(
    kind: type[Pace],
    texts: Sequence[Array],
    costs: Array,
    drafter: Source,
    random: np.random.Generator,
    confidences: Sequence[Array] | None = None,
) -> list[float]:
    """With K chosen as the texts come, one after another, and confidences weighed where there are any."""
    pace = kind(RoundCosts({EXIT: 0.3, "ngram": 0.05}), lambda: 0.0)
    most: dict[Source, int] = {EXIT: 0, drafter: MAX_SPECULATIONS}

    def learn(k: int, accepted: int, run: int) -> None:
        ms = costs[k] * np.exp(SCATTER * random.standard_normal())
        pace.note(drafter if k else EXIT, k, k, accepted, ms)
        if drafter == "ngram":  # what would have been drafted is known after plain rounds too
            pace.compare([1] * MAX_SPECULATIONS, [1] * accepted + [1 if accepted < run else 0])

    def chosen(at: int) -> int:
        made = k = pace.chosen(most)[1]
        if k and sure is not None:
            made = 1
            while made < k and pace.drafts_on(EXIT, float(sure[at + made - 1])):
                made += 1
        return made

    times = []
    for i, right in enumerate(texts):
        sure = None if confidences is None else np.append(confidences[i], np.ones(MAX_SPECULATIONS))
        pace.begin(weighs=sure is not None)
        times.append(time_of(right, costs, chosen, learn))
    return times


def bound_time(right: Array, costs: Array, drafter: Source, segment: int) -> float:
    """By Bayes' rule over the rates there are, and how often they change."""
    rates, weights = np.array(MIXED), np.full(len(MIXED), 1 / len(MIXED))

    def k_at(_: int) -> int:
        tokens = (weights @ rates[:, None] ** LENGTHS).cumsum()
        return int((tokens / costs).argmax())

    def learn(k: int, accepted: int, run: int) -> None:
        known, most = (run, MAX_SPECULATIONS) if drafter == "ngram" else (accepted, k)
        weights[:] *= rates ** min(known, most) * (1 - rates) ** (known < most)
        weights[:] /= weights.sum()
        kept = (1 - 1 / segment) ** (accepted + 1)
        weights[:] = kept * weights + (1 - kept) * (1 - weights) / (len(rates) - 1)

    return time_of(right, costs, k_at, learn)


def fixed_times(texts: Sequence[Array], costs: Array) -> Array:
    """By K, of all texts."""
    return np.sum([[time_of(right, costs, lambda _, k=k: k) for k in LENGTHS] for right in texts], 0)


def all_ways(
    kind: type[Pace], texts: Sequence[Array], rates: Sequence[Array], costs: Array, drafter: Source
) -> list[float]:
    """The time of the second half of the texts: each from nothing, and after the first half; and of an exit that too
    with confidences weighed, and with useless ones.
    """
    half, random = len(texts) // 2, np.random.default_rng(len(texts))
    alone = sum(
        chosen_times(kind, [right], costs, drafter, np.random.default_rng(n))[0] for n, right in enumerate(texts[half:])
    )
    times = [alone, sum(chosen_times(kind, texts, costs, drafter, random)[half:])]
    if drafter == EXIT and kind is Pace:
        sure = [confidences_of(right, of, random) for right, of in zip(texts, rates, strict=True)]
        useless = np.split(random.permutation(np.concatenate(sure)), np.cumsum([len(one) for one in sure])[:-1])
        times += [sum(chosen_times(kind, texts, costs, EXIT, random, one)[half:]) for one in (sure, useless)]
    return times


def mixed(kind: type[Pace], slope: float, drafter: Source, segment: int, texts: int) -> str:
    """The gains on mixed texts."""
    costs, random = 1 + slope * LENGTHS, np.random.default_rng(segment)
    best = {rate: int((np.cumsum(rate**LENGTHS) / costs).argmax()) for rate in MIXED}
    rates = [np.repeat(random.permutation(MIXED * (SEGMENTS // len(MIXED))), segment) for _ in range(2 * texts)]
    rights = [random.random(len(one)) < one for one in rates]
    fixed = fixed_times(rights[texts:], costs)
    knowing = sum(
        time_of(right, costs, lambda at, one=one: best[one[at]])
        for right, one in zip(rights[texts:], rates[texts:], strict=True)
    )
    bound = sum(bound_time(right, costs, drafter, segment) for right in rights[texts:])
    times = (bound, *all_ways(kind, rights, rates, costs, drafter))
    shares = [(fixed.min() - time) / (fixed.min() - knowing) for time in times]
    shown = "  ".join(f"{share:4.0%}" for share in shares)
    return f"{slope:.2f}  {segment:3d} tokens  K = {fixed.argmin():2d}  {fixed.min() / knowing - 1:5.1%}  {shown}"


def uniform(kind: type[Pace], slope: float, drafter: Source, rate: float, tokens: int, texts: int) -> str:
    """The loss on texts of one rate."""
    costs, random = 1 + slope * LENGTHS, np.random.default_rng(tokens)
    rights = [random.random(tokens) < rate for _ in range(2 * texts)]
    fixed = fixed_times(rights[texts:], costs)
    times = all_ways(kind, rights, [np.full(tokens, rate)] * len(rights), costs, drafter)
    shown = "  ".join(f"{time / fixed.min() - 1:+5.1%}" for time in times)
    return f"{slope:.2f}  {tokens:4d} tokens  match {rate:.2f}  K = {fixed.argmin():2d}  {shown}"


def another(kind: type[Pace], slope: float, drafter: Source, before: float, rate: float, texts: int) -> str:
    """The loss on the first text of another rate, of 500 tokens after 8 texts of 1500."""
    costs, random, chosen, fixed = 1 + slope * LENGTHS, np.random.default_rng(8), 0.0, np.zeros(len(LENGTHS))
    for _ in range(texts):
        rights = [*(random.random(1500) < before for _ in range(8)), random.random(500) < rate]
        chosen += chosen_times(kind, rights, costs, drafter, random)[-1]
        fixed += fixed_times(rights[-1:], costs)
    return (
        f"{slope:.2f}  match {before:.2f}, then {rate:.2f}  K = {fixed.argmin():2d}  {chosen / fixed.min() - 1:+5.1%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=12, help="texts of each kind that are measured")
    parser.add_argument("--slopes", type=float, nargs="+", default=list(SLOPES), choices=SLOPES, help="only these")
    parser.add_argument("--ahead", action="store_true", help="choose one round ahead, as on a GPU")
    given = parser.parse_args()
    pace_of = Ahead if given.ahead else Pace
    print(
        "slope, segments, best fixed K, a clairvoyant's gain over it, and shares of that: bound, from nothing, "
        "learned, the same with confidences, with useless ones"
    )
    for one in given.slopes:
        for length in (64, 128, 256):
            print(mixed(pace_of, one, SLOPES[one], length, given.texts), flush=True)
    print("slope, tokens, match of the whole text, best fixed K, and how much slower than it, in the same ways")
    for one in given.slopes:
        for length in TOKENS:
            for match in UNIFORM:
                print(
                    uniform(pace_of, one, SLOPES[one], match, length, given.texts * max(TOKENS) // length), flush=True
                )
    print("slope, match of eight texts and then of another, best fixed K there, and how much slower than it")
    for one in given.slopes:
        for before, after in ((0.1, 0.8), (0.8, 0.5), (0.95, 0.3)):
            print(another(pace_of, one, SLOPES[one], before, after, given.texts), flush=True)
