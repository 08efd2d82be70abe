"""The loop: draft, verify, accept, advance.

Position n is the number of rows in the caches; the token at n is known, but its row is not computed yet. A round
computes rows n .. n+K, keeps those of the accepted drafts, and leaves the rest stale: they are hidden by their position
and overwritten by the next round. The last row of the caches is computed by itself in every way of decoding: a session
may need a second row beside a single one, and there it has no room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import HEAD_ROWS, Split
from edgeskip.runtime.bundle.weights import Rows, StoredTensor, TokenRows
from edgeskip.runtime.decoding.rounds import (
    GIVEN,
    Draft,
    Drafter,
    Picks,
    Round,
    draft_round,
    early_exit_round,
    given_round,
    head_round,
    prefill_round,
    speculative_round,
    verification_round,
)
from edgeskip.runtime.decoding.sampling import GREEDY, Picker, TokenLogprob, token_logprob
from edgeskip.runtime.decoding.session import BoundRound, RoundResult, Session
from edgeskip.runtime.drafting.ngram import NgramIndex
from edgeskip.runtime.errors import BackendError, RequestError


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
        confidence_threshold: a draft less probable than this is the last of its round; 0 always drafts K.
        early_exit: decode with the draft subgraph alone (K is then 0).
        picker: how the heads pick tokens; the split's must pick so.
        picks: whether the session picks instead, as `Session.sample` told it, and on what that depends.
        logprobs: how many of the most probable tokens each token is given with; None reads no logits.
        draft: what drafts.
        lookup: the drafts that the text has; unless only the exit drafts.

    Raises:
        RequestError: they do not.
    """

    split: Split
    num_speculations: int = 0
    confidence_threshold: float = 0.0
    early_exit: bool = False
    picker: Picker = GREEDY
    picks: Picks = "heads"
    logprobs: int | None = None
    draft: Draft = "exit"
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        if self.picker.name != self.split.picker:
            found = f"{self.picker.name}, with heads that are {self.split.picker}"
            raise RequestError("picker", found, wanted="the heads' own")


