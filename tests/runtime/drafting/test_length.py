"""How many drafts a round has, against who knows how often they are right and what rounds take."""

from __future__ import annotations

import numpy as np
import pytest

from edgeskip.runtime.drafting import length
from edgeskip.runtime.drafting.length import (
    FEW_LENGTHS,
    FEW_LIMITS,
    MAX_SPECULATIONS,
    Certainty,
    Pace,
    Rate,
    RoundCosts,
    nearest_length,
)

LENGTHS = np.arange(MAX_SPECULATIONS + 1)
EXIT = 3
SLOPES = {EXIT: 0.3, "ngram": 0.05}


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


def new_pace():
    """One that knows of plain rounds."""
    pace = Pace(RoundCosts(SLOPES), lambda: 0.0)
    for _ in range(4):
        pace.note(EXIT, 0, 0, 0, 1.0)
    return pace


def paced(right, costs, pace=None, confidences=None):
    pace = pace or new_pace()

    def choose(at):
        k = pace.chosen({EXIT: MAX_SPECULATIONS})[1]
        if confidences is None or not k:
            return k
        drafts = range(at, min(at + k, len(right)) - 1)
        return next((i + 1 - at for i in drafts if not pace.drafts_on(EXIT, confidences[i])), len(drafts) + 1)

    def learn(k, accepted, ms):
        pace.note(EXIT, k, k, accepted, ms)

    pace.begin(weighs=confidences is not None)
    return ms_of_text(right, costs, choose, learn)


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


