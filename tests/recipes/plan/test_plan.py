"""Planning: memory as sessions take it, times as they were measured, every pair of recipe and device, and bad input."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeskip.cli import main
from edgeskip.exporter.quantization.choice import chosen_formats
from edgeskip.recipes.deployment import DEVICES, MODELS, load_device, load_export_recipe, recipe_shape
from edgeskip.recipes.plan import plan as planning
from edgeskip.recipes.plan.cost import fit_cost, samples_of_report
from edgeskip.recipes.plan.plan import DRAFT_ROWS, PlanSettings, make_plan
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.backends.engines.targets import RTX_SERVES
from edgeskip.runtime.bench.measure import read_report
from edgeskip.runtime.bundle.graphs import DRAFT_HEAD
from edgeskip.runtime.bundle.weights import stored_arrays
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.load import load

DOCS = Path(__file__).parents[3] / "docs"
RECIPES = sorted(path.stem for path in MODELS.glob("*.toml"))
NAMES = sorted(path.stem for path in DEVICES.glob("*.toml"))
ONE_B, EIGHT_B = load_shape("llama3.2-1b").architecture, load_shape("llama3-8b").architecture


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_all_published_models_and_devices_have_a_recipe():
    assert {
        "llama2-7b",
        "llama2-13b",
        "llama2-70b",
        "codellama-7b",
        "codellama-34b",
        "llama3-8b",
        "llama3.2-1b",
    } <= set(RECIPES)
    assert {"orin-nano-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "thor"} <= set(NAMES)
    assert {"rtx-4060", "rtx-4090", "rtx-5090", "h100"} <= set(NAMES)


@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pair_is_planned(recipe, device):
    chosen, path = load_export_recipe(recipe)
    machine, architecture = load_device(device), recipe_shape(chosen, path).architecture
    rates = {e: (rate,) for e, rate in chosen.match_rates.items()}
    settings = PlanSettings(chosen.exit_layer, max_length=chosen.max_length, match_rates=rates)
    plan = make_plan(recipe, architecture, machine, settings)
    total = sum(plan.memory.values())
    assert (total > plan.available) == any(problem.at == "run" for problem in plan.problems)
    assert plan.works == (not plan.problems)
    weights = sum(size for kind, size in plan.memory.items() if kind.endswith("weights"))
    assert plan.disk["weights"] >= weights
    assert plan.plain_ms_per_token > plan.ideal_ms_per_token
    if plan.largest_max_length:  # one token more does not fit, or the model has no more
        longest = replace(settings, max_length=plan.largest_max_length)
        assert not any(p.at == "run" for p in make_plan(recipe, architecture, machine, longest).problems)
        if plan.largest_max_length < architecture.max_position_embeddings:
            longer = replace(settings, max_length=plan.largest_max_length + 1)
            assert any(p.at == "run" for p in make_plan(recipe, architecture, machine, longer).problems)


def test_what_is_known_to_fit_and_what_is_not():
    nano = load_device("orin-nano-8gb")
    assert make_plan("", ONE_B, nano, PlanSettings(4)).works
    seven = make_plan("", load_shape("llama2-7b").architecture, nano, PlanSettings(8))
    assert "GB are needed to run (13.5 of weights in fp16)" in seven.problems[0].found
    seventy = load_shape("llama2-70b").architecture
    assert not any(make_plan("", seventy, load_device(name), PlanSettings(10)).works for name in NAMES)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "qwen3"])
def test_memory_is_counted_as_a_session_takes_it(variant, bundles):
    bundle = bundles(variant)
    m = bundle.manifest
    settings = PlanSettings(m.exit_layer, dtype="fp32", max_length=m.max_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "DEFAULT_PREFILL_CHUNK", m.prefill_chunk)
        plan = make_plan("", m.architecture, load_device("h100"), settings)
    with load(bundle.folder, device="cpu") as model:
        memory = model.session.memory()
    assert (plan.memory["caches"], plan.memory["workspace"]) == (memory.caches, memory.workspace)
    rope = sum(tensor.bytes for name, tensor in stored_arrays(bundle).items() if name.startswith("rope."))
    held = sum(size for kind, size in plan.memory.items() if kind.endswith("weights"))
    assert held == sum(tensor.bytes for tensor in stored_arrays(bundle).values()) - rope
    assert plan.disk["weights"] == held + rope


def test_the_foretold_times_and_memory_are_near_the_measured_ones():
    """The bars of docs/planning.md, from the reports in docs/benchmarks: 15% and 5%."""
    tables = runpy.run_path(str(DOCS / "planning" / "tables.py"))
    rows = tables["compare"]()
    assert {row.report.rpartition("-")[0] for row in rows} == {"llama2-7b", "llama3-8b"}
    assert len(rows) == 8 * 6
    for row in rows:
        assert abs(row.error) < (0.05 if row.what == "memory" else 0.15), row
    page = (DOCS / "planning.md").read_text()
    assert tables["page"](page) == page


def test_the_kernels_of_the_table_are_the_measured_ones():
    reports = [read_report(path) for path in sorted((DOCS / "benchmarks").glob("llama3.2-1b-*.json"))]
    fitted = fit_cost([sample for report in reports for sample in samples_of_report(report)])
    kernels = load_device("h100").kernels
    copy = sum(report.copy_gb_per_s for report in reports) / len(reports) * 1e6
    assert kernels.copy_share == pytest.approx(fitted.bytes_per_ms / copy, abs=0.02)
    assert kernels.layer_us == pytest.approx(fitted.layer_ms * 1e3, rel=0.05)
    assert kernels.call_us == pytest.approx(fitted.call_ms * 1e3, rel=0.05)
    assert kernels.several_us == pytest.approx(fitted.several_ms * 1e3, rel=0.05)
    assert kernels.row_us == pytest.approx(fitted.row_ms * 1e3, rel=0.05)


def test_the_sms_of_rtx_are_those_of_the_library():
    import tensorrt_rtx

    served = {int(name[2:]) for name in tensorrt_rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(RTX_SERVES) == served


def test_the_best_pair_is_the_fastest_of_the_known_exits():
    rates = {2: (0.5,), 4: (0.8,), 8: (0.82,)}
    plan = make_plan("", ONE_B, load_device("h100"), PlanSettings(4, match_rates=rates))
    known = {e.exit_layer: e.ms_per_token for e in plan.exits if e.match_rate is not None}
    assert known.keys() == rates.keys()
    assert plan.best.exit_layer == min(known, key=known.get)
    own = next(e for e in plan.exits if e.exit_layer == 4)
    assert plan.num_speculations == own.num_speculations
    speeds = {speed.num_speculations: speed.ms_per_token for speed in plan.speeds}
    assert own.ms_per_token == min(ms for k, ms in speeds.items() if k)


def test_several_exits_are_planned_side_by_side():
    """Their graphs hold the same weights, and each exit's rounds are those of its chain of graphs."""
    machine, rates = load_device("h100"), {4: (0.9, 0.3), 8: (0.9, 0.85), 6: (0.5,)}
    alone = {e: make_plan("", ONE_B, machine, PlanSettings(e, match_rates=rates)) for e in (4, 8)}
    both = make_plan("", ONE_B, machine, PlanSettings(4, match_rates=rates, other_exits=(8,)))
    weights = {kind: size for kind, size in both.memory.items() if kind.endswith("weights")}
    assert list(weights) == ["draft weights", "middle_4_8 weights", "verify weights", "head weights"]
    for plan in alone.values():
        held = sum(size for kind, size in plan.memory.items() if kind.endswith("weights"))
        assert sum(weights.values()) == held
        assert (both.disk, both.memory["caches"]) == (plan.disk, plan.memory["caches"])
    speeds = {4: both.speeds, **both.other_speeds}
    assert speeds.keys() == {4, 8}
    kernel = both.cost.call_ms  # of the graph in between
    for e, of_exit in speeds.items():
        for speed, other in zip(of_exit, alone[e].speeds, strict=True):
            calls = 1 if e == 4 else speed.num_speculations + 1  # it verifies once, or drafts with each row
            assert speed.round_ms == pytest.approx(other.round_ms + calls * kernel, rel=1e-3)
        own = next(one for one in both.exits if one.exit_layer == e)
        best = min(of_exit[1:], key=lambda speed: speed.ms_per_token)
        assert (own.num_speculations, own.ms_per_token) == (best.num_speculations, pytest.approx(best.ms_per_token))
    assert next(e for e in both.exits if e.exit_layer == 6) == next(e for e in alone[4].exits if e.exit_layer == 6)


