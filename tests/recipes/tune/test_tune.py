"""Simulated rounds are those of the runtime, carried times those of the formula, and the choice can be used."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from tests.conftest import edit_json
from tests.exporter.quantization.stored import quantized_checkpoint
from tests.runtime.bench.test_page import Page
from tests.standin import HostDevice, standin_model

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.graphs.probe import Probe
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.recipes.deployment import load_export_recipe
from edgeskip.recipes.plan.cost import Cost, cut_model
from edgeskip.recipes.tune.report import print_tuning, tuned_recipe, tuning_page
from edgeskip.recipes.tune.simulation import Drafts, ExitDrafts, Rounds, simulate
from edgeskip.recipes.tune.times import CallTime, Measured, RoundTimes, carried, fitted_cost
from edgeskip.recipes.tune.tune import Text, TuneReport, TuneSettings, drafts_of_text, fastest_of, tune
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.manifest import MANIFEST, read_bundle
from edgeskip.runtime.decoding.rounds import hindsight_round, speculative_round
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.load import load
from edgeskip.runtime.structure import structure

PROMPTS = load_prompts()[:4]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model split at two layers, one of them a poor drafter; little room behind the prompts."""
    folder, checkpoint = tmp_path_factory.mktemp("shipped"), open_checkpoint(str(CHECKPOINT))
    return {e: export_bundle(checkpoint, folder / f"e{e}", ExportSettings(e, max_length=400)).folder for e in (2, 3)}


def decoded(model, prompts, new_tokens):
    """Plain texts, and what each exit drafts for them."""
    texts = []
    for prompt in prompts:
        generation = model.complete(prompt, mode="autoregressive", max_new_tokens=new_tokens)
        texts.append(Text(generation.prompt_token_ids, generation.token_ids, 1.0))
    with Probe(model.bundle) as probe:
        return texts, [probe.exits(text.prompt_ids, text.token_ids) for text in texts]


def assert_simulated(model, prompts, new_tokens, k, threshold):
    """Each text by itself; returns drafts made, simulated and real."""
    made, m = [], model.bundle.manifest
    for text, exits in zip(*decoded(model, prompts, new_tokens), strict=True):
        room = min(m.max_length - len(text.prompt_ids), new_tokens or m.max_length)
        drafts = drafts_of_text(exits, text.prompt_ids, text.token_ids, room)
        found = simulate([drafts], m.exit_layer, k, threshold)
        real = model.complete(
            text.prompt_ids, num_speculations=k, confidence_threshold=threshold, max_new_tokens=new_tokens
        )
        assert real.token_ids == text.token_ids
        s = real.statistics
        assert (found.count, found.tokens) == (s.rounds, s.new_tokens - 1)
        assert (found.tested, found.accepted) == (s.tested, s.accepted)
        made.append((found.drafted, s.drafted))
    return made


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("exit_layer", [2, 3])
def test_fixed_rounds_are_those_of_the_runtime(exit_layer, k, shipped):
    with edgeskip.load(shipped[exit_layer], device="cpu") as model:
        for found, real in assert_simulated(model, PROMPTS, 100, k, 0.0):
            assert found == real


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("exit_layer", [2, 3])
def test_rounds_that_end_early_are_those_of_the_runtime(exit_layer, threshold, shipped):
    with edgeskip.load(shipped[exit_layer], device="cpu") as model:
        made = assert_simulated(model, PROMPTS, 100, 6, threshold)
    found, real = map(sum, zip(*made, strict=True))
    assert found == pytest.approx(real, rel=0.05)  # what follows a confident wrong draft nobody knows
    assert threshold < 1 or found == real  # there it is the last of its round


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_texts_that_fill_the_caches(k, threshold, shipped):
    with edgeskip.load(shipped[3], device="cpu") as model:
        assert_simulated(model, PROMPTS[:2], None, k, threshold)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3"])
