"""How many drafts the next round should have, and whose: those that promise the most tokens for its time.

An exit that has not drafted of late is not forgotten: as often as it pays, a round has its drafts all the same, or its
states, which every round computes, are put through the head to see what it would have drafted.

Both are learned while a text comes. How often drafts are right changes with the text, from one line to the next, and
nobody says when. So each rate that they may have has a probability, which each draft that was tested moves; and as the
rate may be another from any token on, all probabilities also drift to how common each rate has been, in this text and
those before. How fast is unknown too: there are three speeds, each as probable as it has foretold the drafts (Bayes).
Where texts have a few rates, some drafts tell which of these it is now; where all have the same one, nothing is lost
by looking for others. A count that decays, as in DEL (arXiv 2504.05598), has one speed, and is either late where a text
changes or restless where it does not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial, wraps
from statistics import median
from typing import Any, Concatenate, ParamSpec

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS, GraphName, Split
from edgeskip.runtime.drafting.drafters import Source

Array = npt.NDArray[Any]

RATES: Array = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985])
"""The rates that drafts may be right at."""

_LENGTHS: Array = np.arange(MAX_SPECULATIONS + 1)
_POWERS: Array = RATES[:, None] ** _LENGTHS
_TOKENS: Array = _POWERS.cumsum(1)
_MADE: Array = _TOKENS - _POWERS

CHANGES = 1 / 20, 1 / 100, 1 / 1000
"""How probable it is that the rate is another after a token, by speed."""

_LEAST_SHARE = 0.003
"""Of each speed, so that a text that has long been steady may still change."""

_BEGUN, _REMEMBERED = 200.0, 10000.0
"""Drafts that all rates together count as common for when nothing was seen, and how many drafts back are remembered:
far more than a text has.
"""

_OTHER, _OTHER_TEXT = 0.05, 0.25
"""How probable it is that a new rate is any, not one that was common: after a change, and where another text begins."""

_UNTESTED = 48
"""After so many tokens without a draft, there is one: else nobody would know that they have become right."""

_NGRAM_SLOPE = 0.05
"""What a draft of the text adds to a round, as a share of one without, until some were measured."""

_STIFFNESS, _TRUSTED = 10.0, 5.0
"""How much that counts beside rounds, and how many rounds of a kind make up half of its cost: chance in a few
measurements turns nothing upside down.
"""

_ENOUGH, _OFTEN = 15, 10
"""How many rounds of a kind count, and after how many rounds costs are computed anew."""

_PLAIN = 2.0
"""Rounds without drafts to know of at least: the line through all kinds would hang by long rounds alone."""

_RECENT, _FADED = 128, 512
"""How many rounds back is not long ago, and after how many more of other kinds those of a kind count half."""

_BIAS, _TRUST, _KEPT = 0.05, 0.3, 0.9995
"""How uncertain it is at first whether an exit thinks too well of its drafts, and how far it can be believed, as
variances; and the share of what was learned that is kept from one draft to the next.
"""

_LEAST, _LEAST_SLOPE = 0.002, 0.02
"""Probabilities that are not told from 0, and the least part of what a draft tells that is told by its being right."""

_HORIZON, _LONG_HORIZON = 3.0, 240.0
"""Tokens for which a look at what an exit would have drafted is worth as much as to know how often it is right, and a
first round of it as much as to know what its rounds take: docs/benchmarks/exits.py measures it.
"""

_HOPE = 0.85
"""What the rounds of an exit may take of what is thought, while none was timed."""

_TRIED, _COMPARED = 4, 4
"""The most drafts of a round that is there to learn, and after how many rounds exits are compared: it takes a while."""

_MARGIN = 1.1
"""How much better another exit must seem to take the place of the one that drafts."""

_LOOK = 0.2
"""What it takes to put an exit's states through the head, as a share of a round without drafts, until it was timed."""


FEW_LENGTHS, FEW_LIMITS = (0, 1, 2, 3, 4, 6, 8, 12, 16), (0, 3, 7, 16)
"""Drafts of a round to choose from on a device that captures each kind of round: so many, or at most so many where the
device ends rounds by itself.
"""


