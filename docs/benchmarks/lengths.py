"""What choosing K for each round gains: the choice itself, on texts that are drawn, with costs that are given.

python docs/benchmarks/lengths.py [--texts 12]

A text says of each token whether a draft there would be right. Mixed texts have segments of match 0.3, 0.6 and 0.95,
in any order. Who is clairvoyant knows the rate of each segment, and the costs; the choice knows neither, and measures
times that scatter by 3%. The best fixed K is that of all texts together, known afterwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.drafting.drafters import Source
from edgeskip.runtime.drafting.length import Pace, RoundCosts

LENGTHS = np.arange(MAX_SPECULATIONS + 1)
MIXED, UNIFORM, SEGMENTS, TOKENS, SCATTER = (0.3, 0.6, 0.95), (0.1, 0.3, 0.5, 0.6, 0.8, 0.95), 12, 1500, 0.03
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


def chosen_time(right: Array, costs: Array, drafter: Source, random: np.random.Generator) -> float:
    """With K chosen as the text comes."""
    pace = Pace(RoundCosts({EXIT: 0.3, "ngram": 0.05}), lambda: 0.0)
    most: dict[Source, int] = {EXIT: 0, drafter: MAX_SPECULATIONS}

    def learn(k: int, accepted: int, run: int) -> None:
        ms = costs[k] * np.exp(SCATTER * random.standard_normal())
        pace.note(drafter if k else EXIT, k, k, accepted, ms)
        if drafter == "ngram":  # what would have been drafted is known after plain rounds too
            pace.compare([1] * MAX_SPECULATIONS, [1] * accepted + [1 if accepted < run else 0])

    return time_of(right, costs, lambda _: pace.chosen(most)[1], learn)


def mixed(slope: float, drafter: Source, segment: int, texts: int) -> str:
    """The gains on mixed texts."""
    costs, fixed, knowing, chosen = 1 + slope * LENGTHS, np.zeros(len(LENGTHS)), 0.0, 0.0
    best = {rate: int((np.cumsum(rate**LENGTHS) / costs).argmax()) for rate in MIXED}
    for seed in range(texts):
        random = np.random.default_rng(seed)
        rates = np.repeat(random.permutation(MIXED * (SEGMENTS // len(MIXED))), segment)
        right = random.random(len(rates)) < rates
        fixed += [time_of(right, costs, lambda _, k=k: k) for k in LENGTHS]
        knowing += time_of(right, costs, lambda at, rates=rates: best[rates[at]])
        chosen += chosen_time(right, costs, drafter, random)
    gain, share = fixed.min() / knowing - 1, (fixed.min() - chosen) / (fixed.min() - knowing)
    return f"{slope:.2f}  {segment:3d} tokens  K = {fixed.argmin():2d}  {gain:5.1%}  {share:4.0%}"


def uniform(slope: float, drafter: Source, rate: float, texts: int) -> str:
    """The loss on texts of one rate."""
    costs, fixed, chosen = 1 + slope * LENGTHS, np.zeros(len(LENGTHS)), 0.0
    for seed in range(texts):
        random = np.random.default_rng(1000 + seed)
        right = random.random(TOKENS) < rate
        fixed += [time_of(right, costs, lambda _, k=k: k) for k in LENGTHS]
        chosen += chosen_time(right, costs, drafter, random)
    return f"{slope:.2f}  match {rate:.2f}  K = {fixed.argmin():2d}  {chosen / fixed.min() - 1:+.1%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=12, help="texts of each kind")
    count = parser.parse_args().texts
    print("slope, segments, best fixed K, what a clairvoyant gains over it, and the share of it that the choice has:")
    for one, who in SLOPES.items():
        for length in (64, 128, 256):
            print(mixed(one, who, length, count), flush=True)
    print("slope, match of the whole text, best fixed K, and how much slower the choice is:")
    for one, who in SLOPES.items():
        for match in UNIFORM:
            print(uniform(one, who, match, count), flush=True)