def test_a_random_model_whose_drafts_are_mostly_wrong(variant, bundles):
    with edgeskip.load(bundles(variant, exit_layer=3).folder, device="cpu") as model:
        prompts = [list(range(start, start + 9)) for start in range(20, 200, 30)]
        for found, real in assert_simulated(model, prompts, 60, 4, 0.0):
            assert found == real


def drafts(right, confidences=None, room=1000):
    confidences = np.array(confidences or [1.0] * len(right), np.float32)
    return Drafts({4: ExitDrafts(np.array(right, bool), confidences)}, room)


def test_rounds_by_hand():
    # K = 2: [right right] + 1, [wrong ...] + 1, [right wrong] + 1, and a last draft that ends the text
    text = drafts([1, 1, 0, 0, 1, 0, 1])
    assert simulate([text], 4, 2, 0.0) == Rounds({(4, 2): 4}, tokens=7, drafted=7, tested=6, accepted=4, looks={})
    # the second draft is not sure: its round ends behind it
    text = drafts([1, 1, 0, 0, 1, 0, 1], [0.9, 0.4, 0.9, 0.4, 0.9, 0.9, 0.9])
    by_drafts = {(4, 1): 1, (4, 2): 1, (4, 3): 2}
    assert simulate([text], 4, 3, 0.5) == Rounds(by_drafts, tokens=7, drafted=7, tested=6, accepted=4, looks={})
    # five rows after the prompt: the drafts of a round get fewer, and the last two rows are computed one by one
    found = simulate([drafts([0, 0, 0, 0, 0], room=5)], 4, 8, 0.0)
    assert found.by_drafts == {(4, 3): 1, (4, 2): 1, (4, 1): 1, (4, 0): 2}


COST = Cost(call_ms=0.02, layer_ms=0.03, several_ms=0.01, row_ms=0.005, row_byte_ms=1e-9, bytes_per_ms=2e7)


def cut_of(manifest, exit_layers):
    return cut_model(manifest.architecture, manifest.dtype)(exit_layers)


def measured(manifest, exit_layers, position):
    """What a device of that cost would show of a bundle with these exits."""
    cut = cut_of(manifest, exit_layers)

    def ms(graph, rows):
        size = cut.sizes[graph]
        return COST.time_ms(size.layers, rows, size.weight_bytes + size.cache_row_bytes * position)

    keys = {call.key for split in cut.splits.values() for k in range(7) for call in speculative_round(split, k).calls}
    calls = tuple(CallTime(graph, rows, ms(graph, rows)) for graph, rows in sorted(keys))
    return Measured(calls, position, host_round_ms=0.1, host_draft_ms=0.02, plain_ms_per_token=1.0)


@pytest.mark.parametrize("there", [(1,), (3,), (6,), (11,), (3, 6), (2, 3, 9)])
@pytest.mark.parametrize("here", [(2,), (3,), (6, 3), (3, 5, 8)])
def test_times_carried_to_other_exit_layers_are_those_of_the_formula(here, there, shipped):
    manifest, first = read_bundle(shipped[3]).manifest, there[0]
    by_drafts = {(e, drafts): 1 + e + drafts for e in there for drafts in (0, 1, 4)}
    rounds = Rounds(by_drafts, tokens=12, drafted=11, tested=9, accepted=7, looks={(first, 2): 3})
    calls = {(call.graph, call.rows): call.ms for call in measured(manifest, there, 200).calls}
    splits = cut_of(manifest, there).splits
    wanted = 3 * (calls[hindsight_round(splits[first], 2).calls[0].key] + 2 * 0.02)
    for (e, drafts), count in by_drafts.items():
        wanted += count * (sum(calls[c.key] for c in speculative_round(splits[e], drafts).calls) + 0.1 + drafts * 0.02)
    own, cuts = measured(manifest, here, 200), [cut_of(manifest, exits) for exits in (here, there)]
    found = RoundTimes(carried(own, fitted_cost(own, cuts[0]), *cuts), cuts[1])
    assert found.total_ms(rounds) == pytest.approx(wanted, rel=1e-3)


