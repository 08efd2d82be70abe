"""What the caches hold: what a prompt has in common with it need not be computed again.

A row depends on the tokens up to its own position and on nothing else, so the rows of a common beginning serve any
text that begins alike. Rows of other texts can wait in host memory, so that several conversations share one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy.typing as npt

from edgeskip.runtime.decoding.session import Session
from edgeskip.runtime.errors import RequestError

LEAST_SAVED = 16
"""Tokens: fewer are computed sooner than they are copied there and back."""


@dataclass(frozen=True)
class SavedRows:
    """The rows of these tokens, by cache."""

    token_ids: tuple[int, ...]
    rows: Mapping[str, npt.NDArray[Any]]

    @property
    def bytes(self) -> int:
        """Host memory that they take."""
        return sum(array.nbytes for array in self.rows.values())


class HeldRows:
    """The tokens whose rows a session's caches hold, and the rows that were saved from them.

    Early exit computes no rows of the layers after the exit, and leaves those that are there: each run of layers, up to
    an exit or the last layer, is counted apart.

    Args:
        session: whose caches.
        depths: the layers that a text may run through: up to each exit, and all.
    """

    def __init__(self, session: Session, depths: Iterable[int]) -> None:
        self._session = session
        self._held: dict[int, list[int]] = {depth: [] for depth in depths}
        self._saved: list[SavedRows] = []  # used least recently first
        self._most_saved_bytes = 0.0

    @property
    def most_saved_bytes(self) -> float:
        """Host memory for saved rows; what was used least recently goes first. None is taken by default.

        Raises:
            RequestError: it is set to less than 0, or to what is no number.
        """
        return self._most_saved_bytes

    @most_saved_bytes.setter
    def most_saved_bytes(self, most: float) -> None:
        if isinstance(most, bool) or not (isinstance(most, int | float) and most >= 0):
            raise RequestError("most saved bytes", f"{most!r:.60}", wanted="a number from 0")
        self._most_saved_bytes = most

    @property
    def saved_bytes(self) -> int:
        """Host memory that is taken for saved rows."""
        return sum(saved.bytes for saved in self._saved)

    def take(self, token_ids: Sequence[int], depth: int) -> int:
        """How many rows of a prompt, from its beginning, the caches hold; all after them are about to be overwritten.

        The last row is never among them, as the first new token is picked from its state, nor is the one before it:
        where kernels treat a single row differently, this one would not be that of the whole prompt. Rows that were
        saved are brought back if they have more in common with the prompt, which runs through `depth` layers.
        """
        shared = min(_common(held, token_ids) for held in self._to(depth))
        if self._most_saved_bytes:
            found = [(_common(saved.token_ids, token_ids), saved) for saved in self._saved]
            best, saved = max(found, key=lambda one: one[0], default=(0, None))
            self._save(shared)
            if saved is not None and best > shared:
                self._bring_back(saved)
                shared = best
        shared = max(min(shared, len(token_ids) - 2), 0)
        self.cut(shared, depth)
        return shared

    def cut(self, length: int, depth: int) -> None:
        """Notes that rows of so many layers are of no use from this length on."""
        for held in self._to(depth):
            del held[length:]

    def add(self, token_ids: Iterable[int], depth: int) -> None:
        """Notes tokens whose rows of so many layers were computed after those that are held."""
        new = list(token_ids)
        for held in self._to(depth):
            held += new

    def forget(self) -> None:
        """Notes that something else was written to the caches. Saved rows stay."""
        self._hold(())

    def _to(self, depth: int) -> list[list[int]]:
        """What is held of each run of layers up to this one."""
        return [held for end, held in self._held.items() if end <= depth]

    def _hold(self, token_ids: Iterable[int]) -> None:
        self._held = {depth: list(token_ids) for depth in self._held}

    def _save(self, shared: int) -> None:
        """Saves what is held, unless little of it after the first `shared` rows would be lost."""
        first, *others = self._held.values()
        length = min((_common(first, held) for held in others), default=len(first))
        if length - shared < LEAST_SAVED:
            return
        token_ids = tuple(first[:length])
        self._saved = [s for s in self._saved if _common(s.token_ids, token_ids) < len(s.token_ids)]
        self._saved.append(SavedRows(token_ids, self._session.read_caches(length)))
        while self.saved_bytes > self._most_saved_bytes:
            self._saved.pop(0)

    def _bring_back(self, saved: SavedRows) -> None:
        self._saved = [other for other in self._saved if other is not saved]
        self.forget()
        self._session.write_caches(saved.rows)
        self._hold(saved.token_ids)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
