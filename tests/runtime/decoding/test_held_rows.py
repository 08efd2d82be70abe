"""What the caches hold serves the next prompt, with the tokens of a model that computes it from its beginning."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.runtime.decoding.test_decode import assert_same_but_for_ties

from edgeskip.runtime.bundle.weights import TokenRows
from edgeskip.runtime.decoding.decode import Decoding, prefill
from edgeskip.runtime.decoding.rounds import MODES

MODE_SETTINGS = [
    *({"mode": mode} for mode in MODES),
    {"num_speculations": 8, "confidence_threshold": 0},
    {"temperature": 0.9, "seed": 4},
]


@pytest.fixture(scope="module")
def pair(backend, bundles):
    """A model, and another of the same bundle that forgets."""
    bundle = bundles("llama-gqa", exit_layer=2, dtype=backend.dtype)
    with backend.load(bundle) as model, backend.load(bundle) as fresh:
        yield model, fresh


def from_scratch(fresh, prompt, **settings):
    fresh.forget()
    given = fresh.complete(prompt, **settings)
    assert given.statistics.cached_tokens == 0
    return given


def assert_same(fresh, prompt, ours, theirs, settings):
    if settings.get("mode") == "early-exit" or "seed" in settings:  # ties of others are not known to the judge
        assert ours.token_ids == theirs.token_ids
    else:
        assert_same_but_for_ties(fresh, prompt, ours.token_ids, theirs.token_ids)


def test_turns_in_any_order_of_modes_give_the_tokens_from_scratch(pair):
    """Prompts that go on, go back and part, at every place of the 8-row chunks; generations cut short or given up."""
    model, fresh = pair
    chance, text = random.Random(3), [0, 5]
    cached = []
    for turn in range(40):
        settings = {**chance.choice(MODE_SETTINGS), "max_new_tokens": chance.choice([1, 2, 5, 9])}
        text = text[: chance.choice([1, len(text) // 2, len(text) - 1, len(text)]) or 1]
        text += [chance.randrange(2, 258) for _ in range(chance.choice([0, 1, 3, 8, 9, 17]))]
        text = text[:80]
        if turn % 7 == 6:
            pieces = model.generate(text, **settings)
            next(pieces)
            pieces.close()
        ours = model.complete(text, **settings)
        theirs = from_scratch(fresh, text, **settings)
        assert_same(fresh, text, ours, theirs, settings)
        cached.append(ours.statistics.cached_tokens)
        assert cached[-1] < len(text)
        text = [*text, *ours.token_ids]
    assert sum(count > 8 for count in cached) > 5  # something was reused, or nothing was tested


def test_a_turn_computes_its_own_tokens_alone(pair):
    model, _ = pair
    model.forget()
    first = model.complete([0, *range(10, 30)], max_new_tokens=6, mode="autoregressive")
    told = [0, *range(10, 30), *first.token_ids, 40, 41]
    second = model.complete(told, max_new_tokens=2)
    assert second.statistics.cached_tokens == len(told) - 3  # the last answer's last token was never an input
    again = model.complete(told, max_new_tokens=2)
    assert again.statistics.cached_tokens == len(told) - 2


def test_early_exit_counts_for_the_layers_that_it_ran(pair):
    model, fresh = pair
    model.forget()
    prompt = [0, *range(100, 120)]
    model.complete(prompt, max_new_tokens=4)
    other = [0, *range(100, 110), *range(50, 60)]
    model.complete(other, max_new_tokens=4, mode="early-exit")
    assert model.complete(other, max_new_tokens=1, mode="early-exit").statistics.cached_tokens == 19
    whole = model.complete(other, max_new_tokens=8)
    assert whole.statistics.cached_tokens == 11  # of the layers after the exit, what the first text has in common
    assert_same(fresh, other, whole, from_scratch(fresh, other, max_new_tokens=8), {})


def test_conversations_take_turns_from_host_memory(pair):
    model, fresh = pair
    model.forget()
    model.held.most_saved_bytes = 1 << 20
    try:
        talks = [[0, start, *range(start, start + 24)] for start in (20, 60, 100)]
        for turn in range(3):
            for talk in talks:
                ours = model.complete(talk, max_new_tokens=5)
                theirs = from_scratch(fresh, talk, max_new_tokens=5)
                assert_same(fresh, talk, ours, theirs, {})
                assert (ours.statistics.cached_tokens > 20) == (turn > 0)
                talk += [*ours.token_ids, 7, 8, 9]
        row = model.held.saved_bytes / sum(len(saved.token_ids) for saved in model.held._saved)
        assert row == model.session.memory().caches / model.bundle.manifest.max_length
        model.held.most_saved_bytes = int(40 * row)
        model.complete(talks[0], max_new_tokens=1)
        assert model.held.saved_bytes <= 40 * row
    finally:
        model.held.most_saved_bytes = 0


def test_rows_come_back_bit_by_bit(pair):
    model, _ = pair
    ids = [0, *range(30, 50)]
    prefill(model.session, Decoding(model.split), TokenRows(model.embeddings, ids), 8)
    graphs = model.bundle.manifest.graphs.values()
    names = [tensor.name for graph in graphs for tensor in graph.inputs if tensor.is_cache]
    before = {name: model.session.read_cache(name) for name in names}
    saved = model.session.read_caches(17)
    prefill(model.session, Decoding(model.split), TokenRows(model.embeddings, ids[::-1]), 8)
    after = {name: model.session.read_cache(name) for name in names}
    model.session.write_caches(saved)
    model.forget()
    for name in names:
        back = model.session.read_cache(name)
        assert not np.array_equal(after[name][:, :17], before[name][:, :17])
        np.testing.assert_array_equal(back[:, :17], before[name][:, :17])
        np.testing.assert_array_equal(back[:, 17:], after[name][:, 17:])