def assert_sound(report, num_layers):
    assert list(report.match_rates) == list(range(1, num_layers))
    assert len(report.pairs) == (num_layers - 1) * len(report.settings.grid)
    assert report.best == min(report.pairs, key=lambda pair: pair.ms_per_token)
    plain = report.measured.plain_ms_per_token
    for pair in report.pairs:
        assert pair.ms_per_token * pair.speedup == pytest.approx(plain)
        assert 1 <= pair.tokens_per_round <= pair.num_speculations + 1
        assert 0 <= pair.acceptance_rate <= pair.match_rate <= 1
    assert all(math.isfinite(call.ms) and call.ms > 0 for call in report.measured.calls)
    assert all(one.num_speculations == 0 for one in report.drafting if one.chooses_exit)
    kinds = [(one.draft, one.num_speculations > 0) for one in report.drafting if not one.chooses_exit]
    assert kinds == [(draft, fixed) for draft in ("exit", "ngram", "auto") for fixed in (True, False)]
    assert report.drafting[0].ms_per_token == report.best.ms_per_token
    assert {one.exit_layer for one in report.drafting if one.draft == "ngram"} == {report.present.exit_layer}
    assert [one.draft for one in report.drafting if one.chooses_exit][-1] == "auto"
    for one in report.drafting:
        assert set(one.exit_shares) <= set(one.exit_layers)
        assert sum(one.exit_shares.values()) + one.ngram_share <= 1 + 1e-9
    assert report.fastest == fastest_of(report.drafting)
    assert all(one.ms_per_token >= report.fastest.ms_per_token for one in report.drafting if not one.chooses_exit)
    assert all(one.ms_per_token * one.speedup == pytest.approx(plain) for one in report.drafting)
    assert report.departures == 0


@pytest.fixture(scope="module")
def report(shipped):
    settings = TuneSettings((1, 2, 4), 40)
    return tune(lambda: load(shipped[3], device="cpu"), PROMPTS[:2], settings, "edgeskip tune b --recipe r.toml")


def test_a_report_is_sound_and_its_rates_are_those_of_decoding(report, shipped):
    assert_sound(report, 12)
    assert report.settings.confidence_threshold == 0.5
    with edgeskip.load(shipped[3], device="cpu") as model:
        runs = [model.complete(p, num_speculations=4, max_new_tokens=40).statistics for p in PROMPTS[:2]]
    present = report.present
    assert (present.exit_layer, present.num_speculations) == (3, 4)
    assert present.match_rate == sum(s.accepted for s in runs) / sum(s.tested for s in runs)
    assert present.tokens_per_round == sum(s.new_tokens - 1 for s in runs) / sum(s.rounds for s in runs)


def test_a_report_comes_back_from_its_json(report, tmp_path):
    text = json.loads(json.dumps(dataclasses.asdict(report)))
    assert structure(TuneReport, text, tmp_path / "x", RequestError) == report


def test_a_device_that_hides_its_graphs(bundles, tmp_path):
    """Stand-in engines: the session calls itself CUDA, and times calls by themselves."""
    bundle = bundles("llama-tied", exit_layer=2)
    settings = TuneSettings((1, 4), 20)
    found = tune(lambda: standin_model(bundle, tmp_path / "engines", HostDevice()), ["def f(x):", "import"], settings)
    assert_sound(found, 4)
    assert found.settings.confidence_threshold == 0


def test_the_recipe_is_an_export_recipe(report, tmp_path):
    path = tmp_path / "tuned.toml"
    report = dataclasses.replace(report, fastest=report.drafting[0])
    path.write_text(tuned_recipe(report, "a tuned.toml"))
    recipe, _ = load_export_recipe(str(path))
    assert recipe.checkpoint == "python-10m"
    assert (recipe.exit_layer, recipe.num_speculations) == (report.best.exit_layer, report.best.num_speculations)
    assert (recipe.dtype, recipe.max_length) == ("fp32", 400)
    assert recipe.match_rates == pytest.approx(report.match_rates, abs=5e-4)
    assert recipe.source.startswith("edgeskip tune, ")
    head = path.read_text().splitlines()[:2]
    assert head[0] == "# Made by: edgeskip tune b --recipe r.toml"
    assert head[1] == "# Used by: edgeskip export --recipe 'a tuned.toml' [CHECKPOINT] BUNDLE"


