"""Formats of stored tensors: the arrays of numbers that stand for a tensor in the weights file.

`dtype` is what a bundle computes in; each stored tensor has a *format* of its own. A format stores a tensor as one or
more parts, each an array of the weights file: the numbers and, where they are quantized, their scales. How formats are
written, and how graphs read them, is up to the exporter (exporter/formats.py).

Quantized formats are for matrices [N,K] and symmetric: a number times its scale is the value, without zero points.

    int8       numbers int8 [N,K]      -128 .. 127                                            scales [N,1]
    int4-B     numbers uint8 [N,K/2]   -8 .. 7, two's complement, the even column's low       scales [N,K/B]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from edgeskip.runtime.bundle.dtypes import ITEMSIZE, NUMBER_TYPES, DType

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

SCALES = ".scales"
"""Suffix of the scales' array."""

BlockSize = Literal[32, 64, 128]
BLOCK_SIZES: tuple[BlockSize, ...] = get_args(BlockSize)
"""Numbers along K that share a scale, in 4 bits."""


@dataclass(frozen=True)
class Part:
    """An array of a stored tensor: the suffix of its name, its type of numbers, and its shape from the tensor's.

    Its first axis is the tensor's. `number` is null where the numbers have the bundle's dtype.
    """

    suffix: str
    number: str | None
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]

    def number_type(self, dtype: DType) -> str:
        """The type of its numbers in a bundle with this dtype."""
        return self.number or dtype


@dataclass(frozen=True)
class Format:
    """How a tensor is stored; the first part is the largest and has the tensor's own name.

    `decode` turns rows of each part into the same rows of the tensor, [n, ...] in the bundle's dtype. `bits` is the
    size of a quantized number, and null where numbers are stored as they are. `block_size` numbers of a row have one
    scale, or all of them where it is null.
    """

    name: str
    parts: tuple[Part, ...]
    decode: Callable[[Sequence[Array], DType], Array]
    bits: int | None = None
    block_size: int | None = None

    def bytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Size of a tensor of this shape, with all its parts."""
        return sum(math.prod(part.shape(shape)) * ITEMSIZE[part.number_type(dtype)] for part in self.parts)

    def divides(self, columns: int) -> bool:
        """Whether rows of so many numbers are whole blocks."""
        return columns % (self.block_size or 1) == 0


def is_quantized(formats: Iterable[str]) -> bool:
    """Whether any of these formats stores other numbers than those that are computed with."""
    return any(format_ not in get_args(DType) for format_ in formats)


def unpacked(numbers: Array) -> Array:
    """Numbers of 4 bits [n,K/2] uint8, two to a byte, -> [n,K] int8."""
    import numpy as np

    pairs = np.stack((numbers & 15, numbers >> 4), axis=-1)
    both: Array = pairs.reshape(*numbers.shape[:-1], -1).view(np.int8)
    return (both ^ np.int8(8)) - np.int8(8)


def _same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _as_stored(parts: Sequence[Array], _: DType) -> Array:
    return parts[0]


def _in_blocks(parts: Sequence[Array], dtype: DType) -> Array:
    """Decodes 4 bits."""
    return _scaled(unpacked(parts[0]), parts[1], dtype)


def _by_channel(parts: Sequence[Array], dtype: DType) -> Array:
    """Decodes 8 bits."""
    return _scaled(parts[0], parts[1], dtype)


def _scaled(numbers: Array, scales: Array, dtype: DType) -> Array:
    """Numbers [..., K] int8 times scales [..., K/B], rounded once to the dtype."""
    import numpy as np

    blocks = numbers.reshape(*scales.shape, -1)
    wide = (scales.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else scales.astype(np.float32)
    values = (blocks * wide[..., None]).reshape(numbers.shape)
    if dtype == "bf16":  # to the nearest, ties to even; every value is finite
        words = values.view(np.uint32)
        rounded: Array = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
        return rounded
    return values.astype(NUMBER_TYPES[dtype].numpy, copy=False)


def _int4(block_size: int) -> Format:
    numbers = Part("", "uint8", lambda shape: (*shape[:-1], shape[-1] // 2))
    scales = Part(SCALES, None, lambda shape: (*shape[:-1], shape[-1] // block_size))
    return Format(f"int4-{block_size}", (numbers, scales), _in_blocks, 4, block_size)


_PLAIN = [Format(name, (Part("", name, _same),), _as_stored) for name in ("fp32", "fp16", "bf16")]
_INT8 = Format("int8", (Part("", "int8", _same), Part(SCALES, None, lambda shape: (shape[0], 1))), _by_channel, 8)

FORMATS: dict[str, Format] = {one.name: one for one in (*_PLAIN, _INT8, *map(_int4, BLOCK_SIZES))}
"""By name. A plain format stores each number as it is and is read without conversion, so it must be the dtype."""
