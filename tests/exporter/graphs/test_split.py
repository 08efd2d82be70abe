"""The three graphs chained compute what transformers computes."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.conftest import VARIANTS, make_model, run_round, save_checkpoint

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.graphs import NEW_ROWS, dimensions
from edgeskip.runtime.bundle.layers import files_of, weight_of
from edgeskip.runtime.bundle.weights import embedding_table, stored_arrays
from edgeskip.runtime.decoding.rounds import early_exit_round, prefill_round, speculative_round

OLD = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)
OLD_MARK = pytest.mark.skipif(OLD, reason="ONNX Runtime has opset 24 since 1.24")
RUNNABLE = ["cpu", "ort", "primitive", pytest.param("standard", marks=OLD_MARK)]
WHOLE = [name for name, dialect in DIALECTS.items() if not dialect.in_parts]
"""Dialects whose graphs ONNX Runtime can run by themselves: parts of layers need an attention between them."""


@pytest.mark.parametrize("dialect", RUNNABLE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_in_prefill_and_decode(variant, dialect, bundles, reference):
    bundle, model = bundles(variant), reference(variant)
    ids = np.random.default_rng(0).integers(0, 300, 40)
    with torch.no_grad():
        wanted = model(torch.tensor(ids[None])).logits[0].numpy()
        exact = copy.deepcopy(model).double()(torch.tensor(ids[None])).logits[0].numpy()
    bound = 1e-4 + np.abs(wanted - exact).max()  # transformers in fp32 is off by as much
    embeddings, split = embedding_table(bundle), bundle.manifest.split()
    with OrtCpuSession(bundle, dialect=dialect) as session:

        def run(round_, position, rows):
            session.write("inputs_embeds", embeddings[ids[position : position + round_.rows]])
            run_round(session, round_, position)
            return np.abs(
                session.read_logits(rows) - wanted[position + round_.rows - rows : position + round_.rows]
            ).max()

        chunk = prefill_round(split, 8, last=True, early_exit=False)
        assert run(chunk, 0, 1) < bound
        assert run(chunk, 8, 1) < bound
        assert run(chunk, 11, 1) < bound  # overlaps backwards
        assert run(prefill_round(split, 3, last=True, early_exit=False), 19, 1) < bound
        for position in range(22, 26):
            assert run(speculative_round(split, 0), position, 1) < bound
        # verify alone over several rows: their exit states come from drafting them as one chunk
        run(prefill_round(split, 5, last=False, early_exit=False), 26, 1)
        run_round(session, type(chunk)(speculative_round(split, 4).calls[-2:], rows=5, num_drafts=0, num_targets=5), 26)
        assert np.abs(session.read_logits(5) - wanted[26:31]).max() < bound


@OLD_MARK
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_primitives_agree_with_the_standard_graphs(variant, bundles):
    bundle, found = bundles(variant), {}
    ids = np.random.default_rng(1).integers(0, 300, 29)
    embeddings, split = embedding_table(bundle), bundle.manifest.split()
    drafted = prefill_round(split, 5, last=False, early_exit=False)
    verified = type(drafted)(speculative_round(split, 4).calls[-2:], rows=5, num_drafts=0, num_targets=5)
    for dialect in ("standard", "primitive"):
        with OrtCpuSession(bundle, dialect=dialect) as session:
            logits = []
            for first, rows in ((0, 8), (8, 8), (13, 8), (21, 3)):  # the third overlaps backwards
                session.write("inputs_embeds", embeddings[ids[first : first + rows]])
                run_round(session, prefill_round(split, rows, last=True, early_exit=False), first)
                logits.append(session.read_logits(1).copy())
            session.write("inputs_embeds", embeddings[ids[24:29]])
            run_round(session, drafted, 24)
            run_round(session, verified, 24)
            found[dialect] = np.concatenate([*logits, session.read_logits(5)])
    assert np.abs(found["primitive"] - found["standard"]).max() < 1e-4


SHAPES = {  # that published models do not have, or seldom
    "head 2": ("llama", {"head_dim": 2}),
    "head 8": ("llama", {"head_dim": 8}),
    "head 12, normed": ("qwen3", {"head_dim": 12}),
    "head 100": ("llama", {"head_dim": 100}),  # OpenLLaMA 3B
    "head 320": ("mistral", {"head_dim": 320}),
    "one head": ("mistral", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 20}),
    "7 heads over 1": ("qwen2", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 7 * 24}),
    "odd sizes": ("mistral", {"hidden_size": 63, "intermediate_size": 33, "head_dim": 24, "vocab_size": 299}),
    "one of everything": ("mistral", {"hidden_size": 1, "intermediate_size": 1, "vocab_size": 1}),
    "biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10}),
}


@pytest.mark.skipif(OLD, reason="ONNX Runtime has opset 24 since 1.24")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_runs_in_every_dialect_of_whole_graphs(shape, dtype, tmp_path):
    model_type, changes = SHAPES[shape]
    changes = {"num_hidden_layers": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": None} | changes
    model = make_model({"llama": "llama-gqa"}.get(model_type, model_type), **changes)
    save_checkpoint(model, tmp_path / "checkpoint")
    settings = ExportSettings(1, dtype, max_length=17, prefill_chunk=8)
    bundle = export_bundle(open_checkpoint(str(tmp_path / "checkpoint")), tmp_path / "bundle", settings)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 17)
    with torch.no_grad():
        wanted = model(torch.tensor(ids[None])).logits[0].numpy()
    embeddings, split = embedding_table(bundle), bundle.manifest.split()
    for dialect in WHOLE:
        with OrtCpuSession(bundle, dialect=dialect) as session:
            for first, rows in ((0, 8), (8, 8), (16, 1)):  # to the last row of the caches
                session.write("inputs_embeds", embeddings[ids[first : first + rows]])
                run_round(session, prefill_round(split, rows, last=True, early_exit=False), first)
                error = np.abs(session.read_logits(1)[0] - wanted[first + rows - 1]).max()
                assert error < {"fp32": 1e-4, "fp16": 0.05}[dtype] * max(np.abs(wanted).max(), 1), (dialect, first)


@pytest.mark.parametrize("dialect", RUNNABLE)
def test_exit_logits_are_the_shared_head_on_the_early_layers(dialect, bundles, reference):
    bundle, model = bundles("llama-gqa", exit_layer=1), reference("llama-gqa")
    ids = torch.arange(20, 36)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[1]
        wanted = model.lm_head(model.model.norm(states))[0].numpy()
    split = bundle.manifest.split()
    with OrtCpuSession(bundle, dialect=dialect) as session:
        session.write("inputs_embeds", embedding_table(bundle)[ids[0, :15].numpy()])
        run_round(session, prefill_round(split, 15, last=True, early_exit=True), 0)
        np.testing.assert_allclose(session.read_logits(1)[0], wanted[14], atol=1e-4)
        session.write("inputs_embeds", embedding_table(bundle)[ids[0, 15:].numpy()])
        result = run_round(session, early_exit_round(split), 15)
        np.testing.assert_allclose(session.read_logits(1)[0], wanted[15], atol=1e-4)
        assert result.target_ids == [int(wanted[15].argmax())]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_graphs_are_valid_and_declare_every_tensor_of_the_contract(dialect, bundles):
    """Weights that are inputs come after the contract's, under their names in the weights file, in their shapes."""
    bundle, of = bundles("qwen3"), DIALECTS[dialect]
    sizes, arrays = dimensions(bundle.manifest.architecture, bundle.manifest.max_length), stored_arrays(bundle)
    for name, contract in files_of(bundle.manifest.graphs, of).items():
        path = bundle.path(of.file.format(name))
        onnx.checker.check_model(str(path), full_check=dialect == "standard")
        graph = onnx.load(str(path), load_external_data=False).graph

        def declared(value):
            return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

        weights = graph.input[len(contract.inputs) :]
        assert (len(weights) > 0) == (of.weights == "inputs")
        for value in weights:
            assert declared(value) == list(arrays[weight_of(value.name, 0, 1)].shape)
        for tensors, values in (
            (contract.inputs, graph.input[: len(contract.inputs)]),
            (contract.outputs, graph.output),
        ):
            assert [t.name for t in tensors] == [v.name for v in values]
            for tensor, value in zip(tensors, values, strict=True):
                new_rows = of.caches == "new-rows" and tensor.is_cache and tensor in contract.outputs
                wanted = NEW_ROWS if new_rows else tensor.shape
                assert declared(value) == [sizes.get(dim, dim) for dim in wanted]