@pytest.mark.parametrize("rates", [(0.3, 0.6, 0.95), (0.3,), (0.8,)])
def test_confidence_ends_rounds_where_it_tells_something_and_else_costs_next_to_nothing(rates):
    costs, random = 5 * (1 + 0.3 * LENGTHS), np.random.default_rng(6)
    rate = np.repeat(random.permutation(rates * (18 // len(rates))), 192)
    confidences = random.beta(3 * rate, 3 * (1 - rate))
    right, told = random.random(len(rate)) < confidences, confidences.tolist()
    blind, seeing = paced(right, costs), paced(right, costs, confidences=told)
    assert seeing < (0.97 if max(rates) > 0.5 else 1.01) * blind
    assert paced(right, costs, confidences=random.permutation(told).tolist()) < 1.015 * blind


@pytest.mark.parametrize(("bias", "believed"), [(0.0, 0.0), (-1.0, 1.0), (2.0, 0.5)])
def test_how_far_an_exit_can_be_believed_is_learned(bias, believed):
    certainty, random, rate = Certainty(), np.random.default_rng(7), 0.6
    odds = random.normal(scale=2, size=4000)
    chances = 1 / (1 + np.exp(-bias - believed * odds - (1 - believed) * np.log(rate / (1 - rate))))
    for one, right in zip(1 / (1 + np.exp(-odds)), random.random(len(odds)) < chances, strict=True):
        certainty.note(float(one), rate, bool(right))
    found = [certainty.of(float(1 / (1 + np.exp(-one))), rate) for one in odds]
    assert np.abs(np.array(found) - chances).mean() < 0.04


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_a_text_of_one_kind_loses_next_to_nothing(rate):
    costs, right = 1 + 0.2 * LENGTHS, np.random.default_rng(1).random(4000) < rate
    fixed = min(ms_of_text(right, costs, lambda _, k=k: k) for k in LENGTHS)
    assert paced(right, costs) < 1.03 * fixed


def test_what_texts_have_in_common_is_learned_and_another_text_noticed():
    costs, random, pace = 1 + 0.3 * LENGTHS, np.random.default_rng(3), new_pace()
    texts = [random.random(1500) < rate for rate in (0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.9)]
    slower = [paced(one, costs, pace) / min(ms_of_text(one, costs, lambda _, k=k: k) for k in LENGTHS) for one in texts]
    assert slower[3] < 1.005
    assert max(slower) < 1.05


def test_drafts_are_tried_again_where_plain_rounds_paid():
    pace = new_pace()
    for _ in range(40):
        pace.note(EXIT, 2, 2, 0, 1.6)
    ks = []
    for _ in range(200):
        ks.append(pace.chosen({EXIT: MAX_SPECULATIONS})[1])
        pace.note(EXIT, ks[-1], ks[-1], 0, 1 + 0.3 * ks[-1])
    assert ks.count(0) > 150
    assert ks.count(0) < 200


def test_a_rate_follows_what_happens():
    rate, random = Rate(), np.random.default_rng(2)
    for wanted in (0.9, 0.2, 0.7):
        for happened in random.random(400) < wanted:
            rate.note(int(happened), int(not happened), 1)
        once, twice = rate.runs(2)[1:]
        assert once == pytest.approx(wanted, abs=0.12)
        assert once**2 <= twice <= once


def test_a_rate_is_learned_by_bayes_rule():
    """The same step by step: what was seen, then a drift to what is common and in part to any rate."""
    rate, random = Rate(), np.random.default_rng(4)
    kept_each, rates, least = 1 - np.array(length.CHANGES)[:, None], len(length.RATES), length._LEAST_SHARE
    common, weights = np.full(rates, length._BEGUN / rates), np.ones((len(kept_each), rates))

    def drift(weights, kept, other):
        prior = (1 - other) * common / common.sum() + other / rates
        return kept * weights + (1 - kept) * weights.sum(1, keepdims=True) * prior

    weights /= weights.sum()
    for step in range(300):
        happened, failed, tokens = random.integers(0, [8, 2, 9])
        if step % 100 == 0:
            rate.begin()
            weights = drift(weights, 0 * kept_each, length._OTHER_TEXT)
        rate.note(int(happened), int(failed), int(tokens))
        if times := happened + failed:
            weights = weights * length.RATES**happened * (1 - length.RATES) ** failed
            weights /= weights.sum()
            common = (1 - 1 / length._REMEMBERED) ** times * common + times * weights.sum(0)
            weights = weights * (1 - least + least / len(kept_each) / weights.sum(1, keepdims=True))
        weights = drift(weights, kept_each**tokens, length._OTHER)
        assert rate.probabilities == pytest.approx(weights.sum(0), rel=1e-9)


def test_costs_are_those_of_the_latest_rounds():
    costs = RoundCosts(SLOPES)
    for ms in (9.0, 3.0):  # the machine has become faster
        for _ in range(40):
            for k in (2, 0, 6):
                costs.note(EXIT, k, ms * (1 + 0.5 * k))
            costs.note("ngram", 8, ms * 1.4)
    assert costs.of(EXIT, np.array([0, 1, 2, 4, 6, 8])) == pytest.approx(3 * np.array([1, 1.5, 2, 3, 4, 5]), rel=0.1)
    assert costs.of("ngram", np.array([0, 8])) == pytest.approx([3.0, 4.2], rel=0.1)


def test_what_drafts_is_what_is_right_more_often():
    for better in (EXIT, "ngram"):
        pace = new_pace()
        for _ in range(40):
            for drafter in (EXIT, "ngram"):
                right = 4 if drafter == better else 0
                pace.note(drafter, 4, 4, right, 2.0)
                if drafter == "ngram":
                    pace.compare([5] * 4, [5] * right + [6])
        drafter, k = pace.chosen({EXIT: 8, "ngram": 8})
        assert (drafter, k > 2) == (better, True)
        assert pace.chosen({EXIT: 0, "ngram": 0}) == (EXIT, 0)


@pytest.mark.parametrize(("rates", "best"), [({3: 0.84, 5: 0.85}, 3), ({3: 0.3, 5: 0.85}, 5), ({3: 0.1, 5: 0.15}, 0)])
def test_the_exit_is_the_one_that_who_knows_all_would_take(rates, best):
    """Within a few percent of the time, although what is told of the costs beforehand is the wrong way round."""
    costs, random = {3: 4 * (1 + 0.3 * LENGTHS), 5: 4 * (1 + 0.45 * LENGTHS)}, np.random.default_rng(3)
    right = {e: random.random(3000) < rate for e, rate in rates.items()}
    pace, at, ms, rounds = Pace(RoundCosts({3: 0.5, 5: 0.4}), lambda: 0.0), 0, 0.0, {0: 0, 3: 0, 5: 0}
    while at < 3000:
        exit_layer, k = pace.chosen({3: MAX_SPECULATIONS, 5: MAX_SPECULATIONS})
        wrong = np.flatnonzero(~right[exit_layer][at : at + k])
        accepted = int(wrong[0]) if len(wrong) else min(k, 3000 - at)
        ms += costs[exit_layer][k]
        rounds[exit_layer if k else 0] += 1
        pace.note(exit_layer, k, k, accepted, costs[exit_layer][k])
        if (look := pace.worth_a_look()) is not None:
            seen = right[look][at : at + accepted + 1].tolist()
            pace.looked(look, seen, [True] * len(seen), 0.5)
            ms += 0.5
        at += accepted + 1
    fixed = min(ms_of_text(right[e], costs[e], lambda _, k=k: k) for e in rates for k in range(9))
    assert max(rounds, key=rounds.get) == best
    assert ms < 1.05 * fixed


def test_the_exit_of_another_text_has_no_say_where_there_is_nothing_to_choose():
    """Drafts of the text are right now and then and cost little; an exit that drafted best stands for plain rounds."""
    pace = Pace(RoundCosts({3: 0.3, 5: 0.45, "ngram": 0.05}), lambda: 0.0)
    for _ in range(60):
        exit_layer, k = pace.chosen({3: 4, 5: 4})
        pace.note(exit_layer, k, k, k, 4 + k)
    right, ms = np.random.default_rng(0).random(4000) < 0.13, {k: 4 * (1 + 0.05 * k) for k in range(5)}
    for kept in right:
        source, k = pace.chosen({3: 0, "ngram": 4})
        pace.note(source, k, k, min(k, int(kept)), ms[k])
        pace.compare([1] * 4, [1, 2] if kept else [2])
    assert pace.chosen({3: 0, "ngram": 4})[0] == "ngram"


def test_a_look_counts_as_rounds_of_that_exit_would_have():
    by_looks, by_rounds = (Pace(RoundCosts({3: 0.3, 5: 0.45}), lambda: 0.0) for _ in range(2))
    for _ in range(30):
        by_looks.looked(5, [True, True, False, True], [True, False, True, True], 0.1)
        for accepted, drafted in ((2, 2), (1, 1)):  # one that ended as it was not sure, and one that may go on
            by_rounds.note(5, 8 if drafted == 2 else 1, drafted, accepted, 2.0)
    for pace in (by_looks, by_rounds):
        pace._learn()
    for_looks, for_rounds = (pace._accepted[5].runs(4) for pace in (by_looks, by_rounds))
    assert for_looks[1] == pytest.approx(3 / 4, abs=0.06)
    assert for_looks == pytest.approx(for_rounds, abs=0.06)


def test_drafts_that_a_lack_of_confidence_ended_cost_no_more_than_were_made():
    ended, whole = new_pace(), new_pace()
    for _ in range(40):
        ended.note(EXIT, 12, 2, 2, 1.6)
        whole.note(EXIT, 2, 2, 2, 1.6)
    assert ended.chosen({EXIT: 16})[1] > 2


@pytest.mark.parametrize("lengths", [FEW_LENGTHS, FEW_LIMITS])
def test_a_round_of_few_lengths_has_drafts_where_some_were_chosen(lengths):
    for most in range(MAX_SPECULATIONS + 1):
        for k in range(most + 1):
            length = nearest_length(k, lengths, most)
            assert length in lengths
            assert length <= most
            assert (length == 0) == (k == 0 or most < lengths[1])
            assert length == 0 or all(abs(length - k) <= abs(one - k) for one in lengths[1:] if one <= most)
