"""`ort`: ONNX Runtime's fused operators around the attention, which is one node.

qkv -> GroupQueryAttention
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import StoredValue, own_product
from edgeskip.exporter.graphs.standard import Standard
from edgeskip.exporter.graphs.writer import DialectWriter, Heads, Norm
from edgeskip.runtime.bundle.architecture import Architecture

Value = ir.Value


@dataclass(frozen=True)
class _OrtPlaces:
    """`last_position` [B] and `capacity` [] int32, for GroupQueryAttention."""

    position_ids: Value
    cos: Value
    sin: Value
    last_position: Value
    capacity: Value


class Ort(DialectWriter):
    """ONNX Runtime's fused operators around the attention."""

    name = "ort"

    def skip_norm(self, op: OpBuilder, x: Value, delta: Value | None, weight: Value, eps: float) -> tuple[Value, Value]:
        """The sum and its norm as one node."""
        if delta is None:
            return super().skip_norm(op, x, delta, weight, eps)
        normed, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, delta, weight, epsilon=eps, _domain="com.microsoft", _outputs=4
        )
        return normed, total

    def silu(self, op: OpBuilder, x: Value) -> Value:
        """X * sigmoid(x) as one node."""
        out: Value = op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")
        return out

    def logits(self, op: OpBuilder, hidden: Value, table: StoredValue) -> Value:
        """Without reshapes, each of which would copy the logits."""
        own = own_product(self.name, op, hidden, table)
        if own is not None:
            return own
        out: Value = op.FusedMatMul(hidden, table.whole(op), transB=1, _domain="com.microsoft")
        return out


class OrtGrouped(Ort):
    """With GroupQueryAttention, which attends to the rows in use and not to the whole capacity."""

    opsets = MappingProxyType({"": 23, "com.microsoft": 1})  # ONNX Runtime reads opset 24 from release 1.24 on

    def suited(self, architecture: Architecture) -> DialectWriter:
        """GroupQueryAttention has kernels for heads of 8, 16, 24, ... numbers."""
        return self if architecture.head_dim % 8 == 0 else OrtPlain()

    def places(self, op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int | Value) -> _OrtPlaces:
        """The last row, which is one less than the number of rows in use."""
        last = op.Squeeze(op.Slice(position_ids, [-1], [np.iinfo(np.int64).max], [1]), [1])
        if isinstance(capacity, int):
            size = op.Constant(value=ir.tensor(np.array(capacity, np.int32)))
        else:
            size = op.Cast(capacity, to=ir.DataType.INT32)
        return _OrtPlaces(position_ids, cos, sin, op.Cast(last, to=ir.DataType.INT32), size)

    def attention(
        self, op: OpBuilder, heads: Heads, qkv: Value, pasts: tuple[Value, Value], places: _OrtPlaces
    ) -> tuple[Value, Value, Value]:
        """One node, besides norms of queries and keys and a rotation that the operator does not do."""
        a = heads.a
        query, key, value = op.Reshape(qkv, [1, -1, a.qkv_rows]), None, None
        rotates = a.head_dim % 16 == 0  # the operator's own condition
        if a.qk_norm or not rotates:
            q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
            sizes = op.Constant(value_ints=[q_size, kv_size, kv_size])
            query, key, value = op.Split(query, sizes, axis=2, _outputs=3)
        if heads.q_norm and heads.k_norm:
            query, key = self._normed(op, query, heads.q_norm, a), self._normed(op, key, heads.k_norm, a)
        if not rotates:
            table = (places.cos, places.sin, places.position_ids)
            query = op.RotaryEmbedding(query, *table, num_heads=a.num_heads)
            key = op.RotaryEmbedding(key, *table, num_heads=a.num_kv_heads)
        out, present_key, present_value = op.GroupQueryAttention(
            query,
            key,
            value,
            *pasts,
            places.last_position,
            places.capacity,
            *((places.cos, places.sin) if rotates else ()),
            num_heads=a.num_heads,
            kv_num_heads=a.num_kv_heads,
            do_rotary=int(rotates),
            _domain="com.microsoft",
            _outputs=3,
        )
        return out, present_key, present_value

    def _normed(self, op: OpBuilder, x: Value | None, norm: Norm, a: Architecture) -> Value:
        """Normalizes each head of [B,T,heads*D]."""
        out: Value = op.Reshape(norm(op.Reshape(x, [0, 0, -1, a.head_dim])), [0, 0, -1])
        return out


class OrtPlain(Ort, Standard):
    """With the attention of `standard`, for heads of any size."""

    opsets = MappingProxyType(dict(Standard.opsets) | {"com.microsoft": 1})
