"""`primitive`: nothing but the operators that TensorRT has read since 10.3, which is JetPack 6's.

The caches come in whole, and the rows of this call go out; the session writes them into the caches. Attention is over
two blocks, so that no cache is copied: the rows before this call and those of this call.

    q x cached keys (all C rows, hidden from the first position on) -+
    q x new keys (causal) -------------------------------------------+-> softmax -> x cached values + x new values

Rows follow each other, and a row sees the new rows up to its own by their order, not by their positions: whatever
finite numbers the rows after those that are wanted hold, it does not reach them. So a session may pad a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import StoredValue
from edgeskip.exporter.graphs.writer import DialectWriter, Heads, product_of_input
from edgeskip.runtime.bundle.architecture import Architecture

Value = ir.Value

_HIDDEN = -1e30
"""What is added to the score of a row that may not be seen."""


@dataclass(frozen=True)
class _Places:
    """Rows of the RoPE tables, [B,1,T,D/2]; which rows may be seen, as summands in fp32: of the caches [C], of the new
    ones [G*T,T], for each of the G heads of queries that share keys.
    """

    cos: Value
    sin: Value
    past: Value
    new: Value


class Primitive(DialectWriter):
    """Attention and norms in parts, caches handed back as new rows, weights as inputs."""

    name = "primitive"
    opsets = MappingProxyType({"": 18})
    ir_version = 8

    def __init__(self, group: int = 1) -> None:
        self._group = group  # query heads for each head of keys

    def suited(self, architecture: Architecture) -> DialectWriter:
        """The writer for the model's groups of heads."""
        return Primitive(architecture.num_heads // architecture.num_kv_heads)

    def places(self, op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int | Value) -> _Places:
        """The tables' rows, and the masks."""
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        shown, hidden = op.Constant(value_float=0.0), op.Constant(value_float=_HIDDEN)
        first = op.Squeeze(op.Slice(position_ids, [0], [1], [1]), [1])
        if isinstance(capacity, int):
            cached = op.Constant(value=ir.tensor(np.arange(capacity, dtype=np.int64)))
        else:
            cached = op.Range(zero, capacity, one)
        length = op.Squeeze(op.Shape(position_ids, start=1, end=2), [0])
        rows = op.Range(zero, length, one)
        past = op.Where(op.Less(cached, first), shown, hidden)
        new = op.Where(op.LessOrEqual(op.Unsqueeze(rows, [0]), op.Unsqueeze(rows, [1])), shown, hidden)
        new = op.Concat(*[new] * self._group, axis=0) if self._group > 1 else new
        turned = [op.Unsqueeze(op.Gather(table, position_ids), [1]) for table in (cos, sin)]
        return _Places(turned[0], turned[1], past, new)

    def attention(
        self, op: OpBuilder, heads: Heads, qkv: Value, pasts: tuple[Value, Value], places: _Places
    ) -> tuple[Value, Value, Value]:
        """Attends over both blocks; hands the new rows back."""
        a = heads.a
        q, k, v = self.split_heads(op, heads, qkv)
        q, k = self._rotated(op, q, places), self._rotated(op, k, places)
        scale = op.CastLike(op.Constant(value_float=float(a.head_dim) ** -0.5), q)
        # heads of a group are neighbours: [B,Nq,T,D] -> [B,N,G*T,D], to be multiplied with one head of keys
        grouped = op.Reshape(op.Mul(q, scale), [1, a.num_kv_heads, -1, a.head_dim])
        past = self._scores(op, grouped, pasts[0])
        new = self._scores(op, grouped, k)
        scores = op.Concat(op.Add(past, places.past), op.Add(new, places.new), axis=3)
        weights = op.CastLike(op.Softmax(scores, axis=-1), q)
        cached = op.Shape(pasts[0], start=2, end=3)
        over_past = op.MatMul(op.Slice(weights, [0], cached, [3]), pasts[1])
        over_new = op.MatMul(op.Slice(weights, cached, [np.iinfo(np.int64).max], [3]), v)
        out = op.Reshape(op.Add(over_past, over_new), [1, a.num_heads, -1, a.head_dim])
        return op.Transpose(out, perm=[0, 2, 1, 3]), k, v

    def norm(self, op: OpBuilder, x: Value, weight: Value, eps: float) -> Value:
        """Root mean square norm over the last axis, in fp32 within, as ONNX defines RMSNormalization."""
        wide = op.Cast(x, to=ir.DataType.FLOAT)
        mean = op.ReduceMean(op.Mul(wide, wide), [-1], keepdims=1)
        normed = op.Div(wide, op.Sqrt(op.Add(mean, op.Constant(value_float=eps))))
        out: Value = op.Mul(op.CastLike(normed, weight), weight)
        return out

    def product(self, op: OpBuilder, x: Value, weight: StoredValue, bias: Value | None) -> Value:
        """W x^T, transposed."""
        return product_of_input(op, x, weight, bias)

    def _scores(self, op: OpBuilder, q: Value, k: Value) -> Value:
        """Products of queries [B,N,G*T,D] and keys [B,N,S,D] in fp32."""
        out: Value = op.Cast(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), to=ir.DataType.FLOAT)
        return out

    def _rotated(self, op: OpBuilder, x: Value, places: _Places) -> Value:
        """RoPE of [B,N,T,D]: the first half of a head turns with the second."""
        first, second = op.Split(x, num_outputs=2, axis=3, _outputs=2)
        turned = (
            op.Sub(op.Mul(first, places.cos), op.Mul(second, places.sin)),
            op.Add(op.Mul(second, places.cos), op.Mul(first, places.sin)),
        )
        out: Value = op.Concat(*turned, axis=3)
        return out


class Layers(Primitive):
    """`primitive` for parts of layers, which have no attention."""

    name = "layers"

    def suited(self, architecture: Architecture) -> DialectWriter:
        """The same for all models."""
        return self
