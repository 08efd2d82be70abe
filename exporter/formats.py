"""How formats of stored tensors are written and how graphs read them; runtime/bundle/formats.py says what they hold.

A new format is one entry there and one here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
class FormatWriter:
    """A format on the exporter's side.

    `encode` turns rows of the checkpoint [n, ...] into the same rows of each part, in the types that the format's parts
    have in a bundle of this dtype. `read` gives the tensor in the bundle's dtype within a graph, from its parts, with
    ONNX operators that every dialect has.
    """

    encode: Callable[[Array, DType], Sequence[Array]]
    read: Callable[[OpBuilder, Sequence[Value]], Value]


def _cast_to(number: str) -> Callable[[Array, DType], Sequence[Array]]:
    def encode(rows: Array, _: DType) -> Sequence[Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            return (rows.astype(NUMPY_DTYPES[number], copy=False),)

    return encode


def _as_stored(_: OpBuilder, parts: Sequence[Value]) -> Value:
    return parts[0]


WRITERS: dict[str, FormatWriter] = {name: FormatWriter(_cast_to(name), _as_stored) for name in ("fp32", "fp16", "bf16")}
"""By the format's name."""
