"""Quantized bundles: what quantization loses is told and is no fault; what was planted is."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from tests.conftest import make_model, save_checkpoint
from tests.dequantizer import dequantized_model
from tests.exporter.check.test_run import OLD_MARK, PROMPTS, copied
from tests.exporter.quantization.stored import quantized_checkpoint
from transformers import AutoModelForCausalLM

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.check.comparison import ROUNDED, THRESHOLDS
from edgeskip.exporter.check.golden import Golden
from edgeskip.exporter.check.loss import quantization_loss
from edgeskip.exporter.check.run import run_check
from edgeskip.exporter.check.weights import compare_weights
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bundle.formats import SCALES
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.bundle.weights import stored_arrays
from edgeskip.runtime.hub.card import check_figures

VARIANT = "llama-tied"
FORMATS = ["int8", "int4"]
NAME = "model.layers.2.mlp.gate_up_proj.weight"


@pytest.fixture(params=FORMATS)
def bundle(request, bundles):
    return bundles(VARIANT, weights=request.param)


def check(bundle, dialect, original=None, **settings):
    with edgeskip.load(bundle.folder, device="cpu", dialect=dialect) as model:
        return run_check(model, Golden(bundle), PROMPTS, original=original, **settings)


@OLD_MARK
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("weights", FORMATS)
def test_the_bounds_of_the_dtype_hold_against_the_dequantized_weights(weights, dtype, bundles):
    bundle = bundles(VARIANT, dtype=dtype, weights=weights, head="int4")
    report = check(bundle, "standard")
    assert (report.failed_graphs, report.thresholds) == ((), THRESHOLDS[dtype])
    assert not report.rounded_to_8_bits
    assert (report.stored, report.lost) == (None, None)


def test_products_that_round_to_8_bits_have_bounds_of_their_own(bundle):
    report = check(bundle, None)
    assert report.passed
    assert report.rounded_to_8_bits
    assert (report.thresholds, report.tie_gap) == (ROUNDED.rows, ROUNDED.tie_gap)
    assert any(not one.errors.within(THRESHOLDS["fp32"]) for one in report.tensors)  # they are needed


def test_a_bundle_in_the_dtype_keeps_its_bounds(bundles):
    report = check(bundles(VARIANT), None)
    assert (report.rounded_to_8_bits, report.thresholds) == (False, THRESHOLDS["fp32"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3"])
def test_what_was_exported_stands_for_its_checkpoint(variant, dtype, bundles, checkpoints):
    bundle = bundles(variant, dtype=dtype, weights="int4", layers=("0=int8", "1=dtype"))
    reports = list(compare_weights(bundle, Golden(bundle, str(checkpoints(variant)))))
    assert [one.tensor for one in reports] == [t.name for t in bundle.manifest.tensors.values() if t.sources]
    assert all(one.passed for one in reports), [one for one in reports if not one.passed]
    assert {one.format for one in reports} == {"int8", "int4-32", dtype}


# Faults in the weights file: (name of the array, change)


def doubled_scale(scales):
    scales.flat[5] *= scales.dtype.type(2)


def all_scales(scales):
    scales *= scales.dtype.type(1.05)


def other_order(numbers):
    """Nibbles exchanged; in 8 bits, each number in its neighbour's place."""
    pairs = numbers.copy()
    if numbers.dtype == np.uint8:
        numbers[:] = pairs >> 4 | pairs << 4
    else:
        numbers[:, ::2], numbers[:, 1::2] = pairs[:, 1::2], pairs[:, ::2]


def shifted_block(numbers):
    size = numbers.shape[1] // 2
    numbers[7, :size] = np.roll(numbers[7, :size], 1)


def norm(weight):
    weight *= weight.dtype.type(1.001)


FAULTS = [
    (NAME + SCALES, doubled_scale),
    (NAME + SCALES, all_scales),
    (NAME, other_order),
    (NAME, shifted_block),
    ("model.embed_tokens.weight", shifted_block),
    ("model.layers.1.input_layernorm.weight", norm),
]


@pytest.mark.parametrize(("name", "change"), FAULTS)
def test_a_fault_in_the_weights_file_is_found_and_named(name, change, bundle, checkpoints, tmp_path):
    array = stored_arrays(bundle)[name]
    data = bytearray(bundle.path(WEIGHTS).read_bytes())
    kind = {"F32": np.float32, "U8": np.uint8, "I8": np.int8}[array.dtype]
    change(np.frombuffer(data, kind, int(np.prod(array.shape)), array.offset).reshape(array.shape))
    faulty = copied(bundle, tmp_path / "faulty", WEIGHTS, bytes(data))
    reports = compare_weights(faulty, Golden(faulty, str(checkpoints(VARIANT))))
    assert [one.tensor for one in reports if not one.passed] == [name.removesuffix(SCALES)]


