"""The graphs of a bundle, written from the architecture and pointed at the weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from edgeskip.exporter.formats import ONNX_DTYPES, Spelling, StoredValue
from edgeskip.exporter.graphs.decoder import Decoder
from edgeskip.exporter.graphs.dialects import WRITERS as DIALECT_WRITERS
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.dtypes import BY_SAFETENSORS, DType
from edgeskip.runtime.bundle.graphs import Graph, GraphName, Tensor, dimensions
from edgeskip.runtime.bundle.layers import COMES, ENDS, PARTS
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.bundle.tensors import ROPE_TABLES, TensorRecord
from edgeskip.runtime.bundle.weights import StoredArray


@dataclass(frozen=True)
class Model:
    """What graphs are written from: the architecture, the dtype that is computed in, the cache capacity C in rows, and
    the tensors, with the places of their parts in the weights file.
    """

    architecture: Architecture
    dtype: DType
    capacity: int
    tensors: Mapping[str, TensorRecord]
    arrays: Mapping[str, StoredArray]


def split_graph(name: GraphName, graph: Graph, model: Model, dialect: str) -> ir.Model:
    """Writes a graph of the contract in a dialect."""
    writing = begin(name, model, dialect)
    decoder, builder = writing.decoder, writing.decoder.builder
    sizes = graph.dimensions(dimensions(model.architecture, model.capacity))

    def declared(tensor: Tensor, shape: tuple[str, ...]) -> tuple[ir.DataType, list[int | str]]:
        return ONNX_DTYPES[tensor.number_type(model.dtype)], [sizes.get(dim, dim) for dim in shape]

    inputs = {tensor.name: builder.input(tensor.name, *declared(tensor, tensor.shape)) for tensor in graph.inputs}
    if graph.head:
        row_inputs = {tensor.name: inputs[tensor.name] for tensor in graph.inputs[1:]}
        outputs = list(decoder.head(inputs[graph.reads], graph.head, row_inputs))
    elif name in PARTS:
        outputs = _part(name, decoder, [inputs[tensor.name] for tensor in graph.inputs])
    else:
        places = writing.places(inputs["position_ids"], model.capacity)
        pasts = {i: (inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"]) for i in graph.layers}
        hidden, presents = decoder.layers(inputs[graph.reads], graph.layers, pasts, places)
        outputs = [hidden, *presents]
    for tensor, value in zip(graph.outputs, outputs, strict=True):
        element, shape = declared(tensor, DIALECTS[dialect].output_shape(tensor))
        value.type, value.shape = ir.TensorType(element), ir.Shape(shape)
        builder.add_output(value, tensor.name)
    return writing.finished()


def _part(name: str, decoder: Decoder, inputs: list[ir.Value]) -> list[ir.Value]:
    """Writes a part of a layer, as that of layer 0, and of layer 1 where it reaches into the next."""
    if name == "first":
        return [decoder.first(1, *inputs)]
    return list(decoder.between(0, *inputs)) if name == "between" else [decoder.last(0, *inputs)]


def _input_name(name: str) -> str:
    """The name of a weight as an input of a part."""
    return name.replace("model.layers.0.", ENDS).replace("model.layers.1.", COMES)


@dataclass(frozen=True)
class Writing:
    """A graph that is being written."""

    decoder: Decoder
    places: Callable[..., Any]

    def finished(self) -> ir.Model:
        """The model of the graph."""
        for node in self.decoder.builder.graph:
            node.metadata_props.clear()
        return ir.Model(
            self.decoder.builder.graph, ir_version=self.decoder.dialect.ir_version, producer_name="edgeskip"
        )


def begin(name: str, model: Model, dialect: str) -> Writing:
    """Begins a graph; its `places` takes `position_ids` [B,T] and a capacity, as a number or
    a value.
    """
    writer = DIALECT_WRITERS[dialect].suited(model.architecture)
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=dict(writer.opsets), name=name))
    decoder = Decoder(builder, model.architecture, writer, _weights(builder, model, dialect))

    def places(position_ids: ir.Value, capacity: int | ir.Value) -> Any:
        cos, sin = (decoder.weights(name).whole(builder.op) for name in ROPE_TABLES)
        return writer.places(builder.op, position_ids, cos, sin, capacity)

    return Writing(decoder, places)


def _weights(builder: GraphBuilder, model: Model, dialect: str) -> Callable[..., StoredValue]:
    """The bundle's tensors in a graph, by the dialect's convention: as inputs, each in the dtype whatever the file has,
    or as initializers, one for each way in which a part is spelled.
    """
    conventions, dtype = DIALECTS[dialect], ONNX_DTYPES[model.dtype]
    inputs: dict[tuple[str, int], ir.Value] = {}
    initializers: dict[tuple[str, int, Spelling | None, int], ir.Value] = {}

    def input_(record: TensorRecord, rows: int) -> ir.Value:
        if (record.name, rows) not in inputs:
            name = _input_name(record.name) if conventions.in_parts else record.name
            inputs[record.name, rows] = builder.input(name, dtype, [rows, *record.shape[1:]])
        return inputs[record.name, rows]

    def initializer(record: TensorRecord, rows: int, suffix: str, spelled: Spelling | None, start: int) -> ir.Value:
        name = record.name + suffix
        if (name, rows, spelled, start) not in initializers:
            array = model.arrays[name]
            own = ONNX_DTYPES[BY_SAFETENSORS[array.dtype]], (rows, *array.shape[1:])
            element, shape = spelled or own
            row_bytes = array.bytes // record.shape[0]
            as_named = f"{name}.{element.name.lower()}" if spelled else name
            as_named = as_named if shape[0] == record.shape[0] else f"{as_named}.{start}.{shape[0]}"
            tensor = ir.ExternalTensor(
                WEIGHTS,
                array.offset + row_bytes * start,
                row_bytes * shape[0],
                element,
                shape=ir.Shape(shape),
                name=as_named,
            )
            initializers[name, rows, spelled, start] = builder.initializer(tensor, as_named, qualify=False)
        return initializers[name, rows, spelled, start]

    def weights(name: str, rows: int | None = None) -> StoredValue:
        record = model.tensors[name]
        count = record.shape[0] if rows is None else rows
        shape = (count, *record.shape[1:])
        if conventions.weights == "initializers":
            return StoredValue(record.format, shape, dtype, partial(initializer, record, count))
        value = input_(record, count)
        return StoredValue(model.dtype, shape, dtype, lambda *_: value)

    return weights