def nearest_length(k: int, lengths: Iterable[int], most: int) -> int:
    """The length that is nearest to K, of those up to `most`; 0 is for K = 0 alone, unless nothing else fits."""
    fitting = (length for length in lengths if length <= most and bool(length) == bool(k))
    return min(fitting, key=lambda length: abs(length - k), default=0)


def slopes_of(splits: Iterable[Split], weights: Mapping[GraphName, int]) -> dict[Source, float]:
    """What a draft adds to a round, as a share of one without, by what drafts, until some were measured: of an exit,
    what it reads of the weights, given in bytes by graph.
    """
    slopes: dict[Source, float] = {}
    for split in splits:
        early = sum(weights[link.graph] for link in split.draft)
        whole = early + sum(weights[link.graph] for link in split.verify) + weights[split.head.graph]
        slopes[split.exit_layer] = (early + weights[split.draft_head.graph]) / whole
    return slopes | {"ngram": _NGRAM_SLOPE}


class Rate:
    """How often something happens, one time after another, where that may change at any token. Learns over all texts
    which rates are common.
    """

    def __init__(self) -> None:
        speeds, rates = len(CHANGES), len(RATES)
        # by rate: how probable it is, at each speed; and of so many times, how often it was the one
        self._known, self._times = np.full((speeds + 1, rates), 1 / speeds / rates), _BEGUN
        self._known[-1] = _BEGUN / rates
        self._told = np.full((speeds + 2, rates), 1 / rates)  # the same after the latest; and each rate alike

    def begin(self) -> None:
        """Another text begins."""
        self._told[:-1] = self._known
        self._drift([0.0] * len(CHANGES), self._known[:-1].sum(1).tolist(), _OTHER_TEXT)

    def note(self, happened: int, failed: int, tokens: int) -> None:
        """Learns of so many times that it happened and failed, over so many tokens."""
        np.multiply(self._known, _likelihoods(happened, failed), self._told[:-1])
        speeds: list[float] = self._told.dot(_EACH_RATE).tolist()[: len(CHANGES)]
        kept, times, total = _kept(tokens), happened + failed, sum(speeds)
        if not times:
            self._drift(kept, [(1 - k) * speed for k, speed in zip(kept, speeds, strict=True)], _OTHER)
            return
        shares = [(1 - _LEAST_SHARE) * speed / total + _LEAST_SHARE / len(CHANGES) for speed in speeds]
        scales = [k * share / speed for k, share, speed in zip(kept, shares, speeds, strict=True)]
        lost = [(1 - k) * share for k, share in zip(kept, shares, strict=True)]
        faded = (1 - 1 / _REMEMBERED) ** times
        self._times = faded * self._times + times
        self._drift(scales, lost, _OTHER, faded, times / total)

    def _drift(
        self, scales: Sequence[float], lost: Sequence[float], other: float, faded: float = 1.0, new: float = 0.0
    ) -> None:
        """What is known next: at each speed, so many times what was told, and what is lost, to rates that are common
        or in part to any. All is linear in what was told, and one product: each step that has an array takes a while.
        """
        common, speeds = (1 - other) / self._times, len(scales)
        product = [[gone * common * new] * speeds + [gone * common * faded, gone * other] for gone in lost]
        for speed, scale in enumerate(scales):
            product[speed][speed] += scale
        self._known = np.array([*product, [new] * speeds + [faded, 0.0]]).dot(self._told)

    @property
    def probabilities(self) -> Array:
        """Those of RATES."""
        found: Array = _EACH_SPEED.dot(self._known)
        return found

    def runs(self, most: int) -> Array:
        """The probabilities that it happens 0, 1, ... `most` times in a row: [most + 1], the first of them 1."""
        found: Array = self.probabilities.dot(_POWERS)[: most + 1]
        return found


_EACH_RATE, _EACH_SPEED = np.ones(len(RATES)), np.array([*[1.0] * len(CHANGES), 0.0])


