"""The rounds in which texts would be decoded, as the runtime's loop makes them. No formula in a match rate would do:
drafts are right in runs, and the confidence threshold ends rounds where they tend to be wrong.

The texts are known, and so is what would have drafted them, so no model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.decoding.decode import count_accepted, drafts_that_fit
from edgeskip.runtime.drafting.drafters import Draft, Drafter, Source
from edgeskip.runtime.drafting.length import Pace, RoundCosts
from edgeskip.runtime.drafting.ngram import NgramIndex

_EXIT = 1
"""The layer of the exit, which does not matter here."""

SLOPES: dict[Source, float] = {_EXIT: 0.3, "ngram": 0.05}
"""What a draft is thought to add to a round while none was measured."""

NOTHING = -1
"""Where a text has no drafts, in place of how many of them are right."""


@dataclass(frozen=True)
class Drafts:
    """What would have been drafted for the m tokens after a text's first.

    Of an exit: which of its drafts are right, and its probability for each [m]. Of the text itself, by n-grams: how
    many of its drafts are right after the token before each, MAX_SPECULATIONS at most, or `NOTHING` [m]. `room` is the
    number of cache rows after the prompt or, if that is less, of new tokens that were asked for.
    """

    right: npt.NDArray[np.bool_]
    confidences: npt.NDArray[np.float32]
    room: int
    copied: Sequence[int] = ()


@dataclass(frozen=True)
class Rounds:
    """The rounds of decoding some texts: `by_drafts[d]` of them made d drafts at the exit, 0 in plain steps, and
    `by_ngram[d]` had d drafts of the text, which is empty where those were not asked for. The rest is counted as in
    `Statistics`.

    Where EOS ends a text, its last round may draft beyond that; the statistics leave that out, `by_drafts` and
    `by_ngram` do not.
    """

    by_drafts: tuple[int, ...]
    tokens: int
    drafted: int
    tested: int
    accepted: int
    by_ngram: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """All rounds."""
        return sum(self.by_drafts) + sum(self.by_ngram)


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
    texts: Sequence[Drafts], num_speculations: int, confidence_threshold: float, draft: Draft = "exit"
) -> Rounds:
    """The rounds of up to K drafts; of the text where that may draft and has any.

    Rounds, tokens, tested and accepted drafts are exact. What the exit drafts after a confident wrong draft is not
    known: there, and beyond a text's end, the text's own confidences and certainty stand in, and only the number of
    drafts made can differ.
    """

    def choose(most: int, copies: int) -> tuple[Drafter, int]:
        if copies:
            return "ngram", copies
        return "exit", 0 if draft == "ngram" else most

    return _rounds(texts, num_speculations, confidence_threshold, draft, choose)


def simulate_paced(
    texts: Sequence[Drafts], confidence_threshold: float, draft: Draft, cost_ms: Callable[[Drafter, int], float]
) -> tuple[Rounds, float]:
    """The same where each round has the drafts that promise most for their time (`-k auto`), by the runtime's own code.
    What that takes the host, in ms a round, is measured and returned too.

    Args:
        texts: as for `simulate`, one after another.
        confidence_threshold: as there.
        draft: what may draft.
        cost_ms: what a round takes, by what drafts and how many drafts were made.
    """
    now_ms, taken = 0.0, [0.0]
    pace = Pace(RoundCosts(SLOPES), lambda: now_ms)

    def choose(most: int, copies: int) -> tuple[Drafter, int]:
        start = perf_counter()
        source, k = pace.chosen({_EXIT: 0 if draft == "ngram" else most, "ngram": copies})
        taken.append(perf_counter() - start)
        return "ngram" if source == "ngram" else "exit", k

    def note(chosen: tuple[Drafter, int], made: int, accepted: int, copies: Sequence[bool]) -> None:
        nonlocal now_ms
        now_ms += (ms := cost_ms(chosen[0], made))
        start = perf_counter()
        pace.note("ngram" if chosen[0] == "ngram" else _EXIT, chosen[1], made, accepted, ms)
        if draft != "exit":
            pace.compare(copies, [True] * (accepted + 1))  # it looks at nothing but which are alike
        taken[-1] += perf_counter() - start

    rounds = _rounds(texts, MAX_SPECULATIONS, confidence_threshold, draft, choose, note)
    return rounds, 1e3 * median(taken)


def _rounds(
    texts: Sequence[Drafts],
    longest: int,
    confidence_threshold: float,
    draft: Draft,
    choose: Callable[[int, int], tuple[Drafter, int]],
    note: Callable[[tuple[Drafter, int], int, int, Sequence[bool]], None] = lambda *_: None,
) -> Rounds:
    """Rounds whose drafter and most drafts are chosen by the most drafts that have room, and those that the text has.
    What became of each is noted: the choice, drafts made and accepted, and which of the text's were right.
    """
    made: dict[Drafter, list[int]] = {"exit": [0] * (longest + 1), "ngram": [0] * (longest + 1)}
    tokens = drafted = tested = accepted = 0
    for text in texts:
        left, at = len(text.right), 0
        runs = _runs(text.right, end=0)
        sure = _runs(text.confidences >= confidence_threshold, end=longest)
        while left:
            most = drafts_that_fit(longest, text.room - at)
            copied = text.copied[at] if draft != "exit" else NOTHING
            copies = most if copied != NOTHING else 0
            drafter, k = chosen = choose(most, copies)
            count, right = (k, copied) if drafter == "ngram" else (min(sure[at] + 1, k), runs[at])
            made[drafter if count else "exit"][count] += 1
            good = min(right, count, left) if count else 0
            note(chosen, count, good, [place < copied for place in range(copies)])
            if good == left:  # a stop drops the rest of its round, also from the statistics
                count = left
            new = min(good + 1, left)
            tokens, drafted, accepted = tokens + new, drafted + count, accepted + good
            tested += min(good + 1, count)
            at, left = at + new, left - new
    by_ngram = () if draft == "exit" else tuple(made["ngram"])
    return Rounds(tuple(made["exit"]), tokens, drafted, tested, accepted, by_ngram)


def _runs(flags: npt.NDArray[np.bool_], end: int) -> list[int]:
    """At each place, how many flags are set from there on without a gap; `end` more where nothing stops them."""
    runs = [end]
    for flag in reversed(flags.tolist()):
        runs.append(runs[-1] + 1 if flag else 0)
    return runs[::-1]
