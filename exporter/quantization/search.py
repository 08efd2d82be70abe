"""Quantization by search: of several scales for each block of numbers, the one with the least squared error.

A block's extreme, its number of the largest magnitude, is mapped in turn to values about the ends of the range: of 4
bits to -9 .. -7 and 7 .. 8. A scale takes its sign from that. What is beyond the range is cut off, so a smaller scale
may serve the other numbers of the block better. The best scale is then fitted once more to the numbers that it gave, by
least squares. Errors are always those of the scale as it is stored, rounded to the bundle's dtype.

Sums run over blocks that lie side by side, so the order of their summands is fixed, and the same input gives the same
bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.host import usable_cores

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

EXTREMES: dict[int, tuple[float, ...]] = {
    4: (-8.0, -8.5, -9.0, -7.5, -7.0, 7.0, 7.5, 8.0),
    8: (-128.0, -132.0, -124.0, 127.0, 131.0, 123.0),
}
"""What a block's extreme is mapped to, by bits; the first of several that are equally good is taken."""

_SMALLEST: dict[DType, float] = {"fp32": 2.0**-126, "fp16": 2.0**-24, "bf16": 2.0**-126}
"""The smallest scales: what has a finite reciprocal, fp16's subnormal numbers among them."""

_LARGEST: dict[DType, float] = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": float(np.finfo(np.float16).max),
    "bf16": float.fromhex("0x1.fep127"),
}
_SCALES: dict[DType, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip

_CHUNK = 1 << 17
"""Numbers at a time, whose arrays fit a core's cache."""


def encoded_rows(format_: str, rows: Array, dtype: DType) -> Sequence[Array]:
    """Rows [n,K] of a matrix in a quantized format: their numbers, as they are stored, and scales [n,K/B] in the dtype.

    Args:
        format_: its name in FORMATS.
        rows: finite numbers of any floating type.
        dtype: the bundle's.
    """
    stored = FORMATS[format_]
    bits, size = stored.bits or 8, stored.block_size or rows.shape[1]
    numbers, scales = quantized(rows.reshape(-1, size), bits, dtype)
    numbers = numbers.reshape(rows.shape)
    return (packed(numbers) if bits == 4 else numbers), scales.reshape(len(rows), -1)


def quantized(blocks: Array, bits: int, dtype: DType) -> tuple[npt.NDArray[np.int8], Array]:
    """Numbers [n,B] int8 and scales [n] in the dtype for blocks [n,B]."""
    count = max(1, _CHUNK // blocks.shape[1])
    chunks = [blocks[start : start + count] for start in range(0, len(blocks), count)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(lambda chunk: _searched(chunk, bits, dtype), chunks))
    return np.concatenate([numbers for numbers, _ in found]), np.concatenate([scales for _, scales in found])


def packed(numbers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Numbers of 4 bits [n,K] -> [n,K/2], the even column's in the low half of a byte."""
    words: npt.NDArray[np.uint8] = numbers.view(np.uint8)
    return words[:, ::2] & np.uint8(15) | words[:, 1::2] << np.uint8(4)


def _searched(blocks: Array, bits: int, dtype: DType) -> tuple[npt.NDArray[np.int8], Array]:
    """The search for some blocks."""
    columns: Floats = np.array(blocks.T, np.float32, order="C")  # a copy, with a block for a column
    high, low = columns.max(axis=0), columns.min(axis=0)
    extremes = np.where(high > -low, high, low)
    # by a power of two, which is exact, so that no square overflows and no reciprocal is infinite
    units = np.ldexp(np.float32(1), -np.clip(np.frexp(extremes)[1], -126, 126))
    columns *= units
    room, least, best = np.empty_like(columns), np.full(len(blocks), np.inf, np.float32), np.empty_like(extremes)

    def numbers_for(scales: Floats) -> Floats:
        """Within `room`, the nearest numbers."""
        np.multiply(columns, 1 / (scales * units), out=room)
        np.rint(room, out=room)
        return np.clip(room, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, out=room)

    def consider(scales: Floats) -> None:
        """Keeps the scales of those blocks that they serve better than what was kept."""
        nonlocal least, best
        error = numbers_for(scales)
        error *= scales * units
        error -= columns
        error *= error
        errors = np.add.reduce(error, axis=0)
        best = np.where(errors < least, scales, best)
        least = np.minimum(errors, least)

    for value in EXTREMES[bits]:
        consider(_as_stored(extremes / np.float32(value), bits, dtype))
    numbers = numbers_for(best)
    squares = np.maximum(np.add.reduce(numbers * numbers, axis=0), 1)
    numbers *= columns
    consider(_as_stored(np.add.reduce(numbers, axis=0) / squares / units, bits, dtype))
    return numbers_for(best).T.astype(np.int8), best.astype(_SCALES[dtype])


def _as_stored(scales: Floats, bits: int, dtype: DType) -> Floats:
    """The scales in the dtype, never zero, and with every number times its scale finite."""
    sizes = np.clip(np.abs(scales), _SMALLEST[dtype], _LARGEST[dtype] / 2 ** (bits - 1))
    rounded: Floats = np.copysign(sizes, scales).astype(_SCALES[dtype]).astype(np.float32)
    return rounded
