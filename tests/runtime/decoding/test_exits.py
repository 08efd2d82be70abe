"""A bundle of several exits: whichever drafts, round after round, the tokens are those of plain decoding."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.conftest import run_round
from tests.runtime.decoding.test_decode import assert_same_but_for_ties
from tests.standin import make_device, standin_model

from edgeskip import Grammar
from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.bench.measure import TIE_GAP, tie_gap
from edgeskip.runtime.decoding import model as decoding_model
from edgeskip.runtime.decoding.decode import Decoding, prefill
from edgeskip.runtime.decoding.rounds import hindsight_round, speculative_round
from edgeskip.runtime.decoding.sampling import penalized
from edgeskip.runtime.decoding.session import softmax_of
from edgeskip.runtime.drafting.length import Pace
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.masks import TokenMask
from edgeskip.runtime.load import load
from edgeskip.runtime.sampling import GREEDY

EXITS = {"exit_layer": 3, "other_exits": (1,)}


def prompts(count):
    draws = np.random.default_rng(3)
    return [draws.integers(2, 258, draws.integers(4, 14)).tolist() for _ in range(count)]


def test_each_text_can_have_an_exit_of_its_own(backend, bundles):
    """Also where the rows that are held are those of another exit's early layers alone."""
    bundle = bundles("llama-gqa", dtype=backend.dtype, **EXITS)
    chance, text, accepted = random.Random(5), [0, 5], {1: 0, 3: 0}
    with backend.load(bundle) as model, backend.load(bundle) as fresh:
        for turn in range(24):
            exit_layer, k = chance.choice([1, 3]), chance.choice([1, 3, 6])
            text = text[: chance.choice([len(text) // 2, len(text)]) or 1]
            text = [*text, *(chance.randrange(2, 258) for _ in range(chance.choice([1, 3, 9])))][:70]
            early = {"mode": "early-exit", "exit_layer": exit_layer, "max_new_tokens": 4}
            if turn % 3 == 0:
                fresh.forget()
                assert model.complete(text, **early).token_ids == fresh.complete(text, **early).token_ids
            ours = model.complete(text, exit_layer=exit_layer, num_speculations=k, max_new_tokens=9)
            fresh.forget()
            plain = fresh.complete(text, mode="autoregressive", max_new_tokens=9)
            assert_same_but_for_ties(fresh, text, ours.token_ids, plain.token_ids)
            accepted[exit_layer] += ours.statistics.accepted
    assert all(accepted.values())


@pytest.mark.parametrize("fewest", [1, 2])
def test_exits_give_the_same_rows_in_4_bits_on_a_cpu(fewest, bundles, monkeypatch):
    """Also where single rows are computed otherwise: the layers between two exits both draft and verify."""
    if fewest == 2:
        monkeypatch.setattr(cpu_session, "fewest_rows", lambda run: 2)
    monkeypatch.setattr(decoding_model, "Pace", AnyChoice)
    bundle = bundles("llama-tied", weights="int4", head="int4", **EXITS)
    with load(bundle.folder, device="cpu") as model:
        assert model.session.exact
        for prompt in prompts(4):
            plain = model.complete(prompt, mode="autoregressive")
            for exit_layer in (1, 3, "auto"):
                ours = model.complete(prompt, exit_layer=exit_layer, num_speculations=4, confidence_threshold=0)
                assert ours.token_ids == plain.token_ids


@pytest.mark.parametrize("exit_layer", [2, True, "1"])
def test_an_exit_that_is_not_there_is_refused(exit_layer, bundles):
    with (
        load(bundles("llama-gqa", **EXITS).folder, device="cpu") as model,
        pytest.raises(RequestError, match=f"exit layer: {exit_layer!r}; wanted 1, 3: the bundle is cut there"),
    ):
        model.generate([5], exit_layer=exit_layer)


class AnyChoice(Pace):
    """Any exit and any length, and any look at another: what a real choice would do one day."""

    random = random.Random(2)

    def chosen(self, most):
        super().chosen(most)
        source = self.random.choice(list(most))
        return source, self.random.randint(0, most[source])

    def worth_a_look(self):
        super().worth_a_look()
        return self.random.choice([1, 3, None])


DRAWN = {"temperature": 0.3, "top_p": 0.9, "seed": 11}
PENALIZED = {"repetition_penalty": 1.05, "frequency_penalty": 0.1, "temperature": 0.2, "seed": 4}


@pytest.mark.parametrize("settings", [{}, DRAWN, PENALIZED], ids=["greedy", "drawn", "penalized"])
def test_exits_that_alternate_change_no_token(settings, backend, bundles, monkeypatch):
    monkeypatch.setattr(decoding_model, "Pace", AnyChoice)
    bundle, accepted = bundles("llama-gqa", dtype=backend.dtype, **EXITS), {1: 0, 3: 0}
    with backend.load(bundle) as model:
        for prompt in prompts(2):
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=32, **settings)
            for more in ({}, {"confidence_threshold": 0}, {"draft": "auto"}):
                ours = model.complete(prompt, exit_layer="auto", max_new_tokens=32, **more, **settings)
                pairs = enumerate(zip(ours.token_ids, plain.token_ids, strict=False))
                parted = next((i for i, pair in pairs if len({*pair}) > 1), None)
                if parted is not None:
                    assert not model.session.exact
                    pair, text = (ours.token_ids[parted], plain.token_ids[parted]), plain.token_ids[:parted]
                    gap = tie_gap(model, [*prompt, *text], *pair, GREEDY.changed(**settings))
                    assert gap < TIE_GAP[bundle.manifest.dtype]
                s = ours.statistics
                for exit_layer, drafting in s.by_exit.items():
                    accepted[exit_layer] += drafting.accepted
                assert sum(part.rounds for part in s.course) == s.rounds
                assert sum(part.drafted for part in s.course) == s.drafted
                found = {e: sum(part.rounds_by_exit.get(e, 0) for part in s.course) for e in s.by_exit}
                assert found == {e: drafting.rounds for e, drafting in s.by_exit.items()}
    assert all(accepted.values())


@pytest.mark.parametrize("draft_vocabulary", [None, 250])
def test_a_look_shows_what_an_exit_would_have_drafted(draft_vocabulary, bundles, reference):
    bundle, model = bundles("llama-gqa", draft_vocabulary=draft_vocabulary, **EXITS), reference("llama-gqa")
    prompt, kept = prompts(1)[0], []
    with load(bundle.folder, device="cpu") as loaded:
        session, split = loaded.session, bundle.manifest.split(1)
        first = prefill(session, Decoding(split), loaded.embeddings[prompt], 8).token_ids[0]
        for drafts_from, looks_at in ((1, 3), (3, 1)):
            split = bundle.manifest.split(drafts_from)
            result = run_round(session, speculative_round(split, 3), len(prompt))
            text = torch.tensor([[*prompt, first, *result.draft_ids]])
            found = run_round(session, hindsight_round(bundle.manifest.split(looks_at), 4), len(prompt)).draft_ids
            with torch.no_grad():
                states = model(text, output_hidden_states=True).hidden_states[looks_at][0, len(prompt) :]
                logits = model.lm_head(model.model.norm(states))[:, :draft_vocabulary]
            assert found == logits.argmax(-1).tolist()
            confidence = session.draft_confidence(2, split.draft_head.vocabulary)
            assert confidence == pytest.approx(float(logits[2].softmax(0).max()), rel=1e-4)
            kept.append(result.target_ids)
    assert kept[0][0] == kept[1][0]


class Looking(Pace):
    """Drafts from the first exit, and looks at the other one after each round."""

    def begin(self, **settings):
        super().begin(**settings)
        self.seen = []

    def chosen(self, most):
        return 1, min(2, most[1])

    def worth_a_look(self):
        return 3

    def looked(self, exit_layer, right, sure, ms):
        assert exit_layer == 3
        self.seen += zip(right, sure, strict=True)


@pytest.mark.parametrize("kind", ["cpu", "host"])
@pytest.mark.parametrize("draft_vocabulary", [None, 250])
@pytest.mark.parametrize(
    "settings", [{"grammar": Grammar.from_regex("[a-y]{24}\\.")}, {}], ids=["grammar", "penalties"]
)
def test_a_look_picks_as_the_text_does(settings, draft_vocabulary, kind, bundles, reference, monkeypatch, tmp_path):
    """By penalties and a grammar, after what the text has, which it does not change."""
    monkeypatch.setattr(decoding_model, "Pace", Looking)
    penalties = {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
    bundle, judge = bundles("llama-gqa", draft_vocabulary=draft_vocabulary, **EXITS), reference("llama-gqa")
    if kind == "cpu":
        model = load(bundle.folder, device="cpu")
    else:
        model = standin_model(bundle, tmp_path / "b", make_device(kind))
    with model:
        prompt, threshold, found = prompts(1)[0], 0.1, []
        how = {"max_new_tokens": 24, **penalties, **settings}
        plain = model.complete(prompt, mode="autoregressive", **how)
        ours = model.complete(prompt, exit_layer="auto", confidence_threshold=threshold, **how)
        assert ours.token_ids == plain.token_ids
        mask = TokenMask(settings["grammar"], model._token_table) if settings else None
        for at in range(1, len(ours.token_ids)):
            text = np.array([*prompt, *ours.token_ids[:at]])
            with torch.no_grad():
                states = judge(torch.tensor(text[None]), output_hidden_states=True).hidden_states[3]
                logits = judge.lm_head(judge.model.norm(states))[0, -1, :draft_vocabulary].numpy()
            told = penalized(ours.sampling, logits, text, len(prompt))
            if mask and (allowed := mask.allowed(text[len(prompt) :])) is not None:
                told = np.where(allowed[: len(told)], told, np.float32(-np.inf))
            token = int(told.argmax())
            found.append((token == ours.token_ids[at], softmax_of(logits, float(logits[token])) >= threshold))
        assert model._pace.seen == found
        assert {right for right, _ in found} == {sure for _, sure in found} == {True, False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "early-exit"}, "exit layer: auto, beside the mode early-exit.*wanted 3 or 1"),
        ({"draft": "ngram"}, "exit layer: auto, beside drafts of the text alone"),
    ],
)
def test_where_nothing_tells_exits_apart_none_is_chosen(settings, message, bundles):
    with load(bundles("llama-gqa", **EXITS).folder, device="cpu", exit_layer="auto") as model:
        assert model.complete([5], max_new_tokens=3).statistics.num_speculations == 16
        with pytest.raises(RequestError, match=message):
            model.generate([5], **settings)


def test_a_single_exit_is_the_one_that_is_chosen(bundles):
    with load(bundles("llama-gqa").folder, device="cpu") as model:
        ours = model.complete(prompts(1)[0], exit_layer="auto", max_new_tokens=20)
        assert set(ours.statistics.by_exit) <= {2}
        assert ours.token_ids == model.complete(prompts(1)[0], mode="autoregressive", max_new_tokens=20).token_ids