def test_the_standard_dialect_has_no_operators_but_onnx_own(bundles):
    for name in bundles("qwen3").manifest.graphs:
        model = onnx.load(str(bundles("qwen3").graph_path(name, "standard")), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]


def test_a_decoder_layer_has_the_operators_that_tensorrt_maps_natively(bundles):
    model = onnx.load(str(bundles("llama-gqa").graph_path("verify", "standard")), load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    layers = 2
    assert operators.count("Attention") == layers
    assert operators.count("TensorScatter") == operators.count("RotaryEmbedding") == 2 * layers
    assert operators.count("Gemm") == 4 * layers


HALVES = [
    ("cpu", "cpu", "fp16"),
    ("cpu", "primitive", "fp16"),
    pytest.param("cpu", "standard", "fp16", marks=OLD_MARK),
] + [pytest.param("cuda", dialect, dtype, marks=pytest.mark.gpu) for dialect in WHOLE for dtype in ("fp16", "bf16")]


@pytest.mark.parametrize(("device", "dialect", "dtype"), HALVES)
def test_half_precision_stays_close_to_transformers(device, dialect, dtype, bundles, reference):
    bundle = bundles("llama-llama3-rope", dtype=dtype)
    ids = np.arange(30, 46)
    with torch.no_grad():
        wanted = reference("llama-llama3-rope")(torch.tensor(ids[None])).logits[0, -1].numpy()
    with open_session(bundle, device=device, dialect=dialect) as session:
        session.write("inputs_embeds", embedding_table(bundle)[ids])
        run_round(session, prefill_round(bundle.manifest.split(), 16, last=True, early_exit=False), 0)
        error = np.abs(session.read_logits(1)[0] - wanted).max()
    assert error < {"fp16": 0.02, "bf16": 0.2}[dtype] * np.abs(wanted).max()