def told(report):
    """What the table and the page say."""
    console = Console(record=True, width=400, file=io.StringIO())
    print_tuning(report, console)
    return console.export_text(), Page(tuning_page(report)).text


def changed(report, speedup=2.0, **ms):
    """The report where the best exit alone has this speedup, the first rows with these exits and drafts take such
    shares of its time, and all others twice that.
    """
    plain = report.measured.plain_ms_per_token
    shares = [1.0, *(2.0 for _ in report.drafting[1:])]
    for name, share in ms.items():
        draft, _, exits = name.partition("_")
        kind = (draft, exits == "exits")
        shares[[(one.draft, one.chooses_exit) for one in report.drafting].index(kind)] = share
    rows = tuple(
        dataclasses.replace(one, ms_per_token=share * plain / speedup, speedup=speedup / share)
        for one, share in zip(report.drafting, shares, strict=True)
    )
    factor = report.best.speedup / speedup
    pairs = tuple(
        dataclasses.replace(one, ms_per_token=factor * one.ms_per_token, speedup=one.speedup / factor)
        for one in report.pairs
    )
    best, fastest = (min(of, key=lambda one: one.ms_per_token) for of in (pairs, rows))
    return dataclasses.replace(report, best=best, pairs=pairs, drafting=rows, fastest=fastest)


