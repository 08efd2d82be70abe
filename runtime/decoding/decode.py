"""The loop: draft, verify, accept, advance.

Position n is the number of rows in the caches; the token at n is known, but its row is not computed yet. A round
computes rows n .. n+K, keeps those of the accepted drafts, and leaves the rest stale: they are hidden by their position
and overwritten by the next round. The last row of the caches is computed by itself in every way of decoding: a session
may need a second row beside a single one, and there it has no room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import HEAD_ROWS, Split
from edgeskip.runtime.bundle.weights import Rows, StoredTensor, TokenRows
from edgeskip.runtime.decoding.rounds import (
    GIVEN,
    Picks,
    Round,
    draft_round,
    early_exit_round,
    ending_round,
    given_round,
    head_round,
    hindsight_round,
    prefill_round,
    speculative_round,
    trusting_round,
    verification_round,
)
from edgeskip.runtime.decoding.sampling import GREEDY, Picker, TokenLogprob, token_logprob
from edgeskip.runtime.decoding.session import BoundRound, RoundResult, Session, softmax_of
from edgeskip.runtime.drafting.drafters import Draft, Drafter, Source
from edgeskip.runtime.drafting.length import FEW_LENGTHS, FEW_LIMITS, Pace, nearest_length
from edgeskip.runtime.drafting.ngram import NgramIndex
from edgeskip.runtime.errors import BackendError, RequestError


class NotFiniteError(BackendError):
    """Logits of a token that is wanted are not finite; the session was cleared."""


@dataclass(frozen=True)
class Lookup:
    """Drafts that the text has, and what makes rows of them.

    Args:
        text: the prompt and the first new token when the loop begins, which adds what follows.
        embeddings: [V,H].
    """

    text: NgramIndex
    embeddings: StoredTensor


@dataclass(frozen=True)
class Decoding:
    """How to decode.

    Args:
        split: which graphs draft and which verify.
        num_speculations: K, the most drafts per round; 0 is plain decoding.
        confidence_threshold: a draft less probable than this is the last of its round; 0 always drafts K. None leaves
            to the pace, draft by draft, whether there is another.
        early_exit: decode with the draft subgraph alone (K is then 0).
        trusts_exit: take the drafts that the exit was sure of untested: all but the last of each round.
        picker: how the heads pick tokens; the split's must pick so.
        picks: whether the session picks instead, as `Session.sample` told it, and on what that depends.
        logprobs: how many of the most probable tokens each token is given with; None reads no logits.
        draft: what drafts.
        lookup: the drafts that the text has; unless only the exit drafts.
        pace: chooses what drafts a round, and how much; else it is K drafts of the text where it has them.
        others: further exits that it may choose.

    Raises:
        RequestError: they do not.
    """

    split: Split
    num_speculations: int = 0
    confidence_threshold: float | None = 0.0
    early_exit: bool = False
    trusts_exit: bool = False
    picker: Picker = GREEDY
    picks: Picks = "heads"
    logprobs: int | None = None
    draft: Draft = "exit"
    lookup: Lookup | None = None
    pace: Pace | None = None
    others: tuple[Split, ...] = ()

    def __post_init__(self) -> None:
        if self.picker.name != self.split.picker:
            found = f"{self.picker.name}, with heads that are {self.split.picker}"
            raise RequestError("picker", found, wanted="the heads' own")


@dataclass(frozen=True)
class Step:
    """The tokens of one round: accepted drafts, then one of the whole model (or of the exit, in early-exit mode).

    `drafted` is the number of drafts that were made and could be of use, by `drafter`, at `exit_layer` if that is an
    exit, and `trusted` that of the first of them, which were taken untested; `logprobs`, if they were asked for, has an
    entry for each token.
    """

    token_ids: tuple[int, ...]
    drafted: int
    logprobs: tuple[TokenLogprob, ...] = ()
    drafter: Drafter = "exit"
    trusted: int = 0
    exit_layer: int | None = None

    @property
    def accepted(self) -> int:
        """Drafts that verification confirmed, or that were trusted."""
        return len(self.token_ids) - 1


def prefill(session: Session, how: Decoding, embeddings: Rows, chunk: int, start: int = 0) -> Step:
    """Runs a prompt, [T,H] embedding rows, through the layers and picks the first new token.

    It runs in full chunks, the last one overlapping backwards so that there are few shapes: its first rows are computed
    again from the same inputs. A prompt shorter than a chunk is one call, of its own length or of what the
    session rounds that up to: rows of whatever the workspace holds then come after its own, and stay as hidden as those
    of drafts that were wrong.

    Args:
        session: the session.
        how: how to decode.
        embeddings: the prompt's, [T,H].
        chunk: the most rows of a call.
        start: rows of the prompt that the caches hold already, less than T: only the rest runs.

    Raises:
        NotFiniteError: the model's logits are not finite, or something in the caches was not.
    """
    length = len(embeddings)
    rows, places = _chunks(length, chunk, start)
    best = session.prompt_rows(rows, places[-1])
    rows = best if best <= chunk else rows
    chunk_round = session.bind(prefill_round(how.split, rows, last=False, early_exit=how.early_exit))
    for place in places:
        session.write("inputs_embeds", embeddings[place : place + rows])
        chunk_round.start(place)
        if place < places[-1]:
            chunk_round.wait()
    row = length - 1 - places[-1]
    head = _bound(session, how, head_round(how.split, row, 1, early_exit=how.early_exit))
    head.start(places[-1], how.picker.row_inputs(places[-1], row + 1))  # the same positions as the last chunk's
    chunk_round.wait()
    result = head.wait()
    _check_finite(session, result.target_logits, length)
    logprobs = _logprobs(session, how, result.target_ids)
    session.carry(0)
    return Step(tuple(result.target_ids), 0, logprobs)


def score(session: Session, how: Decoding, embeddings: Rows, chunk: int) -> Iterator[npt.NDArray[Any]]:
    """The logits [V] in fp32 that the whole model gives after each token of a text, [T,H] embedding rows.

    Raises:
        NotFiniteError: the model's logits are not finite, or something in the caches was not.
    """
    length, done = len(embeddings), 0
    rows, places = _chunks(length, chunk, 0)
    for place in places:
        session.write("inputs_embeds", embeddings[place : place + rows])
        rounds = [prefill_round(how.split, rows, last=False, early_exit=False)]
        for row in range(done - place, rows, HEAD_ROWS):  # the last chunk begins with rows that are done
            rounds.append(head_round(how.split, row, min(HEAD_ROWS, rows - row), early_exit=False))
        for round_ in rounds:
            bound = session.bind(round_)
            bound.start(place, how.picker.row_inputs(place, round_.rows))
            bound.wait()
            if round_.num_targets:
                logits = session.read_logits(round_.num_targets)
                _check_finite(session, np.abs(logits).max(1), place + round_.rows)
                yield from logits
        done = place + rows


def _chunks(length: int, chunk: int, start: int) -> tuple[int, list[int]]:
    """Rows of each chunk of a prompt, and where these begin: none before `start`, and the last one ends with it."""
    rows = min(chunk, length - start)
    return rows, [*range(start, length - rows, rows), length - rows]


def decode(session: Session, how: Decoding, position: int, capacity: int, *, end: int | None = None) -> Iterator[Step]:
    """Rounds after a prefill of `position` rows, until the caches are full. Each is handed to the device before the
    tokens of the one before it are given out, so that neither what the caller does with them nor the choice of the next
    round costs time.

    Args:
        session: the session, prefilled.
        how: how to decode.
        position: n, rows in the caches.
        capacity: C, rows that the caches hold; nothing is written past them.
        end: the position of the last token that is wanted, if the caller knows it. No round starts there or later. The
            last one drafts no more than is of use, or, where such a round would have to be captured first, its rest is
            left out of its step; trusted drafts may go beyond.

    Raises:
        NotFiniteError: the model's logits are not finite, or something in the caches was not.
    """
    rounds = _Rounds(session, how)
    end = capacity if end is None else min(end, capacity)

    def started() -> _Started | None:
        wanted = end - position
        if wanted <= 0:
            return None
        room = capacity - position
        if not session.is_asynchronous:  # the last draft is never trusted, so what is wanted comes before it
            room = min(room, wanted + (3 if how.trusts_exit else 1))
        round_ = rounds.next(drafts_that_fit(how.num_speculations, room))
        round_.start(position)
        return round_

    under_way = started()
    while under_way:
        result, source = under_way.wait(), rounds.source
        trusted, drafted = _trusted(result), len(result.draft_ids)
        accepted = count_accepted(result.draft_ids[trusted:], result.target_ids)
        kept = [*result.draft_ids[:trusted], *result.target_ids[: accepted + 1]]
        _check_finite(session, result.target_logits[: accepted + 1], position + len(kept))
        logprobs = _logprobs(session, how, kept, trusted, result.first_target)  # before the next round writes others
        session.carry(result.first_target + accepted)
        rounds.note(position, drafted, kept)
        wanted = capacity if how.trusts_exit else end - position
        position += len(kept)
        under_way = started()
        rounds.catch_up()
        step = Step(tuple(kept[:wanted]), min(drafted, wanted - 1), logprobs[:wanted], trusted=trusted)
        yield replace(step, drafter="ngram") if source == "ngram" else replace(step, exit_layer=source)


def _bound(session: Session, how: Decoding, round_: Round) -> BoundRound:
    return session.bind(replace(round_, picks=how.picks))


def _logprobs(
    session: Session, how: Decoding, token_ids: Sequence[int], trusted: int = 0, first_target: int = 0
) -> tuple[TokenLogprob, ...]:
    """By the logits that each token was picked from: those of the exit for the trusted ones, which come first."""
    if how.logprobs is None:
        return ()
    at_exit = session.read_draft_logits(trusted) if trusted else ()
    logits = (*at_exit, *session.read_logits(first_target + len(token_ids) - trusted)[first_target:])
    return tuple(token_logprob(row, token, how.logprobs) for row, token in zip(logits, token_ids, strict=True))


class _Started(Protocol):
    def start(self, position: int) -> None: ...

    def wait(self) -> RoundResult: ...


@dataclass(frozen=True)
class _Choice:
    """What drafts a round, how many drafts at most, and the exit to look at after it, if any."""

    source: Source
    num_drafts: int
    looks_at: int | None = None


class _Rounds:
    """Chooses the rounds to run, and binds each when it is first wanted.

    A device that works by itself is never kept waiting for a choice: while it runs a round, the next one is chosen, by
    all that was known before. Elsewhere a round is chosen when it is wanted, by the one before it too.
    """

    def __init__(self, session: Session, how: Decoding) -> None:
        self._session, self._how = session, how
        self._splits = splits = {split.exit_layer: split for split in (how.split, *how.others)}
        self._at_exit = cache(partial(_at_exit, session, how, splits, *_steps_of_rounds(session, how, splits)))
        self._given = cache(partial(_given, session, how))
        by_heads = replace(how, picks="heads") if how.picks == "history" else how  # a host picks after it
        self._looks = cache(
            lambda exit_layer, rows: _Whole(session, by_heads, hindsight_round(splits[exit_layer], rows))
        )
        self._ends = _ends_rounds(session, how)
        self._drafts: list[int] = []
        self._begun_ms = 0.0
        self._choice = _Choice(how.split.exit_layer, 0)
        self._ahead = self._choice, self._choice  # where the text has no drafts, and where it has
        if how.pace is not None:
            how.pace.begin(weighs=how.confidence_threshold is None)
            self.catch_up()

    @property
    def source(self) -> Source:
        """What drafts in the round that was chosen last."""
        return self._choice.source

    def next(self, most: int) -> _Started:
        """The next round, of so many drafts at most."""
        how, lookup = self._how, self._how.lookup
        self._drafts = lookup.text.drafts(most) if lookup else []
        if how.pace is None:
            source: Source = "ngram" if self._drafts else how.split.exit_layer
            k = len(self._drafts) or (0 if how.draft == "ngram" else most)
            self._choice = _Choice(source, self._length(source, k, k))
        elif self._session.is_asynchronous:
            choice = self._ahead[bool(self._drafts)]
            there = len(self._drafts) if choice.source == "ngram" else most
            fits = choice.num_drafts <= there
            self._choice = choice if fits else replace(choice, num_drafts=self._length(choice.source, there, there))
        else:
            self._choice = self._chosen(how.pace, most, len(self._drafts))
        if how.pace is not None:
            self._begun_ms = how.pace.clock_ms()
        drafts = self._choice.num_drafts
        if self.source == "ngram":
            assert lookup is not None
            return self._given(drafts).of((lookup.text.last, *self._drafts[:drafts]))
        return self._at_exit(self.source, drafts)

    def note(self, position: int, drafted: int, kept: Sequence[int]) -> None:
        """What has become of it: its first position, the drafts that it made, and the tokens that came."""
        pace, lookup = self._how.pace, self._how.lookup
        if pace is not None:
            source, k, ms = self.source, self._choice.num_drafts, pace.clock_ms() - self._begun_ms
            pace.note(source, k, drafted, len(kept) - 1, ms)
            if lookup is not None:
                pace.compare(self._drafts, kept)
            if self._choice.looks_at is not None:
                pace.looked(*self._look(pace, self._choice.looks_at, position, kept))
        if lookup is not None:
            lookup.text.add(kept)

    def catch_up(self) -> None:
        """While a device runs a round: learns of those before it, and chooses the next one."""
        pace, most = self._how.pace, self._how.num_speculations
        if pace is None or not self._session.is_asynchronous:
            return
        choice = self._chosen(pace, most, most if self._how.lookup else 0)
        self._ahead = (self._chosen(pace, most, 0) if choice.source == "ngram" else choice), choice

    def _chosen(self, pace: Pace, most: int, copies: int) -> _Choice:
        """What promises most, of so many drafts of an exit and of the text."""
        limits: dict[Source, int] = dict.fromkeys(self._splits, 0 if self._how.draft == "ngram" else most)
        source, k = pace.chosen(limits | {"ngram": copies} if self._how.lookup else limits)
        return _Choice(source, self._length(source, k, most), pace.worth_a_look())

    def _length(self, source: Source, k: int, most: int) -> int:
        """The drafts of a round for which K were chosen, of so many at most."""
        if not self._session.is_asynchronous:
            return k
        few = FEW_LIMITS if self._ends and source != "ngram" else FEW_LENGTHS
        return nearest_length(k, (*few, self._how.num_speculations), most)

    def _look(
        self, pace: Pace, exit_layer: int, position: int, kept: Sequence[int]
    ) -> tuple[int, list[bool], list[bool], float]:
        """What an exit that did not draft would have drafted in place of these tokens, for `Pace.looked`."""
        how, session = self._how, self._session
        vocabulary, threshold = self._splits[exit_layer].draft_head.vocabulary, how.confidence_threshold or 0.0
        begun_ms, rows = pace.clock_ms(), len(kept)
        looked_at = next(k + 1 for k in FEW_LIMITS if k >= rows - 1) if session.is_asynchronous else rows
        look = self._looks(exit_layer, looked_at)
        look.start(position)
        begun = perf_counter()  # to bind and capture is done once
        drafts, sure = look.wait().draft_ids, [True] * rows
        if how.picks == "history":
            picked = [*session.picks_again(rows, vocabulary, position + 1)]
            drafts, sure = [token for token, _ in picked], [probability >= threshold for _, probability in picked]
        elif threshold:
            logits = session.read_draft_logits(rows)[:, :vocabulary]
            sure = [softmax_of(row, float(row[token])) >= threshold for row, token in zip(logits, drafts, strict=False)]
        right = [draft == token for draft, token in zip(drafts, kept, strict=False)]
        ms = max(pace.clock_ms() - begun_ms, 1e3 * (perf_counter() - begun))  # the host's part counts too
        return exit_layer, right, sure, ms


_Steps = Callable[[int, int], "_Whole"]
"""A step of rounds that the host looks at, by the exit and its number; lengths have them in common."""


def _steps_of_rounds(session: Session, how: Decoding, splits: Mapping[int, Split]) -> tuple[_Steps, _Steps]:
    """The drafts, by their rows, and the checks, by how many drafts they have; each is bound when it is wanted."""
    checking = trusting_round if how.trusts_exit else verification_round
    drafts = cache(lambda exit_layer, row: _Whole(session, how, draft_round(splits[exit_layer], row)))
    return drafts, cache(lambda exit_layer, k: _Whole(session, how, checking(splits[exit_layer], k)))


def _ends_rounds(session: Session, how: Decoding) -> bool:
    """Whether the device ends rounds by itself."""
    threshold = how.confidence_threshold or 0.0
    return how.picks != "history" and threshold > 0 and session.ends_below(threshold)


def _at_exit(
    session: Session,
    how: Decoding,
    splits: Mapping[int, Split],
    drafts: _Steps,
    checks: _Steps,
    exit_layer: int,
    k: int,
) -> _Started:
    """A round of at most so many drafts of an exit."""
    split = splits[exit_layer]
    if how.early_exit:
        return _Whole(session, how, early_exit_round(split))
    if not (k and (how.confidence_threshold != 0 or how.picks == "history")):
        return _Whole(session, how, speculative_round(split, k))
    if _ends_rounds(session, how):
        return (_Trusting if how.trusts_exit else _Whole)(session, how, ending_round(split, k))
    return _WhileConfident(session, how, split, k, partial(drafts, exit_layer), partial(checks, exit_layer))


def _given(session: Session, how: Decoding, k: int) -> _Given:
    """A round of so many drafts that the text has."""
    assert how.lookup is not None
    return _Given(session, how, how.lookup.embeddings, given_round(how.split, k))


class _Whole:
    """A round that a device runs without the host."""

    def __init__(self, session: Session, how: Decoding, round_: Round) -> None:
        self._bound = _bound(session, how, round_)
        self._rows, self._picker = round_.rows, how.picker

    def start(self, position: int) -> None:
        """Hands the round to the device."""
        self._bound.start(position, self._picker.row_inputs(position, self._rows))

    def wait(self) -> RoundResult:
        """Waits for it."""
        return self._bound.wait()


class _Trusting(_Whole):
    """A round that the device ends, of whose drafts only the last one is compared with the whole model's token."""

    def __init__(self, session: Session, how: Decoding, round_: Round) -> None:
        super().__init__(session, how, round_)
        self._ends = partial(_ends_rounds, session, how)

    def wait(self) -> RoundResult:
        """Waits for it, and leaves out what is not compared; all is, if the device did not end it after all."""
        result = super().wait()
        trusted = max(len(result.draft_ids) - 1, 0) if self._ends() else 0
        targets, logits = result.target_ids[trusted:], result.target_logits[trusted:]
        return RoundResult(result.draft_ids, targets, logits, first_target=trusted)


