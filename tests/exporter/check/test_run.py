"""Healthy bundles pass the check, and each planted fault fails it, named by graph and layer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import types
from importlib import util
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from tests import standin
from tests.conftest import VARIANTS, edit_json, make_model, save_checkpoint
from tests.standin import HostDevice, standin_model

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.check.comparison import THRESHOLDS, Comparison
from edgeskip.exporter.check.golden import Golden
from edgeskip.exporter.check.run import run_check
from edgeskip.exporter.check.teacher import split_text, tail
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.demo import CHECKPOINT as SHIPPED
from edgeskip.runtime.bench.measure import TIE_GAP
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.bundle.weights import stored_arrays
from edgeskip.runtime.decoding.rounds import View
from edgeskip.runtime.errors import RequestError

OLD = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)
OLD_MARK = pytest.mark.skipif(OLD, reason="ONNX Runtime has opset 24 since 1.24")
DIALECTS = ["cpu", "ort", pytest.param("standard", marks=OLD_MARK)]
PROMPTS = load_prompts()[:1]


def check(bundle, reference=None, dialect=None, **settings):
    with edgeskip.load(bundle.folder, device="cpu", dialect=dialect) as model:
        return run_check(model, Golden(bundle, reference), PROMPTS, **settings)


def assert_healthy(report):
    assert report.failed_graphs == ()
    # fp32 against fp16 differ from end to end by more than fp16 does against itself
    assert all(d.gap is not None and d.gap < 2 * report.tie_gap for d in report.disagreements)
    assert report.dtype != "fp32" or report.passed


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_healthy_bundles_pass(variant, dialect, bundles, checkpoints):
    assert_healthy(check(bundles(variant), str(checkpoints(variant)), dialect))


@pytest.mark.parametrize(
    ("variant", "dialect"),
    [*((variant, "cpu") for variant in VARIANTS), pytest.param("llama-gqa", "standard", marks=OLD_MARK)],
)
def test_healthy_bundles_pass_in_half_precision(variant, dialect, bundles, checkpoints):
    report = check(bundles(variant, dtype="fp16"), str(checkpoints(variant)), dialect)
    assert_healthy(report)
    assert report.thresholds == THRESHOLDS["fp16"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_shipped_checkpoint_passes(dtype, tmp_path):
    bundle = export_bundle(open_checkpoint(str(SHIPPED)), tmp_path / "b", ExportSettings(3, dtype, 256))
    report = check(bundle, str(SHIPPED))
    assert_healthy(report)
    assert report.rows_used == 256


def test_every_output_is_compared_in_every_kind_of_call(bundles):
    bundle = bundles("llama-gqa")
    report = check(bundle)
    outputs = {"draft": {"exit_hidden_states"}, "verify": {"hidden_states"}, "head": {"logits", "inputs_embeds"}}
    for kind in ("prefill", "step", "verification"):
        for graph, names in outputs.items():
            assert {t.tensor for t in report.tensors if (t.graph, t.kind) == (graph, kind)} == names
    caches = {t.tensor for t in report.tensors if t.kind == "cache"}
    assert caches == {f"past_key_values.{i}.{part}" for i in range(4) for part in ("key", "value")}
    assert report.rows_used == bundle.manifest.max_length
    assert report.reference == "the bundle's own weights"
    assert report.agreed == {"autoregressive": 1, "self-speculative": 1}


@pytest.mark.parametrize("dialect", ENGINE_DIALECTS)
def test_any_session_will_do(dialect, bundles, tmp_path):
    bundle = bundles("llama-gqa")
    with standin_model(bundle, tmp_path / "b", HostDevice(), dialect) as model:
        report = run_check(model, Golden(bundle), PROMPTS)
    assert_healthy(report)
    assert "tensorrt" in report.backend


def test_texts_are_split_into_every_kind_of_call():
    pieces = list(split_text(19, 19 + tail(4), 8, 4))
    assert [(p.start, p.rows) for p in pieces if p.kind == "prefill"] == [(0, 8), (8, 8), (11, 8)]
    assert [p.start for p in pieces if p.kind == "step"] == [19, 20, 21]
    assert [(p.start, p.rows, p.kept) for p in pieces[6:]] == [(22, 5, 1), (23, 5, 5), (28, 5, 5)]
    assert [(p.kind, p.start, p.rows) for p in split_text(3, 5, 8, 4)] == [
        ("prefill", 0, 3),
        ("step", 3, 1),
        ("step", 4, 1),
    ]


# Faults: (name, change of the weight, graph, layer, part)


def swap(start, size):
    """Exchanges two neighbouring blocks of rows."""

    def change(weight):
        first, second = slice(start, start + size), slice(start + size, start + 2 * size)
        weight[first], weight[second] = weight[second].copy(), weight[first].copy()

    return change


def scale(weight):
    weight *= weight.dtype.type(1.02)


def transpose(weight):
    weight[:] = weight.T.copy()


FAULTS = [
    ("model.layers.1.input_layernorm.weight", scale, "draft", 1, "attention"),
    ("model.layers.2.post_attention_layernorm.weight", scale, "verify", 2, "MLP"),
    ("model.norm.weight", scale, "head", None, "norm"),
    ("lm_head.weight", swap(70, 1), "head", None, "LM head"),
    ("model.layers.3.self_attn.qkv_proj.weight", swap(0, 16), "verify", 3, "attention"),  # two query heads
    ("model.layers.0.self_attn.o_proj.weight", transpose, "draft", 0, "attention"),
]


def copied(bundle, folder, name, data):
    """A copy of a bundle with one file changed, and its manifest to match."""
    shutil.copytree(bundle.folder, folder)
    (folder / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder / MANIFEST, lambda manifest: manifest["files"].update({name: record}))
    return read_bundle(folder)


def with_weight(bundle, folder, name, change):
    tensor = stored_arrays(bundle)[name]
    data = bytearray(bundle.path(WEIGHTS).read_bytes())
    dtype = {"F32": np.float32, "F16": np.float16}[tensor.dtype]
    change(np.frombuffer(data, dtype, int(np.prod(tensor.shape)), tensor.offset).reshape(tensor.shape))
    return copied(bundle, folder, WEIGHTS, bytes(data))


def departure(report):
    (graph,) = report.failed_graphs
    found = report.departures[graph]
    return graph, found.layer, found.part, found.seen_in


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("name", "change", "graph", "layer", "part"), FAULTS)
def test_a_wrong_weight_is_found_and_named(name, change, graph, layer, part, dtype, bundles, checkpoints, tmp_path):
    healthy = bundles("llama-gqa", dtype=dtype)
    faulty = with_weight(healthy, tmp_path / "faulty", name, change)
    report = check(faulty, str(checkpoints("llama-gqa")), layers=True)
    assert not report.passed
    assert departure(report) == (graph, layer, part, "graph")


def test_a_wrong_weight_is_not_found_without_the_checkpoint(bundles, tmp_path):
    name, change, *_ = FAULTS[0]
    assert check(with_weight(bundles("llama-gqa"), tmp_path / "faulty", name, change)).passed


@OLD_MARK
def test_positions_off_by_one_are_found(bundles, tmp_path):
    healthy = bundles("llama-gqa")
    model = ir.load(healthy.graph_path("verify", "standard"))
    (given,) = (value for value in model.graph.inputs if value.name == "position_ids")
    one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int64))})
    zero = ir.node("Constant", [], {"value": ir.tensor(np.array(0, np.int64))})
    less = ir.node("Sub", [given, one.outputs[0]])
    shifted = ir.node("Max", [less.outputs[0], zero.outputs[0]])
    given.replace_all_uses_with(shifted.outputs[0])
    less.replace_input_with(0, given)
    model.graph.insert_before(model.graph[0], [one, zero, less, shifted])
    data = ir.to_proto(model).SerializeToString()
    report = check(copied(healthy, tmp_path / "b", "verify.onnx", data), dialect="standard", layers=True)
    assert departure(report) == ("verify", 2, "attention", "graph")


def test_a_wrong_kernel_and_a_weight_bound_in_anothers_place_are_found_and_named(bundles, tmp_path, monkeypatch):
    bundle, healthy = bundles("llama-gqa"), standin.rotate
    for fault in ("rope", "binding"):
        with monkeypatch.context() as patch, standin_model(bundle, tmp_path / fault, HostDevice(), "layers") as model:
            if fault == "rope":  # cosines for sines
                turned = lambda *a: healthy(*a[:9], a[8], *a[10:])  # noqa: E731
                patch.setattr(standin, "rotate", turned)  # which the attention of few rows calls too
                patch.setitem(standin.KERNELS, "rotate", turned)
            else:
                of = model.session._weights.address_of
                swapped = {"model.layers.3.self_attn.o_proj.weight": "model.layers.2.self_attn.o_proj.weight"}
                patch.setattr(
                    model.session._weights, "address_of", lambda name, of=of, to=swapped: of(to.get(name, name))
                )
                model.session._bound.clear()
            report = run_check(model, Golden(bundle), PROMPTS, layers=True)
        assert not report.passed
        if fault == "rope":
            assert set(report.failed_graphs) == {"draft", "verify"}
            found = report.departures["draft"]
            assert (found.layer, found.part, found.seen_in) == (0, "attention", "session")
        else:  # no cache is written after it, so the graph is named and no part of it
            assert report.failed_graphs == ("verify",)


def test_a_stale_cache_row_is_found_in_the_session(bundles):
    bundle, name, row = bundles("llama-gqa"), "past_key_values.3.value", 50
    with edgeskip.load(bundle.folder, device="cpu") as model:
        session, bind = model.session, model.session.bind

        def forgetful(round_):
            bound = bind(round_)

            def wait():
                before = session._caches[name][:, :, row].copy()
                result = bound.wait()
                session._caches[name][:, :, row] = before
                return result

            return types.SimpleNamespace(start=bound.start, wait=wait)

        session.bind = forgetful
        report = run_check(model, Golden(bundle), PROMPTS, layers=True)
    assert departure(report) == ("verify", 3, "attention", "session")
    stale = [t for t in report.tensors if t.tensor == name]
    assert [t.passed for t in stale] == [False]
    assert stale[0].errors.worst_row == row


def test_errors_are_those_computed_by_hand():
    comparison = Comparison()
    golden = np.array([[3, 4], [0, 2]], np.float32)
    comparison.add(("x",), np.array([[6, 8], [2, 0]], np.float32), golden, 7)
    comparison.finish_text()
    comparison.add(("x",), np.array([[np.nan, np.inf]], np.float32), np.zeros((1, 2), np.float32), 20)
    comparison.finish_text()
    errors = comparison.errors["x",]
    assert (errors.rows, errors.values, errors.nans, errors.infs) == (3, 6, 1, 1)
    assert (errors.max_abs, errors.mean_abs) == (4.0, pytest.approx((3 + 4 + 2 + 2) / 6))
    assert errors.cosine == pytest.approx((1 + 0 + 1) / 3)
    assert errors.norm_ratio == pytest.approx((2 + 1 + 1) / 3)
    assert (errors.row_cosine, errors.row_norm_ratio, errors.worst_row) == (0.0, 2.0, 20)
    assert not errors.within(THRESHOLDS["bf16"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_sessions_read_what_was_written(dtype, bundles, tmp_path):
    bundle = bundles("llama-gqa", dtype=dtype)
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype({"fp32": np.float32, "fp16": np.float16}[dtype])
    with edgeskip.load(bundle.folder, device="cpu") as cpu, standin_model(bundle, tmp_path / "b", HostDevice()) as gpu:
        for session in (cpu.session, gpu.session):
            session.write("exit_hidden_states", rows)
            found = session.read(View("exit_hidden_states", 1, 2))
            assert found.dtype == np.float32
            assert np.array_equal(found, rows[1:])
            assert session.read(View("draft_token_ids", 0, 2)).dtype == np.int64
        for model in (cpu, gpu):
            model.complete([5, 6, 7], max_new_tokens=4)
        caches = [model.session.read_cache("past_key_values.1.key") for model in (cpu, gpu)]
    assert caches[0].shape == (2, 96, 16)
    np.testing.assert_allclose(caches[0][:, :6], caches[1][:, :6], atol=0.02)


# The command


def run(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments), "--device", "cpu", "--num-prompts", "1"])


def test_the_command_prints_a_table_and_writes_a_report(bundles, tmp_path):
    result = run(bundles("llama-gqa").folder, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "exit_hidden_states" in result.output
    assert "What runs is what was trained." in result.output
    assert "…" not in result.output  # nothing is cut off
    head, under = next(pair for pair in pairwise(result.output.splitlines()) if pair[1].startswith("graph"))
    assert under.split()[-5:] == ["mean", "1-cos", "norm", "1-cos", "norm"]
    assert head.split() == ["worst", "worst"]  # over the last two, so that no two columns are called the same
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert report["thresholds"] == dataclasses.asdict(THRESHOLDS["fp32"])
    assert report["tie_gap"] == TIE_GAP["fp32"]


def test_the_command_fails_and_says_what_to_do(bundles, checkpoints, tmp_path):
    name, change, *_ = FAULTS[1]
    faulty = with_weight(bundles("llama-gqa"), tmp_path / "faulty", name, change)
    reference = ("--reference", checkpoints("llama-gqa"))
    result = run(faulty.folder, *reference)
    assert result.exit_code == 1
    assert "verify fails. --layers tells where it departs." in result.output
    assert "First to depart: layer 2, MLP (layers.2.mlp)." in run(faulty.folder, *reference, "--layers").output


def test_a_checkpoint_of_another_architecture_is_refused(bundles, checkpoints):
    result = run(bundles("llama-gqa").folder, "--reference", checkpoints("llama-mha"))
    assert result.exit_code == 3
    assert "num_kv_heads is 4; wanted 2, as in" in result.output
    assert result.output.count("\n") == 1


def test_another_model_of_the_same_architecture_fails(bundles, tmp_path):
    other = save_checkpoint(make_model("llama-gqa", seed=1), tmp_path / "other")
    report = check(bundles("llama-gqa"), str(other))
    assert report.failed_graphs == ("draft", "verify", "head")
    assert not report.passed


def test_long_prompts_are_cut_and_empty_ones_refused(bundles, tmp_path):
    bundle = bundles("llama-gqa")
    with edgeskip.load(bundle.folder, device="cpu") as model:
        golden = Golden(bundle)
        assert run_check(model, golden, ["a" * 500, "abc"]).prompts_cut == 1
        model.tokenizer.post_processor = None
        with pytest.raises(RequestError, match="prompt: empty; wanted at least one token"):
            run_check(model, golden, [""])


def test_the_smallest_bundle_passes(checkpoints, tmp_path):
    settings = ExportSettings(1, max_length=2)
    assert_healthy(check(export_bundle(open_checkpoint(str(checkpoints("llama-gqa"))), tmp_path / "b", settings)))


@pytest.mark.parametrize("missing", ["polygraphy", "torch"])
def test_what_is_missing_is_told_in_one_line(missing, bundles, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else find(name))
    result = run(bundles("llama-gqa").folder)
    assert result.exit_code == 6
    assert result.output == f'edgeskip: edgeskip check: {missing} not installed; pip install "edgeskip[check]"\n'


def test_bf16_on_a_cpu_is_refused(bundles):
    result = run(bundles("llama-gqa", dtype="bf16").folder)
    assert result.exit_code == 6
    assert "in bf16, which ONNX Runtime does not compute on a CPU" in result.output
