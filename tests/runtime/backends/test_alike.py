"""On a CPU, drafts change no token: the logits of a row are the same bits however many rows are verified with it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.rows import logits_by_calls

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.backends.alike import MOST_ROWS, fewest_rows
from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.bench import measure
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.decoding.rounds import verification_round
from edgeskip.runtime.host import usable_cores
from edgeskip.runtime.load import load

SHIPPED = Path(__file__).parents[3] / "recipes" / "checkpoints" / "python-10m"
FORMATS = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"weights": "int8"},
    "int4-32": {"weights": "int4", "head": "int4"},
    "mixed": {"weights": "int4", "head": "dtype", "layers": ("3=int8",)},
    "int4-64": {"weights": "int4", "block_size": 64},
}
OF_SHIPPED = ("int8", "int4-32", "int4-64")
OF_RANDOM = tuple(name for name in FORMATS if name != "int4-64")  # which does not divide their rows
VARIANTS = ("llama-gqa", "llama-odd-head-dim", "qwen2", "qwen3")
LENGTHS = (2, 3, 4, 5, 8, 13, HEAD_ROWS)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped checkpoint in one of the formats, exported once."""
    folder, checkpoint = tmp_path_factory.mktemp("shipped"), open_checkpoint(str(SHIPPED))

    def get(name):
        if not (folder / name).exists():
            export_bundle(checkpoint, folder / name, ExportSettings(exit_layer=3, max_length=1024, **FORMATS[name]))
        return read_bundle(folder / name)

    return get


def check_rows(bundle, positions):
    with OrtCpuSession(bundle) as session:
        assert session.exact
        for position in positions:
            single = logits_by_calls(session, bundle.manifest, position, [1] * HEAD_ROWS)
            assert len(np.unique(single, axis=0)) == HEAD_ROWS
            for rows in LENGTHS:
                np.testing.assert_array_equal(
                    logits_by_calls(session, bundle.manifest, position, [rows]), single[:rows]
                )


@pytest.mark.parametrize("name", OF_RANDOM)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_models_with_random_weights(variant, name, bundles):
    """Up to the last row of the caches but one; chunks of prompts are as long as the caches."""
    check_rows(bundles(variant, prefill_chunk=96, **FORMATS[name]), (1, 30, 96 - 1 - HEAD_ROWS))


@pytest.mark.parametrize("name", OF_SHIPPED)
def test_rows_of_the_shipped_model(name, shipped):
    check_rows(shipped(name), (63, 300))


@pytest.mark.skipif(usable_cores() < 2, reason="takes two cores")
def test_rows_do_not_depend_on_threads(shipped):
    command = [sys.executable, "-m", "tests.rows", str(shipped("int4-32").folder)]
    hashes = [
        subprocess.run([*command, threads], capture_output=True, text=True, check=True).stdout.split()
        for threads in ("1", "2")
    ]
    assert len({*hashes[0], *hashes[1]}) == 1


def assert_drafts_change_no_token(model, prompts, new_tokens=None):
    """Every prompt, in every way of drafting; the number of tokens."""
    drafted = 0
    for prompt in prompts:
        plain = model.complete(prompt, mode="autoregressive", max_new_tokens=new_tokens)
        for k, threshold in ((1, 0.0), (3, 0.0), (5, 0.5), (16, 0.2)):
            ours = model.complete(prompt, num_speculations=k, confidence_threshold=threshold, max_new_tokens=new_tokens)
            assert ours.token_ids == plain.token_ids
            assert ours.stop_reason == plain.stop_reason
            drafted += ours.statistics.drafted
    assert drafted > len(prompts)


@pytest.mark.parametrize("name", OF_SHIPPED)
def test_a_prompt_of_one_token_leaves_the_row_that_any_prompt_does(name, shipped):
    with load(shipped(name).folder, device="cpu") as model:
        rows = []
        for prompt in ([7], [7, 8, 9, 10]):
            model.forget()
            model.complete(prompt, max_new_tokens=1)
            rows.append(model.session.read_caches(1))
        for cache, alone in rows[0].items():
            np.testing.assert_array_equal(alone, rows[1][cache])


def random_prompts(count, vocabulary):
    random = np.random.default_rng(1)
    return [list(map(int, random.integers(2, vocabulary, random.integers(1, 12)))) for _ in range(count)]