def recipe_of(report, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(tuned_recipe(report, "r.toml"))
    return load_export_recipe(str(path))[0], path.read_text()


@pytest.mark.parametrize("draft", ["ngram", "auto", "auto_exits", "exit_exits"])
def test_what_should_draft_is_told(draft, report, tmp_path):
    own = changed(report, **{draft: 0.3})
    fastest = own.fastest
    k, exits = fastest.num_speculations or "auto", ",".join(map(str, fastest.exit_layers))
    options = f"--draft {draft.partition('_')[0]}{' -e auto' * ('exits' in draft)} -k {k}"
    exported = "" if draft == "ngram" else f" after an export with --exit-layer {exits}"
    for text in told(own):
        assert f"Fastest is {options}{exported}: {fastest.ms_per_token:.3f} ms, {fastest.speedup:.2f} times as" in text
    recipe, text = recipe_of(own, tmp_path)
    assert f"# Fastest on these texts with {options}: " in text
    first = report.best.exit_layer if draft == "ngram" else fastest.exit_layers[0]
    assert (recipe.exit_layer, recipe.other_exits) == (first, fastest.exit_layers[1:])
    at_first = [pair for pair in report.pairs if pair.exit_layer == first]
    assert recipe.num_speculations == min(at_first, key=lambda pair: pair.ms_per_token).num_speculations


def test_whether_several_exits_are_worth_it_is_told(report, tmp_path):
    both = changed(report, exit_exits=0.8)
    exits = ",".join(map(str, both.together.exit_layers))
    for text in told(both):
        wanted = f"--exit-layer {exits} with -e auto takes {both.together.ms_per_token:.3f} ms, 1.25 times as fast"
        assert f"Worth exporting together: {wanted} as one exit alone." in text
    assert recipe_of(both, tmp_path)[0].other_exits == both.together.exit_layers[1:]
    nearly = changed(report, exit_exits=0.99)
    assert fastest_of(nearly.drafting) == nearly.drafting[0] != nearly.fastest
    assert fastest_of(both.drafting) == both.fastest
    assert "One exit is enough: " in told(nearly)[0]
    alone, slow = changed(report), changed(report, speedup=0.9)
    for text in told(alone):
        assert f"One exit is enough: at best, --exit-layer {exits} with -e auto takes " in text
        assert "Drafts of the text bring no more: --draft exit." in text
    assert all("Nor does anything else." in text for text in told(slow))
    for one in (alone, slow):
        recipe, text = recipe_of(one, tmp_path)
        assert recipe.other_exits == ()
        assert "Fastest" not in text


EXITS = {"exit_layer": 3, "other_exits": (6,)}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The shipped model with two exits, and what tune says of it."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    export_bundle(open_checkpoint(str(CHECKPOINT)), folder, ExportSettings(max_length=400, **EXITS))
    return folder, tune(lambda: load(folder, device="cpu"), PROMPTS[:2], TuneSettings((1, 2, 4), 40, 0.0))


def test_a_bundle_of_several_exits_is_weighed_as_it_is_and_with_others(several, tmp_path):
    folder, found = several
    assert_sound(found, 12)
    manifest = read_bundle(folder).manifest
    assert found.exit_layers == (3, 6)
    assert {call.graph for call in found.measured.calls} == set(manifest.graphs)
    with edgeskip.load(folder, device="cpu") as model:
        settings = {"confidence_threshold": 0.0, "max_new_tokens": 40}
        for pair in found.here:
            settings |= {"exit_layer": pair.exit_layer, "num_speculations": pair.num_speculations}
            runs = [model.complete(p, **settings).statistics for p in PROMPTS[:2]]
            assert pair.match_rate == sum(s.accepted for s in runs) / sum(s.tested for s in runs)
            assert pair.tokens_per_round == sum(s.new_tokens - 1 for s in runs) / sum(s.rounds for s in runs)
    assert [pair.exit_layer for pair in found.here] == [3, 6]
    sets = [set(one.exit_layers) for one in found.drafting if one.draft == "exit" and one.chooses_exit]
    assert {3, 6} in sets
    assert all(found.best.exit_layer in some or some == {3, 6} for some in sets)
    in_bundle = {pair.exit_layer: pair for pair in found.here}
    for text in told(found)[:1]:
        for e in (3, 6):
            assert f"exit layer {e} with {in_bundle[e].num_speculations} draft" in text
    own = next(i for i, one in enumerate(found.drafting) if set(one.exit_layers) == {3, 6})
    best = dataclasses.replace(found.drafting[own], ms_per_token=1e-3, speedup=9.0)
    rows = (*found.drafting[:own], best, *found.drafting[own + 1 :])
    recipe, _ = recipe_of(dataclasses.replace(found, drafting=rows, fastest=best), tmp_path)
    assert {recipe.exit_layer, *recipe.other_exits} == {3, 6}


def test_rounds_of_a_bundle_of_several_exits_are_timed_by_its_own_calls(several):
    """Those of its pairs add up to what was measured, as nothing is carried."""
    folder, found = several
    calls = {(call.graph, call.rows): call.ms for call in found.measured.calls}
    splits = {e: read_bundle(folder).manifest.split(e) for e in found.exit_layers}
    for pair in found.here:
        k = pair.num_speculations
        round_ms = sum(calls[call.key] for call in speculative_round(splits[pair.exit_layer], k).calls)
        round_ms += found.measured.host_round_ms + k * found.measured.host_draft_ms
        most = found.scale * round_ms / pair.tokens_per_round
        assert 0.8 * most < pair.ms_per_token <= most * (1 + 1e-9)  # rounds at the end of a text have fewer drafts


def test_several_exits_on_a_device_that_hides_its_graphs(bundles, tmp_path):
    bundle = bundles("llama-tied", exit_layer=3, other_exits=(1,), draft_vocabulary=150)
    settings = TuneSettings((1, 4), 20)
    found = tune(lambda: standin_model(bundle, tmp_path / "engines", HostDevice()), ["def f(x):", "import"], settings)
    assert_sound(found, 4)
    assert found.exit_layers == (3, 1)
    assert {call.graph for call in found.measured.calls} == set(bundle.manifest.graphs)
    assert found.best_of_all_rows is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "int8"},
        {"weights": "int4", "head": "dtype"},
        {"weights": "int4", "head": "int4", "layers": ("0=int8", "3=dtype")},
        {"head": "int8"},
        {},
    ],
)
def test_the_recipe_has_the_formats_of_the_bundle(settings, report, bundles, checkpoints, tmp_path):
    bundle = bundles("llama-tied", **settings)
    own = dataclasses.replace(report, tensor_formats=bundle.manifest.formats, num_layers=4, quantizer="search")
    (tmp_path / "r.toml").write_text(tuned_recipe(own, "r.toml"))
    found, _ = load_export_recipe(str(tmp_path / "r.toml"))
    chosen = ExportSettings(
        2,
        weights=found.weights,
        head=found.head,
        layers=found.layers,
        block_size=found.block_size or 32,
        prefill_chunk=8,
    )
    made = export_bundle(open_checkpoint(str(checkpoints("llama-tied"))), tmp_path / "b", chosen)
    assert made.manifest.formats == bundle.manifest.formats