# Faults in a graph, which need no checkpoint to be found: what it reads is not what the file holds


def spoiled_graph(bundle, folder, change):
    """A copy of a bundle with another `verify` in `standard`."""
    model = ir.load(bundle.graph_path("verify", "standard"))
    change(model.graph)
    return copied(bundle, folder, "verify.onnx", ir.to_proto(model).SerializeToString())


def initializer(graph, suffix):
    """A part of the matrix, under whatever type it is declared."""
    parts = {name: value for name, value in graph.initializers.items() if name.startswith(NAME)}
    return next(value for name, value in parts.items() if (SCALES in name) == bool(suffix))


def shifted_numbers(graph):
    """Read from 256 bytes before."""
    value = initializer(graph, "")
    old = value.const_value
    settings = {"shape": old.shape, "name": old.name}
    value.const_value = ir.ExternalTensor(old.location, old.offset - 256, old.length, old.dtype, **settings)


def halved_scales(graph):
    scales = initializer(graph, SCALES)
    two = ir.node("Constant", [], {"value": ir.tensor(np.array(2, np.float32))})
    half = ir.node("Div", [scales, two.outputs[0]])
    scales.replace_all_uses_with(half.outputs[0])
    half.replace_input_with(0, scales)
    graph.insert_before(graph[0], [two, half])


GRAPH_FAULTS = {
    "a wrong scale": halved_scales,
    "a shifted block": shifted_numbers,
}


@OLD_MARK
@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_a_fault_in_a_graph_is_found_and_named(fault, bundle, tmp_path):
    faulty = spoiled_graph(bundle, tmp_path / "faulty", GRAPH_FAULTS[fault])
    report = check(faulty, "standard", layers=True)
    assert report.failed_graphs == ("verify",)
    found = report.departures["verify"]
    assert (found.layer, found.part, found.seen_in) == (2, "MLP", "graph")


def test_another_order_of_nibbles_is_found_even_where_products_round_to_8_bits(bundles, tmp_path):
    bundle = bundles(VARIANT, weights="int4")
    dialect = next(name for name in bundle.manifest.dialects if name != "standard")
    model = ir.load(bundle.graph_path("verify", dialect))
    product = next(node for node in model.graph if node.op_type == "MatMulNBits" and node.inputs[1].producer())
    counted = product.inputs[1]
    four, low = (ir.node("Constant", [], {"value": ir.tensor(np.array(number, np.uint8))}) for number in (4, 4))
    up = ir.node("BitShift", [counted, four.outputs[0]], {"direction": "LEFT"})
    down = ir.node("BitShift", [counted, low.outputs[0]], {"direction": "RIGHT"})
    swapped = ir.node("BitwiseOr", [up.outputs[0], down.outputs[0]])
    product.replace_input_with(1, swapped.outputs[0])
    model.graph.insert_before(product, [four, low, up, down, swapped])
    name = bundle.graph_path("verify", dialect).name
    faulty = copied(bundle, tmp_path / "faulty", name, ir.to_proto(model).SerializeToString())
    report = check(faulty, dialect)
    assert report.rounded_to_8_bits
    assert report.failed_graphs == ("verify",)


def test_gptq_may_move_8_bits_farther_as_it_makes_up_for_what_4_bits_lost(bundles, checkpoints):
    bundle = bundles(VARIANT, weights="int8", head="int4", quantizer="gptq")
    failed = [one for one in compare_weights(bundle, Golden(bundle, str(checkpoints(VARIANT)))) if not one.passed]
    assert not failed


@pytest.mark.parametrize("weights", FORMATS)
def test_a_number_that_is_cut_off_as_its_inputs_are_small_is_no_fault(weights, tmp_path):
    model = make_model(VARIANT)
    with torch.no_grad():
        model.model.norm.weight[5] = 0.01
        model.model.embed_tokens.weight[::40, 5] = 64 * model.model.embed_tokens.weight.std()
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    settings = ExportSettings(2, weights=weights, head=weights)
    bundle = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", settings)
    reports = list(compare_weights(bundle, Golden(bundle, str(folder))))
    assert all(one.passed for one in reports), [one for one in reports if not one.passed]
    assert min(one.errors.row_norm_ratio for one in reports) < 0.98  # it is cut off


