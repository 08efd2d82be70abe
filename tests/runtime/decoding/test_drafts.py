"""Drafts that the text itself has change no token, whatever the backend and however tokens are picked."""

from __future__ import annotations

import numpy as np
import pytest

from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.bench.measure import TIE_GAP, tie_gap
from edgeskip.runtime.decoding import model as decoding_model
from edgeskip.runtime.drafting.ngram import NgramIndex
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.load import load
from edgeskip.runtime.sampling import GREEDY

DRAWN = {"temperature": 0.3, "top_p": 0.9, "seed": 11}
PENALIZED = {"repetition_penalty": 1.05, "frequency_penalty": 0.1, "temperature": 0.2, "seed": 4}


class Foreseen(NgramIndex):
    """Drafts what plain decoding gave, with a wrong token here and there: random models do not repeat themselves."""

    text: tuple[int, ...] = ()
    random = np.random.default_rng(0)

    def drafts(self, count):
        tokens = np.array(self.text[len(self._tokens) :][:count], int)
        wrong = self.random.random(len(tokens)) < 0.15
        return np.where(wrong, 2 + (tokens + 7) % 250, tokens).tolist()


def prompts(count):
    random = np.random.default_rng(6)
    return [random.integers(2, 258, random.integers(4, 14)).tolist() for _ in range(count)]


def check_same_tokens(model, lengths, monkeypatch, **settings):
    """Texts with each drafter, which part from plain decoding only at ties; drafts of the text must be accepted."""
    monkeypatch.setattr(decoding_model, "NgramIndex", Foreseen)
    accepted = {"ngram": 0, "exit": 0}
    for prompt in prompts(2):
        plain = model.complete(prompt, mode="autoregressive", max_new_tokens=32, **settings)
        monkeypatch.setattr(Foreseen, "text", (*prompt, *plain.token_ids))
        drafted = [("ngram", k) for k in lengths] + [("auto", lengths[-1]), ("auto", "auto"), ("exit", "auto")]
        for draft, k in drafted:
            ours = model.complete(prompt, draft=draft, num_speculations=k, max_new_tokens=32, **settings)
            pairs = enumerate(zip(ours.token_ids, plain.token_ids, strict=False))
            parted = next((i for i, pair in pairs if len({*pair}) > 1), None)
            if parted is None:
                assert (len(ours.token_ids), ours.stop_reason) == (len(plain.token_ids), plain.stop_reason)
            else:
                assert not model.session.exact
                pair, text = (ours.token_ids[parted], plain.token_ids[parted]), [*prompt, *plain.token_ids[:parted]]
                assert tie_gap(model, text, *pair, GREEDY.changed(**settings)) < TIE_GAP[model.bundle.manifest.dtype]
            for name, drafting in ours.statistics.by_drafter.items():
                assert draft in (name, "auto")
                accepted[name] += drafting.accepted
    assert accepted["ngram"] > 20


@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["greedy", "drawn"])
def test_tokens_are_those_of_plain_decoding(settings, backend, bundles, monkeypatch):
    with backend.load(bundles("llama-gqa", dtype=backend.dtype)) as model:
        check_same_tokens(model, range(1, 9), monkeypatch, **settings)


@pytest.mark.parametrize("settings", [{}, PENALIZED], ids=["greedy", "penalized"])
@pytest.mark.parametrize("fewest", [1, 2])
def test_tokens_on_a_cpu_in_4_bits(fewest, settings, bundles, monkeypatch):
    """Whose products round so coarsely that a last bit shows; also where single rows are computed otherwise."""
    if fewest == 2:
        monkeypatch.setattr(cpu_session, "fewest_rows", lambda run: 2)
    with load(bundles("llama-tied", weights="int4", head="int4").folder, device="cpu") as model:
        assert model.session.exact
        check_same_tokens(model, (1, 4, 16), monkeypatch, **settings)


def foreseen(model, prompt, monkeypatch):
    """What plain decoding gives, which is drafted from now on."""
    plain = model.complete(prompt, mode="autoregressive")
    monkeypatch.setattr(decoding_model, "NgramIndex", Foreseen)
    monkeypatch.setattr(Foreseen, "text", (*prompt, *plain.token_ids))
    return plain


@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_caches_fill_to_their_last_row(k, backend, bundles, monkeypatch):
    prompt = prompts(1)[0] * 6
    with backend.load(bundles("llama-gqa", dtype=backend.dtype)) as model:
        plain = foreseen(model, prompt, monkeypatch)
        ours = model.complete(prompt, draft="ngram", num_speculations=k)
    assert ours.statistics.accepted > 0
    assert (len(ours.token_ids), ours.stop_reason) == (len(plain.token_ids), plain.stop_reason)


def test_rows_of_such_rounds_serve_the_next_prompt(bundles, monkeypatch):
    with load(bundles("llama-gqa").folder, device="cpu") as model:
        prompt = prompts(1)[0]
        foreseen(model, prompt, monkeypatch)
        first = model.complete(prompt, draft="ngram", num_speculations=8, max_new_tokens=30)
        longer = [*prompt, *first.token_ids, 9]
        held = model.complete(longer, max_new_tokens=10)
        model.forget()
        anew = model.complete(longer, mode="autoregressive", max_new_tokens=10)
    assert first.statistics.accepted > 0
    assert held.statistics.cached_tokens == len(longer) - 2
    assert held.token_ids == anew.token_ids


def test_what_drafts_can_be_set_for_a_model(bundles, monkeypatch):
    with load(bundles("llama-gqa").folder, device="cpu") as model:
        prompt = prompts(1)[0]
        foreseen(model, prompt, monkeypatch)
        model.draft = "ngram"
        assert set(model.complete(prompt, max_new_tokens=20).statistics.by_drafter) == {"ngram"}
        assert set(model.complete(prompt, draft="exit", max_new_tokens=20).statistics.by_drafter) == {"exit"}
        with pytest.raises(RequestError, match="draft: 'lookup'; wanted one of exit, ngram, auto"):
            model.generate(prompt, draft="lookup")