def test_what_a_choice_by_the_text_could_bring_is_what_each_kind_has_at_best():
    machine, rates = load_device("h100"), {4: (0.9, 0.3, 0.1), 8: (0.9, 0.85, 0.1)}
    plan = make_plan("", ONE_B, machine, PlanSettings(4, match_rates=rates, other_exits=(8,)))
    rounds = {
        e: {s.num_speculations: s.round_ms for s in of} for e, of in ((4, plan.speeds), *plan.other_speeds.items())
    }

    def ms(kind, e, k):
        return rounds[e][k] / sum(rates[e][kind] ** i for i in range(k + 1))

    pairs = [(e, k) for e in rounds for k in rounds[e]]
    each = [min(ms(kind, *pair) for pair in pairs) for kind in range(3)]
    fixed = min(sum(ms(kind, *pair) for kind in range(3)) / 3 for pair in pairs)
    assert [one.ms_per_token for one in plan.choice.by_kind] == pytest.approx(each)
    assert [one.exit_layer for one in plan.choice.by_kind] == [4, 8, None]
    assert plan.choice.ms_per_token == pytest.approx(sum(each) / 3)
    assert plan.choice.fixed.ms_per_token == pytest.approx(fixed)
    assert plan.choice.ms_per_token < plan.choice.fixed.ms_per_token
    # one rate throughout, for either: nothing to choose
    one = make_plan("", ONE_B, machine, PlanSettings(4, match_rates={4: (0.8,), 8: (0.9,)}, other_exits=(8,))).choice
    assert one.by_kind == (one.fixed,)
    assert one.ms_per_token == one.fixed.ms_per_token
    # of a single exit, K alone is chosen; without all rates, nobody knows
    k = make_plan("", ONE_B, machine, PlanSettings(4, match_rates={4: (0.9, 0.1)})).choice
    assert [one.exit_layer for one in k.by_kind] == [4, None]
    assert make_plan("", ONE_B, machine, PlanSettings(4, match_rates={4: (0.8,)})).choice is None
    assert make_plan("", ONE_B, machine, PlanSettings(4, match_rates={4: (0.8,)}, other_exits=(8,))).choice is None