# What was lost


def test_the_loss_is_what_transformers_computes(bundle, checkpoints):
    folder = str(checkpoints(VARIANT))
    texts = [list(map(int, np.random.default_rng(0).integers(2, 300, tokens))) for tokens in (20, 129)]
    original = AutoModelForCausalLM.from_pretrained(folder)
    models = original, dequantized_model(bundle, original)
    losses = quantization_loss(Golden(bundle), Golden(bundle, folder), texts)
    assert [one.exit_layer for one in losses] == [2, 4]
    for found in losses:
        logits = [[_logits(model, ids, found.exit_layer) for ids in texts] for model in models]
        last = [[_logits(model, ids, 4) for ids in texts] for model in models]
        known = torch.cat([torch.tensor(ids[1:]) for ids in texts])
        perplexities = [F.cross_entropy(torch.cat([one[:-1] for one in of]), known).exp().item() for of in logits]
        both = [torch.cat(of).log_softmax(-1) for of in logits]
        kl = F.kl_div(both[1], both[0], log_target=True, reduction="batchmean").item()
        tops = [one.argmax(-1) for one in both]
        matches = [(top == torch.cat(of).argmax(-1)).float().mean().item() for top, of in zip(tops, last, strict=True)]
        assert [found.original_perplexity, found.perplexity] == pytest.approx(perplexities, rel=1e-4)
        assert found.ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-4)
        assert found.kl == pytest.approx(kl, rel=1e-3)
        assert found.kl > 0
        assert found.agreement == pytest.approx((tops[0] == tops[1]).float().mean().item())
        assert [found.original_match, found.match] == pytest.approx(matches)
        assert found.tokens == len(known)


def _logits(model, ids, layers):
    """Of the state after so many layers, [T,V]."""
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        if layers == model.config.num_hidden_layers:
            return out.logits[0]
        return model.lm_head(model.model.norm(out.hidden_states[layers]))[0]


def test_a_bundle_that_is_its_checkpoint_lost_nothing(bundles, checkpoints):
    bundle = bundles(VARIANT)
    for one in quantization_loss(Golden(bundle), Golden(bundle, str(checkpoints(VARIANT))), [[5, 6, 7]]):
        assert (one.ratio, one.kl, one.agreement) == (pytest.approx(1), pytest.approx(0, abs=1e-9), 1.0)


def test_scales_that_came_in_norms_are_no_fault(checkpoints, tmp_path):
    """As AWQ leaves them: what the columns of a matrix are multiplied by, the norm before it is divided by."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints(VARIANT))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight /= 2
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight *= 2
    quantized_checkpoint(save_checkpoint(model, tmp_path / "scaled"), tmp_path / "awq", "awq", 4, 32)
    bundle = export_bundle(open_checkpoint(str(tmp_path / "awq")), tmp_path / "bundle", ExportSettings(2))
    done = run(bundle.folder, "--reference", checkpoints(VARIANT))
    assert done.exit_code == 0, done.output
    assert "Its layers came quantized, so its weights are not compared with the checkpoint's one by one." in done.output
    assert "Lost to quantization: perplexity x" in done.output


def run(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments), "--device", "cpu", "--num-prompts", "1"])


def test_the_command_tells_loss_from_faults(bundles, checkpoints, tmp_path):
    bundle = bundles(VARIANT, weights="int4")
    healthy = run(bundle.folder, "--reference", checkpoints(VARIANT), "--json", tmp_path / "report.json")
    assert healthy.exit_code == 0, healthy.output
    assert "Lost to quantization: perplexity x" in healthy.output
    assert "What runs is what was trained." in healthy.output
    report = json.loads((tmp_path / "report.json").read_text())
    card = check_figures(report, "the report")  # as `push` shows it
    assert card[0].endswith("with transformers in fp32: what runs is what was trained.")
    assert f"| self-speculative | {report['agreed']['self-speculative']} of {report['prompts']} |" in card
    assert sum(line.startswith(f"| {lost['exit_layer']} |") for lost in report["lost"] for line in card) == 2
    assert [one["exit_layer"] for one in report["lost"]] == [2, 4]
    assert report["rounded_to_8_bits"]
    other = save_checkpoint(make_model(VARIANT, seed=1), tmp_path / "other")
    wrong = run(bundle.folder, "--reference", other)
    assert wrong.exit_code == 1
    assert "model.embed_tokens.weight is not the checkpoint's: int8, 1-cos" in wrong.output
    assert "What runs is what was trained." not in wrong.output
