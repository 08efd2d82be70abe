"""Planning with weights in 8 and 4 bits: bytes and memory as bundles and sessions have them, and the recommendation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from tests.standin import HostDevice, standin_model

from edgeskip.cli import main
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.deployment import load_device, load_export_recipe
from edgeskip.recipes.plan import cost
from edgeskip.recipes.plan import plan as planning
from edgeskip.recipes.plan.plan import PlanSettings, make_plan
from edgeskip.recipes.plan.recommend import fitting_block_size, recommend, weights_formats
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.backends.engines.layers import LayersSession
from edgeskip.runtime.bundle.manifest import WEIGHTS, read_bundle
from edgeskip.runtime.bundle.tensors import num_weights
from edgeskip.runtime.bundle.weights import held_bytes, read_bytes, stored_arrays

ONE_B, EIGHT_B = load_shape("llama3.2-1b").architecture, load_shape("llama3-8b").architecture
NANO = load_device("orin-nano-8gb")
MIXED = {"weights": "int4", "head": "int4", "layers": ("0=int8", "1=dtype")}


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def plan_of(bundle, device, backend=None):
    m = bundle.manifest
    settings = PlanSettings(m.exit_layer, dtype=m.dtype, max_length=m.max_length, backend=backend, formats=m.formats)
    settings = replace(settings, draft_vocabulary=m.draft_vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "DEFAULT_PREFILL_CHUNK", m.prefill_chunk)
        return make_plan("", m.architecture, load_device(device), settings)


@pytest.mark.parametrize(
    "settings",
    [{"weights": "int8"}, {"weights": "int4"}, MIXED, {"weights": "int4", "draft_vocabulary": 200}],
    ids=["int8", "int4", "mixed", "draft-head"],
)
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "qwen2"])
def test_bytes_are_those_of_a_bundle(variant, settings, bundles):
    bundle = bundles(variant, dtype="fp16", **settings)
    m = bundle.manifest
    sizes, plain = (
        cost.cut_model(m.architecture, m.dtype, formats, m.draft_vocabulary)((m.exit_layer,)).sizes
        for formats in (m.formats, None)
    )
    assert {graph: size.weight_bytes for graph, size in sizes.items()} == read_bytes(bundle)
    assert {graph: size.parameters for graph, size in sizes.items()} == {
        graph: size.weight_bytes // 2 for graph, size in plain.items()
    }
    plan = plan_of(bundle, "h100", "onnxruntime")
    arrays = stored_arrays(bundle)
    assert plan.disk["weights"] == sum(array.bytes for array in arrays.values())
    assert sum(plan.formats.values()) == plan.disk["weights"]
    rope = sum(array.bytes for name, array in arrays.items() if name.startswith("rope."))
    norms = 2 * m.architecture.hidden_size * len(m.heads)
    fillers = bundle.path(WEIGHTS).stat().st_size - plan.disk["weights"] + norms
    held = sum(size for kind, size in plan.memory.items() if kind.endswith("weights"))
    assert held == pytest.approx(held_bytes(bundle) - rope, abs=fillers)


@pytest.mark.parametrize("settings", [{"weights": "int8"}, {"weights": "int4"}, MIXED], ids=["int8", "int4", "mixed"])
def test_rows_between_products_are_what_a_session_takes_for_them(settings, bundles, tmp_path, monkeypatch):
    taken, real = {}, LayersSession._taken
    monkeypatch.setattr(
        LayersSession, "_taken", lambda self, size, what: taken.update({what: size}) or real(self, size, what)
    )
    bundle = bundles("llama-tied", dtype="fp16", **settings)
    with standin_model(bundle, tmp_path / "b", HostDevice(), "layers") as model:
        queries, partials, _ = model.session._attention.memory
    names = ("qkv", "attended", "even", "odd", "gated", "normalized")
    rows = sum(taken[f"for {name}"] for name in names) + queries.bytes
    scratch = plan_of(bundle, "orin-nano-8gb").memory["scratch"]
    assert rows < scratch <= rows + partials.bytes


def test_no_layer_is_held_in_the_dtype():
    a, formats = EIGHT_B, weights_formats(EIGHT_B, NANO, "int4")
    quantized = make_plan("", a, NANO, PlanSettings(4, formats=formats)).memory
    whole = make_plan("", a, NANO, PlanSettings(4)).memory
    assert quantized["scratch"] < whole["scratch"]
    assert not {*quantized} - {*whole}


@pytest.mark.parametrize("jetpack", [None, "6", "7"])
def test_engines_of_quantized_weights_are_those_of_layers(jetpack):
    formats = weights_formats(ONE_B, NANO, "int4")
    plan = make_plan("", ONE_B, NANO, PlanSettings(4, jetpack=jetpack, formats=formats))
    assert (plan.works, plan.dialect) == (True, "layers")


def test_a_plain_token_reads_what_is_stored():
    """In blocks of 64, with scales of two bytes: 0.5 + 2/64 bytes for a number of a layer, 1 and a bit of the table."""
    formats = weights_formats(ONE_B, NANO, "int4")
    plan = make_plan("", ONE_B, NANO, PlanSettings(4, formats=formats))
    hidden, vocabulary = ONE_B.hidden_size, ONE_B.vocab_size
    norms = hidden * (2 * ONE_B.num_layers + 1)
    matrices = num_weights(ONE_B) - vocabulary * hidden - norms
    read = vocabulary * (hidden + 2) + matrices * (0.5 + 2 / 64) + 2 * norms
    assert plan.ideal_ms_per_token == pytest.approx(read / (NANO.bandwidth_gb_per_s * NANO.copy_share * 1e6))


def test_kernels_that_do_not_read_the_formats_are_a_problem():
    old = replace(load_device("rtx-4060"), compute_capability=75)
    formats = weights_formats(EIGHT_B, old, "int4")
    found = [p.found for p in make_plan("", EIGHT_B, old, PlanSettings(4, formats=formats)).problems]
    assert any("quantized weights in fp16 on SM 75" in one for one in found)
    assert recommend(EIGHT_B, old, PlanSettings(4)).compared[-1].weights == "fp16"  # nothing else is offered


@pytest.mark.parametrize(("sm", "fix"), [(89, "give --dtype fp16"), (75, "give --weights dtype")])
def test_a_dtype_that_kernels_do_not_read_is_what_is_to_be_changed(sm, fix):
    card = replace(load_device("rtx-4060"), compute_capability=sm)
    settings = PlanSettings(4, dtype="fp32", formats=weights_formats(ONE_B, card, "int4"))
    problems = make_plan("", ONE_B, card, settings).problems
    assert [one.fix for one in problems if "quantized weights in fp32" in one.found] == [fix]


def test_the_bits_of_auto_are_counted_in_the_dtype():
    asked = ("plan", "llama3.2-1b", "-d", "rtx-4060", "--weights", "auto", "--bits", "4.3")
    assert CliRunner().invoke(main, asked).exit_code == 0
    refused = CliRunner().invoke(main, (*asked, "--dtype", "fp32"))
    assert refused.exit_code == 5
    assert "bits: 4.3; wanted 4.5 to" in refused.stderr


# The recommendation


@pytest.mark.parametrize(
    ("model", "device", "weights", "reason"),
    [
        (ONE_B, "orin-nano-8gb", "dtype", "weights fp16: it fits"),
        (EIGHT_B, "orin-nano-8gb", "int4", "weights int4: fp16 does not fit, int8 does not fit"),
        (EIGHT_B, "rtx-4060", "int4", "weights int4: fp16 does not fit, int8 does not fit"),
        (EIGHT_B, "orin-nx-16gb", "int8", "weights int8: fp16 does not fit"),
        (EIGHT_B, "agx-orin-32gb", "dtype", "weights fp16: it fits"),
    ],
)
def test_the_least_loss_that_fits_is_recommended(model, device, weights, reason):
    machine = load_device(device)
    found = recommend(model, machine, PlanSettings(4))
    assert (found.weights, found.reason) == (weights, reason)
    plan = make_plan("", model, machine, PlanSettings(4, formats=found.formats))
    assert plan.works
    assert [one.fits for one in found.compared] == sorted(one.fits for one in found.compared)
    for one, better in zip(found.compared[1:], found.compared, strict=False):
        assert one.memory < better.memory
        assert one.plain_ms_per_token < better.plain_ms_per_token


def test_the_capacity_decides_too():
    nx = load_device("orin-nx-16gb")
    assert recommend(EIGHT_B, nx, PlanSettings(4, max_length=8192)).weights == "int8"
    small = replace(nx, memory_gb=nx.memory_gb - 5.2)
    longest = recommend(EIGHT_B, small, PlanSettings(4, max_length=8192))
    assert (longest.weights, recommend(EIGHT_B, small, PlanSettings(4, max_length=1024)).weights) == ("int4", "int8")


def test_where_nothing_fits_the_smallest_is_named():
    found = recommend(load_shape("llama2-70b").architecture, NANO, PlanSettings(10))
    assert (found.weights, found.reason) == ("int4", "weights int4: nothing fits")


def test_blocks_are_those_that_a_model_has():
    assert fitting_block_size(ONE_B, NANO) == 64
    assert fitting_block_size(replace(ONE_B, intermediate_size=8192 + 32), NANO) == 32
    assert fitting_block_size(ONE_B, load_device("h100")) == 32


# The commands


def test_plan_says_which_format_and_why(tmp_path):
    done = run("plan", "--recipe", "llama3-8b", "-d", "orin-nano-8gb", "--json", tmp_path / "p")
    assert done.exit_code == 0, done.output
    assert "weights int4: fp16 does not fit, int8 does not fit (int4-64 " in done.output
    plan = json.loads((tmp_path / "p").read_text())
    assert plan["recommended"]["weights"] == "int4"
    assert list(plan["formats"]) == ["int4-64", "int8", "fp16"]
    asked = json.loads(run("plan", "llama3-8b", "-d", "orin-nano-8gb", "--weights", "int8", "--json", "-").stdout)
    assert (asked["recommended"], asked["works"], list(asked["formats"])) == (None, False, ["int8", "fp16"])
    mixed = ("--weights", "int4", "--block-size", 128, "--head", "int4", "--layers", "0-3=int8")
    asked = json.loads(run("plan", "llama3-8b", "-d", "orin-nano-8gb", *mixed, "--json", "-").stdout)
    assert list(asked["formats"]) == ["int4-128", "int8", "fp16"]


def test_a_recipe_in_4_bits_is_planned_so_with_either_jetpack():
    recipe, _ = load_export_recipe("llama3.2-1b-int4")
    assert recipe.weights == "int4"
    for jetpack in ("6", "7"):
        done = run("plan", "--recipe", "llama3.2-1b-int4", "-d", "orin-nano-8gb", "--jetpack", jetpack, "--json", "-")
        assert done.exit_code == 0, done.output
        assert list(json.loads(done.stdout)["formats"]) == ["int4-64", "int8", "fp16"]


def test_a_bundle_is_planned_as_it_was_exported(bundles):
    bundle = bundles("llama-tied", dtype="fp16", weights="int8")
    plan = json.loads(run("plan", bundle.folder, "-d", "orin-nano-8gb", "--json", "-").stdout)
    assert (plan["recommended"], list(plan["formats"])) == (None, ["int8", "fp16"])


def test_export_takes_what_plan_recommends(checkpoints, tmp_path):
    """On a device with room for the weights in 4 bits, and not in more."""
    folder = checkpoints("llama-tied")
    architecture = open_checkpoint(str(folder)).architecture
    known = load_device("orin-nano-8gb")
    sizes = {}
    for choice in ("dtype", "int8", "int4"):
        settings = PlanSettings(2, formats=weights_formats(architecture, known, choice), max_length=96)
        sizes[choice] = sum(make_plan("", architecture, known, settings).memory.values())
    assert sizes["int4"] < sizes["int8"] < sizes["dtype"]
    room = (sizes["int4"] + sizes["int8"]) // 2
    (tmp_path / "d.toml").write_text(f'extends = "orin-nano-8gb"\nmemory_gb = {room / 1e9 + 0.9:.9f}\n')
    device = load_device(str(tmp_path / "d.toml"))
    wanted = recommend(architecture, device, PlanSettings(2, max_length=96))
    done = run("export", folder, tmp_path / "b", "-e", 2, "-d", tmp_path / "d.toml", "--max-length", 96)
    assert done.exit_code == 0, done.output
    assert wanted.reason == "weights int4: fp16 does not fit, int8 does not fit"
    assert wanted.reason in done.output
    assert read_bundle(tmp_path / "b").manifest.formats == wanted.formats


def test_a_recipe_is_shown_with_the_format_for_each_device():
    shown = run("recipes", "show", "llama3-8b")
    assert shown.exit_code == 0
    assert "#   orin-nano-8gb: weights int4: fp16 does not fit, int8 does not fit\n" in shown.output
    assert "#   h100: weights fp16: it fits\n" in shown.output
    assert "For a device" not in run("recipes", "show", "llama3.2-1b-int4").output
