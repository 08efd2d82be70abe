"""Simulated rounds with drafts of the text, by n-grams, and of several exits are those of the runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tests.recipes.tune.test_tune import decoded

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.recipes.tune.simulation import (
    NOTHING,
    Drafts,
    ExitDrafts,
    Rounds,
    copied_drafts,
    simulate,
    simulate_paced,
)
from edgeskip.recipes.tune.tune import drafts_of_text
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
        yield model, *known_drafts(model)


def known_drafts(model):
    """Plain texts, and what would draft each."""
    texts, probed = decoded(model, PROMPTS, None)
    rooms = [CAPACITY - len(text.prompt_ids) for text in texts]
    given = zip(probed, texts, rooms, strict=True)
    return texts, [drafts_of_text(exits, text.prompt_ids, text.token_ids, room) for exits, text, room in given]


def drafting(draft):
    """Settings with which no confidence ends a round."""
    return {"draft": draft} if draft == "ngram" else {"draft": draft, "confidence_threshold": 0}


def assert_same(found, real):
    s = real.statistics
    assert (found.count, found.tokens) == (s.rounds, s.new_tokens - 1)
    assert (found.drafted, found.tested, found.accepted) == (s.drafted, s.tested, s.accepted)
    copied = s.by_drafter.get("ngram")
    assert found.share("ngram") * found.count == pytest.approx(copied.rounds if copied else 0)


@pytest.mark.parametrize("draft", ["ngram", "auto"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_rounds_of_a_fixed_length_are_those_of_the_runtime(k, draft, repeating):
    model, texts, drafts = repeating
    copied = 0
    for text, own in zip(texts, drafts, strict=True):
        real = model.complete(text.prompt_ids, num_speculations=k, **drafting(draft))
        assert real.token_ids == text.token_ids
        found = simulate([own], 3, k, 0.0, draft)
        assert_same(found, real)
        copied += found.accepted
    assert copied > 20


@dataclass
class Device:
    """What rounds take on some device, by what a draft adds."""

    slopes: dict = field(default_factory=lambda: {3: 0.3, "ngram": 0.05})

    def round_ms(self, source, drafts):
        return 1 + drafts * self.slopes[source]

    def look_ms(self, exit_layer, rows):
        return 0.005 * rows


class Timed(Pace):
    """As on that device; counts looks by exit and rows."""

    def __init__(self, device):
        super().__init__(RoundCosts(device.slopes), lambda: 0.0)
        self.device, self.looks = device, Counter()

    def note(self, source, limit, drafted, accepted, ms):
        super().note(source, limit, drafted, accepted, self.device.round_ms(source, drafted))

    def looked(self, exit_layer, right, sure, ms):
        self.looks[exit_layer, len(right)] += 1
        super().looked(exit_layer, right, sure, self.device.look_ms(exit_layer, len(right)))


@pytest.mark.parametrize("draft", ["exit", "ngram", "auto"])
def test_rounds_whose_length_is_chosen_are_those_of_the_runtime(draft, repeating, monkeypatch):
    model, texts, drafts = repeating
    for text, own in zip(texts, drafts, strict=True):
        monkeypatch.setattr(model, "_pace", Timed(Device()))
        real = model.complete(text.prompt_ids, num_speculations="auto", **drafting(draft))
        found, choosing_ms = simulate_paced([own], (3,), 0.0, draft, Device())
        assert_same(found, real)
        assert choosing_ms > 0


def test_rounds_that_weigh_confidence_are_about_those_of_the_runtime(repeating, monkeypatch):
    """What the exit is sure of after a wrong draft is not known: it changes how many are made, and what that takes."""
    model, texts, drafts = repeating
    monkeypatch.setattr(model, "_pace", Timed(Device()))
    real = [model.complete(text.prompt_ids, num_speculations="auto").statistics for text in texts]
    found, _ = simulate_paced(drafts, (3,), None, "exit", Device())
    assert found.tokens == sum(one.new_tokens - 1 for one in real)
    assert found.count == pytest.approx(sum(one.rounds for one in real), abs=3)
    assert found.drafted == pytest.approx(sum(one.drafted for one in real), rel=0.2)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The same with three exits."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    export_bundle(open_checkpoint(str(CHECKPOINT)), folder, ExportSettings(3, max_length=CAPACITY, other_exits=(2, 6)))
    with edgeskip.load(folder, device="cpu") as model:
        yield model, *known_drafts(model)


@pytest.mark.parametrize("draft", ["exit", "auto"])
@pytest.mark.parametrize("slopes", [(0.3, 0.1, 0.5), (0.3, 0.2, 0.4)])
def test_rounds_whose_exit_is_chosen_are_those_of_the_runtime(slopes, draft, several, monkeypatch):
    model, texts, drafts = several
    device = Device({3: slopes[0], 2: slopes[1], 6: slopes[2], "ngram": 0.05})
    pace = Timed(device)
    monkeypatch.setattr(model, "_pace", pace)
    found, _ = simulate_paced(drafts, (3, 2, 6), 0.0, draft, device)
    rounds, tokens = Counter(), 0
    for text in texts:  # one after another: what was learned of one counts in the next
        real = model.complete(text.prompt_ids, exit_layer="auto", num_speculations="auto", **drafting(draft))
        assert real.token_ids == text.token_ids
        s = real.statistics
        tokens += s.new_tokens - 1
        for e, one in s.by_exit.items():
            rounds += Counter({(e, k): n for k, n in enumerate(one.rounds_by_length) if n})
    assert found.tokens == tokens
    # statistics leave out what the last round of a text drafted beyond its end
    exits = {e for e, _ in rounds}
    assert len(exits) > 1
    for e in exits:
        assert found.share(e) * found.count == pytest.approx(sum(n for (one, _), n in rounds.items() if one == e))
    assert sum(abs(found.by_drafts.get(kind, 0) - rounds[kind]) for kind in rounds) <= 2 * len(texts)
    assert Counter(found.looks) == pace.looks
    assert pace.looks


def test_rounds_by_hand():
    right = np.array([1, 0, 0, 1, 1, 0], bool)
    # nothing known, then two right drafts of the text, nothing again, one that is wrong, and one beyond the end
    text = Drafts({5: ExitDrafts(right, np.ones(6, np.float32))}, 100, [NOTHING, 2, 0, 0, NOTHING, 4])
    found = simulate([text], 5, 3, 0.0, "ngram")
    assert found == Rounds({(5, 0): 2, ("ngram", 3): 2}, tokens=6, drafted=4, tested=4, accepted=3, looks={})


def test_copies_are_what_followed_before():
    a, b, c, d = range(4)
    # neither `b d` nor `d a` stood there before; the latest `a b` was followed by `d a`, and `b d` by `a`
    assert copied_drafts([a, b, c, a, b], [d, a, b, d, a]) == [NOTHING, NOTHING, 2, 1]