@dataclass(frozen=True)
class Step:
    """The tokens of one round: accepted drafts, then one of the whole model (or of the exit, in early-exit mode).

    `drafted` is the number of drafts that were made, by `drafter`; `logprobs`, if they were asked for, has an entry for
    each token.
    """

    token_ids: tuple[int, ...]
    drafted: int
    logprobs: tuple[TokenLogprob, ...] = ()
    drafter: Drafter = "exit"

    @property
    def accepted(self) -> int:
        """Drafts that verification confirmed."""
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
        BackendError: the model's logits are not finite.
    """
    length = len(embeddings)
    rows, places = _chunks(length, chunk, start)
    rows = max(rows, min(session.prompt_rows(rows, places[-1]), chunk))
    for place in places:
        session.write("inputs_embeds", embeddings[place : place + rows])
        round_ = session.bind(prefill_round(how.split, rows, last=False, early_exit=how.early_exit))
        round_.start(place)
        round_.wait()
    row = length - 1 - places[-1]
    head = _bound(session, how, head_round(how.split, row, 1, early_exit=how.early_exit))
    head.start(places[-1], how.picker.row_inputs(places[-1], row + 1))
    result = head.wait()
    logprobs = _logprobs(session, how, result.target_ids)
    session.carry(0)
    return _step(result, 0, length, logprobs)


def score(session: Session, how: Decoding, embeddings: Rows, chunk: int) -> Iterator[npt.NDArray[Any]]:
    """The logits [V] in fp32 that the whole model gives after each token of a text, [T,H] embedding rows."""
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
            yield from session.read_logits(round_.num_targets) if round_.num_targets else ()
        done = place + rows


def _chunks(length: int, chunk: int, start: int) -> tuple[int, list[int]]:
    """Rows of each chunk of a prompt, and where these begin: none before `start`, and the last one ends with it."""
    rows = min(chunk, length - start)
    return rows, [*range(start, length - rows, rows), length - rows]


def decode(session: Session, how: Decoding, position: int, capacity: int, *, end: int | None = None) -> Iterator[Step]:
    """Rounds after a prefill of `position` rows, until the caches are full. Each is handed to the device before the
    tokens of the one before it are given out, so that what the caller does with them costs no time.

    Args:
        session: the session, prefilled.
        how: how to decode.
        position: n, rows in the caches.
        capacity: C, rows that the caches hold; nothing is written past them.
        end: no round starts here or later, if the caller knows how far it will go.

    Raises:
        BackendError: the model's logits are not finite.
    """
    drafting = _drafting(session, how)
    end = capacity if end is None else min(end, capacity)

    def started() -> _Started | None:
        if position >= end:
            return None
        round_ = drafting(drafts_that_fit(how.num_speculations, capacity - position))
        round_.start(position)
        return round_

    under_way = started()
    while under_way:
        result, drafter = under_way.wait(), under_way.drafter
        accepted = count_accepted(result.draft_ids, result.target_ids)
        kept = result.target_ids[: accepted + 1]
        logprobs = _logprobs(session, how, kept)  # before the next round writes others
        session.carry(accepted)
        if how.lookup is not None:
            how.lookup.text.add(kept)
        position += accepted + 1
        under_way = started()
        yield replace(_step(result, accepted, position, logprobs), drafter=drafter)


def _bound(session: Session, how: Decoding, round_: Round) -> BoundRound:
    return session.bind(replace(round_, picks=how.picks))


def _logprobs(session: Session, how: Decoding, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    if how.logprobs is None:
        return ()
    logits = session.read_logits(len(token_ids))
    return tuple(token_logprob(row, token, how.logprobs) for row, token in zip(logits, token_ids, strict=True))


class _Started(Protocol):
    drafter: Drafter

    def start(self, position: int) -> None: ...

    def wait(self) -> RoundResult: ...


def _drafting(session: Session, how: Decoding) -> Callable[[int], _Started]:
    """The next round, from the most drafts that it may have."""
    lookup = how.lookup
    if lookup is None:
        return _drafting_at_exit(session, how)
    others = _drafting_at_exit(session, how if how.draft == "auto" else replace(how, num_speculations=0))
    given = [_Given(session, how, lookup, k) for k in range(1, how.num_speculations + 1)]

    def drafting(most: int) -> _Started:
        drafts = lookup.text.drafts(most)
        return given[len(drafts) - 1].of(drafts) if drafts else others(most if how.draft == "auto" else 0)

    return drafting


def _drafting_at_exit(session: Session, how: Decoding) -> Callable[[int], _Started]:
    """The rounds to run, by their number of drafts."""
    if how.early_exit:
        step = _Whole(session, how, early_exit_round(how.split))
        return lambda _: step
    if not (how.num_speculations and (how.confidence_threshold or how.picks == "history")):
        whole = [_Whole(session, how, speculative_round(how.split, k)) for k in range(how.num_speculations + 1)]
        return lambda k: whole[k]
    drafts = [_Whole(session, how, draft_round(how.split, row)) for row in range(how.num_speculations)]
    checks = [_Whole(session, how, verification_round(how.split, k)) for k in range(how.num_speculations + 1)]
    confident = [_WhileConfident(session, how, drafts[:k], checks) for k in range(how.num_speculations + 1)]
    return lambda k: confident[k]


class _Whole:
    """A round that a device runs without the host."""

    drafter: Drafter = "exit"

    def __init__(self, session: Session, how: Decoding, round_: Round) -> None:
        self._bound = _bound(session, how, round_)
        self._rows, self._picker = round_.rows, how.picker
        self.wait = self._bound.wait

    def start(self, position: int) -> None:
        """Hands the round to the device."""
        self._bound.start(position, self._picker.row_inputs(position, self._rows))


class _Given:
    """A round whose drafts the text has."""

    drafter: Drafter = "ngram"

    def __init__(self, session: Session, how: Decoding, lookup: Lookup, k: int) -> None:
        round_ = given_round(how.split, k)
        self._session, self._lookup, self._picker, self._rows = session, lookup, how.picker, round_.rows
        self._bound = _bound(session, how, round_)
        self._drafts: Sequence[int] = ()
        self.wait = self._bound.wait

    def of(self, drafts: Sequence[int]) -> _Given:
        """With these drafts."""
        self._drafts = drafts
        return self

    def start(self, position: int) -> None:
        """Writes the rows of the last token and of the drafts, and hands the round to the device."""
        self._session.write(
            "inputs_embeds", TokenRows(self._lookup.embeddings, (self._lookup.text.last, *self._drafts))
        )
        given = {GIVEN: np.array((*self._drafts, 0))}
        self._bound.start(position, {**self._picker.row_inputs(position, self._rows), **given})


class _WhileConfident:
    """A round that the host looks at draft by draft, for picks that depend on the drafts before, or for a threshold: it
    stops drafting after the first draft less probable than that, or the last of these.
    """

    drafter: Drafter = "exit"

    def __init__(self, session: Session, how: Decoding, drafts: Sequence[_Whole], checks: Sequence[_Whole]) -> None:
        self._drafts, self._checks = drafts, checks
        self._session, self._threshold = session, how.confidence_threshold
        self._vocabulary = how.split.draft_head.vocabulary
        self._first, self._left, self._position = checks[0], self._steps(), 0

    def start(self, position: int) -> None:
        """Hands the first step to the device. The host looks at each draft, so others run when somebody waits."""
        self._position, self._left = position, self._steps()
        self._first = next(self._left)
        self._first.start(position)

    def wait(self) -> RoundResult:
        """Runs the rest of the round."""
        result = self._first.wait()
        for step in self._left:
            step.start(self._position)
            result = step.wait()
        return result

    def _steps(self) -> Iterator[_Whole]:
        """The drafts, as long as the exit is sure of them, and the verification."""
        drafted = 0
        for draft in self._drafts:
            yield draft
            drafted += 1
            if drafted < len(self._drafts) and self._confidence(drafted - 1) < self._threshold:
                break
        yield self._checks[drafted]

    def _confidence(self, row: int) -> float:
        return self._session.draft_confidence(row, self._vocabulary) if self._threshold else 1.0


def drafts_that_fit(num_speculations: int, room: int) -> int:
    """Drafts of the next round, K at most, where this many rows of the caches are left: one or more."""
    return max(0, min(num_speculations, room - 2))


def count_accepted(draft_ids: list[int], target_ids: list[int]) -> int:
    """Length of the longest prefix of drafts that equal the targets."""
    for accepted, (draft, target) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if draft != target:
            return accepted
    return len(draft_ids)


def _step(result: RoundResult, accepted: int, position: int, logprobs: tuple[TokenLogprob, ...]) -> Step:
    """What a round gives out; its last token is the one at `position`.

    Logits that are not finite pick a token all the same, usually the first one, and so would all that follow.
    """
    kept = result.target_logits[: accepted + 1]
    if not all(map(math.isfinite, kept)):
        raise BackendError(
            f"the token at position {position}",
            "the model's logits are not finite, so nothing can be picked from them",
            fix="export with --dtype fp32 or bf16, whose numbers reach farther than fp16's, or check the weights",
        )
    return Step(tuple(result.target_ids[: accepted + 1]), len(result.draft_ids), logprobs)