@lru_cache(1 << 12)
def _likelihoods(happened: int, failed: int) -> Array:
    """Of so many times by rate, at each speed; and a row of ones."""
    found: Array = np.ones((len(CHANGES) + 1, len(RATES)))
    found[:-1] = RATES**happened * (1 - RATES) ** failed
    return found


@lru_cache(1 << 12)
def _kept(tokens: int) -> list[float]:
    """How probable it is that the rate is still the same after so many tokens, by speed."""
    return [(1 - change) ** tokens for change in CHANGES]


class Certainty:
    """How probable it is that a draft is right, by the probability that the exit gave it and by how often its drafts
    are right: the log odds of both, with a weight and a bias that are learned (Platt scaling, by Kalman's filter). At
    first the exit is not believed at all.
    """

    def __init__(self) -> None:
        self._bias = self._trust = 0.0
        self._variances = _BIAS, 0.0, _TRUST  # of the bias, of both, of the trust

    def of(self, confidence: float, rate: float) -> float:
        """The probability."""
        prior = _log_odds(rate)
        return 1 / (1 + math.exp(-self._bias - prior - self._trust * (_log_odds(confidence) - prior)))

    def note(self, confidence: float, rate: float, right: bool) -> None:
        """Learns whether it was."""
        expected, news = self.of(confidence, rate), _log_odds(confidence) - _log_odds(rate)
        slope, (bias, both, trust) = max(expected * (1 - expected), _LEAST_SLOPE), self._variances
        to_bias, to_trust = bias + both * news, both + trust * news
        spread = 1 / slope + to_bias + to_trust * news
        step = (right - expected) / slope / spread
        self._bias, self._trust = self._bias + to_bias * step, self._trust + to_trust * step
        # what no draft tells is never less certain than it was at first
        kept = _KEPT if bias < _BIAS and trust < _TRUST else 1.0
        self._variances = (
            (bias - to_bias * to_bias / spread) / kept,
            (both - to_bias * to_trust / spread) / kept,
            (trust - to_trust * to_trust / spread) / kept,
        )


def _log_odds(probability: float) -> float:
    """Of a probability, and not beyond what drafts could tell; no number is the least."""
    bounded = min(max(_LEAST, probability), 1 - _LEAST)
    return math.log(bounded / (1 - bounded))


