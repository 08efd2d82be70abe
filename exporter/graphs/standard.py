"""`standard`: ONNX's own operators, which TensorRT 10.15 turns into layers of its own.

qkv -> split -+-> q -> RoPE ----------------------+
              +-> k -> RoPE -> TensorScatter -----+-> Attention
              +-> v ---------> TensorScatter -----+
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import StoredValue
from edgeskip.exporter.graphs.writer import DialectWriter, Heads, product_of_input

Value = ir.Value


@dataclass(frozen=True)
class _StandardPlaces:
    """`write_index` [B] int64, the first cache row; `mask` [B,1,T,C] bool."""

    position_ids: Value
    cos: Value
    sin: Value
    write_index: Value
    mask: Value


class Standard(DialectWriter):
    """ONNX operators only, caches of static capacity updated in place."""

    name = "standard"
    opsets = MappingProxyType({"": 24})

    def places(
        self, op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int | Value
    ) -> _StandardPlaces:
        """The first row, and which rows of the caches each row may see."""
        if isinstance(capacity, int):
            rows = op.Constant(value=ir.tensor(np.arange(capacity, dtype=np.int64)))
        else:
            rows = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
        mask = op.LessOrEqual(rows, op.Unsqueeze(position_ids, [1, 3]))
        first = op.Squeeze(op.Slice(position_ids, [0], [1], [1]), [1])
        return _StandardPlaces(position_ids, cos, sin, first, mask)

    def attention(
        self, op: OpBuilder, heads: Heads, qkv: Value, pasts: tuple[Value, Value], places: _StandardPlaces
    ) -> tuple[Value, Value, Value]:
        """Attends over the caches with the new rows written into them."""
        q, k, v = self.rotated_heads(op, heads, qkv, places)
        present_key = op.TensorScatter(pasts[0], k, places.write_index, axis=2)
        present_value = op.TensorScatter(pasts[1], v, places.write_index, axis=2)
        out = op.Attention(q, present_key, present_value, places.mask)
        return op.Transpose(out, perm=[0, 2, 1, 3]), present_key, present_value

    def rotated_heads(
        self, op: OpBuilder, heads: Heads, qkv: Value, places: _StandardPlaces
    ) -> tuple[Value, Value, Value]:
        """Queries [B,Nq,T,D], keys and values [B,N,T,D] of this call's rows, normed and rotated."""
        q, k, v = self.split_heads(op, heads, qkv)
        table = (places.cos, places.sin, places.position_ids)
        return op.RotaryEmbedding(q, *table), op.RotaryEmbedding(k, *table), v


class StandardInputs(Standard):
    """`standard` for engines: products with matrices that are inputs."""

    name = "standard-inputs"

    def product(self, op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
        """W x^T, transposed."""
        return product_of_input(op, x, weight, bias)
