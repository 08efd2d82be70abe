"""A dialect of the graphs: which operators express the same mathematics, and for whom.

A new dialect is a class like those in standard.py, ort.py and primitive.py, its conventions in
runtime/bundle/dialects.py, and an entry in dialects.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import StoredValue, gathered, own_product
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

    ir_version: int = 11
    """That of the ONNX files."""

    def suited(self, architecture: Architecture) -> DialectWriter:
        """The writer for a model, if some need other operators."""
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

    def split_heads(self, op: OpBuilder, heads: Heads, qkv: Value) -> tuple[Value, Value, Value]:
        """Queries [B,Nq,T,D], keys and values [B,N,T,D] of this call's rows, normed."""
        a = heads.a
        # [B*T, (Nq+2N)D] -> [B, T, Nq+2N, D] -> [B, Nq+2N, T, D], then heads are parts of axis 1
        parts = op.Transpose(op.Reshape(qkv, [1, -1, a.num_heads + 2 * a.num_kv_heads, a.head_dim]), perm=[0, 2, 1, 3])
        sizes = op.Constant(value_ints=[a.num_heads, a.num_kv_heads, a.num_kv_heads])
        q, k, v = op.Split(parts, sizes, axis=1, _outputs=3)
        q = heads.q_norm(q) if heads.q_norm else q
        k = heads.k_norm(k) if heads.k_norm else k
        return q, k, v

    def linear(self, op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
        """Y = x W^T + b over [rows, in] -> [rows, out], by the format's own product where this dialect has one."""
        out = own_product(self.name, op, x, weight)
        if out is None:
            return self.product(op, x, weight, bias)
        return out if bias is None else op.Add(out, bias)

    def product(self, op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
        """The same with the whole matrix."""
        inputs = (x, weight.whole(op)) if bias is None else (x, weight.whole(op), bias)
        out: Value = op.Gemm(*inputs, transB=1)
        return out

    def gather(self, op: OpBuilder, table: StoredValue, rows: Value) -> Value:
        """Rows of a table [V,H] by number, [B,T] -> [B,T,H]."""
        return gathered(self.name, op, table, rows)

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


def product_of_input(op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
    """Y = (W x^T)^T + b over [rows, in] -> [rows, out], for a matrix W [out, in] that is an input of the graph.

    TensorRT reads it as it lies; of `Gemm(x, W, transB=1)` it would make a transposed copy at each call.
    """
    transposed = op.MatMul(weight.whole(op), op.Transpose(x, perm=[1, 0]))
    out: Value = op.Transpose(transposed, perm=[1, 0])
    return out if bias is None else op.Add(out, bias)