@pytest.mark.parametrize("name", ["int8", "int4-32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_of_models_with_random_weights(variant, name, bundles):
    """Up to full caches; logits of such models lie close together."""
    with load(bundles(variant, **FORMATS[name]).folder, device="cpu") as model:
        assert_drafts_change_no_token(model, random_prompts(4, 300))


@pytest.mark.parametrize("name", OF_SHIPPED)
def test_texts_of_the_shipped_model(name, shipped):
    with load(shipped(name).folder, device="cpu") as model:
        assert_drafts_change_no_token(model, random_prompts(3, 4096), 80)


def sums(order):
    """Calls that give numbers that depend on the rows as `order` tells."""
    return lambda rows: [np.array([row + order(rows, row) for row in range(rows)])]


@pytest.mark.parametrize(
    ("order", "fewest"),
    [
        (lambda rows, row: 0, 1),
        (lambda rows, row: rows == 1, 2),
        (lambda rows, row: rows >= 4 and row < 4, None),
        (lambda rows, row: rows, None),
    ],
    ids=["alike", "a single row differs", "four rows differ", "all differ"],
)
def test_the_fewest_rows_that_are_those_of_a_longer_call(order, fewest):
    assert fewest_rows(sums(order)) == fewest


def test_where_a_single_row_is_computed_otherwise_there_are_two(bundles, monkeypatch):
    """Whichever kernels this processor has: texts stay as they are, up to the last row of the caches."""
    bundle = bundles("llama-gqa", **FORMATS["int4-32"])
    prompts = random_prompts(4, 300)
    with load(bundle.folder, device="cpu") as model:
        texts = [model.complete(prompt, mode="autoregressive") for prompt in prompts]
    monkeypatch.setattr(cpu_session, "fewest_rows", lambda run: 2)
    with load(bundle.folder, device="cpu") as model:
        assert_drafts_change_no_token(model, prompts)
        for prompt, text in zip(prompts, texts, strict=True):
            assert replace(model.complete(prompt, mode="autoregressive"), statistics=text.statistics) == text


def test_a_session_says_where_rows_differ(bundles, monkeypatch):
    monkeypatch.setattr(cpu_session, "fewest_rows", lambda run: None)
    with OrtCpuSession(bundles("llama-gqa")) as session:
        assert not session.exact
        assert "a row depends on their number here, so drafts may change a token" in session.description
    with OrtCpuSession(bundles("llama-gqa"), dialect="ort") as session:
        assert not session.exact


def test_trying_it_out_leaves_no_trace(bundles):
    bundle = bundles("llama-gqa")
    with OrtCpuSession(bundle) as session:
        names = [tensor.name for graph in bundle.manifest.graphs.values() for tensor in graph.inputs if tensor.is_cache]
        assert not any(session.read_cache(name).any() for name in names)
        assert bundle.manifest.max_length > MOST_ROWS


@pytest.mark.parametrize(
    ("dialect", "mode", "is_tie"),
    [("cpu", "self-speculative", False), ("cpu", "another runtime", True), ("ort", "self-speculative", True)],
)
def test_bench_takes_no_difference_for_a_tie_where_there_are_none(dialect, mode, is_tie, bundles, monkeypatch):
    """With gaps as wide as one likes."""
    monkeypatch.setattr(measure, "TIE_GAP", {"fp32": 1e9})
    texts = [measure.Run((5, token), 0.0, 0.0) for token in (6, 7)]
    contestant = measure.Contestant(mode, 1, lambda *_: texts[1])
    with load(bundles("llama-gqa").folder, device="cpu", dialect=dialect) as model:
        (difference,) = measure._differences(model, contestant, [[3, 4]], texts[:1], texts[1:])
    assert (difference.position, difference.is_tie) == (1, is_tie)


def test_a_widened_call_has_more_rows_of_the_same_buffers(bundles):
    *_, verify, head = verification_round(bundles("llama-gqa").manifest.split(), 0).calls
    for call in (verify, head):
        wide = call.widened(2)
        assert (call.rows, wide.rows) == (1, 2)
        views = zip((*call.inputs, *call.outputs), (*wide.inputs, *wide.outputs), strict=True)
        for (name, view), (same, more) in views:
            assert (name, replace(view, rows=2)) == (same, more)
        assert call.widened(1) == call
        assert wide.widened(1) == wide
