"""Ending a round's drafting early changes which drafts are made, never which tokens come out."""

from __future__ import annotations

import numpy as np
import pytest

import edgeskip
from edgeskip.runtime.errors import RequestError

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def model(bundles):
    with edgeskip.load(bundles("llama-tied", exit_layer=3).folder) as model:
        yield model


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_tokens_are_those_of_plain_decoding_at_every_threshold(k, threshold, model):
    plain = model.complete(PROMPT, mode="autoregressive")
    ours = model.complete(PROMPT, num_speculations=k, confidence_threshold=threshold)
    assert ours.token_ids == plain.token_ids
    assert ours.stop_reason == plain.stop_reason


def test_a_threshold_of_zero_always_drafts_k_and_one_always_a_single_token(model):
    fixed = model.complete(PROMPT, num_speculations=4, confidence_threshold=0.0, max_new_tokens=30).statistics
    assert fixed.drafted > 3 * (fixed.rounds - 1)
    single = model.complete(PROMPT, num_speculations=4, confidence_threshold=1.0, max_new_tokens=30).statistics
    assert single.drafted <= single.rounds


def test_a_higher_threshold_drafts_less_and_wastes_less(model):
    runs = [
        model.complete(PROMPT, num_speculations=6, confidence_threshold=t, max_new_tokens=60).statistics
        for t in (0.0, 0.3, 0.9)
    ]
    assert runs[0].drafted > runs[1].drafted > runs[2].drafted
    assert runs[0].acceptance_rate < runs[2].acceptance_rate


def test_the_confidence_is_the_softmax_probability_of_the_drafted_token(model):
    session = model.session
    model.complete(PROMPT, num_speculations=1, confidence_threshold=0.5, max_new_tokens=4)
    logits = np.array([[0.5, 3.0, -1.0] + [-4.0] * 297], np.float64)
    session._buffers["draft_logits"][0] = logits
    session._buffers["draft_token_logits"][0] = logits.max()
    wanted = (np.exp(logits) / np.exp(logits).sum()).max()
    assert session.draft_confidence(0, 300) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold, model):
    with pytest.raises(RequestError, match=r"confidence threshold: .*; wanted 0 to 1"):
        model.generate(PROMPT, confidence_threshold=threshold)


def test_a_closed_model_says_so(bundles):
    with edgeskip.load(bundles("llama-tied", exit_layer=3).folder) as closed:
        pass
    with pytest.raises(RequestError, match="model: is closed"):
        next(closed.generate("a"))
