"""Quantized bundles as graphs: what they compute, judged by ONNX's reference evaluator and by transformers on weights
that are dequantized apart from the code under test; and how ONNX Runtime runs them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import GraphBuilder
from tests.dequantizer import dequantized_model, stored_weights

from edgeskip.exporter.formats import StoredValue, own_product
from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.backends.ort import cpu_options
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.manifest import WEIGHTS, Bundle, Quantization, read_bundle
from edgeskip.runtime.bundle.weights import embedding_table, read_bytes
from edgeskip.runtime.decoding.decode import Decoding, prefill
from edgeskip.runtime.load import load

PROMPTS = [list(map(int, np.random.default_rng(seed).integers(2, 300, 11))) for seed in range(3)]
VARIANTS = ("llama-gqa", "llama-tied", "llama-mlp-bias", "llama-odd-head-dim", "qwen2", "qwen3", "mistral")
MIXTURES = (
    {"weights": "int8"},
    {"weights": "int4"},
    {"weights": "int4", "head": "int4"},
    {"weights": "int4", "head": "dtype", "layers": ("0-1=int8", "3=dtype")},
)


FUSED = ("cpu", "ort")
"""Dialects with ONNX Runtime's products of quantized matrices."""


def named(mixture):
    return "-".join(str(value) for value in mixture.values())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_rows_of_the_table_for_prompts(head, dtype, bundles):
    for variant in ("llama-tied", "llama-gqa"):
        bundle = bundles(variant, weights="int4", head=head, dtype=dtype)
        wanted, table = stored_weights(bundle)["model.embed_tokens.weight"], embedding_table(bundle)
        for rows in ([5], [3, 3, 299, 0], slice(10, 13), slice(None)):
            found = torch.from_numpy(np.array(table[rows])).view(wanted.dtype)
            assert torch.equal(found, wanted[rows])


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_the_standard_head_in_the_reference_evaluator(variant, head, bundles):
    """Product and gather of the very file, with its external data, as the specification has them."""
    bundle = bundles(variant, head=head)
    evaluator = ReferenceEvaluator(onnx.load(bundle.graph_path("head", "standard")))
    states = np.random.default_rng(0).standard_normal((1, 3, 64)).astype(np.float32)
    logits, token_ids, token_logits, embeds = evaluator.run(None, {"hidden_states": states})
    weights = {name: tensor.double().numpy() for name, tensor in stored_weights(bundle).items()}
    table = weights["model.embed_tokens.weight"]
    normed = states / np.sqrt(np.square(states).mean(-1, keepdims=True) + bundle.manifest.architecture.rms_norm_eps)
    wanted = normed * weights["model.norm.weight"] @ weights.get("lm_head.weight", table).T
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(token_ids, wanted.argmax(-1))
    np.testing.assert_allclose(token_logits, wanted.max(-1), atol=1e-5)
    np.testing.assert_allclose(embeds, table[token_ids], atol=1e-7)


@pytest.mark.parametrize("mixture", MIXTURES, ids=named)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_standard_dialect_decodes_as_transformers_on_the_dequantized_weights(variant, mixture, bundles, reference):
    bundle = bundles(variant, **mixture)
    judge = dequantized_model(bundle, reference(variant))
    with load(bundle.folder, device="cpu", dialect="standard") as model:
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            wanted = judge.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=1
            )
            for settings in ({"mode": "autoregressive"}, {"num_speculations": 3}):
                found = model.complete(prompt, max_new_tokens=30, **settings)
                assert list(found.token_ids) == wanted[0, len(prompt) :].tolist()


def logits_after(bundle, dialect, prompt):
    with OrtCpuSession(bundle, dialect=dialect) as session:
        prefill(session, Decoding(bundle.manifest.split()), embedding_table(bundle)[prompt], 8)
        return session.read_logits(1)[0].astype(np.float64)


def wanted_logits(bundle, model, prompt):
    with torch.no_grad():
        return dequantized_model(bundle, model)(torch.tensor([prompt])).logits[0, -1].double().numpy()


@pytest.mark.parametrize("dialect", FUSED)
@pytest.mark.parametrize("mixture", MIXTURES, ids=named)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_dialects_compute_the_same_but_for_the_rounding_of_activations(
    variant, mixture, dialect, bundles, reference, tmp_path
):
    """ONNX Runtime rounds activations to 8 bits at accuracy level 4, and not at level 1."""
    bundle = bundles(variant, **mixture)
    exact = Bundle(shutil.copytree(bundle.folder, tmp_path / "exact"), bundle.manifest)
    for path in exact.folder.glob(f"*.{dialect}.onnx"):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(model, path)
    for prompt in PROMPTS:
        wanted = wanted_logits(bundle, reference(variant), prompt)
        np.testing.assert_allclose(logits_after(exact, dialect, prompt), wanted, atol=2e-4)
        found = logits_after(bundle, dialect, prompt)
        assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dialect", FUSED)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("mixture", MIXTURES, ids=named)
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2"])
def test_onnx_runtime_dequantizes_no_whole_matrix_in_a_call(variant, mixture, dtype, dialect, bundles, tmp_path):
    """Of the graphs as it runs them: products read the parts, and what could be folded has been."""
    bundle = bundles(variant, **mixture, dtype=dtype)
    quantized = {name for name, format_ in bundle.manifest.formats.items()}
    for name, graph in bundle.manifest.graphs.items():
        options = cpu_options(onnxruntime, 0)
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        onnxruntime.InferenceSession(bundle.graph_path(name, dialect), options, providers=["CPUExecutionProvider"])
        nodes = Counter(
            node.op_type for node in onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.node
        )
        tensors = (
            {"lm_head.weight" if variant == "qwen2" else "model.embed_tokens.weight"}
            if graph.head
            else {tensor for tensor in quantized if bundle.manifest.tensors[tensor].layer in graph.layers}
        )
        assert nodes["MatMulNBits"] == len(tensors & quantized)
        assert not nodes.keys() & {"DequantizeLinear", "BitwiseXor", "Expand"}
        assert nodes["GatherBlockQuantized"] == (1 if graph.head and mixture.get("head") == "int4" else 0)


