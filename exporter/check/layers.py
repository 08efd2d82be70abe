"""Where a graph departs: the bundle's own file once more, in ONNX Runtime, with whatever each layer adds as an output.

    layers[i]   x --> norm --> attention --> + --> norm --> MLP --> +
                                   |                         |
                                tapped                    tapped

The taps are found by the norms' weights, in either dialect. Inputs and outputs are cast from and to fp32 within the
graph, so that numpy can feed all dtypes alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeskip.exporter.check.golden import Golden, Trace
from edgeskip.runtime.backends.ort import CUDA_PROVIDER, cpu_options, has_cuda_provider, onnxruntime, ort_errors
from edgeskip.runtime.bundle.graphs import Graph, GraphName, dimensions, present_name
from edgeskip.runtime.bundle.manifest import Bundle

Array = npt.NDArray[Any]


class TappedGraph:
    """One graph of a bundle with its layers' summands as outputs, and with caches of its own.

    Args:
        bundle: the bundle.
        name: the graph's name.
        dialect: the file's dialect.
        device: `cuda` if ONNX Runtime should use its CUDA provider.

    Raises:
        BackendError: ONNX Runtime is missing, or cannot run the graph there.
    """

    def __init__(self, bundle: Bundle, name: GraphName, dialect: str, device: str) -> None:
        manifest = bundle.manifest
        self.name, self._graph = name, manifest.graphs[name]
        self._pasts = [tensor.name for tensor in self._graph.inputs if tensor.is_cache]
        path = bundle.graph_path(name, dialect)
        model = ir.load(path)
        taps = _taps(model.graph, self._graph)
        _fp32_inputs(model.graph)
        presents = {str(value.name): value for value in model.graph.outputs}
        _set_outputs(model.graph, taps | {present_name(name): presents[present_name(name)] for name in self._pasts})
        self.taps = tuple(taps)
        ort = onnxruntime()
        on_gpu = device == "cuda" and has_cuda_provider(ort)
        options = cpu_options(ort, 0)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
        providers = [CUDA_PROVIDER] if on_gpu else []
        data = ir.to_proto(model).SerializeToString()
        with ort_errors(f"{path}, with its layers as outputs"):
            self._session = ort.InferenceSession(data, options, providers=[*providers, "CPUExecutionProvider"])
        dims = dimensions(manifest.architecture, manifest.max_length)
        self._caches = {
            t.name: np.zeros([dims[dim] for dim in t.shape], np.float32) for t in self._graph.inputs if t.is_cache
        }

    def run(self, states: Array, start: int) -> dict[str, Array]:
        """What each layer adds to states [T,H], and the cache rows it writes, [T, values]."""
        feeds: dict[str, Array] = {self._graph.inputs[0].name: states[None], **self._caches}
        rows = slice(start, start + len(states))
        if self._caches:
            feeds["position_ids"] = np.arange(rows.start, rows.stop)[None]
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, feeds), strict=True))
        outputs = {}
        for name in self._caches:
            self._caches[name] = found[present_name(name)]
            outputs[name] = self._caches[name][0, :, rows].transpose(1, 0, 2).reshape(len(states), -1)
        return outputs | {name: found[name].reshape(len(states), -1) for name in self.taps}

    def order(self) -> Iterable[tuple[str, int | None, str]]:
        """Outputs in the order of computation: name, layer, and part of the layer."""
        if self._graph.head:
            return [("norm", None, "norm"), ("logits", None, "LM head")]
        return [
            (name.format(i), i, part)
            for i in self._graph.layers
            for name, part in (
                ("past_key_values.{}.key", "attention"),
                ("past_key_values.{}.value", "attention"),
                ("layers.{}.attention", "attention"),
                ("layers.{}.mlp", "MLP"),
            )
        ]


def golden_taps(golden: Golden, trace: Trace, graph: Graph, rows: slice) -> dict[str, Array]:
    """What `TappedGraph.run` should give for these rows of a text."""
    if graph.head:
        states = trace.states[max(trace.states)][rows]
        return {"norm": golden.norm(states), "logits": golden.logits(states)[:, : graph.head.vocabulary]}
    caches = {key: cache[rows] for key, cache in trace.caches.items()}
    attention = {f"layers.{i}.attention": added[rows] for i, added in trace.attention.items()}
    return caches | attention | {f"layers.{i}.mlp": added[rows] for i, added in trace.mlp.items()}


def _taps(graph: ir.Graph, contract: Graph) -> dict[str, ir.Value]:
    """Values to make outputs, by name."""
    readers = {value.name: node for node in graph for value in node.inputs if value is not None}
    layers = contract.layers
    if contract.head:
        return {"norm": readers["model.norm.weight"].outputs[0], "logits": graph.outputs[0]}
    taps = {}
    for i in layers:
        taps[f"layers.{i}.attention"] = _summand(readers[f"model.layers.{i}.post_attention_layernorm.weight"])
        last = i + 1 == layers.stop
        taps[f"layers.{i}.mlp"] = _summand(
            graph.outputs[0].producer() if last else readers[f"model.layers.{i + 1}.input_layernorm.weight"]
        )
    return taps


def _summand(node: ir.Node | None) -> ir.Value:
    """What is added to the residual stream at a norm, at a fused norm, or at the sum itself."""
    while node is not None and node.op_type == "RMSNormalization":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None
    summand = node.inputs[1]
    assert summand is not None
    return summand


def _fp32_inputs(graph: ir.Graph) -> None:
    for i, value in enumerate(list(graph.inputs)):
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            given = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            cast = ir.node("Cast", [given], {"to": value.dtype})
            cast.outputs[0].name = f"{value.name}.narrowed"
            graph.inputs[i] = given
            value.replace_all_uses_with(cast.outputs[0])
            graph.insert_before(graph[0], cast)


def _set_outputs(graph: ir.Graph, outputs: dict[str, ir.Value]) -> None:
    graph.outputs.clear()
    for name, value in outputs.items():
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        graph.append(cast)
        if value.name == name:
            value.name = f"{name}.stored"
        cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(cast.outputs[0])
