"""A session on engines of parts of layers, with an attention of ours between them: see runtime/bundle/layers.py.

Rounds, which are bound by the bytes of the weights, do without those engines: each linear layer is a kernel of ours
that reads its matrix once, at the pace of memory. Prompts, which are bound by arithmetic, run in the engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeskip.runtime.backends.engines.attention import Attention, Operands
from edgeskip.runtime.backends.engines.products import Matrix, Product, enqueued, serves
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName
from edgeskip.runtime.bundle.layers import PARTS
from edgeskip.runtime.bundle.tensors import ROPE_TABLES
from edgeskip.runtime.decoding.rounds import Call


class LayersSession(TrtSession):
    """TensorRT for prompts and heads; kernels of ours for attention, and for linear layers of few rows.

    A run of layers is enqueued part by part, each bound to the weights of its layers; in a captured round that costs
    the host nothing.
    """

    def _prepare(self) -> None:
        a, longest, itemsize = self._bundle.manifest.architecture, self._longest, ITEMSIZE[self._dtype]
        cos, sin = (self._weights.address_of(name) for name in ROPE_TABLES)
        self._attention = Attention(self._device, a, self._dtype, self._dims["C"], longest, (cos, sin))
        for taken in self._attention.memory:
            self._workspace_bytes += taken.bytes
            self.planned_bytes += taken.bytes
        self._has_products = serves(a, self._dtype, self._device.compute_capability)
        sizes = {name: self._dims[dim] for name, dim in (("qkv", "Q"), ("attended", "A"), ("even", "H"), ("odd", "H"))}
        sizes["gated"] = a.intermediate_size if self._has_products else 0
        self._between = {
            name: self._taken(longest * size * itemsize, f"for {name}").address for name, size in sizes.items() if size
        }

    def _engines_of(self, call: Call) -> tuple[GraphName, ...]:
        if call.graph in self._engines:
            return (call.graph,)
        return () if self._is_few(call) else tuple(PARTS)

    def _is_few(self, call: Call) -> bool:
        """Whether kernels of ours do all of a run of layers."""
        return self._has_products and call.rows <= HEAD_ROWS

    def _enqueued(self, call: Call) -> Callable[[], None]:
        if call.graph in self._engines:
            return super()._enqueued(call)
        steps = self._by_products(call) if self._is_few(call) else self._by_engines(call)

        def enqueue() -> None:
            for step in steps:
                step()

        return enqueue

    def _by_products(self, call: Call) -> list[Callable[[], None]]:
        """A run of layers of few rows: each linear layer is a kernel that reads its matrix once."""
        a, dims, rows = self._bundle.manifest.architecture, self._dims, call.rows

        def bind(product: Product, x: int, out: int) -> Callable[[], None]:
            return enqueued(self._device, product, x, out, rows=rows, dtype=self._dtype, eps=a.rms_norm_eps)

        hidden, size, ffn = self._address(call.inputs[0][1]), dims["H"], a.intermediate_size
        qkv, attended, gated, between = (self._between[name] for name in ("qkv", "attended", "gated", "even"))
        steps: list[Callable[[], None]] = []
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

    def _product(self, name: str, inputs: int, outputs: int, **more: Any) -> Product:
        return Product(
            Matrix(self._weight(f"{name}.weight")), inputs, outputs, bias=self._weight(f"{name}.bias"), **more
        )

    def _weight(self, name: str) -> int:
        """Where a tensor is; 0 if the model has no such tensor."""
        return self._weights.address_of(name) if name in self._weights.arrays else 0

    def _by_engines(self, call: Call) -> list[Callable[[], None]]:
        """A run of layers of many rows."""
        layers = self._graph_table[call.graph].layers
        profile, rows = self._profile("between", call.rows)
        before: list[Callable[[], None]] = []
        after: list[Callable[[], None]] = []
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