def test_a_plan_computes_each_round_once(monkeypatch):
    computed, right = [], planning.round_ms

    def counted(cost, cut, exit_layer, k, position):
        computed.append((DRAFT_HEAD in cut.sizes, *cut.splits, exit_layer, k))
        return right(cost, cut, exit_layer, k, position)

    monkeypatch.setattr(planning, "round_ms", counted)
    make_plan("", ONE_B, load_device("h100"), PlanSettings(4, match_rates={4: (0.8,)}, other_exits=(8,)))
    assert (False, 4, 8, 8, 5) in computed
    assert len(computed) == len(set(computed))


def test_below_the_break_even_rate_speculation_loses():
    machine = load_device("orin-nano-8gb")
    rate = next(e for e in make_plan("", ONE_B, machine, PlanSettings(8)).exits if e.exit_layer == 8).break_even
    for sign, better in ((-1, False), (1, True)):
        plan = make_plan("", ONE_B, machine, PlanSettings(8, match_rates={8: (rate + sign * 0.01,)}))
        assert (plan.best.ms_per_token < plan.plain_ms_per_token) == better


def test_drafts_of_the_text_pay_from_their_break_even_rate():
    machine = load_device("orin-nano-8gb")
    plain = make_plan("", ONE_B, machine, PlanSettings(8))
    for sign, better in ((-1, False), (1, True)):
        rate = plain.ngrams.break_even + sign * 0.01
        plan = make_plan("", ONE_B, machine, PlanSettings(8, ngrams=(1.0, rate)))
        assert (plan.ngrams.ms_per_token < plan.plain_ms_per_token) == better
    some = make_plan("", ONE_B, machine, PlanSettings(8, ngrams=(0.25, 0.5))).ngrams
    # of four rounds, one has drafts, the others are plain steps
    tokens = {k: 3 + sum(0.5**i for i in range(k + 1)) for k in range(1, 17)}
    wanted = {k: (3 * plain.plain_ms_per_token + some.rounds_ms[k]) / tokens[k] for k in tokens}
    assert some.ms_per_token == pytest.approx(min(wanted.values()))
    assert some.num_speculations == min(wanted, key=wanted.get)