class RoundCosts:
    """What rounds take, in ms, by what drafts and how many drafts were made: of each kind, the median of the latest.

    What was measured long ago counts less, as machines change and texts grow. The fewer rounds of a kind there are,
    the more its cost is that on the line through all kinds of what drafts. The first round of a kind is left out, as it
    binds memory and compiles.

    Args:
        slopes: what may draft, and what one of its drafts is thought to add, as a share of a round without.
    """

    def __init__(self, slopes: Mapping[Source, float]) -> None:
        self._slopes = dict(slopes)
        self._seen: set[tuple[Source, int]] = set()
        self._noted = 0
        self._latest: dict[tuple[Source, int], deque[float]] = {}
        self._noted_at: dict[tuple[Source, int], int] = {}
        self._drafted_at: dict[Source, int] = {}
        self._curves: dict[Source, Array] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """What may draft."""
        return tuple(self._slopes)

    def note(self, source: Source, drafts: int, ms: float) -> None:
        """Remembers a round."""
        kind = (source if drafts else self.sources[0], drafts)  # without drafts, all are alike
        if kind in self._seen:
            self._latest.setdefault(kind, deque(maxlen=_ENOUGH)).append(ms)
            self._noted += 1
            self._noted_at[kind] = self._noted
            if drafts:
                self._drafted_at[source] = self._noted
            if self._noted <= _OFTEN or self._noted % _OFTEN == 0:  # it takes a while
                self._curves.clear()
        self._seen.add(kind)

    def of(self, source: Source, drafts: Array) -> Array:
        """The costs [n] of rounds with so many drafts, which may be means; in some unit while none was measured."""
        costs: Array = np.interp(drafts, _LENGTHS, self.curve(source))
        return costs

    def curve(self, source: Source) -> Array:
        """The costs of rounds with 0, 1, ... drafts, in the same unit."""
        if source not in self._curves:
            self._curves[source] = self._curve(source)
        return self._curves[source]

    def of_a_draft(self, source: Source) -> float:
        """What one more adds, in the same unit: on average, as what a single one adds is too little to be measured."""
        curve = self.curve(source)
        return float(curve[-1] - curve[1]) / (len(curve) - 2)

    @property
    def plain_known(self) -> bool:
        """Whether enough is known of rounds without drafts, which are worth one where it is not."""
        plain = (self.sources[0], 0)
        return plain in self._latest and self._counting(plain) >= _PLAIN

    def timed(self, source: Source) -> bool:
        """Whether a recent round had drafts of this source."""
        at = self._drafted_at.get(source)
        return at is not None and at > self._noted - _RECENT

    def _counting(self, kind: tuple[Source, int]) -> float:
        """How many rounds of a kind count."""
        return float(len(self._latest[kind]) * 0.5 ** ((self._noted - self._noted_at[kind]) / _FADED))

    def _curve(self, source: Source) -> Array:
        """The costs of rounds with 0, 1, ... drafts: a line a + b k, by least squares with b near its share of a, drawn
        to what was measured.
        """
        kinds = [kind for kind in self._latest if kind[0] == source or not kind[1]]
        slope = self._slopes[source]
        if not kinds:  # only another source's were
            share = [median(ms) / (1 + self._slopes[who] * drafts) for (who, drafts), ms in self._latest.items()]
            alone: Array = (median(share) if share else 1.0) * (1 + slope * _LENGTHS)
            return alone
        rounds = [(kind[1], self._counting(kind), median(self._latest[kind])) for kind in kinds]
        n, nk, nkk, nc, nkc = _STIFFNESS * slope**2, -_STIFFNESS * slope, _STIFFNESS, 0.0, 0.0
        for k, count, cost in rounds:
            n, nk, nkk = n + count, nk + count * k, nkk + count * k * k
            nc, nkc = nc + count * cost, nkc + count * k * cost
        whole = n * nkk - nk * nk
        a, b = (nkk * nc - nk * nkc) / whole, max((n * nkc - nk * nc) / whole, 0.0)
        curve = [a + b * k for k in range(len(_LENGTHS))]
        for k, count, cost in rounds:
            curve[k] += count / (count + _TRUSTED) * (cost - curve[k])
        bounded: Array = np.array(curve).clip(min(cost for _, _, cost in rounds) / 10)
        return bounded


_P = ParamSpec("_P")


def _learned_later(learn: Callable[Concatenate[Pace, _P], None]) -> Callable[Concatenate[Pace, _P], None]:
    """What is told is kept until the next round is chosen."""

    @wraps(learn)
    def note(self: Pace, /, *told: _P.args, **named: _P.kwargs) -> None:
        self._untold.append(partial(learn, self, *told, **named))

    return note


