"""A bundle of several exits: whichever drafts, round after round, the tokens are those of plain decoding."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.runtime.decoding.test_decode import assert_same_but_for_ties

from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.load import load

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
    bundle = bundles("llama-tied", weights="int4", head="int4", **EXITS)
    with load(bundle.folder, device="cpu") as model:
        assert model.session.exact
        for prompt in prompts(4):
            plain = model.complete(prompt, mode="autoregressive")
            for exit_layer in (1, 3):
                ours = model.complete(prompt, exit_layer=exit_layer, num_speculations=4, confidence_threshold=0)
                assert ours.token_ids == plain.token_ids


@pytest.mark.parametrize("exit_layer", [2, True, "1"])
def test_an_exit_that_is_not_there_is_refused(exit_layer, bundles):
    with (
        load(bundles("llama-gqa", **EXITS).folder, device="cpu") as model,
        pytest.raises(RequestError, match=f"exit layer: {exit_layer!r}; wanted 1, 3: the bundle is cut there"),
    ):
        model.generate([5], exit_layer=exit_layer)
