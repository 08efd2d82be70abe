"""The three graphs of a bundle, authored from the architecture and pointed at the weights file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript import GraphBuilder

from edgeskip.exporter import decoder
from edgeskip.exporter.weights import PlacedTensor, WeightsLayout
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.graphs import Graph, GraphName, Tensor, dimensions
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.bundle.weights import StoredTensor

OPSETS = {"standard": 24, "ort": 23}
"""The lowest that has each dialect's operators; ONNX Runtime reads 24 from its release 1.24 on."""
DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def split_graph(
    name: GraphName, graph: Graph, architecture: Architecture, layout: WeightsLayout, dialect: str
) -> ir.Model:
    """Authors one graph.

    Args:
        name: which.
        graph: its layers and tensors, from the contract.
        architecture: the model.
        layout: where each weight stands, its dtype and the cache capacity (the rows of `rope.cos`).
        dialect: `standard` or `ort`.
    """
    fused = dialect == "ort"
    dtype = DTYPES[layout.dtype]
    capacity = layout.tensors["rope.cos"].shape[0]
    sizes = dimensions(architecture, capacity)
    opsets = {"": OPSETS[dialect]} | ({"com.microsoft": 1} if fused else {})
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=opsets, name=name))
    op = builder.op

    def declared(tensor: Tensor) -> tuple[ir.DataType, list[int | str]]:
        element = dtype if tensor.dtype == "float" else ir.DataType.INT64
        return element, [sizes.get(dim, dim) for dim in tensor.shape]

    inputs = {tensor.name: builder.input(tensor.name, *declared(tensor)) for tensor in graph.inputs}
    if name == "head":
        outputs = list(decoder.Head(architecture, dtype, fused=fused)(op, inputs["hidden_states"]))
    else:
        tables = ("rope.cos", "rope.sin")
        cos, sin = (builder.initializer(external(layout.tensors[name], name, dtype), name) for name in tables)
        places = decoder.places(op, inputs["position_ids"], cos, sin, capacity, fused=fused)
        pasts = {i: (inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"]) for i in graph.layers}
        layers = decoder.Layers(architecture, graph.layers, dtype, fused=fused)
        hidden, presents = layers(op, inputs[graph.inputs[0].name], pasts, places)
        outputs = [hidden, *presents]
    for tensor, value in zip(graph.outputs, outputs, strict=True):
        element, shape = declared(tensor)
        value.type, value.shape = ir.TensorType(element), ir.Shape(shape)
        builder.add_output(value, tensor.name)
    return finished(builder, layout.tensors, dtype)


def finished(builder: GraphBuilder, tensors: Mapping[str, PlacedTensor | StoredTensor], dtype: ir.DataType) -> ir.Model:
    """The model of a built graph, its weights pointed at their places in the weights file."""
    for name, value in builder.graph.initializers.items():
        if value.const_value is None:
            value.const_value = external(tensors[name], name, dtype)
    for node in builder.graph:
        node.metadata_props.clear()
    return ir.Model(builder.graph, ir_version=11, producer_name="edgeskip")


def external(placed: PlacedTensor | StoredTensor, name: str, dtype: ir.DataType) -> ir.ExternalTensor:
    """A tensor in the weights file."""
    return ir.ExternalTensor(WEIGHTS, placed.offset, placed.bytes, dtype, shape=ir.Shape(placed.shape), name=name)
