"""The loop: draft, verify, accept, advance.

Position n is the number of rows in the caches; the token that stands at n is known, its row is not yet computed.
A round computes rows n .. n+K, keeps those of the accepted drafts, and leaves the rest stale: they are hidden by
position and overwritten by the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt

from edgeskip.runtime.decoding.rounds import (
    draft_round,
    early_exit_round,
    prefill_round,
    speculative_round,
    verification_round,
)
from edgeskip.runtime.decoding.session import RoundResult, Session


@dataclass(frozen=True)
class Step:
    """The tokens of one round: accepted drafts, then one of the whole model (or of the exit, in early-exit mode).

    `drafted` is the number of drafts that were made.
    """

    token_ids: tuple[int, ...]
    drafted: int

    @property
    def accepted(self) -> int:
        """Drafts that the verification confirmed."""
        return len(self.token_ids) - 1


def prefill(session: Session, embeddings: npt.NDArray[Any], chunk: int, *, early_exit: bool = False) -> Step:
    """Runs a prompt, [T,H] embedding rows, through the layers and picks the first new token.

    Full chunks, the last one overlapping backwards so that shapes stay few: its first rows are computed again,
    from the same inputs. A prompt shorter than a chunk is one call of its own length.
    """
    length = len(embeddings)
    rows = min(chunk, length)
    starts = [*range(0, length - rows, rows), length - rows]
    for start in starts:
        session.write_embeddings(embeddings[start : start + rows])
        result = session.bind(prefill_round(rows, last=start == starts[-1], early_exit=early_exit))(start)()
    session.carry(0)
    return Step(tuple(result.target_ids), 0)


def decode(
    session: Session,
    position: int,
    capacity: int,
    num_speculations: int,
    *,
    end: int | None = None,
    confidence_threshold: float = 0.0,
    early_exit: bool = False,
) -> Iterator[Step]:
    """Rounds after a prefill of `position` rows, until the caches are full. Each is handed to the device before the
    tokens of the one before it are given out, so that what the caller does with them costs no time.

    Args:
        session: prefilled.
        position: n, rows in the caches.
        capacity: C, rows that the caches hold; nothing is written past them.
        num_speculations: K, drafts a round at most; 0 is plain decoding.
        end: no round starts here or behind it, where the caller knows how far it will go.
        confidence_threshold: a draft less probable than this is the last of its round; 0 always drafts K.
        early_exit: decode with the draft subgraph alone (K is then 0).
    """
    start = _drafting(session, num_speculations, confidence_threshold, early_exit)
    end = capacity if end is None else min(end, capacity)
    under_way = start(position, min(num_speculations, capacity - position - 1)) if position < end else None
    while under_way:
        result = under_way()
        accepted = count_accepted(result.draft_ids, result.target_ids)
        session.carry(accepted)
        position += accepted + 1
        under_way = start(position, min(num_speculations, capacity - position - 1)) if position < end else None
        yield Step(tuple(result.target_ids[: accepted + 1]), len(result.draft_ids))


def _drafting(
    session: Session, num_speculations: int, threshold: float, early_exit: bool
) -> Callable[[int, int], Callable[[], RoundResult]]:
    """How a round starts: (position, K of this round) -> what waits for its result."""
    if early_exit:
        step = session.bind(early_exit_round())
        return lambda position, _: step(position)
    if not (num_speculations and threshold):
        whole = [session.bind(speculative_round(k)) for k in range(num_speculations + 1)]
        return lambda position, k: whole[k](position)
    drafts = [session.bind(draft_round(row)) for row in range(num_speculations)]
    checks = [session.bind(verification_round(k)) for k in range(num_speculations + 1)]

    def while_confident(position: int, k: int) -> RoundResult:
        """Ends drafting behind the first draft of a probability below the threshold."""
        drafted = 0
        while drafted < k:
            drafts[drafted](position)()
            drafted += 1
            if drafted < k and session.draft_confidence(drafted - 1) < threshold:
                break
        return checks[drafted](position)()

    return lambda position, k: partial(while_confident, position, k)


def count_accepted(draft_ids: list[int], target_ids: list[int]) -> int:
    """Length of the longest prefix of drafts that equal the targets."""
    for accepted, (draft, target) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if draft != target:
            return accepted
    return len(draft_ids)
