"""The Llama family as ONNX modules, in two dialects that read the same weights.

Parameter names are the checkpoint's, but for the packed `qkv_proj` and `gate_up_proj`. Linear layers work on
[B*T, ...], so that they are one Gemm each; attention on [B, T, ...].

One layer, `standard` (`ort` in brackets: one node for all of a box):

    x -> RMSNorm -> qkv_proj -> split -+-> q -> RoPE ----------------------+
         [Skip-                        +-> k -> RoPE -> TensorScatter -----+-> Attention -> o_proj -> + x -> MLP
          Simplified-                  +-> v ---------> TensorScatter -----+
          LayerNorm]                   [GroupQueryAttention                ]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from edgeskip.runtime.bundle.architecture import Architecture

Value = ir.Value


@dataclass(frozen=True)
class Places:
    """Where the rows of this call stand, as each dialect's operators want it; made once a graph.

    `position_ids` [B,T] int64; `write_index` [B] int64, the first cache row; `mask` [B,1,T,C] bool;
    `last_position` [B] and `capacity` [] int32, for GroupQueryAttention; `cos` and `sin` [C, D/2].
    """

    position_ids: Value
    cos: Value
    sin: Value
    write_index: Value | None = None
    mask: Value | None = None
    last_position: Value | None = None
    capacity: Value | None = None


class Linear(nn.Module):
    """y = x W^T + b over [rows, in] -> [rows, out]."""

    def __init__(self, rows: int, columns: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter([rows, columns], dtype)
        self.bias = nn.Parameter([rows], dtype) if bias else None

    def forward(self, op: OpBuilder, x: Value) -> Value:
        """Applies the layer."""
        inputs = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        out: Value = op.Gemm(*inputs, transB=1)
        return out


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) over the last axis, in fp32 within."""

    def __init__(self, size: int, eps: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.eps = eps

    def forward(self, op: OpBuilder, x: Value) -> Value:
        """Normalizes x."""
        normed: Value = op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps)
        return normed