class _Given:
    """A round whose drafts the text has."""

    def __init__(self, session: Session, how: Decoding, embeddings: StoredTensor, round_: Round) -> None:
        self._session, self._picker, self._embeddings = session, how.picker, embeddings
        self._bound = _bound(session, how, round_)
        self._tokens: Sequence[int] = ()
        self.wait = self._bound.wait

    def of(self, tokens: Sequence[int]) -> _Given:
        """With these tokens: the last one of the text, and the drafts."""
        self._tokens = tokens
        return self

    def start(self, position: int) -> None:
        """Writes the rows of its tokens, and hands the round to the device."""
        self._session.write("inputs_embeds", TokenRows(self._embeddings, self._tokens))
        told = self._picker.row_inputs(position, len(self._tokens))
        self._bound.start(position, {**told, GIVEN: np.array((*self._tokens[1:], 0))})


class _WhileConfident:
    """A round that the host looks at draft by draft, for picks that depend on the drafts before, or for how probable
    they are: it stops drafting after the first draft less probable than a threshold, or where the pace says that
    another one is not worth its time; or after the last of these.
    """

    def __init__(
        self,
        session: Session,
        how: Decoding,
        split: Split,
        k: int,
        draft: Callable[[int], _Whole],
        check: Callable[[int], _Whole],
    ) -> None:
        self._session, self._k, self._draft, self._check = session, k, draft, check
        self._threshold, self._vocabulary = how.confidence_threshold, split.draft_head.vocabulary
        self._pace, self._exit_layer = how.pace, split.exit_layer
        self._first, self._position = draft(0), 0

    def start(self, position: int) -> None:
        """Hands the first draft to the device. The host looks at each, so all else runs when somebody waits."""
        self._position = position
        self._first.start(position)

    def wait(self) -> RoundResult:
        """Runs the rest of the round: drafts, as long as the exit is sure of them, and the verification."""
        self._first.wait()
        drafted = 1
        while drafted < self._k and self._is_sure(drafted - 1):
            self._run(self._draft(drafted))
            drafted += 1
        return self._run(self._check(drafted))

    def _run(self, step: _Whole) -> RoundResult:
        step.start(self._position)
        return step.wait()

    def _is_sure(self, row: int) -> bool:
        if self._threshold == 0:
            return True
        confidence = self._session.draft_confidence(row, self._vocabulary)
        if self._threshold is None:
            assert self._pace is not None
            return self._pace.drafts_on(self._exit_layer, confidence)
        return confidence >= self._threshold


def drafts_that_fit(num_speculations: int, room: int) -> int:
    """Drafts of the next round, K at most, where this many rows of the caches are left: one or more."""
    return max(0, min(num_speculations, room - 2))


def count_accepted(draft_ids: list[int], target_ids: list[int]) -> int:
    """Length of the longest prefix of drafts that equal the targets."""
    for accepted, (draft, target) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if draft != target:
            return accepted
    return len(draft_ids)


def _trusted(result: RoundResult) -> int:
    """The first drafts of a round, which have no target."""
    return len(result.draft_ids) + 1 - len(result.target_ids)


def _check_finite(session: Session, logits: Iterable[float], position: int) -> None:
    """Ends a text whose logits are not finite, the last of them for the token at `position`. They pick a token all the
    same, usually the first one, and so would all that follow, in this text and in others.
    """
    if not all(map(math.isfinite, logits)):
        session.clear()
        raise NotFiniteError(
            f"the token at position {position}",
            "the model's logits are not finite, so nothing can be picked from them",
            fix="export with --dtype fp32 or bf16, whose numbers reach farther than fp16's, or check the weights",
        )
