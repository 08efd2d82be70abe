"""How many drafts the next round should have, and whose: those that promise the most tokens for its time.

Both are learned while a text comes. How often drafts are right changes with the text, from one line to the next, and
nobody says when. So each rate that they may have has a probability, which each draft that was tested moves; and as the
rate may be another from any token on, all probabilities also drift back to where they began. How fast is unknown too:
there are three speeds, each as probable as it has foretold the drafts (Bayes). A count that decays, as in DEL
(arXiv 2504.05598), has one speed, and is either late where a text changes or restless where it does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.drafting.drafters import DRAFTERS, Drafter

Array = npt.NDArray[Any]

RATES: Array = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985])
"""The rates that drafts may be right at."""

_LENGTHS: Array = np.arange(MAX_SPECULATIONS + 1)
_POWERS: Array = RATES[:, None] ** _LENGTHS

CHANGES: Array = np.array([[1 / 20], [1 / 100], [1 / 1000]])
"""How probable it is that the rate is another after a token, by speed."""

_LEAST_SHARE = 0.01
"""Of each speed, so that a text that has long been steady may still change."""

_SLOPES: Mapping[Drafter, float] = {"exit": 0.3, "ngram": 0.05}
"""What a draft adds to a round, as a share of one without, until some were measured."""

_STIFFNESS, _TRUSTED = 10.0, 5.0
"""How much that counts beside rounds, and how many rounds of a kind make up half of its cost: chance in a few
measurements turns nothing upside down.
"""

_KEPT, _ENOUGH, _OFTEN = 128, 15, 10
"""Rounds that are remembered, how many of a kind count, and after how many costs are computed anew."""


class Rate:
    """How often something happens, one time after another, where that may change at any token."""

    def __init__(self) -> None:
        self._prior = np.full(len(RATES), 1 / len(RATES))
        self._weights = np.ones((len(CHANGES), 1)) * self._prior / len(CHANGES)

    def note(self, happened: int, failed: int, tokens: int) -> None:
        """Learns of so many times that it happened and failed, over so many tokens."""
        weights = self._weights * RATES**happened * (1 - RATES) ** failed
        weights /= weights.sum()
        speeds = weights.sum(1, keepdims=True)
        weights *= (1 - _LEAST_SHARE) + _LEAST_SHARE / len(CHANGES) / speeds
        kept = (1 - CHANGES) ** tokens
        self._weights = kept * weights + (1 - kept) * weights.sum(1, keepdims=True) * self._prior

    def runs(self, most: int) -> Array:
        """The probabilities that it happens 0, 1, ... `most` times in a row: [most + 1], the first of them 1."""
        found: Array = self._weights.sum(0) @ _POWERS[:, : most + 1]
        return found


class RoundCosts:
    """What rounds take, in ms, by what drafts and how many drafts were made: of each kind, the median of the latest.

    What was measured long ago does not count, as machines change and texts grow. The fewer rounds of a kind there are,
    the more its cost is that on the line through all kinds of a drafter. The first round of a kind is left out, as it
    binds memory and compiles.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[Drafter, int]] = set()
        self._noted = 0
        self._latest: deque[tuple[Drafter, int, float]] = deque(maxlen=_KEPT)
        self._curves = {drafter: 1 + slope * _LENGTHS for drafter, slope in _SLOPES.items()}

    def note(self, drafter: Drafter, drafts: int, ms: float) -> None:
        """Remembers a round."""
        kind = (drafter if drafts else DRAFTERS[0], drafts)  # without drafts, all are alike
        if kind in self._seen:
            self._latest.append((*kind, ms))
            self._noted += 1
            if self._noted <= _OFTEN or self._noted % _OFTEN == 0:  # it takes a while
                self._curves = {drafter: self._curve(drafter) for drafter in DRAFTERS}
        self._seen.add(kind)

    def of(self, drafter: Drafter, drafts: Array) -> Array:
        """The costs [n] of rounds with so many drafts, which may be means; in some unit while none was measured."""
        costs: Array = np.interp(drafts, _LENGTHS, self._curves[drafter])
        return costs

    def _curve(self, drafter: Drafter) -> Array:
        """The costs of rounds with 0, 1, ... drafts: a line a + b k, by least squares with b near its share of a, drawn
        to what was measured.
        """
        by_length: dict[int, list[float]] = {}
        for who, drafts, ms in self._latest:
            if who == drafter or not drafts:
                by_length.setdefault(drafts, []).append(ms)
        slope = _SLOPES[drafter]
        if not by_length:  # only another drafter's were
            share = [ms / (1 + _SLOPES[who] * drafts) for who, drafts, ms in self._latest]
            alone: Array = median(share) * (1 + slope * _LENGTHS)
            return alone
        k, n = np.array(list(by_length)), np.array([min(len(ms), _ENOUGH) for ms in by_length.values()])
        cost = np.array([median(ms[-_ENOUGH:]) for ms in by_length.values()])
        cross = n @ k - _STIFFNESS * slope
        sums = np.array([[n.sum() + _STIFFNESS * slope**2, cross], [cross, n @ k**2 + _STIFFNESS]])
        a, b = np.linalg.solve(sums, np.array([n @ cost, n @ (k * cost)]))
        curve = a + max(b, 0.0) * _LENGTHS
        curve[k] += n / (n + _TRUSTED) * (cost - curve[k])
        bounded: Array = np.maximum(curve, cost.min() / 10)
        return bounded