class SkipRMSNorm(nn.Module):
    """The residual sum and its norm: (x, delta) -> (norm(x + delta), x + delta), delta absent at the start."""

    def __init__(self, size: int, eps: float, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.eps, self.fused = eps, fused

    def forward(self, op: OpBuilder, x: Value, delta: Value | None) -> tuple[Value, Value]:
        """Adds and normalizes."""
        if delta is not None and self.fused:
            normed, _, _, total = op.SkipSimplifiedLayerNormalization(
                x, delta, self.weight, epsilon=self.eps, _domain="com.microsoft", _outputs=4
            )
            return normed, total
        total = x if delta is None else op.Add(x, delta)
        return op.RMSNormalization(total, self.weight, axis=-1, epsilon=self.eps), total


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE over a cache of static capacity."""

    def __init__(self, a: Architecture, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__()
        self.a, self.fused = a, fused
        self.qkv_proj = Linear(a.qkv_rows, a.hidden_size, dtype, bias=a.qkv_bias)
        self.o_proj = Linear(a.hidden_size, a.num_heads * a.head_dim, dtype, bias=a.output_bias)
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps, dtype)

    def forward(
        self, op: OpBuilder, x: Value, past_key: Value, past_value: Value, places: Places
    ) -> tuple[Value, Value, Value]:
        """Attends: x [B*T,H], past [B,N,C,D] -> output [B*T,H], present key and value [B,N,C,D]."""
        core = self._fused_core if self.fused else self._standard_core
        out, present_key, present_value = core(op, self.qkv_proj(op, x), past_key, past_value, places)
        return (
            self.o_proj(op, op.Reshape(out, [-1, self.a.num_heads * self.a.head_dim])),
            present_key,
            present_value,
        )

    def _standard_core(
        self, op: OpBuilder, qkv: Value, past_key: Value, past_value: Value, places: Places
    ) -> tuple[Value, Value, Value]:
        a = self.a
        # [B*T, (Nq+2N)D] -> [B, T, Nq+2N, D] -> [B, Nq+2N, T, D], then heads are parts of axis 1
        heads = op.Transpose(op.Reshape(qkv, [1, -1, a.num_heads + 2 * a.num_kv_heads, a.head_dim]), perm=[0, 2, 1, 3])
        sizes = op.Constant(value_ints=[a.num_heads, a.num_kv_heads, a.num_kv_heads])
        q, k, v = op.Split(heads, sizes, axis=1, _outputs=3)
        if a.qk_norm:
            q, k = self.q_norm(op, q), self.k_norm(op, k)
        q = op.RotaryEmbedding(q, places.cos, places.sin, places.position_ids)
        k = op.RotaryEmbedding(k, places.cos, places.sin, places.position_ids)
        present_key = op.TensorScatter(past_key, k, places.write_index, axis=2)
        present_value = op.TensorScatter(past_value, v, places.write_index, axis=2)
        out = op.Attention(q, present_key, present_value, places.mask)
        return op.Transpose(out, perm=[0, 2, 1, 3]), present_key, present_value

    def _fused_core(
        self, op: OpBuilder, qkv: Value, past_key: Value, past_value: Value, places: Places
    ) -> tuple[Value, Value, Value]:
        a = self.a
        query, key, value = op.Reshape(qkv, [1, -1, a.qkv_rows]), None, None
        rotates = a.head_dim % 16 == 0  # the operator's own condition
        if a.qk_norm or not rotates:
            q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
            sizes = op.Constant(value_ints=[q_size, kv_size, kv_size])
            query, key, value = op.Split(query, sizes, axis=2, _outputs=3)
        if a.qk_norm:
            query, key = self._normed(op, query, self.q_norm), self._normed(op, key, self.k_norm)
        if not rotates:
            table = (places.cos, places.sin, places.position_ids)
            query = op.RotaryEmbedding(query, *table, num_heads=a.num_heads)
            key = op.RotaryEmbedding(key, *table, num_heads=a.num_kv_heads)
        out, present_key, present_value = op.GroupQueryAttention(
            query,
            key,
            value,
            past_key,
            past_value,
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

    def _normed(self, op: OpBuilder, x: Value | None, norm: RMSNorm) -> Value:
        """Normalizes each head of [B,T,heads*D]."""
        out: Value = op.Reshape(norm(op, op.Reshape(x, [0, 0, -1, self.a.head_dim])), [0, 0, -1])
        return out


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, a: Architecture, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.gate_up_proj = Linear(2 * a.intermediate_size, a.hidden_size, dtype, bias=a.mlp_bias)
        self.down_proj = Linear(a.hidden_size, a.intermediate_size, dtype, bias=a.mlp_bias)

    def forward(self, op: OpBuilder, x: Value) -> Value:
        """[B*T,H] -> [B*T,H]."""
        gate, up = op.Split(self.gate_up_proj(op, x), num_outputs=2, axis=1, _outputs=2)
        if self.fused:
            activated = op.QuickGelu(gate, alpha=1.0, _domain="com.microsoft")
        else:
            activated = op.Mul(gate, op.Sigmoid(gate))
        out: Value = self.down_proj(op, op.Mul(activated, up))
        return out


class DecoderLayer(nn.Module):
    """One pre-norm layer. It hands on the residual stream and its own last summand, added by the next norm."""

    def __init__(self, a: Architecture, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__()
        self.input_layernorm = SkipRMSNorm(a.hidden_size, a.rms_norm_eps, dtype, fused=fused)
        self.self_attn = Attention(a, dtype, fused=fused)
        self.post_attention_layernorm = SkipRMSNorm(a.hidden_size, a.rms_norm_eps, dtype, fused=fused)
        self.mlp = MLP(a, dtype, fused=fused)

    def forward(
        self, op: OpBuilder, x: Value, delta: Value | None, past_key: Value, past_value: Value, places: Places
    ) -> tuple[Value, Value, Value, Value]:
        """Runs the layer: (residual, summand) -> (residual, summand), present key and value."""
        normed, x = self.input_layernorm(op, x, delta)
        attended, present_key, present_value = self.self_attn(op, normed, past_key, past_value, places)
        normed, x = self.post_attention_layernorm(op, x, attended)
        return x, self.mlp(op, normed), present_key, present_value


class Layers(nn.Module):
    """A run of decoder layers: layers[first:last] of the model, named as in the checkpoint."""

    def __init__(self, a: Architecture, layers: range, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__("model")
        self.hidden_size = a.hidden_size
        self.layers = {i: DecoderLayer(a, dtype, fused=fused) for i in layers}
        for i, layer in self.layers.items():
            setattr(self, f"layers.{i}", layer)

    def forward(
        self, op: OpBuilder, hidden: Value, pasts: dict[int, tuple[Value, Value]], places: Places
    ) -> tuple[Value, list[Value]]:
        """Hidden [B,T,H] -> hidden [B,T,H] and the present caches, key and value by layer."""
        x, delta = op.Reshape(hidden, [-1, self.hidden_size]), None
        presents: list[Value] = []
        for i, layer in self.layers.items():
            x, delta, *present = layer(op, x, delta, *pasts[i], places)
            presents += present
        # shaped before the sum, not after it: a reshape into a graph's output is a copy
        x, delta = (op.Reshape(part, [1, -1, self.hidden_size]) for part in (x, delta))
        return op.Add(x, delta), presents


class Head(nn.Module):
    """Final norm, LM head, argmax, and the embedding of the token picked."""

    def __init__(self, a: Architecture, dtype: ir.DataType, *, fused: bool) -> None:
        super().__init__()
        self.a, self.fused = a, fused
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps, dtype)
        self.norm._set_name("model.norm")
        self.embed_tokens = nn.Parameter([a.vocab_size, a.hidden_size], dtype, "model.embed_tokens.weight")
        if not a.tie_word_embeddings:
            self.lm_head = nn.Parameter([a.vocab_size, a.hidden_size], dtype, "lm_head.weight")

    def forward(self, op: OpBuilder, hidden: Value) -> tuple[Value, Value, Value]:
        """Hidden [B,T,H] -> logits [B,T,V], token ids [B,T], their embeddings [B,T,H]."""
        table = self.embed_tokens if self.a.tie_word_embeddings else self.lm_head
        if self.fused:
            logits = op.FusedMatMul(self.norm(op, hidden), table, transB=1, _domain="com.microsoft")
        else:
            normed = self.norm(op, op.Reshape(hidden, [-1, self.a.hidden_size]))
            logits = op.Reshape(op.Gemm(normed, table, transB=1), [1, -1, self.a.vocab_size])
        # ONNX Runtime's ArgMax has no bf16 on CUDA; the wider numbers are the same
        ranked = op.Cast(logits, to=ir.DataType.FLOAT) if table.dtype == ir.DataType.BFLOAT16 else logits
        token_ids = op.ArgMax(ranked, axis=-1, keepdims=0)
        return logits, token_ids, op.Gather(self.embed_tokens, token_ids)


def places(op: OpBuilder, position_ids: Value, cos: Value, sin: Value, capacity: int, *, fused: bool) -> Places:
    """Derives from `position_ids` [B,T], the one source of truth for place, what the attention core wants."""
    if fused:
        last = op.Squeeze(op.Slice(position_ids, [-1], [np.iinfo(np.int64).max], [1]), [1])
        return Places(
            position_ids,
            cos,
            sin,
            last_position=op.Cast(last, to=ir.DataType.INT32),
            capacity=op.Constant(value=ir.tensor(np.array(capacity, np.int32))),
        )
    rows = op.Constant(value=ir.tensor(np.arange(capacity, dtype=np.int64)))
    mask = op.LessOrEqual(rows, op.Unsqueeze(position_ids, [1, 3]))
    first = op.Squeeze(op.Slice(position_ids, [0], [1], [1]), [1])
    return Places(position_ids, cos, sin, write_index=first, mask=mask)
