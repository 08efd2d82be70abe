"""Rounds that a GPU ends early by itself: drafts and texts are those of a host that looks at each draft."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.runtime.backends.test_history import same
from tests.standin import HostDevice, standin_model

import edgeskip
from edgeskip.runtime.bench.measure import TIE_GAP
from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.drafting.length import FEW_LIMITS
from edgeskip.runtime.errors import BackendError

PROMPTS = [list(range(40, 60)), [5, 90, 33], [7, 7, 7, 201]]
DRAWN = {"temperature": 0.7, "top_k": 20, "seed": 4}


@pytest.fixture
def model(backend, bundles):
    if backend.device == "cpu":
        pytest.skip("its host ends rounds")
    with backend.load(bundles("llama-tied", exit_layer=3, dtype=backend.dtype)) as model:
        assert model.session.ends_below(0.5)
        yield model


def captures(monkeypatch, kind):
    found, real = [], kind.captured_while
    monkeypatch.setattr(kind, "captured_while", lambda *args: found.append(1) or real(*args))
    return found


@pytest.mark.parametrize("further", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_drafts_and_texts_are_those_of_a_host_that_looks_at_each_draft(further, model, monkeypatch):
    kind, dtype, lengths = type(model.session), model.bundle.manifest.dtype, set()
    captured, alike = captures(monkeypatch, type(model.session._device)), 0
    for threshold in (0.1, 0.2, 0.5, 1.0):
        for prompt in PROMPTS:
            how = {"max_new_tokens": 40, **further}
            drafting = how | {"num_speculations": 5, "confidence_threshold": threshold}
            plain = model.complete(prompt, mode="autoregressive", **how)
            ours = model.complete(prompt, **drafting)
            with monkeypatch.context() as patch:
                patch.setattr(kind, "ends_below", lambda *_: False)
                wanted = model.complete(prompt, **drafting)
            assert same(ours, plain, model, further, 2 * TIE_GAP[dtype]) > 0
            if ours.token_ids == wanted.token_ids:
                alike += 1
                told = ("drafted", "accepted", "rounds", "tested")
                assert [getattr(ours.statistics, name) for name in told] == [
                    getattr(wanted.statistics, name) for name in told
                ]
            assert ours.statistics.captured_rounds == ours.statistics.rounds
            lengths |= {n for n, rounds in enumerate(ours.statistics.by_drafter["exit"].rounds_by_length) if rounds}
    assert lengths >= {1, 2, 3, 5}
    assert alike > (3 if dtype == "bf16" else 8)
    assert len(captured) < len(FEW_LIMITS)


@pytest.mark.parametrize("further", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_early_exit_trusts_the_drafts_that_a_host_would_trust(further, model, monkeypatch):
    kind, dtype, trusted, alike = type(model.session), model.bundle.manifest.dtype, 0, 0
    captured = captures(monkeypatch, type(model.session._device))
    for threshold in (0.1, 0.2, 0.5, 1.0):
        for prompt in PROMPTS:
            how = {"mode": "early-exit", "confidence_threshold": threshold, "max_new_tokens": 40, "logprobs": 0}
            ours = model.complete(prompt, **how, **further)
            with monkeypatch.context() as patch:
                patch.setattr(kind, "ends_below", lambda *_: False)
                wanted = model.complete(prompt, **how, **further)
            assert ours.statistics.captured_rounds == ours.statistics.rounds
            if ours.token_ids == wanted.token_ids:
                alike += 1
                found, judged = ([one.logprob for one in made.logprobs] for made in (ours, wanted))
                assert found == pytest.approx(judged, abs=TIE_GAP[dtype])
                for name in ("drafted", "accepted", "rounds", "tested", "trusted"):
                    assert getattr(ours.statistics, name) == getattr(wanted.statistics, name)
            trusted += ours.statistics.trusted
    assert alike > (3 if dtype == "bf16" else 8)
    assert trusted > 20
    assert len(captured) < len(FEW_LIMITS)


def test_another_threshold_captures_nothing_anew(model, monkeypatch):
    captured = captures(monkeypatch, type(model.session._device))
    drafted = [
        model.complete(
            PROMPTS[0], num_speculations=MAX_SPECULATIONS, confidence_threshold=t, max_new_tokens=30, temperature=0
        ).statistics.drafted
        for t in (0.05, 0.3, 0.9)
    ]
    assert len(captured) == 1
    assert all(more > fewer for more, fewer in pairwise(drafted))


@pytest.mark.parametrize("how", [{"num_speculations": 16}, {"mode": "early-exit"}], ids=str)
def test_the_end_of_the_caches_captures_few_more(how, model, monkeypatch):
    captured, ids = captures(monkeypatch, type(model.session._device)), []
    for prompt in PROMPTS:
        ids += model.complete(prompt, confidence_threshold=0.2, temperature=0, **how).token_ids
    assert len(ids) > 100
    assert len(captured) < len(FEW_LIMITS)


def test_rounds_of_a_later_exit_end_early_too(bundles, tmp_path):
    bundle = bundles("llama-gqa", exit_layer=3, other_exits=(1,))
    with standin_model(bundle, tmp_path / "b", HostDevice()) as model:
        for prompt in PROMPTS:
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=30)
            ours = model.complete(prompt, num_speculations=5, confidence_threshold=0.3, max_new_tokens=30)
            assert ours.token_ids == plain.token_ids
            assert ours.statistics.captured_rounds == ours.statistics.rounds


def test_a_driver_without_conditions_leaves_it_to_the_host(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(HostDevice, "has_conditions", False)
    with standin_model(bundles("llama-tied", exit_layer=3), tmp_path / "b", HostDevice()) as model:
        single = model.complete(PROMPTS[0], num_speculations=4, confidence_threshold=1.0, max_new_tokens=30)
    assert single.statistics.drafted <= single.statistics.rounds


def test_a_capture_that_the_driver_refuses_costs_no_token_and_leaves_it_to_the_host(bundles, tmp_path, monkeypatch):
    def refuse(*_):
        raise BackendError("CUDA", "CUDA_ERROR_NOT_SUPPORTED")

    bundle, how = bundles("llama-tied", exit_layer=3), {"num_speculations": 4, "max_new_tokens": 30}
    monkeypatch.setattr(HostDevice, "captured_while", refuse)
    with (
        standin_model(bundle, tmp_path / "b", HostDevice()) as model,
        edgeskip.load(bundle.folder, device="cpu") as cpu,
    ):
        for threshold in (0, 0.9):  # first whole rounds, and then those of the host
            wanted = cpu.complete(PROMPTS[0], confidence_threshold=threshold, **how)
            ours = model.complete(PROMPTS[0], confidence_threshold=0.9, **how)
            assert ours.token_ids == wanted.token_ids
            assert ours.statistics.drafted == wanted.statistics.drafted


def test_where_that_is_refused_early_exit_trusts_no_draft_that_nobody_judged(bundles, tmp_path, monkeypatch):
    def refuse(*_):
        raise BackendError("CUDA", "CUDA_ERROR_NOT_SUPPORTED")

    bundle, how = bundles("llama-tied", exit_layer=3), {"max_new_tokens": 30}
    early = how | {"mode": "early-exit", "confidence_threshold": 0.2}
    monkeypatch.setattr(HostDevice, "captured_while", refuse)
    with standin_model(bundle, tmp_path / "b", HostDevice()) as model:
        plain, tested = model.complete(PROMPTS[0], mode="autoregressive", **how), model.complete(PROMPTS[0], **early)
        assert (tested.token_ids, tested.statistics.trusted) == (plain.token_ids, 0)
        assert model.complete(PROMPTS[0], **early).statistics.trusted > 0
