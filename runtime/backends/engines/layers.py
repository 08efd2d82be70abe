"""A session on engines of parts of layers, with an attention of ours between them: see runtime/bundle/layers.py.

Rounds, which are bound by the bytes of the weights, do without those engines: each linear layer, the head's too, is a
kernel of ours that reads its matrix once, as it is stored, at the pace of memory. Prompts, which are bound by
arithmetic, run in the engines, unless matrices of layers are quantized: TensorRT never sees one of those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from edgeskip.runtime.backends.device import Step, in_order
from edgeskip.runtime.backends.engines.attention import Attention, Operands
from edgeskip.runtime.backends.engines.heads import Picked, embedder, picker, room
from edgeskip.runtime.backends.engines.products import Matrix, Product, enqueued, long_enqueued
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.formats import FORMATS, SCALES
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName
from edgeskip.runtime.bundle.layers import PARTS
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM, ROPE_TABLES
from edgeskip.runtime.decoding.rounds import Call


class LayersSession(TrtSession):
    """TensorRT for prompts; kernels of ours for attention, for linear layers of few rows, and for picking tokens.

    A run of layers is enqueued part by part, each bound to the weights of its layers; in a captured round that costs
    the host nothing.
    """

    def _prepare(self) -> None:
        manifest, itemsize = self._bundle.manifest, ITEMSIZE[self._dtype]
        a, longest = manifest.architecture, self._longest
        cos, sin = (self._weights.address_of(name) for name in ROPE_TABLES)
        self._attention = Attention(self._device, a, self._dtype, self._dims["C"], longest, (cos, sin))
        for taken in self._attention.memory:
            self._workspace_bytes += taken.bytes
            self.planned_bytes += taken.bytes
        self._has_products = manifest.has_products(self._device.compute_capability)
        sizes = {name: self._dims[dim] for name, dim in (("qkv", "Q"), ("attended", "A"), ("even", "H"), ("odd", "H"))}
        shapes = {name: (longest, size) for name, size in sizes.items()}
        if self._has_products:  # what lies between products of ours alone
            shapes["gated"] = HEAD_ROWS if self._files else longest, a.intermediate_size
        if not self._files:
            shapes["normalized"] = longest, a.hidden_size
        self._between = {
            name: self._taken(rows * size * itemsize, f"for {name}").address for name, (rows, size) in shapes.items()
        }
        if self._has_products:
            parts, counters = (self._taken(size, "for picking tokens").address for size in room())
            table = self._device, self._matrix(EMBEDDINGS), a.hidden_size, self._dtype
            self._pick, self._embed = picker(*table, (parts, counters)), embedder(*table)
            self._token_ids = self._taken(longest * ITEMSIZE["int64"], "for token ids").address

    def _token_table(self) -> Matrix:
        return self._matrix(EMBEDDINGS)

    def _engines_of(self, call: Call) -> tuple[GraphName, ...]:
        if call.graph in self._engines:
            return (call.graph,)
        return () if self._is_ours(call) else tuple(PARTS)

    def _is_ours(self, call: Call) -> bool:
        """Whether kernels of ours do all of a call."""
        return self._has_products and (call.rows <= HEAD_ROWS or not self._files)

    def _enqueued(self, call: Call) -> Step:
        if call.graph in self._engines:
            return super()._enqueued(call)
        if self._graph_table[call.graph].head:
            steps = self._head(call)
        else:
            steps = self._by_products(call) if self._is_ours(call) else self._by_engines(call)
        return partial(in_order, steps)

    def _head(self, call: Call) -> list[Step]:
        """A head: its logits, and what is picked from them."""
        a, head, outputs = self._bundle.manifest.architecture, self._graph_table[call.graph].head, dict(call.outputs)
        assert head is not None
        logits, *picked = (
            self._address(outputs[name]) for name in ("logits", "token_ids", "token_logits", "inputs_embeds")
        )
        table = self._matrix(EMBEDDINGS if a.tie_word_embeddings else LM_HEAD)
        product = Product(table, a.hidden_size, head.vocabulary, norm=self._weight(NORM))
        return [
            self._binder(call.rows)(product, self._address(call.inputs[0][1]), logits),
            self._pick(Picked(logits, *picked), call.rows, head.vocabulary),
        ]

    def _by_products(self, call: Call) -> list[Step]:
        """A run of layers, each linear layer of which is a kernel that reads its matrix as it is stored."""
        a, dims, rows, bind = self._bundle.manifest.architecture, self._dims, call.rows, self._binder(call.rows)
        hidden, size, ffn = self._address(call.inputs[0][1]), dims["H"], a.intermediate_size
        qkv, attended, gated, between = (self._between[name] for name in ("qkv", "attended", "gated", "even"))
        steps: list[Step] = []
        for layer in (layers := self._graph_table[call.graph].layers):
            self_attn, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            norms = [
                self._weight(f"model.layers.{layer}.{part}_layernorm.weight") for part in ("input", "post_attention")
            ]
            out = self._address(call.outputs[0][1]) if layer == layers[-1] else self._between["odd"]
            steps += [
                bind(self._product(f"{self_attn}.qkv_proj", size, dims["Q"], norm=norms[0]), hidden, qkv),
                self._attention.enqueued(rows, self._operands(call, layer)),
                bind(self._product(f"{self_attn}.o_proj", dims["A"], size, residual=hidden), attended, between),
                bind(self._product(f"{mlp}.gate_up_proj", size, ffn, norm=norms[1], gated=True), between, gated),
                bind(self._product(f"{mlp}.down_proj", ffn, size, residual=between), gated, out),
            ]
            hidden = out
        return steps

    def _binder(self, rows: int) -> Callable[[Product, int, int], Step]:
        eps = self._bundle.manifest.architecture.rms_norm_eps
        bound = enqueued if rows <= HEAD_ROWS else long_enqueued
        return partial(bound, self._device, rows=rows, dtype=self._dtype, eps=eps)

    def _product(self, name: str, inputs: int, outputs: int, **more: Any) -> Product:
        more |= {"bias": self._weight(f"{name}.bias"), "normalized": self._between.get("normalized", 0)}
        return Product(self._matrix(f"{name}.weight"), inputs, outputs, **more)

    def _matrix(self, name: str) -> Matrix:
        """A matrix as it is stored."""
        format_ = FORMATS[self._bundle.manifest.tensors[name].format]
        return Matrix(self._weight(name), self._weight(name + SCALES), format_.bits or 16, format_.block_size or 0)

    def _weight(self, name: str) -> int:
        """Where an array of the weights file is; 0 if the model has none of this name."""
        return self._weights.address_of(name) if name in self._weights.arrays else 0

    def _by_engines(self, call: Call) -> list[Step]:
        """A run of layers of many rows."""
        layers = self._graph_table[call.graph].layers
        profile, rows = self._profile("between", call.rows)
        before: list[Step] = []
        after: list[Step] = []
        hidden = self._on_grid(call.inputs[0][1], rows, before, is_input=True)
        out = self._on_grid(call.outputs[0][1], rows, after, is_input=False)
        qkv, attended = self._between["qkv"], self._between["attended"]
        steps = [self._execution("first", profile, rows, {"hidden_states": hidden, "qkv": qkv}, (0, layers[0]))]
        for layer in layers:
            steps.append(self._attention.enqueued(call.rows, self._operands(call, layer)))
            tensors = {"hidden_states": hidden, "attended": attended}
            if layer == layers[-1]:
                steps.append(self._execution("last", profile, rows, tensors | {"output_states": out}, (layer, 0)))
                break
            hidden = self._between["odd" if layer % 2 else "even"]
            tensors |= {"output_states": hidden, "qkv": qkv}
            steps.append(self._execution("between", profile, rows, tensors, (layer, layer + 1)))
        return [*before, *steps, *after]

    def _operands(self, call: Call, layer: int) -> Operands:
        keys, values = (self._caches[call.cache(f"past_key_values.{layer}.{part}")] for part in ("key", "value"))
        q_norm, k_norm = (self._weight(f"model.layers.{layer}.self_attn.{part}_norm.weight") for part in "qk")
        positions = self._address(dict(call.inputs)["position_ids"])
        between = self._between["qkv"], self._between["attended"]
        return Operands(*between, keys.address, values.address, positions, q_norm, k_norm)
