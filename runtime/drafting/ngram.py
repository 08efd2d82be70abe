"""N-gram drafts: a text that repeats itself is likely to go on as it did before (prompt lookup, Saxena 2023).

The tokens that followed the latest earlier occurrence of the text's last n tokens are its drafts. They cost nothing to
make and need no training, so any model can have them.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2
"""Tokens of the n-grams that are looked up, the longest ones first."""


class NgramIndex:
    """A text, and where each of its n-grams occurred last. What a lookup costs does not grow with the text.

    Args:
        token_ids: the text so far.
        longest: tokens of the longest n-grams.
        shortest: tokens of the shortest ones.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # an n-gram -> the place of the token after it
        self.add(token_ids)

    def add(self, token_ids: Iterable[int]) -> None:
        """Appends tokens to the text."""
        for token in token_ids:
            place = len(self._tokens)
            for n in self._lengths:
                if n <= place:
                    self._followed[tuple(self._tokens[place - n :])] = place
            self._tokens.append(token)

    @property
    def last(self) -> int:
        """The text's last token."""
        return self._tokens[-1]

    def drafts(self, count: int) -> list[int]:
        """The next `count` tokens as they followed the longest known n-gram that the text ends with; none if none is
        known. Where they would reach the end of the text, they repeat what they have copied.
        """
        size = len(self._tokens)
        for n in self._lengths:
            place = self._followed.get(tuple(self._tokens[size - n :])) if n <= size else None
            if place is not None:
                return [self._tokens[place + i % (size - place)] for i in range(count)]
        return []
