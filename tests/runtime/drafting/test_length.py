"""How many drafts a round has, against who knows how often they are right and what rounds take."""

from __future__ import annotations

import numpy as np
import pytest

from edgeskip.runtime.drafting.length import MAX_SPECULATIONS, Pace, Rate, RoundCosts

LENGTHS = np.arange(MAX_SPECULATIONS + 1)


def ms_of_text(right, costs, choose, learn=lambda *_: None):
    """The time of a text: whether a draft at each place is right, what rounds cost, and the drafts of the next one."""
    at, ms = 0, 0.0
    while at < len(right):
        k = choose(at)
        wrong = np.flatnonzero(~right[at : at + k])
        accepted = int(wrong[0]) if len(wrong) else min(k, len(right) - at)
        ms += costs[k]
        learn(k, accepted, costs[k])
        at += accepted + 1
    return ms


def paced(right, costs):
    pace = Pace(RoundCosts(), lambda: 0.0)

    def learn(k, accepted, ms):
        pace.note("exit", k, k, accepted, ms)

    return ms_of_text(right, costs, lambda _: pace.chosen({"exit": MAX_SPECULATIONS})[1], learn)


@pytest.mark.parametrize("slope", [0.15, 0.3])
def test_a_mixed_text_gains_most_of_what_who_knows_its_parts_would(slope):
    costs, random = 5 * (1 + slope * LENGTHS), np.random.default_rng(5)
    rates = np.repeat(random.permutation([0.3, 0.6, 0.95] * 6), 192)
    right = random.random(len(rates)) < rates
    best = {rate: int((np.cumsum(rate**LENGTHS) / costs).argmax()) for rate in (0.3, 0.6, 0.95)}
    knowing = ms_of_text(right, costs, lambda at: best[rates[at]])
    fixed = min(ms_of_text(right, costs, lambda _, k=k: k) for k in range(9))
    assert knowing < 0.95 * fixed  # there is something to gain
    assert fixed - paced(right, costs) > 0.6 * (fixed - knowing)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_a_text_of_one_kind_loses_next_to_nothing(rate):
    costs, right = 1 + 0.2 * LENGTHS, np.random.default_rng(1).random(4000) < rate
    fixed = min(ms_of_text(right, costs, lambda _, k=k: k) for k in LENGTHS)
    assert paced(right, costs) < 1.03 * fixed


def test_a_rate_follows_what_happens():
    rate, random = Rate(), np.random.default_rng(2)
    for wanted in (0.9, 0.2, 0.7):
        for happened in random.random(400) < wanted:
            rate.note(int(happened), int(not happened), 1)
        once, twice = rate.runs(2)[1:]
        assert once == pytest.approx(wanted, abs=0.12)
        assert once**2 <= twice <= once


def test_costs_are_those_of_the_latest_rounds():
    costs = RoundCosts()
    for ms in (9.0, 3.0):  # the machine has become faster
        for _ in range(40):
            for k in (2, 0, 6):
                costs.note("exit", k, ms * (1 + 0.5 * k))
            costs.note("ngram", 8, ms * 1.4)
    assert costs.of("exit", np.array([0, 1, 2, 4, 6, 8])) == pytest.approx(3 * np.array([1, 1.5, 2, 3, 4, 5]), rel=0.1)
    assert costs.of("ngram", np.array([0, 8])) == pytest.approx([3.0, 4.2], rel=0.1)


def test_what_drafts_is_what_is_right_more_often():
    for better in ("exit", "ngram"):
        pace = Pace(RoundCosts(), lambda: 0.0)
        for _ in range(40):
            for drafter in ("exit", "ngram"):
                right = 4 if drafter == better else 0
                pace.note(drafter, 4, 4, right, 2.0)
                if drafter == "ngram":
                    pace.compare([5] * 4, [5] * right + [6])
        drafter, k = pace.chosen({"exit": 8, "ngram": 8})
        assert (drafter, k > 2) == (better, True)
        assert pace.chosen({"exit": 0, "ngram": 0}) == ("exit", 0)


def test_drafts_that_a_lack_of_confidence_ended_cost_no_more_than_were_made():
    ended, whole = (Pace(RoundCosts(), lambda: 0.0) for _ in range(2))
    for _ in range(40):
        ended.note("exit", 12, 2, 2, 1.6)
        whole.note("exit", 2, 2, 2, 1.6)
    assert ended.chosen({"exit": 16})[1] > 2