@pytest.mark.parametrize(
    ("device", "changes", "found", "fix"),
    [
        ("orin-nano-8gb", {"dtype": "fp32"}, "fp32 on SM 87; wanted fp16 or bf16", "give --dtype fp16"),
        ("rtx-4060", {"dtype": "fp32"}, "fp32 on SM 89", "give --dtype fp16"),
        ("orin-nano-8gb", {"max_length": 131072}, "GB are needed to run", "give --max-length"),
    ],
)
def test_what_does_not_work_is_said_with_what_to_change(device, changes, found, fix):
    plan = make_plan("", ONE_B, load_device(device), PlanSettings(4, **changes))
    assert not plan.works
    assert any(found in problem.found and fix in problem.fix for problem in plan.problems), plan.problems


def test_heads_that_need_another_dialect():
    odd = replace(ONE_B, head_dim=20)
    (problem,) = make_plan("", odd, load_device("rtx-4060"), PlanSettings(4)).problems
    assert "does not compute its attention heads (32 of 20)" in problem.found
    assert problem.fix == "build its engines with --dialect primitive"
    assert make_plan("", odd, load_device("orin-nano-8gb"), PlanSettings(4, jetpack="6")).works
    assert make_plan("", ONE_B, load_device("orin-nano-8gb"), PlanSettings(4, jetpack="6", dtype="fp32")).works


def test_an_old_gpu_has_no_bf16():
    old = replace(load_device("rtx-4060"), compute_capability=75)
    plan = make_plan("", ONE_B, old, PlanSettings(4, dtype="bf16"))
    assert [problem.found for problem in plan.problems] == ["bf16 on SM 75; wanted SM 80 or later for bf16"]
    unserved = replace(old, compute_capability=90)
    assert "does not serve SM 90" in make_plan("", ONE_B, unserved, PlanSettings(4)).problems[0].found


@pytest.mark.parametrize(
    ("jetpack", "version", "dialect", "why"),
    [
        (None, "10.16", "standard", ""),
        ("7", "10.16", "standard", ""),
        ("6", "10.3", "layers", ", as standard needs 10.15"),
        ("6.1", "10.3", "layers", ", as standard needs 10.15"),
        ("6.2.1", "10.3", "layers", ", as standard needs 10.15"),  # of which the table has 6.2
    ],
)
def test_a_jetpack_decides_the_dialect(jetpack, version, dialect, why):
    plan = make_plan("", ONE_B, load_device("orin-nano-8gb"), PlanSettings(4, jetpack=jetpack))
    assert (plan.works, plan.dialect) == (True, dialect)
    (note,) = (note for note in plan.notes if "engines of the" in note)
    assert note.endswith(f"TensorRT {version}: engines of the {dialect} dialect{why}.")
    assert note.startswith("JetPack " if jetpack else "TensorRT ")


@pytest.mark.parametrize("jetpack", ["6", "7"])
@pytest.mark.parametrize(
    ("weights", "engines"),
    [("int4", "no engines are needed, as layers are quantized."), (None, "engines of the layers dialect, as ")],
)
def test_notes_on_engines_are_those_of_the_plan(jetpack, weights, engines):
    formats = chosen_formats(ONE_B, "fp16", weights, "int8", (), 64)
    plan = make_plan("", ONE_B, load_device("orin-nano-8gb"), PlanSettings(4, jetpack=jetpack, formats=formats))
    assert (plan.works, plan.dialect, plan.build is None) == (True, "layers", weights is not None)
    (note,) = (note for note in plan.notes if "has TensorRT" in note)
    assert f": {engines}" in note
    assert any("Memory to build" in note for note in plan.notes) == (plan.build is not None)


