"""A session on engines of parts of layers, with an attention of ours between them: see runtime/bundle/layers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgeskip.runtime.backends.attention import Attention, Operands
from edgeskip.runtime.backends.trt_session import TrtSession
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.bundle.layers import PARTS
from edgeskip.runtime.bundle.tensors import ROPE_TABLES
from edgeskip.runtime.decoding.rounds import Call


class LayersSession(TrtSession):
    """TensorRT between the attentions, and kernels of ours for those.

    A run of layers is enqueued engine by engine, each bound to the weights of its layers; in a captured round that
    costs the host nothing.
    """

    def _prepare(self) -> None:
        a, longest, itemsize = self._bundle.manifest.architecture, self._longest, ITEMSIZE[self._dtype]
        cos, sin = (self._weights.address_of(name) for name in ROPE_TABLES)
        self._attention = Attention(self._device, a, self._dtype, self._dims["C"], longest, (cos, sin))
        for taken in self._attention.memory:
            self._workspace_bytes += taken.bytes
            self.planned_bytes += taken.bytes
        sizes = {"qkv": self._dims["Q"], "attended": self._dims["A"], "even": self._dims["H"], "odd": self._dims["H"]}
        self._between = {
            name: self._taken(longest * size * itemsize, f"for {name}").address for name, size in sizes.items()
        }

    def _engines_of(self, call: Call) -> tuple[GraphName, ...]:
        return (call.graph,) if call.graph in self._engines else tuple(PARTS)

    def _enqueued(self, call: Call) -> Callable[[], None]:
        if call.graph in self._engines:
            return super()._enqueued(call)
        layers = self._graph_table[call.graph].layers
        profile, rows = self._profile("between", call.rows)
        before: list[Callable[[], None]] = []
        after: list[Callable[[], None]] = []
        states, positions = call.inputs[0][1], dict(call.inputs)["position_ids"]
        hidden = self._on_grid(states, rows, before, is_input=True)
        out = self._on_grid(call.outputs[0][1], rows, after, is_input=False)
        qkv, attended = self._between["qkv"], self._between["attended"]
        steps = [self._execution("first", profile, rows, {"hidden_states": hidden, "qkv": qkv}, (0, layers[0]))]
        at = Operands(qkv, attended, 0, 0, self._address(positions))
        for layer in layers:
            steps.append(self._attention.enqueued(call.rows, self._operands(call, layer, at)))
            tensors = {"hidden_states": hidden, "attended": attended}
            if layer == layers[-1]:
                steps.append(self._execution("last", profile, rows, tensors | {"output_states": out}, (layer, 0)))
                break
            hidden = self._between["odd" if layer % 2 else "even"]
            tensors |= {"output_states": hidden, "qkv": qkv}
            steps.append(self._execution("between", profile, rows, tensors, (layer, layer + 1)))

        def enqueue() -> None:
            for step in (*before, *steps, *after):
                step()

        return enqueue

    def _operands(self, call: Call, layer: int, at: Operands) -> Operands:
        keys, values = (self._caches[call.cache(f"past_key_values.{layer}.{part}")] for part in ("key", "value"))
        norms = {
            f"{part}_norm": self._weights.address_of(name)
            for part in "qk"
            if (name := f"model.layers.{layer}.self_attn.{part}_norm.weight") in self._weights.arrays
        }
        return replace(at, keys=keys.address, values=values.address, **norms)
