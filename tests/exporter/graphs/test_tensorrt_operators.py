"""Every node of the graphs for TensorRT 10.3 is one that its parser reads, by its own list of operators."""

from __future__ import annotations

import onnx
import pytest
from tests.conftest import VARIANTS

from edgeskip.exporter.graphs.tensorrt_operators import CONSTANT_INPUTS, OPERATORS, OPSETS
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.layers import files_of

DTYPES = [
    *((variant, "fp16") for variant in VARIANTS),
    *((variant, d) for variant in ("llama-gqa", "qwen3") for d in ("fp32", "bf16")),
]


def models(bundle, dialect):
    """The graph files of a dialect that engines are built from."""
    of = ENGINE_DIALECTS[dialect]
    for name in files_of(bundle.manifest.graphs, of):
        yield onnx.load(str(bundle.path(of.file.format(name))), load_external_data=False)


def unread(model):
    """What of a graph is not in the table, and the operators that it has."""
    problems = {f"opset {o.domain}:{o.version}" for o in model.opset_import if o.domain or o.version not in OPSETS}
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
    types |= {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        read = OPERATORS.get(node.op_type) if node.domain == "" else None
        if read is None:
            problems.add(f"{node.domain}:{node.op_type}")
            continue
        taken = [*node.input, *(node.output if node.op_type == "Constant" else [])]
        problems |= {f"{node.op_type} of {types[name]}" for name in taken if name and types[name] not in read}
        axes = CONSTANT_INPUTS.get(node.op_type)
        if axes is not None and len(node.input) > axes and node.input[axes] not in constants:
            problems.add(f"{node.op_type} of axes that are not constant")
    return problems, {node.op_type for node in graph.node}


@pytest.mark.parametrize(("variant", "dtype"), DTYPES)
def test_every_node_is_in_the_table_of_tensorrt_10_3(variant, dtype, bundles):
    bundle = bundles(variant, dtype=dtype)
    for dialect in ("primitive", "layers"):
        for model in models(bundle, dialect):
            assert unread(model)[0] == set(), (dialect, model.graph.name)


def test_the_table_has_nothing_that_no_graph_has(bundles):
    used = set()
    for dialect in ("primitive", "layers"):
        for model in models(bundles("qwen3", dtype="fp16"), dialect):
            used |= unread(model)[1]
    assert used == OPERATORS.keys()


def test_what_tensorrt_10_3_lacks_is_seen(bundles):
    """The standard graphs have operators of a later opset; and a type, or axes, that it does not take."""
    draft = next(models(bundles("llama-gqa", dtype="fp16"), "standard"))
    assert {"opset :24", ":Attention", ":RMSNormalization", ":RotaryEmbedding", ":TensorScatter"} <= unread(draft)[0]
    i, f = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("MatMul", ["counts", "counts"], ["product"]),
        onnx.helper.make_node("Squeeze", ["x", "axes"], ["squeezed"]),
    ]
    inputs = [
        onnx.helper.make_tensor_value_info(*one) for one in (("counts", i, [2, 2]), ("x", f, [1, 2]), ("axes", i, [1]))
    ]
    outputs = [onnx.helper.make_tensor_value_info(*one) for one in (("product", i, [2, 2]), ("squeezed", f, None))]
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[opset])
    assert unread(model)[0] == {"MatMul of INT64", "Squeeze of axes that are not constant"}
