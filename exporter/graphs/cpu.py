"""`cpu`: `ort` for CPUs, where a row's numbers are the same however many rows a call has.

So drafts that are verified together give the text of plain decoding, to the last bit of every logit. Norms, activations
and products with constant matrices work row by row as they are, products with quantized ones where blocks are small
(exporter/formats.py). Attention does not: ONNX Runtime has one kernel for a single row and another for several. So a
single row gets another one beside it, of zeros. What that gives is cut off; what it writes into the caches is hidden by
its position and overwritten, as that of a rejected draft.

    qkv [T,Q] -> Pad -> [T+A,Q] -> attention -> [B,T+A,...] -> Slice -> [B,T,...]        A = 1 if T = 1, else 0

After the last row of the caches there is none; it is always computed by itself (runtime/decoding/decode.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.graphs.ort import Ort, OrtGrouped
from edgeskip.exporter.graphs.writer import DialectWriter, Heads
from edgeskip.runtime.bundle.architecture import Architecture

Value = ir.Value

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _AlikePlaces:
    """`places` of all T+A rows, `rows` [1] int64, which is T, and `pads` [4] int64, which adds A rows to [T,Q]."""

    places: Any
    rows: Value
    pads: Value


class Cpu(Ort):
    """The attention of `ort` with a second row beside a single one."""

    name = "cpu"

    def __init__(self, attends: DialectWriter | None = None) -> None:
        self.attends = attends or OrtGrouped()
        self.opsets = self.attends.opsets

    def suited(self, architecture: Architecture) -> DialectWriter:
        """With the attention that suits the model."""
        return Cpu(self.attends.suited(architecture))

    def places(self, op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int | Value) -> _AlikePlaces:
        """With a position after the first one, if there is none and the caches have it."""
        one = op.Constant(value_int=1)
        first = op.Squeeze(op.Slice(position_ids, [0], [1], [1]))
        last = op.Squeeze(op.Slice(position_ids, [-1], [_END], [1]))
        full = op.Constant(value_int=capacity - 1) if isinstance(capacity, int) else op.Sub(capacity, one)
        added = op.Range(op.Add(last, one), op.Add(op.Min(op.Max(last, op.Add(first, one)), full), one), one)
        positions = op.Concat(position_ids, op.Unsqueeze(added, [0]), axis=1)
        places = self.attends.places(op, positions, cos, sin, capacity)
        zero = op.Constant(value_ints=[0])
        pads = op.Concat(zero, zero, op.Shape(added), zero, axis=0)
        return _AlikePlaces(places, op.Shape(position_ids, start=1, end=2), pads)

    def attention(
        self, op: OpBuilder, heads: Heads, qkv: Value, pasts: tuple[Value, Value], places: _AlikePlaces
    ) -> tuple[Value, Value, Value]:
        """Attends with all rows, and gives the call's own."""
        attended, key, value = self.attends.attention(op, heads, op.Pad(qkv, places.pads), pasts, places.places)
        return op.Slice(attended, [0], places.rows, [1]), key, value