class Pace:
    """Chooses what drafts the next round, and how much. One text after another may go through it.

    Args:
        costs: what rounds take.
        clock_ms: what all rounds so far have taken.
    """

    def __init__(self, costs: RoundCosts, clock_ms: Callable[[], float]) -> None:
        self._costs, self.clock_ms = costs, clock_ms
        self._accepted = {drafter: Rate() for drafter in DRAFTERS}  # once more; where no draft was made, it was not
        self._goes_on = Rate()  # drafting at the exit after a draft, where a lack of confidence ends it
        self._ends = False

    def chosen(self, most: Mapping[Drafter, int]) -> tuple[Drafter, int]:
        """What should draft, and how many drafts at most: 0 is a plain round.

        Args:
            most: the most drafts that each drafter could give, with ties going to the first.
        """
        best: tuple[float, Drafter, int] = (0.0, DRAFTERS[0], 0)
        for drafter, limit in most.items():
            tokens, drafts = self._expected(drafter, limit)
            pace = tokens / self._costs.of(drafter, drafts)
            k = int(pace.argmax())
            best = max(best, (float(pace[k]), drafter, k), key=lambda one: one[0])
        return best[1:]

    def _expected(self, drafter: Drafter, limit: int) -> tuple[Array, Array]:
        """Tokens and drafts that rounds limited to 0, 1, ... drafts are expected to have."""
        accepted = self._accepted[drafter].runs(limit)
        made = np.ones(limit + 1)
        if drafter == "exit" and self._ends:
            made[1:] = self._goes_on.runs(limit)[:-1]
        drafts = np.concatenate([[0.0], made[1:].cumsum()])
        return accepted.cumsum(), drafts

    def note(self, drafter: Drafter, limit: int, drafted: int, accepted: int, ms: float) -> None:
        """Learns from a round: so many drafts at most, so many made and accepted, and its time."""
        self._costs.note(drafter, drafted, ms)
        if drafter == "exit":
            self._ends |= drafted < limit
            self._accepted[drafter].note(accepted, int(accepted < limit), accepted + 1)
            if drafted:
                self._goes_on.note(drafted - 1, int(drafted < limit), accepted + 1)

    def compare(self, drafts: Sequence[int], kept: Sequence[int]) -> None:
        """Learns from what the text would have drafted, whether it did or not, and the tokens that came."""
        right = next((i for i, (one, other) in enumerate(zip(drafts, kept, strict=False)) if one != other), None)
        tested = min(len(drafts), len(kept))
        self._accepted["ngram"].note(tested if right is None else right, int(right is not None), len(kept))
