"""The dialects of the graphs: which operators express the same mathematics, and for whom.

`standard` has only ONNX's own operators, for TensorRT; `ort` has ONNX Runtime's fused ones where they exist.
An attention in `standard` (in brackets `ort`, with one node for all of it):

    qkv -> split -+-> q -> RoPE ----------------------+
                  +-> k -> RoPE -> TensorScatter -----+-> Attention
                  +-> v ---------> TensorScatter -----+
           [GroupQueryAttention                       ]

A new dialect is a class here, its conventions in runtime/bundle/dialects.py, and an entry in `WRITERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import WRITERS as WRITERS_OF_FORMATS
from edgeskip.exporter.formats import StoredValue
from edgeskip.runtime.bundle.architecture import Architecture

Value = ir.Value
Norm = Callable[[Value], Value]


@dataclass(frozen=True)
class Heads:
    """What an attention does to its heads: their number and size, and the norms of queries and keys, if any."""

    a: Architecture
    q_norm: Norm | None
    k_norm: Norm | None


class DialectWriter(ABC):
    """The operators of a dialect; what `places` gives is up to the dialect, made once per graph for each attention."""

    name: str
    opsets: Mapping[str, int]
    """The lowest versions that have the dialect's operators, by domain."""

    def suited(self, architecture: Architecture) -> DialectWriter:
        """The writer for a model, if some models need other operators."""
        return self

    @abstractmethod
    def places(self, op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int | Value) -> Any:
        """Derives the places of this call's rows from `position_ids` [B,T], the only source of truth for them.

        Args:
            op: the builder.
            position_ids: [B,T] int64.
            cos: [C, D/2].
            sin: [C, D/2].
            capacity: C, the rows of the caches; a value [] int64 where it is not known yet.
        """

    @abstractmethod
    def attention(
        self, op: OpBuilder, heads: Heads, qkv: Value, pasts: tuple[Value, Value], places: Any
    ) -> tuple[Value, Value, Value]:
        """Attends: projections [B*T, (Nq+2N)D] and caches [B,N,C,D] -> Nq*D per row, and the caches to hand back."""

    def linear(self, op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
        """Y = x W^T + b over [rows, in] -> [rows, out], by the format's own product where this dialect has one."""
        if product := WRITERS_OF_FORMATS[weight.format].products.get(self.name):
            out: Value = product(op, x, weight)
            return out if bias is None else op.Add(out, bias)
        inputs = (x, weight.whole(op)) if bias is None else (x, weight.whole(op), bias)
        out = op.Gemm(*inputs, transB=1)
        return out

    def gather(self, op: OpBuilder, table: StoredValue, rows: Value) -> Value:
        """Rows of a table [V,H] by number, [B,T] -> [B,T,H]."""
        if gather := WRITERS_OF_FORMATS[table.format].gathers.get(self.name):
            return gather(op, table, rows)
        out: Value = op.Gather(table.whole(op), rows)
        return out

    def norm(self, op: OpBuilder, x: Value, weight: Value, eps: float) -> Value:
        """Root mean square norm (arXiv 1910.07467) over the last axis, in fp32 within."""
        out: Value = op.RMSNormalization(x, weight, axis=-1, epsilon=eps)
        return out

    def skip_norm(self, op: OpBuilder, x: Value, delta: Value | None, weight: Value, eps: float) -> tuple[Value, Value]:
        """The residual sum and its norm: (norm(x + delta), x + delta); delta is absent at the start."""
        total = x if delta is None else op.Add(x, delta)
        return self.norm(op, total, weight, eps), total

    def silu(self, op: OpBuilder, x: Value) -> Value:
        """X * sigmoid(x)."""
        out: Value = op.Mul(x, op.Sigmoid(x))
        return out

    def logits(self, op: OpBuilder, hidden: Value, table: StoredValue) -> Value:
        """Normed states [B,T,H] and a table [V,H] -> [B,T,V]."""
        rows, size = table.shape
        out: Value = op.Reshape(self.linear(op, op.Reshape(hidden, [-1, size]), table, None), [1, -1, rows])
        return out


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
        a = heads.a
        # [B*T, (Nq+2N)D] -> [B, T, Nq+2N, D] -> [B, Nq+2N, T, D], then heads are parts of axis 1
        parts = op.Transpose(op.Reshape(qkv, [1, -1, a.num_heads + 2 * a.num_kv_heads, a.head_dim]), perm=[0, 2, 1, 3])
        sizes = op.Constant(value_ints=[a.num_heads, a.num_kv_heads, a.num_kv_heads])
        q, k, v = op.Split(parts, sizes, axis=1, _outputs=3)
        q = heads.q_norm(q) if heads.q_norm else q
        k = heads.k_norm(k) if heads.k_norm else k
        table = (places.cos, places.sin, places.position_ids)
        return op.RotaryEmbedding(q, *table), op.RotaryEmbedding(k, *table), v


@dataclass(frozen=True)
class _OrtPlaces:
    """`last_position` [B] and `capacity` [] int32, for GroupQueryAttention."""

    position_ids: Value
    cos: Value
    sin: Value
    last_position: Value
    capacity: Value


class _Ort(DialectWriter):
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
        """Without reshapes, each of which would copy the logits, where the format has no product of its own."""
        if WRITERS_OF_FORMATS[table.format].products.get(self.name):
            return super().logits(op, hidden, table)
        out: Value = op.FusedMatMul(hidden, table.whole(op), transB=1, _domain="com.microsoft")
        return out


class OrtGrouped(_Ort):
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


class OrtPlain(_Ort, Standard):
    """With the attention of `standard`, for heads of any size."""

    opsets = MappingProxyType(dict(Standard.opsets) | {"com.microsoft": 1})


WRITERS: dict[str, DialectWriter] = {"standard": Standard(), "ort": OrtGrouped()}
"""By name, for each dialect of runtime/bundle/dialects.py."""
