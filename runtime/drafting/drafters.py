"""What drafts."""

from __future__ import annotations

from typing import Literal, get_args

Draft = Literal["exit", "ngram", "auto"]
DRAFTS: tuple[Draft, ...] = get_args(Draft)
"""What a text is drafted by: the exit; the text so far; or both, as they promise."""

Drafter = Literal["exit", "ngram"]
DRAFTERS: tuple[Drafter, ...] = get_args(Drafter)
"""What made the drafts of a round."""

Source = int | Literal["ngram"]
"""The same, with exits told apart by their layers."""

ExitChoice = int | Literal["auto"]
"""The exit that drafts; or, for each round, the one that promises most."""
