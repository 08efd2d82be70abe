"""The rounds in which texts would be decoded, as the runtime's loop makes them. No formula in a match rate would do:
drafts are right in runs, and the confidence threshold ends rounds where they tend to be wrong.

The texts are known, and so is what would have drafted them, so no model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.decoding.decode import count_accepted, drafts_that_fit
from edgeskip.runtime.drafting.drafters import Draft, Source
from edgeskip.runtime.drafting.length import Pace, RoundCosts
from edgeskip.runtime.drafting.ngram import NgramIndex

NOTHING = -1
"""Where a text has no drafts, in place of how many of them are right."""


@dataclass(frozen=True)
class ExitDrafts:
    """What an exit would have drafted for the m tokens after a text's first: which of its drafts are right, and its
    probability for each [m].
    """

    right: npt.NDArray[np.bool_]
    confidences: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Drafts:
    """What would have been drafted for the m tokens after a text's first.

    Of exits, by layer. Of the text itself, by n-grams: how many of its drafts are right after the token before each,
    MAX_SPECULATIONS at most, or `NOTHING` [m]. `room` is the number of cache rows after the prompt or, if that is less,
    of new tokens that were asked for.
    """

    exits: Mapping[int, ExitDrafts]
    room: int
    copied: Sequence[int] = ()


@dataclass(frozen=True)
class Rounds:
    """The rounds of decoding some texts: how many had so many drafts of a source, by both, where plain ones have 0 of
    an exit; and how often it was looked what an exit would have drafted for so many tokens, by both. The rest is
    counted as in `Statistics`.

    Where EOS ends a text, its last round may draft beyond that; the statistics leave that out, `by_drafts` does not.
    """

    by_drafts: Mapping[tuple[Source, int], int]
    tokens: int
    drafted: int
    tested: int
    accepted: int
    looks: Mapping[tuple[int, int], int]

    @property
    def count(self) -> int:
        """All rounds."""
        return sum(self.by_drafts.values())

    def share(self, source: Source) -> float:
        """The share of rounds that had drafts of a source."""
        return sum(n for (one, drafts), n in self.by_drafts.items() if one == source and drafts) / self.count


class Costs(Protocol):
    """What rounds take."""

    @property
    def slopes(self) -> Mapping[Source, float]:
        """What may draft, and what a draft is thought to add, as for `RoundCosts`."""

    def round_ms(self, source: Source, drafts: int) -> float:
        """A round with so many drafts of a source, as a session would tell it."""

    def look_ms(self, exit_layer: int, rows: int) -> float:
        """A look at what an exit would have drafted for so many tokens."""


def copied_drafts(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[int]:
    """How many drafts that a text has are right, after each of its new tokens but the last; see `Drafts`."""
    text, found = NgramIndex(prompt_ids), []
    for following, token in enumerate(token_ids[:-1], 1):
        text.add([token])
        rest = list(token_ids[following : following + MAX_SPECULATIONS])
        drafts = text.drafts(MAX_SPECULATIONS)[: len(rest)]
        found.append(count_accepted(drafts, rest) if drafts else NOTHING)
    return found


def simulate(
    texts: Sequence[Drafts],
    exit_layer: int,
    num_speculations: int,
    confidence_threshold: float,
    draft: Draft = "exit",
) -> Rounds:
    """The rounds of up to K drafts of an exit; of the text where that may draft and has any.

    Rounds, tokens, tested and accepted drafts are exact. What the exit drafts after a confident wrong draft is not
    known: there, and beyond a text's end, the text's own confidences and certainty stand in, and only the number of
    drafts made can differ.
    """
    fixed = _Fixed(exit_layer, at_exit=draft != "ngram")
    return _rounds(texts, (exit_layer,), num_speculations, confidence_threshold, draft, fixed)


def simulate_paced(
    texts: Sequence[Drafts], exit_layers: Sequence[int], confidence_threshold: float | None, draft: Draft, costs: Costs
) -> tuple[Rounds, float]:
    """The same where each round has the drafts that promise most for their time, by the runtime's own code: of the only
    exit (`-k auto`), or of one of several (`-e auto`). What choosing takes the host, in ms a round, is measured and
    returned too.

    Args:
        texts: as for `simulate`, one after another.
        exit_layers: the exits that may draft, with ties going to the first.
        confidence_threshold: as there; None has the confidence of each draft weighed.
        draft: what may draft.
        costs: what rounds take.
    """
    paced = _Paced(costs, exit_layers, draft, weighs=confidence_threshold is None)
    rounds = _rounds(texts, exit_layers, MAX_SPECULATIONS, confidence_threshold or 0.0, draft, paced)
    return rounds, 1e3 * median(paced.taken)


class _Choice(Protocol):
    """What drafts each round, and how much."""

    def begin(self) -> None:
        """Another text begins."""

    def chosen(self, most: int, copies: int) -> tuple[Source, int]:
        """The next round's, by the most drafts that have room, and those that the text has."""

    def drafts_on(self, confidence: float) -> bool:
        """Whether it goes on after a draft of an exit that gave it this probability, no less than the threshold."""

    def note(self, made: int, accepted: int, copies: Sequence[bool]) -> None:
        """What became of it: drafts made and accepted, and which of the text's were right."""

    @property
    def looks_at(self) -> int | None:
        """The exit to look at after it, if any."""

    def looked(self, exit_layer: int, right: Sequence[bool], sure: Sequence[bool]) -> None:
        """What it would have drafted, as for `Pace.looked`."""


