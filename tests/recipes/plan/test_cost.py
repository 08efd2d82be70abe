"""The cost model: it finds back what made its samples, and its rounds and rates are what counting gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.plan import cost
from edgeskip.recipes.plan.cost import Cost, Sample
from edgeskip.runtime.bench.measure import BenchSettings, run_bench
from edgeskip.runtime.bundle.graphs import graph_table, heads_of, split_at
from edgeskip.runtime.bundle.weights import read_bytes

KNOWN = Cost(call_ms=0.02, layer_ms=0.03, several_ms=0.004, row_ms=0.0005, row_byte_ms=0.0, bytes_per_ms=2.5e9)


def samples(known, layers=(0, 4, 12), rows=(1, 2, 4, 9)):
    sizes = {0: 500_000_000, 4: 490_000_000, 12: 1_470_000_000}
    return [Sample(n, t, sizes[n], known.time_ms(n, t, sizes[n])) for n in layers for t in rows]


@pytest.mark.parametrize(
    "known",
    [
        KNOWN,
        Cost(0.0, 0.1, 0.0, 0.0, 0.0, 1e9),
        Cost(0.05, 0.0, 0.0, 0.0, 2e-10, 3e7),  # a CPU: every row computes
    ],
)
def test_a_fit_finds_back_what_made_the_samples(known):
    fitted = cost.fit_cost(samples(known))
    for layers, rows, size in ((32, 1, 16_000_000_000), (8, 5, 3_000_000_000), (0, 3, 1_000_000_000)):
        assert fitted.time_ms(layers, rows, size) == pytest.approx(known.time_ms(layers, rows, size), rel=1e-6)


def test_no_part_of_a_fit_is_negative():
    rng = np.random.default_rng(0)
    noisy = [Sample(s.layers, s.rows, s.bytes, s.ms * rng.uniform(0.8, 1.2)) for s in samples(KNOWN)]
    fitted = cost.fit_cost(noisy)
    assert min(fitted.call_ms, fitted.layer_ms, fitted.several_ms, fitted.row_ms, fitted.row_byte_ms) >= 0
    assert fitted.bytes_per_ms > 0


def test_no_samples_tell_nothing():
    with pytest.raises(ValueError, match="no times of its graphs"):
        cost.fit_cost([])


def test_arithmetic_bounds_calls_of_many_rows():
    bounded = Cost(0.0, 0.0, 0.0, 0.0, 0.0, bytes_per_ms=1e9, flops_per_ms=1e9)
    assert bounded.time_ms(1, 1, 10**9, flops=10**8) == 1
    assert bounded.time_ms(1, 1, 10**9, flops=7 * 10**9) == 7


@pytest.mark.parametrize(
    ("variant", "rows"),
    [("llama-gqa", None), ("llama-gqa", 150), ("llama-tied", 150), ("qwen2", None), ("qwen3", None)],
)
def test_graph_sizes_are_those_of_a_bundle(variant, rows, checkpoints, tmp_path):
    checkpoint = open_checkpoint(str(checkpoints(variant)))
    cut = cost.cut_model(checkpoint.architecture, "fp16", None, rows)
    for exits in ((1,), (3, 1)):
        settings = ExportSettings(exits[0], dtype="fp16", draft_vocabulary=rows, other_exits=exits[1:])
        bundle = export_bundle(checkpoint, tmp_path / f"bundle-{len(exits)}", settings)
        found = cut(exits)
        assert {graph: size.weight_bytes for graph, size in found.sizes.items()} == read_bytes(bundle)
        assert found.splits == {e: bundle.manifest.split(e) for e in exits}
        layers = {name: len(graph.layers) for name, graph in bundle.manifest.graphs.items()}
        assert {graph: size.layers for graph, size in found.sizes.items()} == layers


SIZES = {
    "draft": cost.GraphSize(2, 0, 100, 3),
    "middle_2_4": cost.GraphSize(2, 0, 70, 2),
    "verify": cost.GraphSize(4, 0, 200, 5),
    "head": cost.GraphSize(0, 0, 50, 0),
    "draft_head": cost.GraphSize(0, 0, 20, 0),
}


def cut_of(exits, draft_vocabulary=None):
    graphs = graph_table(8, exits, heads_of(100, draft_vocabulary))
    return cost.Cut({name: SIZES[name] for name in graphs}, {e: split_at(graphs, e) for e in exits})


def test_a_round_is_the_sum_of_its_calls():
    reading = Cost(0.0, 0.0, 0.0, 0.0, 0.0, bytes_per_ms=1.0)  # ms are bytes
    cut = cut_of((2,))
    # Drafts at rows 10, 11, 12 see 11, 12, 13 tokens, two of them with a head; then verify sees all 13, and a head.
    wanted = 3 * 100 + 3 * (11 + 12 + 13) + 2 * 50 + 200 + 5 * 13 + 50
    assert cost.round_ms(reading, cut, 2, 2, position=10) == wanted
    assert cost.round_ms(reading, cut_of((2,), 40), 2, 2, position=10) == wanted - 2 * 30
    assert cost.round_ms(reading, cut, 2, 0, position=10) == 100 + 3 * 11 + 200 + 5 * 11 + 50
    # drafts that the text has: all three rows at once, and one head
    assert cost.ngram_round_ms(reading, cut, 2, position=10) == 100 + 3 * 13 + 200 + 5 * 13 + 50
    # of two exits, what lies between them verifies for the first, once, and drafts for the second, row by row
    both = cut_of((2, 4))
    assert cost.round_ms(reading, both, 2, 2, position=10) == wanted + 70 + 2 * 13
    assert cost.round_ms(reading, both, 4, 2, position=10) == wanted + 3 * 70 + 2 * (11 + 12 + 13)
    plain = {cost.round_ms(reading, both, e, 0, position=10) for e in (2, 4)}
    assert plain == {100 + 3 * 11 + 70 + 2 * 11 + 200 + 5 * 11 + 50}


def test_tokens_a_round_are_what_counting_all_outcomes_gives():
    m, k = 0.7, 4
    expected = 0.0
    for outcome in itertools.product((True, False), repeat=k):
        probability = np.prod([m if right else 1 - m for right in outcome])
        expected += probability * (1 + len(list(itertools.takewhile(bool, outcome))))
    assert cost.tokens_per_round(m, k) == pytest.approx(expected)
    assert cost.tokens_per_round(1.0, 3) == 4
    assert cost.tokens_per_round(0.0, 3) == 1


def test_break_even_is_where_the_best_length_costs_a_plain_step():
    rounds = {1: 1.5, 2: 2.0, 4: 3.0}
    rate = cost.break_even(1.0, rounds)
    assert cost.best_speculation(rounds, (rate,))[1] == pytest.approx(1.0, abs=1e-6)
    assert cost.best_speculation(rounds, (rate - 0.05,))[1] > 1
    assert cost.break_even(1.0, {1: 2.5, 2: 3.5}) is None


def test_the_time_of_texts_of_several_kinds_is_the_mean_of_theirs():
    # 1000 tokens of each kind, in rounds of two drafts that are all right and all wrong: 1000 / 3 and 1000 of them
    rounds = 1000 / 3 + 1000
    assert cost.ms_per_token(1.5, 2, (1.0, 0.0)) == pytest.approx(1.5 * rounds / 2000)
    assert cost.best_speculation({1: 1.2, 2: 1.5}, (1.0, 0.0))[0] == 1
    assert cost.best_speculation({1: 1.2, 2: 1.5}, (1.0,))[0] == 2


def test_a_report_of_a_bundle_with_several_exits_calibrates(bundles):
    bundle = bundles("llama-tied", exit_layer=3, other_exits=(1,))
    with edgeskip.load(bundle.folder, device="cpu") as model:
        report = run_bench(model, ["def f(x):"], BenchSettings((2,), 12, 1, 0.0, exit_layers=(3, 1)))
    layers = {name: len(graph.layers) for name, graph in bundle.manifest.graphs.items()}
    found = list(cost.samples_of_report(report))
    assert [sample.layers for sample in found] == [layers[stage.graph] for stage in report.stages]
    assert {"draft", "middle_1_3", "verify", "head"} == {stage.graph for stage in report.stages}
    for name in ("middle_3_1", "middle_2_5", "middle_1", "middle"):
        stages = (replace(report.stages[0], graph=name), *report.stages[1:])
        with pytest.raises(ValueError, match="times of a graph"):
            list(cost.samples_of_report(replace(report, stages=stages)))


def test_a_report_of_a_bundle_with_a_draft_head_calibrates(bundles):
    bundle = bundles("llama-tied", exit_layer=3, draft_vocabulary=150)
    with edgeskip.load(bundle.folder, device="cpu") as model:
        report = run_bench(model, ["def f(x):"], BenchSettings((2,), 12, 1, 0.0))
    assert report.faults == 0
    assert {stage.graph for stage in report.stages} == set(bundle.manifest.graphs)
    size = cost.cut_model(bundle.manifest.architecture, "fp32", None, 150)((3,)).sizes["draft_head"]
    found = [(sample.layers, sample.rows, sample.bytes) for sample in cost.samples_of_report(report)]
    assert found.count((0, 1, size.weight_bytes)) == 1
