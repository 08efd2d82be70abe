"""Formats of stored tensors: the arrays of numbers that stand for a tensor in the weights file.

`dtype` is what a bundle computes in; each stored tensor has a *format* of its own. A format stores a tensor as one or
more parts, each an array of the weights file: the numbers and, where they are quantized, their scales. How formats are
written, and how graphs read them, is up to the exporter (exporter/formats.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeskip.runtime.bundle.dtypes import ITEMSIZE, DType

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


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

    `decode` turns rows of each part into the same rows of the tensor, [n, ...] in the bundle's dtype.
    """

    name: str
    parts: tuple[Part, ...]
    decode: Callable[[Sequence[Array], DType], Array]

    def bytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Size of a tensor of this shape, with all its parts."""
        return sum(math.prod(part.shape(shape)) * ITEMSIZE[part.number_type(dtype)] for part in self.parts)


def _same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _as_stored(parts: Sequence[Array], _: DType) -> Array:
    return parts[0]


FORMATS: dict[str, Format] = {
    name: Format(name, (Part("", name, _same),), _as_stored) for name in ("fp32", "fp16", "bf16")
}
"""By name. A plain format stores each number as it is and is read without conversion, so it must be the dtype."""
