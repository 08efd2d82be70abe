"""The loop: draft, verify, accept, advance.

Position n is the number of rows in the caches; the token that stands at n is known, its row is not yet computed.
A round computes rows n .. n+K, keeps those of the accepted drafts, and leaves the rest stale: they are hidden by
position and overwritten by the next round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edgeskip.runtime.rounds import Round, early_exit_round, prefill_round, speculative_round
from edgeskip.runtime.session import Session


@dataclass(frozen=True)
class Step:
    """The tokens of one round: accepted drafts, then one of the whole model (or of the exit, in early-exit mode).

    `drafted` is K of this round; `stage_ns` is the time by graph, None where the device hides it.
    """

    token_ids: tuple[int, ...]
    drafted: int
    stage_ns: Mapping[str, int] | None

    @property
    def accepted(self) -> int:
        """Drafts that the verification confirmed."""
        return len(self.token_ids) - 1


def prefill(session: Session, embeddings: np.ndarray, chunk: int, *, early_exit: bool = False) -> Step:
    """Runs a prompt, [T,H] embedding rows, through the layers and picks the first new token.

    Full chunks, the last one overlapping backwards so that shapes stay few: its first rows are computed again,
    from the same inputs. A prompt shorter than a chunk is one call of its own length.
    """
    length = len(embeddings)
    rows = min(chunk, length)
    starts = [*range(0, length - rows, rows), length - rows]
    for start in starts:
        session.write_embeddings(embeddings[start : start + rows])
        result = session.bind(prefill_round(rows, last=start == starts[-1], early_exit=early_exit))(start)
    session.carry(0)
    return Step(tuple(result.target_ids), 0, result.stage_ns)


def decode(
    session: Session, position: int, capacity: int, num_speculations: int, *, early_exit: bool = False
) -> Iterator[Step]:
    """Rounds after a prefill of `position` rows, until the caches are full.

    Args:
        session: prefilled.
        position: n, rows in the caches.
        capacity: C, rows that the caches hold; nothing is written past them.
        num_speculations: K; 0 is plain decoding.
        early_exit: decode with the draft subgraph alone (K is then 0).
    """
    while position < capacity:
        k = min(num_speculations, capacity - position - 1)
        result = session.bind(_round(k, early_exit))(position)
        accepted = count_accepted(result.draft_ids, result.target_ids)
        session.carry(accepted)
        position += accepted + 1
        yield Step(tuple(result.target_ids[: accepted + 1]), k, result.stage_ns)


def count_accepted(draft_ids: list[int], target_ids: list[int]) -> int:
    """Length of the longest prefix of drafts that equal the targets."""
    for accepted, (draft, target) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if draft != target:
            return accepted
    return len(draft_ids)


def _round(num_speculations: int, early_exit: bool) -> Round:
    return early_exit_round() if early_exit else speculative_round(num_speculations)