class Pace:
    """Chooses what drafts the next round, and how much. One text after another may go through it.

    It learns of a round when it chooses the next one, which a device that works by itself need not wait for.

    Args:
        costs: what rounds take.
        clock_ms: what all rounds so far have taken.
    """

    def __init__(self, costs: RoundCosts, clock_ms: Callable[[], float]) -> None:
        self._costs, self.clock_ms = costs, clock_ms
        self._accepted = {source: Rate() for source in costs.sources}  # once more; where no draft was made, it was not
        self._goes_on = {source: Rate() for source in costs.sources}  # drafting, where a lack of confidence ends it
        self._certainty = {source: Certainty() for source in costs.sources}
        self._weighs, self._reached = False, 1.0
        self._confidences: list[float] = []  # of the drafts of the latest round
        self._again: list[float] = []  # how probable it was before that the first one is right, the next one too, ...
        self._ends = False
        self._looks: deque[float] = deque(maxlen=_ENOUGH)
        self._has_looked, self._best = False, 0.0
        self._worths: dict[int, float] = {}  # of knowing more of the exits that do not draft, in tokens
        self._exit: Source | None = None  # the best one when they were last compared
        self._chosen = self._untested = 0
        self._unnoted: dict[Source, int] = dict.fromkeys(costs.sources, 0)  # tokens that came without its drafts
        self._untold: list[Callable[[], None]] = []  # what is yet to be learned

    def begin(self, *, weighs: bool = False) -> None:
        """Another text begins. If it `weighs`, rounds are told to draft on, draft by draft (`drafts_on`)."""
        self._learn()
        self._weighs = weighs
        for rate in (*self._accepted.values(), *self._goes_on.values()):
            rate.begin()
        self._unnoted = dict.fromkeys(self._unnoted, 0)

    def chosen(self, most: Mapping[Source, int]) -> tuple[Source, int]:
        """What should draft, and how many drafts at most: 0 is a plain round.

        Args:
            most: the most drafts that each source could give, with ties going to the first.
        """
        self._learn()
        source, k = self._promising(most)
        self._confidences, self._reached = [], 1.0
        return source, most[source] if k and self._weighs and source != "ngram" else k

    def _learn(self) -> None:
        for news in self._untold:
            news()
        self._untold.clear()

    def _promising(self, most: Mapping[Source, int]) -> tuple[Source, int]:
        """The same, by what is known before the round."""
        exits = [source for source, limit in most.items() if source != "ngram" and limit]
        if len(exits) < 2:
            self._exit = None
        elif self._exit in exits and self._chosen % _COMPARED:
            exits = [self._exit]
            most = {source: limit for source, limit in most.items() if source == self._exit or source == "ngram"}
        self._chosen += 1
        self._worths = {}
        costs, paces = {}, {}
        for source, limit in most.items():
            if self._unnoted[source]:
                self._let_pass(source)
            costs[source] = self._costs_of(source, limit)
            paces[source] = self._tokens(source, limit) / costs[source]
        if len(exits) > 1:
            best_exit: Source = max(
                exits, key=lambda one: float(paces[one][1:].max()) * (_MARGIN if one == self._exit else 1)
            )
            self._exit = best_exit
        lengths = {source: int(pace.argmax()) for source, pace in paces.items()}
        rivals = [source for source in paces if self._exit in (None, source) or source == "ngram"]
        best: Source = max(rivals, key=lambda one: float(paces[one][lengths[one]]))
        k = lengths[best]
        self._best = float(paces[best][k])
        for source in exits if len(exits) > 1 else ():
            if source != best or not k:
                worth, is_timed = self._worth(source, costs[source]), self._costs.timed(source)
                own = 1 + int(paces[source][1 : _TRIED + 1].argmax())
                loss = float((self._best - paces[source][own]) * costs[source][own])
                if loss < worth and (loss < self._look_ms * self._best or not is_timed):
                    return source, own
                self._worths[source] = worth
        if not self._costs.plain_known:
            return best, 0
        if not k and exits and self._untested >= _UNTESTED:
            return exits[0], 1
        return best, k

    def drafts_on(self, exit_layer: int, confidence: float) -> bool:
        """Whether one more draft is worth its time in the round that was chosen last, after one that the exit gave this
        probability.
        """
        if not self._confidences:
            runs = self._accepted[exit_layer].runs(MAX_SPECULATIONS)
            self._again = (runs[1:] / runs[:-1]).tolist()
        made = len(self._confidences)
        self._confidences.append(confidence)
        self._reached *= self._certainty[exit_layer].of(confidence, self._again[made])
        return self._reached * self._again[made + 1] > self._costs.of_a_draft(exit_layer) * self._best

    def _tokens(self, source: Source, limit: int) -> Array:
        """Tokens that rounds limited to 0, 1, ... drafts are expected to have."""
        tokens: Array = self._accepted[source].probabilities.dot(_TOKENS)
        return tokens[: limit + 1]

    def _costs_of(self, source: Source, limit: int) -> Array:
        """What rounds limited to 0, 1, ... drafts are expected to take."""
        if source == "ngram" or not self._ends:
            return self._costs.curve(source)[: limit + 1]
        return self._costs.of(source, self._drafts(source, limit))

    def _drafts(self, source: Source, limit: int) -> Array:
        """Drafts that rounds limited to 0, 1, ... are expected to have, where a lack of confidence ends them."""
        made: Array = self._goes_on[source].probabilities.dot(_MADE)
        return made[: limit + 1]

    def _worth(self, exit_layer: int, costs: Array) -> float:
        """What it is worth, in tokens, to know how often an exit is right and, unless some were timed, what its rounds
        take: what is gained where it turns out to be better than what seems best, for as long as that may hold.
        """
        timed = self._costs.timed(exit_layer)
        tokens = _TOKENS[:, : len(costs)]
        if self._ends:  # where more are right, more are made
            made = np.maximum(self._drafts(exit_layer, len(costs) - 1), tokens - 1)
            costs = self._costs.of(exit_layer, made)
        paces = (tokens / costs).max(1) / (1 if timed else _HOPE)
        gain = self._accepted[exit_layer].probabilities @ np.maximum(paces / self._best - 1, 0)
        return float(gain) * (_HORIZON if timed else _LONG_HORIZON)

    @property
    def _look_ms(self) -> float:
        """What it takes to look what an exit would have drafted."""
        if self._looks:
            return median(self._looks)
        return _LOOK * float(self._costs.curve(self._costs.sources[0])[0])

    @_learned_later
    def note(self, source: Source, limit: int, drafted: int, accepted: int, ms: float) -> None:
        """Learns from a round: so many drafts at most, so many made and accepted, and its time."""
        self._costs.note(source, drafted, ms)
        self._untested = 0 if drafted else self._untested + accepted + 1
        for one in self._unnoted:
            if one != source and one != "ngram":
                self._unnoted[one] += accepted + 1
        if source != "ngram":
            for at, confidence in enumerate(self._confidences[: accepted + 1]):
                self._certainty[source].note(confidence, self._again[at], at < accepted)
            limit = drafted if self._weighs else limit
            self._ends |= drafted < limit
            self._accepted[source].note(accepted, int(accepted < limit), accepted + 1)
            if drafted and self._ends:
                self._goes_on[source].note(drafted - 1, int(drafted < limit), accepted + 1)

    def _let_pass(self, source: Source) -> None:
        """Notes the tokens that came since anything was known of an exit's drafts."""
        self._accepted[source].note(0, 0, self._unnoted[source])
        if self._ends:
            self._goes_on[source].note(0, 0, self._unnoted[source])
        self._unnoted[source] = 0

    @_learned_later
    def compare(self, drafts: Sequence[int], kept: Sequence[int]) -> None:
        """Learns from what the text would have drafted, whether it did or not, and the tokens that came."""
        right = next((i for i, (one, other) in enumerate(zip(drafts, kept, strict=False)) if one != other), None)
        tested = min(len(drafts), len(kept))
        self._accepted["ngram"].note(tested if right is None else right, int(right is not None), len(kept))

    def worth_a_look(self) -> int | None:
        """The exit of which it pays most to see what it would have drafted in the round that was chosen last, where it
        did not draft; None where it pays for none.
        """
        best = max(self._worths, key=lambda one: self._worths[one], default=None)
        return best if best is not None and self._worths[best] > self._look_ms * self._best else None

    @_learned_later
    def looked(self, exit_layer: int, right: Sequence[bool], sure: Sequence[bool], ms: float) -> None:
        """Learns from what an exit would have drafted in place of each of a round's tokens, as if its own rounds had
        brought them.

        Args:
            exit_layer: the exit.
            right: whether it would have been right, for each token.
            sure: whether it would have drafted on.
            ms: what it took to see that.
        """
        if self._has_looked:  # the first one binds memory
            self._looks.append(ms)
        self._has_looked = True
        accepted = failed = went_on = ended = at = 0
        while at < len(right):
            accepted, failed = accepted + right[at], failed + (not right[at] or not sure[at])
            went_on, ended = went_on + sure[at], ended + (not sure[at])
            at += 2 if right[at] and not sure[at] else 1  # the token after the last draft is no draft
        self._ends |= bool(ended)
        self._accepted[exit_layer].note(accepted, failed, 0)
        if self._ends:
            self._goes_on[exit_layer].note(went_on, ended, 0)