@dataclass(frozen=True)
class _Fixed:
    """The text's drafts where it has any, else those of an exit, if it may."""

    exit_layer: int
    at_exit: bool

    def begin(self) -> None:
        pass

    def chosen(self, most: int, copies: int) -> tuple[Source, int]:
        return ("ngram", copies) if copies else (self.exit_layer, most if self.at_exit else 0)

    def drafts_on(self, confidence: float) -> bool:
        return True

    def note(self, made: int, accepted: int, copies: Sequence[bool]) -> None:
        pass

    @property
    def looks_at(self) -> None:
        return None

    def looked(self, exit_layer: int, right: Sequence[bool], sure: Sequence[bool]) -> None:
        pass


class _Paced:
    """By a `Pace`; `taken` has the seconds of each choice."""

    def __init__(self, costs: Costs, exit_layers: Sequence[int], draft: Draft, *, weighs: bool) -> None:
        self._weighs = weighs
        self._costs, self._exit_layers, self._draft = costs, exit_layers, draft
        self._pace = Pace(RoundCosts(costs.slopes), lambda: 0.0)  # it is told times, and asks for none
        self._chosen: tuple[Source, int] = (exit_layers[0], 0)
        self.looks_at: int | None = None
        self.taken = [0.0]

    def begin(self) -> None:
        self._pace.begin(weighs=self._weighs)

    def chosen(self, most: int, copies: int) -> tuple[Source, int]:
        limits: dict[Source, int] = dict.fromkeys(self._exit_layers, 0 if self._draft == "ngram" else most)
        start = perf_counter()
        self._chosen = self._pace.chosen(limits if self._draft == "exit" else limits | {"ngram": copies})
        self.looks_at = self._pace.worth_a_look()
        self.taken.append(perf_counter() - start)
        return self._chosen

    def drafts_on(self, confidence: float) -> bool:
        source, start = self._chosen[0], perf_counter()
        goes_on = not self._weighs or source == "ngram" or self._pace.drafts_on(source, confidence)
        self.taken[-1] += perf_counter() - start
        return goes_on

    def note(self, made: int, accepted: int, copies: Sequence[bool]) -> None:
        source, limit = self._chosen
        ms = self._costs.round_ms(source, made)
        start = perf_counter()
        self._pace.note(source, limit, made, accepted, ms)
        if self._draft != "exit":
            self._pace.compare(copies, [True] * (accepted + 1))  # it looks at nothing but which are alike
        self.taken[-1] += perf_counter() - start

    def looked(self, exit_layer: int, right: Sequence[bool], sure: Sequence[bool]) -> None:
        self._pace.looked(exit_layer, right, sure, self._costs.look_ms(exit_layer, len(right)))


def _rounds(
    texts: Sequence[Drafts],
    exit_layers: Sequence[int],
    longest: int,
    confidence_threshold: float,
    draft: Draft,
    choice: _Choice,
) -> Rounds:
    """Rounds whose source and most drafts are chosen."""
    made: Counter[tuple[Source, int]] = Counter()
    looks: Counter[tuple[int, int]] = Counter()
    tokens = drafted = tested = accepted = 0
    for text in texts:
        right = {e: text.exits[e].right.tolist() for e in exit_layers}
        sure = {e: (text.exits[e].confidences >= confidence_threshold).tolist() for e in exit_layers}
        runs = {e: _runs(flags, end=0) for e, flags in right.items()}
        certain = {e: _runs(flags, end=longest) for e, flags in sure.items()}
        confidences = {e: [*text.exits[e].confidences.tolist(), *[1.0] * longest] for e in exit_layers}
        at, left = 0, len(right[exit_layers[0]])
        choice.begin()
        while left:
            most = drafts_that_fit(longest, text.room - at)
            copied = text.copied[at] if draft != "exit" else NOTHING
            copies = most if copied != NOTHING else 0
            source, k = choice.chosen(most, copies)
            if source == "ngram":
                count, good = k, copied
            else:
                count, good = min(certain[source][at] + 1, k), runs[source][at]
                drafts = confidences[source][at : at + count - 1] if count else []
                count = next((n for n, one in enumerate(drafts, 1) if not choice.drafts_on(one)), count)
            made[source if count else exit_layers[0], count] += 1
            good = min(good, count, left) if count else 0
            new = min(good + 1, left)
            choice.note(count, good, [place < copied for place in range(copies)])
            if (seen := choice.looks_at) is not None:
                choice.looked(seen, right[seen][at : at + new], sure[seen][at : at + new])
                looks[seen, new] += 1
            if good == left:  # a stop drops the rest of its round, also from the statistics
                count = left
            tokens, drafted, accepted = tokens + new, drafted + count, accepted + good
            tested += min(good + 1, count)
            at, left = at + new, left - new
    return Rounds(dict(made), tokens, drafted, tested, accepted, dict(looks))


def _runs(flags: Iterable[bool], end: int) -> list[int]:
    """At each place, how many flags are set from there on without a gap; `end` more where nothing stops them."""
    runs = [end]
    for flag in reversed(list(flags)):
        runs.append(runs[-1] + 1 if flag else 0)
    return runs[::-1]
