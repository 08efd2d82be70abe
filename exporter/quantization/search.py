"""Quantization by search: of several scales for each block of numbers, the one with the least squared error.

A block's extreme, its number of the largest magnitude, is mapped in turn to values about the ends of the range: of 4
bits to -10 .. -7.5 and 7 .. 9. A scale takes its sign from that. What is beyond the range is cut off, so a smaller
scale may serve the other numbers of the block better. The best scale is then fitted to the numbers that it gave, by
least squares, and what that gives once more. The error is what a product loses: each column's by the size of the inputs
that it multiplies (inputs.py). It is always that of the scale as it is stored, rounded to the bundle's dtype.

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
    4: (-8.0, 7.0, -7.5, -8.5, 7.5, -9.0, 8.0, -10.0, 9.0),
    8: (-128.0, 127.0, -132.0, 131.0),
}
"""What a block's extreme is mapped to, by bits; the first of several that are equally good is taken."""

_FITS = 2
"""How often the best scale is fitted. The squared error of the shipped checkpoint's layers, in blocks of 32 to 128, is
then within 1% of that of 50 extremes from -12 to 12.
"""

SMALLEST_SCALES: dict[DType, float] = {"fp32": 2.0**-126, "fp16": 2.0**-24, "bf16": 2.0**-126}
"""The smallest scales: what has a finite reciprocal, fp16's subnormal numbers among them."""

LARGEST: dict[DType, float] = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": float(np.finfo(np.float16).max),
    "bf16": float.fromhex("0x1.fep127"),
}
"""The largest numbers."""

_SCALES: dict[DType, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip

_CHUNK, _THREADS = 1 << 18, 8
"""Numbers at a time, and the most threads: with smaller chunks or more threads, they wait for the interpreter's lock
more than they compute. On 16 cores, 68 million numbers a second; with 2^16 and 16 threads, 20.
"""


def encoded_rows(format_: str, rows: Array, dtype: DType, input_sizes: Array | None = None) -> Sequence[Array]:
    """Rows [n,K] of a matrix in a quantized format: their numbers, as they are stored, and scales [n,K/B] in the dtype.

    Args:
        format_: its name in FORMATS.
        rows: finite numbers of any floating type.
        dtype: the bundle's.
        input_sizes: the root mean squares of the inputs that each column multiplies, up to a factor, [K]; by default
            all alike.
    """
    stored = FORMATS[format_]
    bits, columns = stored.bits or 8, rows.shape[1]
    size = stored.block_size or columns
    sizes = np.ones(columns) if input_sizes is None else input_sizes / np.max(input_sizes)
    weights = np.square(sizes).astype(np.float32).reshape(-1, size).T
    count = max(1, _CHUNK // columns)
    chunks = [rows[start : start + count] for start in range(0, len(rows), count)]

    def searched(chunk: Array) -> tuple[Array, Array]:
        blocks = np.array(chunk.reshape(-1, size).T, np.float32, order="C")
        numbers, scales = _searched(blocks, np.tile(weights, (1, len(chunk))), bits, dtype)
        whole: npt.NDArray[np.int8] = numbers.T.reshape(chunk.shape).astype(np.int8)
        return (packed(whole) if bits == 4 else whole), scales.reshape(len(chunk), -1)

    with ThreadPoolExecutor(min(usable_cores(), _THREADS)) as pool:
        found = list(pool.map(searched, chunks))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def packed(numbers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Numbers of 4 bits [n,K] -> [n,K/2], the even column's in the low half of a byte."""
    words: npt.NDArray[np.uint8] = numbers.view(np.uint8)
    return words[:, ::2] & np.uint8(15) | words[:, 1::2] << np.uint8(4)


def _searched(blocks: Floats, weights: Floats, bits: int, dtype: DType) -> tuple[Floats, Array]:
    """Numbers [B,n] and scales [n] of blocks [B,n], which it changes; errors count by weights of the same shape."""
    high, low = blocks.max(axis=0), blocks.min(axis=0)
    extremes = np.where(high > -low, high, low)
    # by a power of two, which is exact, so that no square overflows and no reciprocal is infinite
    units = np.ldexp(np.float32(1), -np.clip(np.frexp(extremes)[1], -126, 126))
    blocks *= units
    room, least = np.empty_like(blocks), np.full_like(extremes, np.inf)
    best = _as_stored(extremes, bits, dtype)

    def numbers_for(scales: Floats) -> Floats:
        """Within `room`, the nearest numbers."""
        np.multiply(blocks, 1 / (scales * units), out=room)
        np.rint(room, out=room)
        return np.clip(room, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, out=room)

    def consider(scales: Floats) -> None:
        """Keeps the scales of those blocks that they serve better than what was kept."""
        nonlocal least, best
        error = numbers_for(scales)
        error *= scales * units
        error -= blocks
        error *= error
        error *= weights
        errors = np.add.reduce(error, axis=0)
        best = np.where(errors < least, scales, best)
        least = np.minimum(errors, least)

    for value in EXTREMES[bits]:
        consider(_as_stored(extremes / np.float32(value), bits, dtype))
    for _ in range(_FITS):
        numbers = numbers_for(best)
        weighted = numbers * weights
        squares = np.add.reduce(numbers * weighted, axis=0)
        weighted *= blocks
        products = np.add.reduce(weighted, axis=0)
        fitted = np.divide(products, squares, out=best * units, where=squares > 0)
        consider(_as_stored(fitted / units, bits, dtype))
    return numbers_for(best), best.astype(_SCALES[dtype])


def _as_stored(scales: Floats, bits: int, dtype: DType) -> Floats:
    """The scales in the dtype, never zero, and with every number times its scale finite."""
    sizes = np.clip(np.abs(scales), SMALLEST_SCALES[dtype], LARGEST[dtype] / 2 ** (bits - 1))
    rounded: Floats = np.copysign(sizes, scales).astype(_SCALES[dtype]).astype(np.float32)
    return rounded
