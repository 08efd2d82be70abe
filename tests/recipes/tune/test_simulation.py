"""Simulated rounds with drafts of the text, by n-grams, are those of the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.recipes.tune.test_tune import decoded

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.recipes.tune.simulation import NOTHING, Drafts, Rounds, copied_drafts, simulate, simulate_paced
from edgeskip.recipes.tune.tune import drafts_of_exit
from edgeskip.runtime.drafting.length import Pace, RoundCosts

FOLDER = Path(__file__).parents[3] / "docs" / "repeating-code"
PROMPTS = [(FOLDER / name).read_text() for name in ("matrix.txt", "copy-edit.txt")]
CAPACITY = 256


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """The shipped model with little room behind prompts that it repeats, and what would draft each text."""
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    export_bundle(open_checkpoint(str(CHECKPOINT)), folder, ExportSettings(3, max_length=CAPACITY))
    with edgeskip.load(folder, device="cpu") as model:
        texts, probed = decoded(model, PROMPTS, None)
        drafts = []
        for exits, text in zip(probed, texts, strict=True):
            own = drafts_of_exit(exits, text, 3, CAPACITY - len(text.prompt_ids))
            drafts.append(Drafts(own.right, own.confidences, own.room, copied_drafts(text.prompt_ids, text.token_ids)))
        yield model, texts, drafts


def drafting(draft):
    """Settings with which no confidence ends a round."""
    return {"draft": draft} if draft == "ngram" else {"draft": draft, "confidence_threshold": 0}


def assert_same(found, real):
    s = real.statistics
    assert (found.count, found.tokens) == (s.rounds, s.new_tokens - 1)
    assert (found.drafted, found.tested, found.accepted) == (s.drafted, s.tested, s.accepted)
    copied = s.by_drafter.get("ngram")
    assert sum(found.by_ngram) == (copied.rounds if copied else 0)


@pytest.mark.parametrize("draft", ["ngram", "auto"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_rounds_of_a_fixed_length_are_those_of_the_runtime(k, draft, repeating):
    model, texts, drafts = repeating
    copied = 0
    for text, own in zip(texts, drafts, strict=True):
        real = model.complete(text.prompt_ids, num_speculations=k, **drafting(draft))
        assert real.token_ids == text.token_ids
        found = simulate([own], k, 0.0, draft)
        assert_same(found, real)
        copied += found.accepted
    assert copied > 20


def cost_ms(drafter, drafts):
    """What rounds of some device take."""
    return 1 + drafts * {"exit": 0.3, "ngram": 0.05}[drafter]


class Timed(Pace):
    """As on that device."""

    def note(self, source, limit, drafted, accepted, ms):
        drafter = "ngram" if source == "ngram" else "exit"
        super().note(source, limit, drafted, accepted, cost_ms(drafter, drafted))


@pytest.mark.parametrize("draft", ["exit", "ngram", "auto"])
def test_rounds_whose_length_is_chosen_are_those_of_the_runtime(draft, repeating, monkeypatch):
    model, texts, drafts = repeating
    for text, own in zip(texts, drafts, strict=True):
        monkeypatch.setattr(model, "_pace", Timed(RoundCosts({3: 0.3, "ngram": 0.05}), lambda: 0.0))
        real = model.complete(text.prompt_ids, num_speculations="auto", **drafting(draft))
        found, choosing_ms = simulate_paced([own], 0.0, draft, cost_ms)
        assert_same(found, real)
        assert choosing_ms > 0


def test_rounds_by_hand():
    right = np.array([1, 0, 0, 1, 1, 0], bool)
    # nothing known, then two right drafts of the text, nothing again, one that is wrong, and one beyond the end
    text = Drafts(right, np.ones(6, np.float32), 100, [NOTHING, 2, 0, 0, NOTHING, 4])
    found = simulate([text], 3, 0.0, "ngram")
    assert found == Rounds((2, 0, 0, 0), tokens=6, drafted=4, tested=4, accepted=3, by_ngram=(0, 0, 0, 2))


def test_copies_are_what_followed_before():
    a, b, c, d = range(4)
    # neither `b d` nor `d a` stood there before; the latest `a b` was followed by `d a`, and `b d` by `a`
    assert copied_drafts([a, b, c, a, b], [d, a, b, d, a]) == [NOTHING, NOTHING, 2, 1]