@pytest.mark.parametrize("jetpack", ["5", "6.9", "60", "6.20", ""])
def test_a_jetpack_that_a_device_does_not_have_is_refused(jetpack):
    with pytest.raises(
        RequestError, match=f"JetPack: {jetpack}, which is not in the table .*; wanted 6.1 or 6.2 or 7.2"
    ):
        make_plan("", ONE_B, load_device("orin-nano-8gb"), PlanSettings(4, jetpack=jetpack))


def test_a_jetpack_whose_tensorrt_reads_no_dialect():
    old = replace(load_device("orin-nano-8gb"), jetpacks={"6.0": "8.6", "7.2": "10.16"})
    plan = make_plan("", ONE_B, old, PlanSettings(4, jetpack="6.0"))
    problem = planning.Problem(
        "build", "JetPack 6.0 has TensorRT 8.6; wanted TensorRT 10.3 or later", "install JetPack 7.2"
    )
    assert plan.problems == (problem,)


def test_layers_whose_kernels_are_ours_cost_their_launches():
    """Five for each layer, in place of what a layer's small kernels cost; not in fp32, which has no such kernels."""
    nano = load_device("orin-nano-8gb")
    saved = 16 * (nano.kernels.layer_us - 5 * nano.kernels.launch_us) / 1e3
    for dtype, wanted in (("fp16", saved), ("fp32", 0)):
        ms = [
            make_plan("", ONE_B, nano, PlanSettings(4, jetpack=jetpack, dtype=dtype)).plain_ms_per_token
            for jetpack in ("7", "6")
        ]
        assert ms[0] - ms[1] == pytest.approx(wanted)


def test_engines_hold_no_weights():
    """They are a few MB on disk and on the device; the parts of layers are the same for any number of layers."""
    nano = load_device("orin-nano-8gb")
    for jetpack in ("6", "7"):
        plan = make_plan("", ONE_B, nano, PlanSettings(4, jetpack=jetpack))
        assert plan.disk["engines"] < 20e6
        assert plan.memory["tables and kernels"] + plan.memory["scratch"] < 80e6
        assert plan.build < 0.8e9
    deep, shallow = (make_plan("", replace(ONE_B, num_layers=n), nano, PlanSettings(2, jetpack="6")) for n in (16, 4))
    assert (deep.disk["engines"], deep.build) == (shallow.disk["engines"], shallow.build)


def test_a_build_that_needs_more_than_the_device_has_is_said():
    machine = replace(load_device("orin-nano-8gb"), memory_gb=1.2)
    *_, problem = make_plan("", ONE_B, machine, PlanSettings(4)).problems
    assert problem.at == "build"
    assert "about 0.3 GB are needed to build engines, 0.3 GB are free" in problem.found
    assert "1 GB of swap" in problem.fix


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layer": 16}, "exit layer: 16; wanted 1 to 15: the model has 16 layers"),
        ({"match_rates": {20: (0.5,)}}, "exit layer: 20; wanted 1 to 15"),
        ({"match_rates": {4: (0.5, 0.6, 0.7), 8: (0.5, 0.6)}}, "match rate: 2 of exit layer 8; wanted 3, one for each"),
        ({"max_length": 1}, "max length: 1; wanted 2 to 131072"),
        ({"backend": "tensorrt-rtx"}, "backend: tensorrt-rtx does not serve H100"),
        ({"jetpack": "7.2"}, "JetPack: 7.2, which is not in the table of H100"),
    ],
)
def test_bad_settings_are_one_line(changes, message):
    with pytest.raises(RequestError) as caught:
        make_plan("", ONE_B, load_device("h100"), PlanSettings(**({"exit_layer": 4} | changes)))
    assert str(caught.value).startswith(message)