def test_formats_that_no_recipe_says_are_noted(report):
    formats = {"model.layers.0.mlp.down_proj.weight": "int8", "model.layers.0.self_attn.o_proj.weight": "int4-32"}
    text = tuned_recipe(dataclasses.replace(report, tensor_formats=formats, quantizer="search"), "r.toml")
    assert "# The formats of its single matrices are not for a recipe to say: give --weights." in text
    assert "weights =" not in text


@pytest.mark.parametrize("quantizer", ["search", "gptq"])
def test_the_recipe_has_the_quantizer_of_the_bundle(quantizer, report, tmp_path):
    formats = {"lm_head.weight": "int8"}
    own = dataclasses.replace(report, tensor_formats=formats, num_layers=4, quantizer=quantizer)
    (tmp_path / "r.toml").write_text(tuned_recipe(own, "r.toml"))
    assert load_export_recipe(str(tmp_path / "r.toml"))[0].quantizer == quantizer


@pytest.mark.parametrize("settings", [(), ("--head", "int4", "--block-size", "64")])
def test_the_recipe_leaves_layers_that_came_quantized_as_they_are(settings, checkpoints, tmp_path):
    quantized_checkpoint(checkpoints("llama-tied"), tmp_path / "q", "gptq", 4, 32)
    assert run("export", tmp_path / "q", tmp_path / "a", "-e", 2, *settings).exit_code == 0
    bundle = read_bundle(tmp_path / "a")
    found = tune(lambda: edgeskip.load(bundle.folder, device="cpu"), ["def f(x):", "import"], TuneSettings((1,), 20))
    assert found.quantizer is None
    (tmp_path / "r.toml").write_text(tuned_recipe(found, "r.toml"))
    again = run("export", "--recipe", tmp_path / "r.toml", tmp_path / "q", tmp_path / "b")
    assert again.exit_code == 0, again.output
    assert read_bundle(tmp_path / "b").manifest.formats == bundle.manifest.formats


def test_a_quantized_bundle_is_tuned_and_its_formats_are_told(bundles):
    bundle = bundles("llama-tied", weights="int4", layers=("0=int8",))
    found = tune(lambda: edgeskip.load(bundle.folder, device="cpu"), ["def f(x):", "import"], TuneSettings((1, 4), 20))
    assert_sound(dataclasses.replace(found, departures=0), 4)  # its products round what they multiply
    assert found.tensor_formats == bundle.manifest.formats
    assert found.quantizer == "search"
    assert found.formats.keys() == {"int4-32", "int8", "fp32"}
    console = Console(record=True, width=200, file=io.StringIO())
    print_tuning(found, console)
    assert "Weights: " in console.export_text()