@pytest.mark.parametrize("mixture", MIXTURES, ids=named)
def test_graphs_that_are_fed_whole_matrices_do_not_know_of_formats(mixture, bundles):
    for variant in ("llama-gqa", "llama-tied", "qwen2"):
        plain, quantized = bundles(variant), bundles(variant, **mixture)
        assert quantized.manifest.dialects.keys() == {"standard", "ort", "cpu", "layers"}
        assert quantized.manifest.engine_dialects.keys() == {"layers"}
        wanted = plain.manifest.graph_hashes(DIALECTS["layers"])
        assert quantized.manifest.graph_hashes(DIALECTS["layers"]) == wanted
        files = {path.name for path in quantized.folder.iterdir()}
        assert not [name for name in files if ".inputs." in name or ".primitive." in name]


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_a_head_over_fewer_rows_reads_the_beginning_of_the_same_parts(variant, bundles, reference):
    for head in ("int8", "int4"):
        bundle = bundles(variant, weights="int4", head=head, draft_vocabulary=220)
        whole = bundles(variant, weights="int4", head=head)
        assert bundle.manifest.files[WEIGHTS] == whole.manifest.files[WEIGHTS]
        with (
            load(bundle.folder, device="cpu", dialect="standard") as model,
            load(whole.folder, device="cpu", dialect="standard") as other,
        ):
            for prompt in PROMPTS:
                found = model.complete(prompt, num_speculations=3, max_new_tokens=30)
                assert found.token_ids == other.complete(prompt, mode="autoregressive", max_new_tokens=30).token_ids


def test_bytes_are_those_of_the_parts(bundles):
    plain, bundle = bundles("llama-gqa"), bundles("llama-gqa", weights="int4", head="int8")
    whole, read = read_bytes(plain), read_bytes(bundle)

    def size(k, n):
        return n * k // 2 + 4 * n * k // 32  # with scales in fp32

    layer = size(64, 128) + size(64, 64) + size(64, 192) + size(96, 64) + 2 * 64 * 4
    assert read["draft"] == 2 * layer
    assert read["head"] == 300 * 64 + 300 * 4 + 64 * 4
    assert sum(read.values()) < 0.25 * sum(whole.values())


def test_the_same_input_gives_the_same_bytes(bundles, checkpoints, tmp_path):
    from edgeskip.exporter.bundle import ExportSettings, export_bundle
    from edgeskip.exporter.checkpoint import open_checkpoint

    bundle = bundles("qwen3", weights="int4")
    again = export_bundle(
        open_checkpoint(str(checkpoints("qwen3"))), tmp_path / "b", ExportSettings(2, prefill_chunk=8, weights="int4")
    )
    assert again.manifest == bundle.manifest
    assert again.manifest.quantization == Quantization("search")
    assert read_bundle(tmp_path / "b").manifest == replace(again.manifest)


@pytest.mark.parametrize("shape", [(1500, 1408), (8800, 1056)])
def test_large_matrices_in_8_bits_share_the_scales_of_their_blocks_on_a_cpu(shape, tmp_path):
    """Of activations that the rounding to 8 bits leaves as they are, so that the products are exact."""
    (n, k), draw = shape, np.random.default_rng(0)
    numbers = [draw.integers(-128, 128, shape, np.int8) for _ in range(2)]
    scales = draw.standard_normal((n, 1)).astype(np.float32)
    x = draw.integers(-127, 128, (1, 3, k)).astype(np.float32)
    x[..., ::32] = 127
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="products"))
    states = builder.input("x", ir.DataType.FLOAT, x.shape)
    for index, matrix in enumerate(numbers):

        def declare(suffix, spelled, start, index=index, matrix=matrix):
            element, wanted = spelled or (ir.DataType.FLOAT, scales.shape)
            rows = (scales if suffix else matrix)[start : start + wanted[0]].view(element.numpy()).reshape(wanted)
            name = f"{index}{suffix}.{start}"
            return builder.initializer(ir.tensor(rows, name=name), name, qualify=False)

        stored = StoredValue("int8", shape, ir.DataType.FLOAT, declare)
        product = own_product("cpu", builder.op, states, stored)
        product.type, product.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 3, n])
        builder.add_output(product, f"product{index}")
    onnx_model = ir.to_proto(ir.Model(builder.graph, ir_version=10))
    options = cpu_options(onnxruntime, 0)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for found, matrix in zip(session.run(None, {"x": x}), numbers, strict=True):
        np.testing.assert_array_equal(found, (x @ matrix.T.astype(np.float32)) * scales[:, 0])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    products = [node for node in optimized.node if node.op_type == "MatMulNBits"]
    assert len({node.input[1] for node in products}) == len(products) >= len(numbers)
    assert len({node.input[2] for node in products}) == 1
