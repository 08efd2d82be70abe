"""Rows that are the same numbers however many of them a call has, so that drafts change no token.

The graphs of the `cpu` dialect are written for it, but kernels depend on the processor and on ONNX Runtime's release.
Products with weights of 4 bits are the same for any number of rows with AVX-512, and on ARM since ONNX Runtime 1.24;
with AVX2, for any number but one. So a session tries it out when it loads its graphs, and where it has to, it computes
two rows when one is wanted.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_ROWS = 5
"""Rows of the longest call that is tried: more than four, which is how many are computed together."""

LARGEST_HEAD = 128
"""Numbers in a head of attention: of longer ones, the products with few keys are added up in another order."""


def fewest_rows(run: Callable[[int], Sequence[npt.NDArray[Any]]]) -> int | None:
    """The fewest rows, one or two, of a call whose rows are those of a longer one; None if even two are not.

    Args:
        run: the outputs [T,...] of calls with the first T of the same `MOST_ROWS` rows, until it runs again.
    """
    long = [one.copy() for one in run(MOST_ROWS)]

    def same(rows: int) -> bool:
        return all(np.array_equal(one, other[:rows]) for one, other in zip(run(rows), long, strict=True))

    return next((rows for rows in (1, 2) if same(rows)), None)


def choose_attention() -> None:
    """Chooses, of ONNX Runtime's two, the attention that adds up each row by itself, for graphs that are loaded later.

    On ARM, the other one adds up the last few numbers of a row in an order that depends on the last row of the call.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
