"""How tokens are picked: which heads of a bundle do it, and what they are told about each row besides its state.

Picking is part of a head's graph, so that drafting never waits for the host. A picker on the host's side only says
what that graph needs to know about a row, from the row's position alone. So draft and target pick alike, and the text
depends neither on the exit layer nor on the speculation length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt


class Picker(Protocol):
    """A way of picking tokens.

    `name` is that of the heads' pickers in the manifest; `row_inputs` returns, for rows at positions first ..
    first+rows, an int64 array [rows] for each input that such a head has besides the states.
    """

    @property
    def name(self) -> str:
        """The name of the heads that pick in this way."""
        ...

    def row_inputs(self, first: int, rows: int) -> Mapping[str, npt.NDArray[Any]]:
        """What the heads are told about these rows."""
        ...


class Greedy:
    """The token with the largest logit."""

    name = "greedy"

    def row_inputs(self, first: int, rows: int) -> Mapping[str, npt.NDArray[Any]]:
        """Nothing."""
        return {}


GREEDY = Greedy()
