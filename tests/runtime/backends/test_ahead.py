"""A GPU waits for no choice: the next round is chosen while it runs this one, and few kinds of rounds are captured."""

from __future__ import annotations

from itertools import cycle

import pytest
from tests.standin import HostDevice, standin_model

import edgeskip
from edgeskip.runtime.decoding import model as decoding_model
from edgeskip.runtime.drafting.length import Pace, RoundCosts

EXITS = {"exit_layer": 3, "other_exits": (1,)}
PROMPTS = [list(range(40, 60)), [5, 90, 33], [7, 7, 7, 201]]
AUTO = [{"num_speculations": "auto"}, {"exit_layer": "auto"}, {"draft": "auto"}, {"draft": "ngram"}]
THRESHOLD = {"num_speculations": "auto", "confidence_threshold": 0.1}
OTHERS = [{"mode": "autoregressive"}, {"mode": "early-exit"}, {"mode": "early-exit", "confidence_threshold": 0.1}]


class Cycling(Pace):
    """Every length of every source in turn, and looks at every exit."""

    def __init__(self, *args):
        super().__init__(*args)
        self._turns, self._seen, self._exits = cycle(range(17)), cycle([1, None, 3]), []

    def chosen(self, most):
        super().chosen(most)
        turn = next(self._turns)
        source = list(most)[turn % len(most)]
        self._exits = [one for one in most if one != "ngram"]
        return source, min(turn, most[source])

    def worth_a_look(self):
        return next(self._seen) if len(self._exits) > 1 else None


@pytest.mark.parametrize("how", AUTO, ids=str)
def test_a_device_runs_a_round_while_the_next_one_is_chosen(how, bundles, tmp_path, monkeypatch):
    device, at_work = HostDevice(), []

    class Watched(Pace):
        def chosen(self, most):
            at_work.append(bool(device.stream.queued))
            return super().chosen(most)

    class Costs(RoundCosts):
        def note(self, *args):
            at_work.append(bool(device.stream.queued))
            super().note(*args)

    monkeypatch.setattr(decoding_model, "Pace", Watched)
    monkeypatch.setattr(decoding_model, "RoundCosts", Costs)
    with standin_model(bundles("llama-gqa", **EXITS), tmp_path / "b", device) as model:
        rounds = model.complete(PROMPTS[0], max_new_tokens=40, **how).statistics.rounds
    assert len(at_work) > 2 * rounds
    assert at_work.count(False) <= 2 + 3  # before the first round, and after the last one


def test_a_cpu_chooses_each_round_by_the_one_before_it(bundles, monkeypatch):
    happened = []

    class Watched(Pace):
        def chosen(self, most):
            happened.append("chosen")
            return super().chosen(most)

        def note(self, *args):
            happened.append("noted")
            super().note(*args)

    monkeypatch.setattr(decoding_model, "Pace", Watched)
    with edgeskip.load(bundles("llama-gqa", **EXITS).folder, device="cpu") as model:
        rounds = model.complete(PROMPTS[0], max_new_tokens=40, num_speculations="auto").statistics.rounds
    assert happened == ["chosen", "noted"] * rounds
    assert rounds > 5


@pytest.mark.parametrize("how", [*AUTO, THRESHOLD, THRESHOLD | {"exit_layer": "auto"}], ids=str)
def test_any_choice_gives_the_tokens_of_plain_decoding(how, bundles, tmp_path, monkeypatch):
    """Also where there is hardly room for a draft."""
    monkeypatch.setattr(decoding_model, "Pace", Cycling)
    with standin_model(bundles("llama-gqa", **EXITS), tmp_path / "b", HostDevice()) as model:
        for prompt in PROMPTS:
            assert model.complete(prompt, **how).token_ids == model.complete(prompt, mode="autoregressive").token_ids


@pytest.mark.parametrize(
    ("how", "most"),
    [(AUTO[0], 9), (AUTO[1], 2 * (9 + 4)), (AUTO[2], 9 + 9), (THRESHOLD, 4), (THRESHOLD | AUTO[1], 2 * (4 + 4))],
    ids=str,
)
def test_few_kinds_of_rounds_are_captured(how, most, bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding_model, "Pace", Cycling)
    device = HostDevice()
    with standin_model(bundles("llama-gqa", **EXITS), tmp_path / "b", device) as model:
        for text in range(6):
            model.complete(PROMPTS[0], max_new_tokens=40, **how)
            if not text:
                prompts = device.captures
        model.complete(PROMPTS[0], max_new_tokens=40, **how)
    assert device.captures <= prompts + most


def test_what_was_captured_is_kept_whatever_comes_between(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding_model, "Pace", Cycling)
    device, captures = HostDevice(), []
    with standin_model(bundles("llama-gqa", **EXITS), tmp_path / "b", device) as model:
        for _ in range(3):  # what comes for the second time is captured
            model._pace._turns, model._pace._seen = cycle(range(17)), cycle([1, None, 3])
            for how in (*AUTO, THRESHOLD, *OTHERS, {"num_speculations": 4}):
                for prompt in PROMPTS:
                    model.forget()
                    model.complete(prompt, max_new_tokens=40, **how)
            captures.append(device.captures)
    assert captures[0] > 30
    assert captures[2] == captures[1]
