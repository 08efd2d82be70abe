"""Draws: their noise against the generator's paper, the filters against transformers, frequencies against softmax."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from tests.conftest import edit_json
from transformers import LogitsProcessorList
from transformers.generation import logits_process as judges

import edgeskip
from edgeskip.runtime.bench.measure import TIE_GAP, BenchSettings, run_bench, tie_gap
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.decoding.sampling import (
    HostSampler,
    candidates,
    distribution,
    drawn,
    gumbel,
    penalized,
    uniform_bits,
)
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.sampling import GREEDY, Sampling

FILTERS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.3, top_k=7),
    Sampling(1.0, top_p=0.8),
    Sampling(0.9, min_p=0.1),
    Sampling(1.1, top_k=20, top_p=0.9, min_p=0.02),
]

SETTINGS = [
    {"temperature": 0.4},
    {"temperature": 0.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.3, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"temperature": 0, "repetition_penalty": 1.3},
]


def philox(counter, key, rounds=10):
    """Philox4x64 as its paper defines it, in whole numbers of any size."""
    word = (1 << 64) - 1
    for _ in range(rounds):
        high_0, low_0 = divmod(0xD2E7470EE14C6C93 * counter[0], 1 << 64)
        high_1, low_1 = divmod(0xCA5A826395121157 * counter[2], 1 << 64)
        counter = (high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0)
        key = ((key[0] + 0x9E3779B97F4A7C15) & word, (key[1] + 0xBB67AE8584CAA73B) & word)
    return counter


def test_the_generator_of_the_judge_gives_the_published_words():
    words = philox((0, 0, 0, 0), (0, 0))
    assert words == (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 1), ((1 << 64) - 1, 77), (1 << 40, 131071)])
def test_each_token_has_its_own_32_bits_of_philox(seed, position):
    bits = uniform_bits(seed, position, 1001)
    assert len(bits) == 1001
    for token in (0, 1, 7, 8, 500, 999, 1000):
        word = philox((1 + token // 8, position, 0, 0), (seed, 0))[token % 8 // 2]
        assert bits[token] == (word >> 32 * (token % 2)) & 0xFFFFFFFF
    np.testing.assert_array_equal(uniform_bits(seed, position, 10), bits[:10])


def test_noise_is_gumbels_but_for_rounding():
    bits = np.concatenate([np.random.default_rng(0).integers(0, 1 << 32, 1 << 19), [0, 1, 0xB504F333, 0xB504F334]])
    bits = np.concatenate([bits, [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x80000000]]).astype(np.uint32)
    wanted = -np.log(-np.log((bits.astype(np.longdouble) + 0.5) / 2**32))
    found = gumbel(bits)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 2e-6


def noise(seed, positions, tokens=64):
    return gumbel(np.stack([uniform_bits(seed, int(position), tokens) for position in positions]))


def test_noise_of_other_seeds_positions_and_tokens_is_independent():
    at = np.arange(2000)
    one = noise(5, at)
    others = {"seed": noise(6, at), "high bit": noise(5 | 1 << 63, at), "next": np.roll(one, 1, 0)}
    others |= {"neighbour": np.roll(one, 1, 1), "block": np.roll(one, 8, 1), "mirrored": one[::-1]}
    for name, other in others.items():
        found = np.corrcoef([one.ravel(), other.ravel(), np.exp(-one).ravel(), np.exp(-other).ravel()])
        assert np.abs(found[[0, 2, 0], [1, 3, 3]]).max() < 5 / np.sqrt(one.size), name


def judged(sampling, logits, token_ids=(), prompt=0):
    """Scores [V] as transformers filters them; its presence and frequency penalties are those of OpenAI's formula."""
    s, made = sampling, LogitsProcessorList()
    if s.repetition_penalty != 1:
        made.append(judges.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    scores = torch.from_numpy(np.array(logits))[None]
    scores = made(torch.tensor([list(token_ids)]), scores)
    counts = torch.bincount(torch.tensor(list(token_ids[prompt:]), dtype=torch.long), minlength=len(logits))
    scores = scores - s.presence_penalty * (counts > 0) - s.frequency_penalty * counts
    warpers = LogitsProcessorList([judges.TemperatureLogitsWarper(float(s.temperature))])
    if s.top_k:
        warpers.append(judges.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(judges.TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(judges.MinPLogitsWarper(s.min_p))
    return warpers(None, scores)[0]


@pytest.mark.parametrize("sampling", FILTERS[2:], ids=str)
def test_the_filters_keep_what_those_of_transformers_keep(sampling):
    random = np.random.default_rng(1)
    for size in (5, 40, 3000):
        for spread in (0.5, 3, 20):
            logits = (random.normal(size=size) * spread).astype(np.float32)
            tokens, scaled = candidates(sampling, logits)
            scores = judged(sampling, logits)
            np.testing.assert_array_equal(tokens, torch.isfinite(scores).nonzero()[:, 0])
            shifted = scores[tokens] - scores.max()
            np.testing.assert_allclose(scaled, shifted, rtol=1e-5, atol=1e-5)


def test_equally_probable_tokens_are_kept_or_dropped_together():
    logits = np.array([1, 3, 2, 3, 2, 0, 2, 3], np.float32)
    assert candidates(Sampling(1, top_k=1), logits)[0].tolist() == [1, 3, 7]
    assert candidates(Sampling(1, top_k=4), logits)[0].tolist() == [1, 2, 3, 4, 6, 7]
    assert candidates(Sampling(1, top_p=0.01), logits)[0].tolist() == [1, 3, 7]
    assert candidates(Sampling(1, top_p=0.0), logits)[0].tolist() == [1, 3, 7]
    assert candidates(Sampling(1, top_p=0.71), logits)[0].tolist() == [1, 2, 3, 4, 6, 7]  # the three 3s have 0.6995
    assert candidates(Sampling(1, top_p=0.69), logits)[0].tolist() == [1, 3, 7]


def test_penalties_are_those_of_transformers_and_openai():
    random = np.random.default_rng(2)
    logits, token_ids = random.normal(size=50).astype(np.float32) * 4, random.integers(0, 50, 60)
    sampling = Sampling(1, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.3)
    found = penalized(sampling, logits, token_ids, prompt=20)
    np.testing.assert_allclose(found, judged(sampling, logits, token_ids, 20), rtol=1e-5, atol=1e-5)
    few = penalized(sampling, logits[:30], token_ids, prompt=20)  # of a draft head that knows fewer tokens
    np.testing.assert_array_equal(few, found[:30])


def test_draws_are_those_of_softmax():
    """100,000 draws with each filter from two vocabularies, by Pearson's chi-square; tokens that should come less than
    8 times count as one.
    """
    draws, random = 100_000, np.random.default_rng(6)
    logits = [(random.normal(size=size) * 2).astype(np.float32) for size in (40, 120)]
    cases = [(sampling, row, *candidates(sampling, row)) for row in logits for sampling in FILTERS]
    counts = [np.zeros(120, int) for _ in cases]
    for start in range(0, draws, 1000):
        made = noise(11, range(start, start + 1000), 120)
        for count, (_, _, tokens, scaled) in zip(counts, cases, strict=True):
            count += np.bincount(tokens[(scaled + made[:, tokens]).argmax(1)], minlength=120)
    for (sampling, row, _, _), count in zip(cases, counts, strict=True):
        wanted = draws * judged(sampling, row).double().softmax(0).numpy()
        rare = wanted < 8
        assert not count[: len(row)][wanted == 0].any()
        found = np.append(count[: len(row)][~rare], count[: len(row)][rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
        chi_square = ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
        spread = 2 / (9 * (np.count_nonzero(wanted) - 1))  # Wilson and Hilferty: its cube root is nearly normal
        deviations = ((chi_square * spread * 4.5) ** (1 / 3) - 1 + spread) / np.sqrt(spread)
        assert deviations < 4, (sampling, len(row))


def test_the_tokens_that_are_left_out_of_many_could_not_have_won():
    random = np.random.default_rng(3)
    for spread in (0.1, 1, 4, 12):
        for position in range(30):
            scaled = (random.normal(size=5000) * spread).astype(np.float32)
            scaled -= scaled.max()
            bits = uniform_bits(1, position, 5000)
            assert drawn(scaled, bits) == (scaled + gumbel(bits)).argmax()


def test_a_token_hangs_on_seed_position_and_logits_alone():
    logits = np.random.default_rng(4).normal(size=(60, 200)).astype(np.float32)
    sampling = Sampling(1, seed=9, top_p=0.95)
    forth = HostSampler(sampling, [1, 2], 60)
    back = HostSampler(sampling, [1, 2], 60)
    found = [forth.pick(row, position) for position, row in enumerate(logits)]
    assert found == [back.pick(row, position) for position, row in reversed([*enumerate(logits)])][::-1]
    assert len({*found}) > 20
    other = HostSampler(Sampling(1, seed=10, top_p=0.95), [1, 2], 60)
    assert found != [other.pick(row, position) for position, row in enumerate(logits)]


def test_no_token_is_drawn_from_what_is_not_finite():
    logits = np.array([0, np.nan, 2, np.inf], np.float32)
    assert HostSampler(Sampling(1, seed=1), [], 9).pick(logits, 3) == 1
    assert HostSampler(Sampling(1, seed=1), [], 9).pick(logits[2:], 3) == 1
    assert HostSampler(Sampling(1, seed=1), [], 9).pick(np.array([-np.inf, 1], np.float32), 3) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"seed": 1 << 64},
        {"repetition_penalty": 0},
        {"presence_penalty": 1e9},
        {"top_q": 1},
    ],
)
def test_what_cannot_be_is_refused(given):
    with pytest.raises(RequestError, match=next(iter(given)).replace("_", "[ _]")):
        GREEDY.changed(**given)


def test_what_is_given_comes_before_the_bundles_own():
    own = Sampling(0.6, top_p=0.9)
    assert own.changed(top_p=None, top_k=5) == Sampling(0.6, 5, 0.9)
    assert own.changed(temperature=0).is_greedy
    assert GREEDY.changed(top_p=0.9) == Sampling(1.0, top_p=0.9)
    assert GREEDY.changed(temperature=0, seed=3).is_greedy
    assert GREEDY.seeded() == GREEDY
    assert own.seeded().seed is not None
    assert own.changed(seed=3).seeded().seed == 3


def test_the_same_seed_draws_the_same_text_with_any_exit_and_length(bundles):
    texts, accepted, cases = {}, 0, itertools.product(SETTINGS, range(2))
    cases = [([5 + seed, 90, 33], how | {"seed": seed, "max_new_tokens": 24}) for how, seed in cases]
    for exit_layer in (1, 3):
        with edgeskip.load(bundles("llama-tied", exit_layer=exit_layer).folder, device="cpu") as model:
            for number, (prompt, settings) in enumerate(cases):
                plain = texts.setdefault(number, model.complete(prompt, mode="autoregressive", **settings).token_ids)
                for k, threshold in ((1, 0.0), (4, 0.0), (6, 0.3)):
                    ours = model.complete(prompt, num_speculations=k, confidence_threshold=threshold, **settings)
                    assert ours.token_ids == plain
                    accepted += ours.statistics.accepted
                assert model.complete(prompt, mode="early-exit", **settings).token_ids != plain
    assert len({*texts.values()}) == len(cases)
    assert accepted


def test_each_token_is_what_the_picker_draws_from_the_logits_of_transformers(bundles, reference):
    prompt, sampling = [5, 90, 33, 7], Sampling(0.4, top_p=0.9, seed=3, presence_penalty=0.5)
    with edgeskip.load(bundles("llama-tied").folder, device="cpu") as model:
        made = model.complete(prompt, max_new_tokens=30, logprobs=3, **sampling.settings)
    with torch.no_grad():
        logits = reference("llama-tied")(torch.tensor([[*prompt, *made.token_ids]])).logits[0, len(prompt) - 1 : -1]
    judge = HostSampler(sampling, prompt, 96)
    assert [judge.pick(row.numpy(), 4 + i) for i, row in enumerate(logits)] == list(made.token_ids)
    likely = logits.double().log_softmax(-1)
    for row, token, told in zip(likely, made.token_ids, made.logprobs, strict=True):
        assert told.token_id == token
        assert told.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in told.top] == row.topk(3).indices.tolist()
        np.testing.assert_allclose([value for _, value in told.top], row.topk(3).values, atol=1e-4)


def test_a_bundle_may_draw_by_itself_and_a_seed_is_told(bundles, tmp_path):
    shutil.copytree(bundles("llama-tied").folder, tmp_path / "b")
    edit_json(tmp_path / "b" / "manifest.json", lambda manifest: manifest.update(sampling={"temperature": 0.5}))
    assert read_bundle(tmp_path / "b").manifest.sampling == Sampling(0.5)
    with edgeskip.load(tmp_path / "b", device="cpu") as model:
        drawn = [model.complete([5, 6], max_new_tokens=20) for _ in range(3)]
        assert len({made.token_ids for made in drawn}) == 3
        again = model.complete([5, 6], max_new_tokens=20, seed=drawn[0].sampling.seed)
        assert again.token_ids == drawn[0].token_ids
        assert model.complete([5, 6], max_new_tokens=5, temperature=0).sampling.is_greedy
        for wrong in ({"logprobs": -1}, {"logprobs": 1.0}, {"logprobs": 1000}, {"top_p": 7}):
            with pytest.raises(RequestError, match=next(iter(wrong)).replace("_", " ")):
                model.generate([5, 6], **wrong)


def test_every_backend_draws_alike_with_and_without_drafts(backend, bundles):
    with backend.load(bundles("llama-tied", dtype=backend.dtype)) as model:
        for seed, how in enumerate(SETTINGS[:2] * 2):
            prompt, settings = [5 + seed, 90, 33], how | {"seed": seed, "max_new_tokens": 30}
            plain = model.complete(prompt, mode="autoregressive", **settings)
            ours = model.complete(prompt, num_speculations=4, confidence_threshold=0, **settings)
            assert ours.statistics.accepted
            assert ours.statistics.captured_rounds != 0
            pairs = enumerate(zip(plain.token_ids, ours.token_ids, strict=True))
            parted = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
            if parted:
                i, *tokens = parted
                gap = tie_gap(model, [*prompt, *plain.token_ids[:i]], *tokens, plain.sampling)
                assert gap < TIE_GAP[model.bundle.manifest.dtype]


def test_a_bench_of_draws_has_the_best_possible_match_rate_beside_its_own(bundles):
    sampling = Sampling(0.4, top_p=0.9, seed=3)
    with edgeskip.load(bundles("llama-tied", exit_layer=3).folder, device="cpu") as model:
        report = run_bench(model, ["ab", "some text"], BenchSettings((2,), 24, 1, 0.0, sampling=sampling))
    assert report.faults == 0
    assert report.settings.sampling == sampling
    assert 0 < report.rows[1].match_rate < report.best_match_rate + 0.2 < 1.2


def test_the_share_of_two_distributions_bounds_how_often_draws_from_them_agree():
    """Noise that is shared agrees at least half as often as the best of all ways (Daliri, Musco, Suresh 2024)."""
    random, sampling = np.random.default_rng(8), Sampling(1.0, top_k=20)
    one = random.normal(size=100).astype(np.float32) * 2
    other = one + random.normal(size=100).astype(np.float32) * 0.7
    best = np.minimum(distribution(sampling, one), distribution(sampling, other)).sum()
    made = noise(12, range(20_000), 100)
    drawn_ids = [
        tokens[(scaled + made[:, tokens]).argmax(1)]
        for tokens, scaled in (candidates(sampling, x) for x in (one, other))
    ]
    agree = np.mean(drawn_ids[0] == drawn_ids[1])
    assert best / (2 - best) - 0.01 < agree < best


def test_a_prompts_tokens_have_the_probabilities_of_transformers(backend, bundles, reference):
    random = np.random.default_rng(5)
    with backend.load(bundles("llama-tied", dtype=backend.dtype, prefill_chunk=20)) as model:
        for length in (1, 2, 19, 45, 96):
            ids = random.integers(2, 258, length).tolist()
            with torch.no_grad():
                wanted = reference("llama-tied")(torch.tensor([ids])).logits[0].log_softmax(-1)
            told = model.score(ids, logprobs=1)
            assert [one.token_id for one in told] == ids[1:]
            found = np.array([one.logprob for one in told])
            np.testing.assert_allclose(found, wanted[range(length - 1), ids[1:]], atol=backend.tie)
            likely = [one.top[0][1] for one in told]
            np.testing.assert_allclose(likely, wanted[:-1].max(-1).values, atol=backend.tie)
        pieces = model.generate(ids[:5])
        next(pieces)
        with pytest.raises(RequestError, match="already generating"):
            model.score(ids)
        pieces.close()
        again = model.complete(ids[:5], max_new_tokens=9, temperature=0).token_ids
        model.score(ids)
        assert model.complete(ids[:5], max_new_tokens=9, temperature=0).token_ids == again
