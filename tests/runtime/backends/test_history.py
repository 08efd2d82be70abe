"""Picks that depend on the history, on GPUs: drafts change no text, and it is that of a CPU."""

from __future__ import annotations

import numpy as np
import pytest
from tests.conftest import BACKENDS
from tests.runtime.decoding.test_drafts import Foreseen
from tests.runtime.grammar.test_masks import ACCENTED, PERSON
from tests.standin import make_device, standin_model

import edgeskip
from edgeskip import Grammar
from edgeskip.runtime.bench.measure import TIE_GAP
from edgeskip.runtime.bundle.graphs import LEAST_DRAFT_VOCABULARY
from edgeskip.runtime.decoding import model as decoding_model
from edgeskip.runtime.decoding.decode import Decoding, prefill
from edgeskip.runtime.decoding.sampling import draw_gap, penalized
from edgeskip.runtime.grammar.masks import TokenMask

SCHEMA, REGEX = Grammar.from_json_schema(PERSON), Grammar.from_regex("(ab|c[0-9]{1,3}){4,9}\\.")
DRAWN = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5}
CASES = {
    "schema": {"grammar": SCHEMA, "temperature": 0},
    "schema-drawn": {"grammar": SCHEMA} | DRAWN,
    "regex-drawn": {"grammar": REGEX, "temperature": 1.3, "seed": 3},
    "schema-penalized": {"grammar": SCHEMA, "temperature": 0, "frequency_penalty": 0.3},
    "penalized": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "penalized-drawn": {"repetition_penalty": 1.1, "presence_penalty": 0.3} | DRAWN,
}
PROMPTS = [[5, 90, 33], [*range(40, 60)]]
ALL = (1, 2, 3, 4), PROMPTS


def same(found, wanted, model, settings, tie):
    """How many tokens two texts begin with alike. Where they part, rounding must have decided between the tokens."""
    pairs = enumerate(zip(found.token_ids, wanted.token_ids, strict=False))
    parted = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if parted is None:
        assert found.token_ids == wanted.token_ids
        return len(wanted.token_ids)
    tokens = found.token_ids[parted], wanted.token_ids[parted]
    prompt, before = wanted.prompt_token_ids, wanted.token_ids[:parted]
    model.forget()
    prefill(model.session, Decoding(model.split), model.embeddings[[*prompt, *before]], 8)
    logits = penalized(wanted.sampling, model.session.read_logits(1)[0], np.array([*prompt, *before]), len(prompt))
    if "grammar" in settings:
        allowed = TokenMask(settings["grammar"], model._token_table).allowed(np.array(before, np.int64))
        logits = np.where(allowed[: len(logits)], logits, np.float32(-np.inf))
    if wanted.sampling.is_drawn:
        assert draw_gap(wanted.sampling, logits, len(prompt) + parted, tokens) < tie
    else:
        assert logits.max() - logits[list(tokens)].min() < tie
    return parted


def check(model, judge, tie, monkeypatch, ks=(), prompts=PROMPTS[:1]):
    """Compares texts with drafts and without on a model, and those with the judge's."""
    alike, dtype = 0, model.bundle.manifest.dtype
    monkeypatch.setattr(decoding_model, "NgramIndex", Foreseen)
    for settings in CASES.values():
        for prompt in prompts:
            how = settings | {"max_new_tokens": 30}
            plain = model.complete(prompt, mode="autoregressive", **how)
            for k in ks:
                drafted = model.complete(prompt, num_speculations=k, confidence_threshold=0, **how)
                same(drafted, plain, model, settings, 2 * TIE_GAP[dtype])
            monkeypatch.setattr(Foreseen, "text", (*prompt, *plain.token_ids))
            given = model.complete(prompt, num_speculations=3, draft="auto", **how)
            same(given, plain, model, settings, 2 * TIE_GAP[dtype])
            assert given.statistics.by_drafter["ngram"].accepted
            few = {"num_speculations": 3, "confidence_threshold": 0.2} | how
            drafted, wanted = model.complete(prompt, **few), judge.complete(prompt, **few)
            same(drafted, plain, model, settings, 2 * TIE_GAP[dtype])
            alike += same(drafted, wanted, judge, settings, 2 * tie)
            if dtype == "fp32" and drafted.token_ids == wanted.token_ids:  # drafts and their confidence too
                assert drafted.statistics.drafted == wanted.statistics.drafted
                assert drafted.statistics.accepted == wanted.statistics.accepted
    assert alike > 60


@pytest.mark.parametrize("backend", BACKENDS[1:], ids=str)
def test_drafts_change_no_text_and_it_is_a_cpus(backend, bundles, monkeypatch):
    bundle = bundles("llama-tied", dtype=backend.dtype)
    with (
        backend.load(bundle) as model,
        edgeskip.load(bundles("llama-tied").folder, device="cpu", threads=1) as judge,
    ):
        check(model, judge, backend.tie, monkeypatch, *(ALL if backend.device == "cuda" else ((4,), PROMPTS)))
        greedy = model.complete(PROMPTS[0], max_new_tokens=20, temperature=0, confidence_threshold=0)
        wanted = judge.complete(PROMPTS[0], max_new_tokens=20, temperature=0)
        assert same(greedy, wanted, judge, {}, 2 * backend.tie)
        # rounds that need no host are whole as ever
        assert greedy.statistics.captured_rounds >= greedy.statistics.rounds - 1


@pytest.mark.parametrize("kind", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_so_it_is_with_kernels_of_ours_and_quantized_weights(kind, bundles, tmp_path, monkeypatch):
    bundle = bundles("llama-tied", dtype="fp16", weights="int4", head="int8")
    with (
        standin_model(bundle, tmp_path / "b", make_device(kind), "layers") as model,
        edgeskip.load(bundle.folder, device="cpu", dialect="standard", threads=1) as judge,
    ):
        check(model, judge, 0.15, monkeypatch, *(ALL if kind == "cuda" else ()))


@pytest.mark.parametrize("backend", BACKENDS[1:3], ids=str)
def test_an_exit_that_has_no_token_that_may_follow_changes_no_text(backend, bundles):
    bundle = bundles("llama-gqa", dtype=backend.dtype, draft_vocabulary=LEAST_DRAFT_VOCABULARY)
    how = {"grammar": ACCENTED, "temperature": 1.2, "seed": 1, "max_new_tokens": 40}
    with backend.load(bundle) as model:
        for number in range(3):
            plain = model.complete([5, number], mode="autoregressive", **how)
            drafted = model.complete([5, number], num_speculations=3, **how)
            same(drafted, plain, model, how, 2 * TIE_GAP[backend.dtype])
            assert drafted.text[0] == "é"
            assert drafted.statistics.accepted