def test_drafts_from_some_rows_of_the_vocabulary_are_weighed_as_they_are_decoded(bundles, tmp_path):
    bundle = bundles("llama-tied", exit_layer=3, draft_vocabulary=150)
    load_it, texts = (lambda: edgeskip.load(bundle.folder, device="cpu")), ["def f(x):", "import"]
    found = tune(load_it, texts, TuneSettings((1, 4), 40, confidence_threshold=0))
    assert_sound(found, 4)
    with load_it() as model:
        settings = {"num_speculations": 4, "confidence_threshold": 0, "max_new_tokens": 40}
        runs = [model.complete(text, **settings) for text in texts]
    stats = [run.statistics for run in runs]
    assert found.present.match_rate == sum(s.accepted for s in stats) / sum(s.tested for s in stats)
    ids = [token for run in runs for token in run.token_ids[1:]]
    assert found.covered == sum(token < 150 for token in ids) / len(ids) < 1
    assert found.match_rates[3] <= found.covered
    assert {call.graph for call in found.measured.calls} == set(bundle.manifest.graphs)
    console = Console(record=True, width=200, file=io.StringIO())
    print_tuning(found, console)
    assert f"Drafts come from 150 rows of the vocabulary, which have {found.covered:.1%}" in console.export_text()
    whole = bundles("llama-tied", exit_layer=3)
    other, ms = found.best_of_all_rows, found.best.ms_per_token
    with edgeskip.load(whole.folder, device="cpu") as model:
        settings |= {"num_speculations": other.num_speculations}
        stats = [model.complete(text, **settings).statistics for text in texts]
    if other.exit_layer == 3:
        assert other.match_rate == sum(s.accepted for s in stats) / sum(s.tested for s in stats)
    for factor, rows, exit_layer in ((1.1, 150, found.best.exit_layer), (0.9, None, other.exit_layer)):
        all_rows = dataclasses.replace(other, ms_per_token=factor * ms)
        one = dataclasses.replace(found, best_of_all_rows=all_rows, fastest=found.drafting[0])
        (tmp_path / "r.toml").write_text(tuned_recipe(one, "r.toml"))
        recipe, _ = load_export_recipe(str(tmp_path / "r.toml"))
        assert (recipe.draft_vocabulary, recipe.exit_layer) == (rows, exit_layer)
        console = Console(record=True, width=400, file=io.StringIO())
        print_tuning(one, console)
        assert ("which is faster: export with --draft-vocabulary all" in console.export_text()) == (rows is None)


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "line\nbreak", "tab\tand \x7f", "größer"])
def test_any_name_is_kept_in_the_recipe(name, report, tmp_path):
    path = tmp_path / "tuned.toml"
    path.write_text(tuned_recipe(dataclasses.replace(report, source=name, command=name), "x.toml"), encoding="utf-8")
    assert load_export_recipe(str(path))[0].checkpoint == name


def timed(report, fastest_ms):
    """The report as of a machine on which plain decoding takes 2 ms a token, and the last pair is the fastest."""

    def at(pair, ms):
        return dataclasses.replace(pair, ms_per_token=ms, speedup=2 / ms)

    pairs = [at(pair, 3.0) for pair in report.pairs[:-1]]
    best = at(report.pairs[-1], fastest_ms)
    measured = dataclasses.replace(report.measured, plain_ms_per_token=2.0)
    return dataclasses.replace(report, pairs=(*pairs, best), best=best, measured=measured)


@pytest.mark.parametrize(
    ("ms", "verdict", "figure"),
    [
        (1.25, "Exit layer 11 with 4 drafts per round: 1.250 ms per token, 1.60 times as fast", "1.25"),
        (0.05, "Exit layer 11 with 4 drafts per round: 0.050 ms per token, 40.00 times as fast", "0.050"),
        (2.5, "No pair beats plain decoding here: at best, exit layer 11 with 4 drafts, 0.80 times as fast", "2.50"),
        (12.0, "No pair beats plain decoding here: at best, exit layer 11 with 4 drafts, 0.17 times as fast", "12.0"),
    ],
)
def test_the_page_is_whole(ms, verdict, figure, report):
    page = Page(tuning_page(timed(report, ms)))
    assert {"surface", "drafting", "match"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.svgs) == 3
    assert verdict in page.text
    assert f">{figure}<" in page.svgs[0]
    assert all(source.startswith("#") for source in page.sources)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("def f(x):")
    return path