def test_the_command_prints_a_plan_and_its_json(tmp_path):
    known = ("--match-rate", "0.8", "--ngrams", "0.6=0.9")
    done = run("--recipe", "llama3.2-1b", "--device", "orin-nano-8gb", *known, "--json", tmp_path / "p")
    assert done.exit_code == 0, done.output
    assert "It fits" in done.output
    assert "Where 60% of the rounds have some, 90% of which are right" in done.output
    plan = json.loads((tmp_path / "p").read_text())
    assert plan["exit_layer"] == 4
    assert next(e for e in plan["exits"] if e["exit_layer"] == 4)["match_rate"] == 0.8
    piped = run("llama3.2-1b", "--device", "orin-nano-8gb", "-e", 4, "--json", "-")
    assert json.loads(piped.stdout)["works"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["-e", "4,8", "--match-rate", "4=0.8", "--match-rate", "8=0.9"],
            "a choice by the text (-e auto) brings nothing",
        ),
        (
            ["-e", "4,8", "--match-rate", "0.9,0.3", "--match-rate", "8=0.9"],
            "has as many tokens of each of these 2 kinds",
        ),
        (["-e", "4,8", "--match-rate", "4=0.8"], "could bring: give --match-rate for each exit"),
        (["-e", "4", "--match-rate", "0.9,0.1"], "A choice by the text (-k auto) takes at least"),
        (["-e", "4", "-k", "auto", "--match-rate", "0.9,0.1"], "A choice by the text (-k auto) takes at least"),
        (["-e", "4", "-k", "auto", "--match-rate", "0.8"], "a choice by the text (-k auto) brings nothing"),
        (["-e", "4", "-k", "auto"], "(-k auto) could bring: give --match-rate of several kinds of text"),
        (["-e", "4", "-k", "auto"], "exit layer 4 of 16, K = auto (calls of K = 4)"),
    ],
)
def test_the_command_says_what_a_choice_could_bring(arguments, said):
    done = run("llama3.2-1b", "-d", "h100", *arguments)
    assert done.exit_code == 0, done.output
    assert said in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("weights", "fix"), [("dtype", "--weights int8 or int4, a"), ("int8", "--weights int4, a"), ("int4", "a")]
)
def test_the_command_says_no_with_its_exit_code(weights, fix):
    done = run("llama2-70b", "--device", "rtx-4090", "-e", 10, "--weights", weights)
    assert done.exit_code == 1
    assert "Will not work: " in done.output
    assert f"no length fits: choose {fix} smaller model" in done.output


def test_a_config_of_ones_own_is_planned(checkpoints):
    folder = checkpoints("qwen3")
    for model in (folder, folder / "config.json"):
        done = run(model, "--device", "rtx-4090")
        assert done.exit_code == 0, done.output
        assert "exit layer 1 of 4" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a MODEL or --recipe"),
        (["llama3-8b", "--recipe", "llama3-8b"], 2, "give a MODEL or --recipe"),
        (["llama3-8c"], 5, "did you mean 'llama3-8b'?"),
        (["--recipe", "llama3-8c"], 7, "did you mean 'llama3-8b'?"),
        (["llama3-8b", "--match-rate", "80"], 5, "'80'; wanted a share from 0 to 1, or E=share"),
        (["llama3-8b", "--match-rate", "4=x"], 5, "'4=x'; wanted a share"),
        (["llama3-8b", "--match-rate", "=0.5"], 5, "'=0.5'; wanted a share"),
        (
            ["llama3-8b", "-e", "4", "--match-rate", "0.5", "--match-rate", "4=0.9"],
            5,
            "that of exit layer 4 twice; give",
        ),
        (["llama3-8b", "--bits", "5"], 5, "bits: 5, for weights that are not `auto`; leave it out"),
        (["llama3-8b", "--ngrams", "1.5"], 5, "n-grams: '1.5'; wanted a match rate from 0 to 1, or share=rate"),
        (["llama3-8b", "--ngrams", "=0.5"], 5, "'=0.5'; wanted a match rate"),
        (["llama3-8b", "--exit-layer", "0"], 5, "exit layer: 0; wanted 1 to 31"),
        (["llama3-8b", "-k", "17"], 5, "num speculations: 17; wanted 1 to 16 or 'auto'"),
        (["llama3-8b", "--max-length", "0"], 5, "max length: 0; wanted 2 to 8192"),
        (["llama3-8b", "--position", "9" * 30], 5, "wanted 0 to 4095, within the capacity"),
        (["--recipe", "x" * 5000], 7, "no 'xxx"),
        (["llama3-8b", "--calibrate", "nowhere.json"], 5, "nowhere.json: no such file"),
    ],
)
def test_bad_commands_are_one_line(arguments, code, message):
    done = run(*arguments, "--device", "h100")
    assert done.exit_code == code
    assert message in done.output


