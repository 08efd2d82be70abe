"""How formats of stored tensors are written and how graphs read them; runtime/bundle/formats.py says what they hold.

A new format is one entry there and one here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType

Array = npt.NDArray[Any]
Value = ir.Value

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bf16" else number.numpy) for name, number in NUMBER_TYPES.items()
}
"""The types of numbers in NumPy, bf16 as a number where the runtime has raw words."""

ONNX_DTYPES = {name: ir.DataType(number.onnx) for name, number in NUMBER_TYPES.items()}


@dataclass(frozen=True)
class StoredValue:
    """A stored tensor within a graph: its format, the values of its parts, and the dtype that is computed in."""

    format: str
    parts: tuple[Value, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType

    def whole(self, op: OpBuilder) -> Value:
        """The tensor in the dtype."""
        return WRITERS[self.format].read(op, self.parts, self.dtype)


@dataclass(frozen=True)
class FormatWriter:
    """A format on the exporter's side.

    `encode` turns rows of the checkpoint [n, ...] into the same rows of each part, in the types that the format's parts
    have in a bundle of this dtype. `read` gives the tensor in the bundle's dtype within a graph, from its parts, with
    ONNX operators that every dialect has. Where a dialect has an operator that reads the parts themselves, it stands in
    `products` (x [rows, in] -> x W^T) or `gathers` (row numbers -> rows), by the dialect's name. `declare` is how a
    graph of a dialect spells a part's bytes, where that is not as they are stored: type and shape, from the dialect's
    name, the part's suffix and its stored shape.
    """

    encode: Callable[[Array, DType], Sequence[Array]]
    read: Callable[[OpBuilder, Sequence[Value], ir.DataType], Value]
    products: Mapping[str, Callable[[OpBuilder, Value, StoredValue], Value]] = field(default_factory=dict)
    gathers: Mapping[str, Callable[[OpBuilder, StoredValue, Value], Value]] = field(default_factory=dict)
    declare: Callable[[str, str, tuple[int, ...]], tuple[ir.DataType, tuple[int, ...]] | None] = lambda *_: None


def _cast_to(number: str) -> Callable[[Array, DType], Sequence[Array]]:
    def encode(rows: Array, _: DType) -> Sequence[Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            return (rows.astype(NUMPY_DTYPES[number], copy=False),)

    return encode


def _as_stored(_: OpBuilder, parts: Sequence[Value], __: ir.DataType) -> Value:
    return parts[0]


WRITERS: dict[str, FormatWriter] = {name: FormatWriter(_cast_to(name), _as_stored) for name in ("fp32", "fp16", "bf16")}
"""By the format's name."""
