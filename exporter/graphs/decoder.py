"""The Llama family as ONNX graphs: its mathematics, written once, in the operators of any dialect.

Tensors have the checkpoint's names, except for the packed `qkv_proj` and `gate_up_proj`. Linear layers work on
[B*T, ...], so that each is one product; attention works on [B, T, ...].

    x -> norm -> qkv_proj -> attention -> o_proj -> + x -> norm -> gate_up_proj -> SiLU(gate) * up -> down_proj -> + x
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder

from edgeskip.exporter.formats import StoredValue
from edgeskip.exporter.graphs.pickers import PICKERS
from edgeskip.exporter.graphs.writer import DialectWriter, Heads
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.graphs import HeadRecord
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM

Value = ir.Value


class Weights(Protocol):
    """The bundle's tensors in a graph."""

    def __call__(self, name: str, rows: int | None = None) -> StoredValue:
        """A whole tensor, or its first rows."""
        ...


@dataclass(frozen=True)
class Decoder:
    """A model being written into one graph."""

    builder: GraphBuilder
    architecture: Architecture
    dialect: DialectWriter
    weights: Weights

    @property
    def op(self) -> OpBuilder:
        """Adds nodes."""
        return self.builder.op

    def layers(
        self, hidden: Value, layers: range, pasts: Mapping[int, tuple[Value, Value]], places: Any
    ) -> tuple[Value, list[Value]]:
        """A run of layers: hidden [B,T,H] -> hidden [B,T,H], and what is handed back of the caches, key and value by
        layer.
        """
        op, size = self.op, self.architecture.hidden_size
        x, delta = op.Reshape(hidden, [-1, size]), None
        presents: list[Value] = []
        for i in layers:
            with self._scope(f"model.layers.{i}"):
                x, delta, *present = self._layer(f"model.layers.{i}", x, delta, pasts[i], places)
            presents += present
        # shaped before the sum, not after it: a reshape into a graph's output is a copy
        x, delta = (op.Reshape(part, [1, -1, size]) for part in (x, delta))
        return op.Add(x, delta), presents

    def head(self, hidden: Value, head: HeadRecord, row_inputs: Mapping[str, Value]) -> tuple[Value, ...]:
        """Hidden [B,T,H] -> logits [B,T,V], token ids [B,T], their logits [B,T], their embeddings [B,T,H]."""
        op, a = self.op, self.architecture
        rows = None if head.vocabulary == a.vocab_size else head.vocabulary
        logits = self.logits(hidden, rows)
        token_ids = PICKERS[head.picker](op, logits, row_inputs)
        token_logits = op.GatherND(logits, op.Unsqueeze(token_ids, [2]), batch_dims=2)
        return logits, token_ids, token_logits, self.dialect.gather(op, self.weights(EMBEDDINGS, rows), token_ids)

    def logits(self, hidden: Value, rows: int | None = None) -> Value:
        """Final norm and LM head: hidden [B,T,H] -> logits [B,T,V], or those of the first rows of the vocabulary."""
        table = self.weights(EMBEDDINGS if self.architecture.tie_word_embeddings else LM_HEAD, rows)
        normed = self.dialect.norm(self.op, hidden, self._whole(NORM), self.architecture.rms_norm_eps)
        logits = self.dialect.logits(self.op, normed, table)
        logits.type = ir.TensorType(table.dtype)
        return logits

    def first(self, layer: int, hidden: Value) -> Value:
        """What comes before a layer's attention: hidden [B,T,H] -> qkv [T,Q]."""
        with self._scope("next"):
            return self._projected(f"model.layers.{layer}", self.op.Reshape(hidden, [-1, self._size]), None)[0]

    def between(self, layer: int, hidden: Value, attended: Value) -> tuple[Value, Value]:
        """From one layer's attention [T,A] to that of the next: -> hidden [B,T,H], qkv [T,Q]."""
        x, delta = self._after_attention(layer, hidden, attended)
        with self._scope("next"):
            qkv, x = self._projected(f"model.layers.{layer + 1}", x, delta)
        return self.op.Reshape(x, [1, -1, self._size]), qkv

    def last(self, layer: int, hidden: Value, attended: Value) -> Value:
        """What comes after a layer's attention [T,A]: -> hidden [B,T,H]."""
        x, delta = self._after_attention(layer, hidden, attended)
        out: Value = self.op.Reshape(self.op.Add(x, delta), [1, -1, self._size])
        return out

    def _after_attention(self, layer: int, hidden: Value, attended: Value) -> tuple[Value, Value]:
        with self._scope("layer"):
            return self._finished(f"model.layers.{layer}", self.op.Reshape(hidden, [-1, self._size]), attended)

    @property
    def _size(self) -> int:
        return self.architecture.hidden_size

    def _layer(
        self, name: str, x: Value, delta: Value | None, pasts: tuple[Value, Value], places: Any
    ) -> tuple[Value, Value, Value, Value]:
        """One pre-norm layer: (residual stream, its last summand, which the next norm adds) -> the same, and caches."""
        a, op = self.architecture, self.op
        qkv, x = self._projected(name, x, delta)
        attended, key, value = self.dialect.attention(op, self._heads(name), qkv, pasts, places)
        flat = op.Reshape(attended, [-1, a.num_heads * a.head_dim])
        return *self._finished(name, x, flat), key, value

    def _projected(self, name: str, x: Value, delta: Value | None) -> tuple[Value, Value]:
        """Norm and projections: -> queries, keys and values of all heads [B*T,Q], and the residual stream [B*T,H]."""
        eps = self.architecture.rms_norm_eps
        normed, x = self.dialect.skip_norm(self.op, x, delta, self._whole(f"{name}.input_layernorm.weight"), eps)
        return self._linear(f"{name}.self_attn.qkv_proj", normed, bias=self.architecture.qkv_bias), x

    def _finished(self, name: str, x: Value, attended: Value) -> tuple[Value, Value]:
        """What follows a layer's attention [B*T,A]: -> the residual stream, and what is still to be added to it."""
        eps = self.architecture.rms_norm_eps
        attended = self._linear(f"{name}.self_attn.o_proj", attended, bias=self.architecture.output_bias)
        norm = self._whole(f"{name}.post_attention_layernorm.weight")
        normed, x = self.dialect.skip_norm(self.op, x, attended, norm, eps)
        return x, self._mlp(f"{name}.mlp", normed)

    def _heads(self, name: str) -> Heads:
        a = self.architecture
        if not a.qk_norm:
            return Heads(a, None, None)
        norms = (self._whole(f"{name}.self_attn.{part}_norm.weight") for part in "qk")
        q_norm, k_norm = (partial(self.dialect.norm, self.op, weight=norm, eps=a.rms_norm_eps) for norm in norms)
        return Heads(a, q_norm, k_norm)

    def _mlp(self, name: str, x: Value) -> Value:
        """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), gate and up in one product."""
        op, bias = self.op, self.architecture.mlp_bias
        gate, up = op.Split(self._linear(f"{name}.gate_up_proj", x, bias=bias), num_outputs=2, axis=1, _outputs=2)
        return self._linear(f"{name}.down_proj", op.Mul(self.dialect.silu(op, gate), up), bias=bias)

    def _linear(self, name: str, x: Value, *, bias: bool) -> Value:
        weight = self.weights(f"{name}.weight")
        return self.dialect.linear(self.op, x, weight, self._whole(f"{name}.bias") if bias else None)

    def _whole(self, name: str) -> Value:
        return self.weights(name).whole(self.op)

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        """Makes the names of nodes say which layer they belong to."""
        self.builder.push_module(name)
        try:
            yield
        finally:
            self.builder.pop_module()
