"""Ending a round's drafting early changes which drafts are made, never which tokens come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.runtime.decoding.test_decode import prompts

import edgeskip
from edgeskip.runtime.bundle.graphs import LEAST_DRAFT_VOCABULARY, MAX_SPECULATIONS
from edgeskip.runtime.drafting.length import Pace
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


def test_a_length_that_is_chosen_weighs_confidence_unless_a_threshold_is_given(model, monkeypatch):
    weighed, drafts_on = [], Pace.drafts_on

    def noted(pace, exit_layer, confidence):
        weighed.append(confidence)
        return drafts_on(pace, exit_layer, confidence)

    monkeypatch.setattr(Pace, "drafts_on", noted)
    plain = model.complete(PROMPT, mode="autoregressive")
    for threshold in (0.0, 1.0, None):
        assert not weighed
        ours = model.complete(PROMPT, num_speculations="auto", confidence_threshold=threshold)
        assert ours.token_ids == plain.token_ids
        if threshold == 1:
            assert ours.statistics.drafted <= ours.statistics.rounds
    assert weighed
    assert all(0 < one <= 1 for one in weighed)


def test_the_confidence_is_the_softmax_probability_of_the_drafted_token(model):
    session = model.session
    model.complete(PROMPT, num_speculations=1, confidence_threshold=0.5, max_new_tokens=4)
    logits = np.array([[0.5, 3.0, -1.0] + [-4.0] * 297], np.float64)
    session._buffers["draft_logits"][0] = logits
    session._buffers["draft_token_logits"][0] = logits.max()
    wanted = (np.exp(logits) / np.exp(logits).sum()).max()
    assert session.draft_confidence(0, 300) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.01, 0.12, 0.2])
def test_early_exit_with_a_threshold_takes_what_transformers_exit_is_sure_of(threshold, bundles, reference):
    """Sure tokens, but not too many in a row and whichever rows the draft head knows; then one or two of the whole
    model.
    """
    full, trusted = reference("llama-gqa"), 0

    def after(ids):
        with torch.no_grad():
            output = full(torch.tensor([ids]), output_hidden_states=True)
            at_exit = full.lm_head(full.model.norm(output.hidden_states[3]))[0, -1].softmax(-1)
        assert abs(float(at_exit.max()) - threshold) > 1e-5  # or rounding decides
        target = output.logits[0, -1].log_softmax(-1).max(-1)
        return int(at_exit.argmax()), float(at_exit.max()), int(target.indices), float(target.values)

    bundle = bundles("llama-gqa", exit_layer=3, draft_vocabulary=LEAST_DRAFT_VOCABULARY)
    with edgeskip.load(bundle.folder) as model:
        for prompt in prompts(4, seed=7):
            wanted, in_a_row = [(*after(prompt)[2:], False)], 0  # tokens, their log probabilities, whether the exit's
            while len(wanted) < 24:
                token, confidence, *target = after([*prompt, *(one[0] for one in wanted)])
                sure = confidence >= threshold and in_a_row < MAX_SPECULATIONS - 1
                wanted.append((token, np.log(confidence), True) if sure else (*target, False))
                in_a_row = (in_a_row + 1) * sure
                if not sure and token == target[0]:
                    wanted.append((*after([*prompt, *(one[0] for one in wanted)])[2:], False))
            how = {"confidence_threshold": threshold, "max_new_tokens": 24, "logprobs": 0}
            made = model.complete(prompt, mode="early-exit", **how)
            assert len(made.token_ids) == 24 or made.stop_reason == "eos"
            tokens, logprobs, own = zip(*wanted[: len(made.token_ids)], strict=True)
            assert made.token_ids == tokens
            assert [one.logprob for one in made.logprobs] == pytest.approx(logprobs, abs=1e-3)
            assert made.statistics.trusted == sum(own)
            trusted += sum(own)
    assert trusted > 10


@pytest.mark.parametrize("picking", [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3}])
def test_early_exit_that_is_never_sure_enough_gives_the_text_of_plain_decoding(picking, model):
    plain = model.complete(PROMPT, mode="autoregressive", max_new_tokens=30, **picking)
    ours = model.complete(PROMPT, mode="early-exit", confidence_threshold=1, max_new_tokens=30, **picking)
    assert ours.token_ids == plain.token_ids
    assert ours.statistics.tested == ours.statistics.drafted
    assert ours.statistics.trusted == 0


def test_early_exit_with_a_threshold_leaves_no_layer_without_rows(model):
    made = model.complete(PROMPT, mode="early-exit", confidence_threshold=0.05, max_new_tokens=30)
    assert made.statistics.trusted
    told = [*PROMPT, *made.token_ids]
    after = model.complete(told, mode="autoregressive", max_new_tokens=20)
    assert after.statistics.cached_tokens > len(PROMPT)
    model.forget()
    assert after.token_ids == model.complete(told, mode="autoregressive", max_new_tokens=20).token_ids


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold, model):
    with pytest.raises(RequestError, match=r"confidence threshold: .*; wanted 0 to 1"):
        model.generate(PROMPT, confidence_threshold=threshold)


def test_a_closed_model_says_so(bundles):
    with edgeskip.load(bundles("llama-tied", exit_layer=3).folder) as closed:
        pass
    with pytest.raises(RequestError, match="model: is closed"):
        next(closed.generate("a"))