@pytest.mark.parametrize("others", [(), (3,)])
def test_the_command_writes_all_it_is_asked_for(others, bundles, prompt, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "toml")}
    bundle = bundles("llama-tied", exit_layer=2, other_exits=others).folder
    result = run(
        *("tune", bundle, "--prompts", prompt, "-k", 2, "-k", "auto", "-k", 3, "-n", 12, "--json", files["json"]),
        *("--html", files["html"], "--recipe", files["toml"]),
    )
    assert result.exception is None, result.stderr
    assert "exit layer" in result.stdout
    report = json.loads(files["json"].read_text())
    fastest = report["fastest"]
    assert fastest in report["drafting"]
    assert {pair["num_speculations"] for pair in report["pairs"]} == {2, 3}
    assert {one["num_speculations"] for one in report["drafting"]} >= {0}
    exits = [report["best"]["exit_layer"]] if fastest["draft"] == "ngram" else fastest["exit_layers"]
    recipe = load_export_recipe(str(files["toml"]))[0]
    assert [recipe.exit_layer, *recipe.other_exits] == exits
    assert "What should draft" in result.stdout
    assert Page(files["html"].read_text()).svgs
    kept = files["toml"].read_text()
    again = run("tune", bundle, "--prompts", prompt, "-n", 12, "--recipe", files["toml"])
    assert again.exit_code == 7
    assert again.stderr == f"edgeskip: {files['toml']}: is there already; give another file, or remove it\n"
    assert files["toml"].read_text() == kept


def test_no_recipe_comes_from_a_machine_that_is_not_idle(bundles, prompt, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[tune.__module__], "BUSY", 0.0)
    recipe, report = tmp_path / "tuned.toml", tmp_path / "report.json"
    bundle = bundles("llama-tied", exit_layer=2).folder
    result = run("tune", bundle, "--prompts", prompt, "-k", 2, "-n", 12, "--json", report, "--recipe", recipe)
    assert result.exit_code == 5
    assert "tuned.toml: not written: the measurement is not valid; run it again on an idle machine" in result.stderr
    assert not recipe.exists()
    made = json.loads(report.read_text())
    assert not made["valid"]
    (doubt,) = made["doubts"]
    assert f"Not a valid measurement: {doubt}." in result.stdout
    assert re.fullmatch(r"rounds took \d+\.\d\d times what their calls add up to", doubt)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["-k", "0", "-k", "auto"], 5, "num speculations: 0; wanted 1 to 16 or 'auto'"),
        (["-n", "1"], 5, "max new tokens: 1; wanted 2 to 86, after the longest prompt"),
        (["-n", "87"], 5, "max new tokens: 87; wanted 2 to 86"),
        (["--prompts", "{long}"], 5, "prompts: one of 201 tokens; wanted at most 94"),
        (["--prompts", "{tmp}/nowhere"], 5, "nowhere: no such file"),
        (["--recipe", "{tmp}/no/x.toml"], 5, "x.toml: cannot be written (no such folder)"),
        (["--recipe", "{tmp}/x", "--json", "{tmp}/x"], 5, "given twice"),
        (["--device", "cpu", "--backend", "tensorrt"], 4, "no tensorrt engines"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, code, line, bundles, prompt, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 200)
    places = {"long": str(tmp_path / "long.txt"), "tmp": str(tmp_path)}
    given = [argument.format(**places) for argument in arguments]
    result = run("tune", bundles("llama-gqa").folder, "--prompts", prompt, "--max-new-tokens", 8, *given)
    assert result.exit_code == code
    assert result.stdout == ""
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_says_nothing_is_one_line(bundles, prompt, tmp_path):
    bundle = bundles("llama-gqa")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with edgeskip.load(copy, device="cpu") as model:
        first = model.complete("def f(x):", max_new_tokens=1).token_ids[0]
    edit_json(copy / MANIFEST, lambda manifest: manifest.update(eos_token_ids=[first]))
    result = run("tune", copy, "--prompts", prompt, "-n", 8, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "prompts: the model ends after the first token of each" in result.stderr