def test_a_device_that_is_not_there_names_the_nearest():
    done = run("llama3-8b", "--device", "orin-nano-8g")
    assert done.exit_code == 7
    assert "did you mean 'orin-nano-8gb'?" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "--calibrate: no times of its graphs"),
        ({"copy_gb_per_s": 0}, "r.json: copy_gb_per_s: found 0"),
        ({"copy_gb_per_s": float("nan")}, "r.json: copy_gb_per_s: found nan"),
        ({"exit_layer": 16}, "exit layer 16 of 16 layers"),
        ({"num_layers": 0}, "r.json: num_layers: found 0"),
        ({"rows": 0}, "r.json: stages[0].rows: found 0"),
        ({"bytes": -1}, "r.json: stages[0].bytes: found -1"),
        ({"ms": float("inf")}, "r.json: stages[0].ms: found inf"),
    ],
)
def test_a_report_without_usable_times_cannot_calibrate(change, message, tmp_path):
    report = json.loads((DOCS / "benchmarks" / "llama3.2-1b-0.8.json").read_text())
    (report if change.keys() <= report.keys() and "rows" not in change else report["stages"][0]).update(change)
    (tmp_path / "r.json").write_text(json.dumps(report))
    done = run("llama3-8b", "--device", "h100", "--calibrate", tmp_path / "r.json")
    assert done.exit_code == 5
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hardware": {"device": "NVIDIA L4", "host": "x", "compute_capability": 89}},
            "a report from NVIDIA L4, SM 89",
        ),
        ({"backend": "ONNX Runtime 1.32.0, CPU, ort dialect, fp32"}, "a report from NVIDIA H100 80GB HBM3, a CPU"),
    ],
)
def test_a_report_from_another_device_cannot_calibrate(change, message, tmp_path):
    report = json.loads((DOCS / "benchmarks" / "llama3.2-1b-0.8.json").read_text()) | change
    (tmp_path / "r.json").write_text(json.dumps(report))
    done = run("llama3-8b", "--device", "h100", "--calibrate", tmp_path / "r.json")
    assert done.exit_code == 5
    assert f"--calibrate: {message}; wanted one from H100 80GB HBM3 (SXM), SM 90" in done.output


@pytest.mark.parametrize(
    ("name", "said"), [("NVIDIA H100 80GB HBM3", False), ("NVIDIA H100 PCIe", True), ("NVIDIA H200", True)]
)
def test_a_report_from_a_device_of_another_name_is_noted(name, said, tmp_path):
    report = json.loads((DOCS / "benchmarks" / "llama3.2-1b-0.8.json").read_text())
    report["hardware"] = {"device": name, "host": "x", "compute_capability": 90}
    (tmp_path / "r.json").write_text(json.dumps(report))
    done = run("llama3-8b", "--device", "h100", "--calibrate", tmp_path / "r.json")
    assert done.exit_code == 0
    assert (f"Calibrated by a report from {name}: see that it is this device." in done.output) == said


def test_a_plan_prints_in_any_encoding():
    command = [sys.executable, "-m", "edgeskip.cli", "plan", "llama3.2-1b", "-d", "h100"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"It fits" in done.stdout


def test_a_plan_of_a_large_vocabulary_says_what_drafts_from_a_part_of_it_would_bring(tmp_path):
    plans = []
    for drafts in ((), ("--draft-vocabulary", DRAFT_ROWS)):
        done = run("llama3-8b", "-d", "h100", "-e", 4, "-k", 3, *drafts, "--json", tmp_path / "p")
        plans.append(json.loads((tmp_path / "p").read_text()) | {"said": "pays unless it brings" in done.output})
    times = [next(speed["round_ms"] for speed in p["speeds"] if speed["num_speculations"] == 3) for p in plans]
    assert plans[0]["draft_head"] == {
        "rows": DRAFT_ROWS,
        "num_speculations": 3,
        "round_ms": times[1],
        "all_rows_ms": times[0],
    }
    assert times[1] < times[0]
    assert plans[1]["draft_head"] is None
    assert [plan["said"] for plan in plans] == [True, False]
    assert make_plan("", load_shape("llama2-7b").architecture, load_device("h100"), PlanSettings(8)).draft_head is None
