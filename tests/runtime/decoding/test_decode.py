"""Self-speculative decoding gives the tokens of plain decoding, which are those of transformers."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.conftest import VARIANTS, Backend, edit_json, make_model, save_checkpoint

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bench.measure import TIE_GAP, tie_gap
from edgeskip.runtime.bundle.manifest import MANIFEST
from edgeskip.runtime.decoding.decode import Decoding, count_accepted, decode, prefill
from edgeskip.runtime.decoding.rounds import MODES
from edgeskip.runtime.decoding.statistics import distinct_4grams
from edgeskip.runtime.errors import BackendError, RequestError

CAPACITY = 96
COMPARED = {"fp32": 30, "fp16": 30, "bf16": 5}
"""Tokens ahead of the first near tie, or next to nothing was compared; bf16 is coarse for models this small."""


@pytest.fixture(scope="module")
def greedy(reference):
    """transformers' greedy tokens, and the gap between the two top logits at each; computed once for each prompt."""

    @cache
    def get(variant, prompt, max_new_tokens):
        out = reference(variant).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(out.logits)[:, 0].topk(2).values
        return out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()

    return lambda variant, prompt, max_new_tokens: get(variant, tuple(prompt), max_new_tokens)


def assert_same_tokens(ours, wanted, gaps, bound):
    """Equal up to the first near tie, behind which the texts may part; returns how many were compared."""
    tie = next((i for i, gap in enumerate(gaps) if gap < bound), len(gaps))
    assert list(ours[:tie]) == wanted[:tie]
    if tie == len(gaps):
        assert len(ours) == len(wanted)
    return tie


def assert_same_but_for_ties(model, prompt, ours, plain):
    """Two texts of one backend, which part only where the two top logits lie within rounding of each other."""
    parted = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
    if parted is None:
        assert len(ours) == len(plain)
    else:
        assert not model.session.exact
        gap = tie_gap(model, [*prompt, *plain[:parted]], ours[parted], plain[parted])
        assert gap < TIE_GAP[model.bundle.manifest.dtype]


def prompts(count, seed=0, longest=30):
    random = np.random.default_rng(seed)
    return [random.integers(2, 258, random.integers(1, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_tokens_equal_transformers_for_every_exit_and_length(exit_layer, backend, bundles, greedy):
    bundle = bundles("llama-tied", exit_layer=exit_layer, dtype=backend.dtype)
    accepted = compared = 0
    with backend.load(bundle) as model:
        for prompt in prompts(6, seed=2):
            wanted, gaps = greedy("llama-tied", prompt, 33)
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=33)
            compared += assert_same_tokens(plain.token_ids, wanted, gaps, backend.tie)
            for k in range(1, 9):
                ours = model.complete(prompt, num_speculations=k, confidence_threshold=0, max_new_tokens=33)
                assert_same_tokens(ours.token_ids, wanted, gaps, backend.tie)
                assert_same_but_for_ties(model, prompt, ours.token_ids, plain.token_ids)
                accepted += ours.statistics.accepted
    assert accepted > 0  # some drafts were right, or nothing was tested
    assert compared >= COMPARED[backend.dtype]


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-llama3-rope", "mistral", "qwen2", "qwen3"])
def test_tokens_equal_transformers_for_every_family(variant, backend, bundles, greedy):
    compared = 0
    with backend.load(bundles(variant, exit_layer=3, dtype=backend.dtype)) as model:
        for prompt in prompts(8, seed=1):
            wanted, gaps = greedy(variant, prompt, 40)
            for k in (1, 4, 7):
                ours = model.complete(prompt, num_speculations=k, confidence_threshold=0, max_new_tokens=40)
                compared += assert_same_tokens(ours.token_ids, wanted, gaps, backend.tie)
    assert compared >= COMPARED[backend.dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_the_primitives_equal_transformers(variant, bundles, greedy):
    """The graphs for TensorRT 10.3, in ONNX Runtime."""
    compared = 0
    with edgeskip.load(bundles(variant).folder, device="cpu", dialect="primitive") as model:
        for prompt in prompts(4, seed=4):
            wanted, gaps = greedy(variant, prompt, 30)
            for mode in ("autoregressive", "self-speculative"):
                ours = model.complete(prompt, mode=mode, max_new_tokens=30)
                compared += assert_same_tokens(ours.token_ids, wanted, gaps, 2e-4)
    assert compared >= 60


def test_the_texts_of_these_tests_do_not_loop(bundles):
    with edgeskip.load(bundles("llama-tied").folder) as model:
        texts = [model.complete(prompt, max_new_tokens=33).token_ids for prompt in prompts(6)]
    assert distinct_4grams(texts) > 0.5


@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_number_of_new_tokens_ends_exactly_there(k, backend, bundles):
    with backend.load(bundles("llama-gqa", exit_layer=3, dtype=backend.dtype)) as model:
        prompt = prompts(1)[0]
        whole = model.complete(prompt, mode="autoregressive", max_new_tokens=24)
        for count in range(1, 24):
            cut = model.complete(prompt, num_speculations=k, confidence_threshold=0, max_new_tokens=count)
            assert_same_but_for_ties(model, prompt, cut.token_ids, whole.token_ids[:count])
            assert cut.stop_reason == "max_new_tokens"
            assert sum(n * (a + 1) for a, n in enumerate(cut.statistics.acceptance_histogram)) == count - 1
            assert cut.statistics.new_tokens == count
            assert cut.statistics.drafted <= k * cut.statistics.rounds


def draft_calls(session, monkeypatch):
    """How many tokens heads draft, in rounds of those lengths that are run from now on."""
    lengths = []

    def bind(round_, real=session.bind):
        bound = real(round_)
        drafts = sum(("token_ids", "draft_token_ids") in [(n, v.buffer) for n, v in c.outputs] for c in round_.calls)

        def start(*given):
            lengths.append(drafts)
            bound.start(*given)

        return SimpleNamespace(start=start, wait=bound.wait)

    monkeypatch.setattr(session, "bind", bind)
    return lengths


@pytest.mark.parametrize(
    "further",
    [{"confidence_threshold": 0}, {"confidence_threshold": 1e-6}, {"frequency_penalty": 0.1}, {"draft": "auto"}],
    ids=str,
)
def test_the_last_round_drafts_no_more_than_the_text_can_take(further, bundles, monkeypatch):
    prompt, settings = prompts(1)[0], {"num_speculations": 6, "confidence_threshold": 1e-6, **further}
    with edgeskip.load(bundles("llama-gqa", exit_layer=3).folder, device="cpu") as model:
        made = draft_calls(model.session, monkeypatch)
        for count in range(1, 12):
            made.clear()
            cut = model.complete(prompt, max_new_tokens=count, **settings).statistics
            copied = cut.by_drafter.get("ngram")
            assert sum(made) == cut.drafted - (copied.drafted if copied else 0)
            assert cut.drafted <= sum(range(count - 1))  # one less than the tokens that are wanted, round after round


def test_trusted_drafts_are_those_of_a_longer_text(bundles, monkeypatch):
    """The last draft of a round is never trusted: that must not be one that the text can take."""
    with edgeskip.load(bundles("llama-gqa", exit_layer=3).folder, device="cpu") as model:
        made = draft_calls(model.session, monkeypatch)
        how = {"mode": "early-exit", "confidence_threshold": 0.02}
        for prompt in prompts(3):
            whole = model.complete(prompt, max_new_tokens=24, **how)
            assert whole.statistics.trusted
            for count in range(1, 24):
                made.clear()
                cut = model.complete(prompt, max_new_tokens=count, **how)
                assert cut.token_ids == whole.token_ids[:count]
                assert sum(made[-count:]) <= count + 2


def test_a_device_that_captures_rounds_gets_no_shorter_ones_for_the_end_of_a_text(bundles):
    bundle, host = bundles("llama-gqa", exit_layer=3), Backend("host", "engines", "fp32", 1e-4)
    with host.load(bundle) as model, edgeskip.load(bundle.folder, device="cpu") as judge:
        how = {"num_speculations": bundle.manifest.num_speculations, "confidence_threshold": 0}
        for prompt in prompts(3):
            for count in range(2, 12):
                ours, wanted = (one.complete(prompt, max_new_tokens=count, **how) for one in (model, judge))
                assert ours.token_ids == wanted.token_ids
                told = ("drafted", "accepted", "tested", "rounds", "acceptance_histogram")
                assert all(getattr(ours.statistics, n) == getattr(wanted.statistics, n) for n in told)
        assert {round_.num_drafts for round_ in model.session._bound} == {0, how["num_speculations"]}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 95, 96])
@pytest.mark.parametrize("k", [0, 1, 5, 8])
def test_the_cache_fills_to_its_last_row_and_no_further(length, k, backend, bundles, greedy):
    prompt = prompts(1, seed=length, longest=2)[0] * length
    wanted, gaps = greedy("llama-gqa", prompt, CAPACITY - length + 1)
    with backend.load(bundles("llama-gqa", exit_layer=2, dtype=backend.dtype)) as model:
        mode = {"mode": "autoregressive"} if k == 0 else {"num_speculations": k, "confidence_threshold": 0}
        ours = model.complete(prompt, **mode)
    assert ours.stop_reason in ("capacity", "eos")
    if ours.stop_reason == "capacity":
        assert len(ours.token_ids) == CAPACITY - length + 1
    assert_same_tokens(ours.token_ids, wanted, gaps, backend.tie)


def test_eos_inside_accepted_drafts_drops_what_follows(bundles, tmp_path):
    source = bundles("llama-gqa", exit_layer=3)
    with edgeskip.load(source.folder) as model:
        for prompt in prompts(20, seed=3):
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=24).token_ids
            inside = _second_token_of_a_long_round(_steps(model, prompt, 8), plain)
            if inside is not None:
                break
        else:
            pytest.fail("no round accepted two drafts")
    eos = plain[inside]
    folder = tmp_path / "bundle"
    _copy_with_eos(source.folder, folder, eos)
    with edgeskip.load(folder) as model:
        first = plain.index(eos)
        ours = model.complete(prompt, num_speculations=8, confidence_threshold=0, max_new_tokens=24)
        assert ours.token_ids == plain[: first + 1]
        assert ours.stop_reason == "eos"
        histogram = ours.statistics.acceptance_histogram
        assert sum(histogram) == ours.statistics.rounds
        assert ours.statistics.accepted == sum(a * n for a, n in enumerate(histogram))
        assert ours.statistics.new_tokens == first + 1


def _steps(model, prompt, k, **settings):
    """The loop itself, without stop rules: prefill, then rounds until the caches are full."""
    session, manifest = model.session, model.bundle.manifest
    how = Decoding(model.split, k, **settings)
    yield prefill(session, how, model.embeddings[list(prompt)], manifest.prefill_chunk)
    yield from decode(session, how, len(prompt), manifest.max_length)


def _second_token_of_a_long_round(steps, plain):
    position = 0
    for step in steps:
        if step.accepted >= 2 and position + 1 < len(plain) and plain.index(plain[position + 1]) == position + 1:
            return position + 1
        position += len(step.token_ids)
    return None


def _copy_with_eos(source, folder, eos):
    import shutil

    shutil.copytree(source, folder)
    edit_json(folder / MANIFEST, lambda manifest: manifest.update(eos_token_ids=[int(eos)]))


@pytest.mark.parametrize("threshold", [0.12, 0.2])
def test_drafting_ends_behind_the_first_unsure_draft_of_transformers(threshold, bundles, reference):
    """Each round's number of drafts, against the same early layers and head in transformers."""
    full, k = reference("llama-gqa"), 5

    def exit_probabilities(ids):
        with torch.no_grad():
            states = full(torch.tensor([ids]), output_hidden_states=True).hidden_states[3]
            return full.lm_head(full.model.norm(states))[0, -1].softmax(-1)

    lengths = set()
    with edgeskip.load(bundles("llama-gqa", exit_layer=3).folder) as model:
        for prompt in prompts(4, seed=7):
            steps = _steps(model, prompt, k, confidence_threshold=threshold)
            ids = [*prompt, *next(steps).token_ids]
            for step in islice(steps, 8):
                drafts, sure = [], True
                while sure and len(drafts) < k:
                    confidence, draft = exit_probabilities(ids + drafts).max(-1)
                    assert abs(confidence - threshold) > 1e-5  # or rounding decides
                    drafts.append(int(draft))
                    sure = confidence >= threshold
                assert step.drafted == len(drafts)
                assert list(step.token_ids[:-1]) == drafts[: step.accepted]
                lengths.add(step.drafted)
                ids += step.token_ids
    assert len(lengths) > 2  # rounds of several lengths, or nothing was tested


def test_early_exit_mode_is_the_model_cut_off_at_the_exit_layer(bundles, reference):
    full = reference("llama-gqa")
    prompt = prompts(1, seed=5)[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            states = full(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
            ids.append(int(full.lm_head(full.model.norm(states))[0, -1].argmax()))
    with edgeskip.load(bundles("llama-gqa", exit_layer=2).folder) as model:
        ours = model.complete(prompt, mode="early-exit", max_new_tokens=20)
    assert list(ours.token_ids) == ids[len(prompt) :]
    assert ours.statistics.stage_ms["verify"] == 0


def test_a_second_generator_is_refused_and_the_first_goes_on(backend, bundles):
    with backend.load(bundles("llama-gqa", dtype=backend.dtype)) as model:
        whole = model.complete("abc", max_new_tokens=12).text
        first = model.generate("abc", max_new_tokens=12)
        start = next(first).text
        with pytest.raises(RequestError, match="already generating"):
            next(model.generate("xyz"))
        assert start + "".join(piece.text for piece in first) == whole


def test_leaving_a_generator_early_resets_the_model(backend, bundles):
    with backend.load(bundles("llama-gqa", dtype=backend.dtype)) as model:
        whole = model.complete("abc", max_new_tokens=12)
        for _ in model.generate("a longer text that fills other rows"):
            break
        again = model.complete("abc", max_new_tokens=12)
    assert again.token_ids == whole.token_ids


OVERFLOWS = 200
"""A token that only the first gate and the first product of an MLP make much of."""


def with_overflow(model):
    """A model whose logits are finite unless a text has a certain token: its product is beyond fp32."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[OVERFLOWS, 0] = 1
        for layer in model.model.layers:  # nothing else writes to this dimension, and the first MLP alone reads it
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[0] = 0
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, 0] = 1e25 if layer is model.model.layers[0] else 0
    return model


def exported(model, folder):
    checkpoint = open_checkpoint(str(save_checkpoint(model, folder / "checkpoint")))
    return export_bundle(checkpoint, folder / "bundle", ExportSettings(exit_layer=2, prefill_chunk=8))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    return exported(with_overflow(make_model("llama-gqa")), tmp_path_factory.mktemp("overflowing"))


@pytest.mark.parametrize(
    "runs",
    [
        Backend("cpu", "standard", "fp32", 1e-4),
        Backend("host", "engines", "fp32", 1e-4),
        pytest.param(Backend("cuda", "standard", "fp32", 1e-4), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_a_text_with_logits_that_are_not_finite_is_refused_and_leaves_nothing(runs, overflowing):
    healthy = [5, 6, 7, 8, 9]
    with runs.load(overflowing) as model:
        wanted = model.complete(healthy, max_new_tokens=8).token_ids
        for mode in MODES:
            with pytest.raises(BackendError, match="the token at position 12: the model's logits are not finite"):
                model.complete([*healthy, OVERFLOWS, *range(20, 26)], mode=mode)
            again = model.complete(healthy, max_new_tokens=8)
            assert (again.token_ids, again.statistics.cached_tokens) == (wanted, 0)
        with pytest.raises(BackendError, match="not finite"):
            model.score([*healthy, OVERFLOWS, 20])
        assert model.complete(healthy, max_new_tokens=8).token_ids == wanted


DRAFTED = 9
"""The dimension that an exit drafts the overflowing token by; a bias after it takes that away again."""


@pytest.fixture(scope="module")
def overdrafting(tmp_path_factory):
    """A bundle of a model with the same token, which its exit drafts at every place and its last layer never picks."""
    model = with_overflow(make_model("llama-mlp-bias"))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, DRAFTED] = 8
        model.lm_head.weight[OVERFLOWS, DRAFTED] = 40
        model.model.norm.weight[DRAFTED] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[DRAFTED] = 0
            layer.mlp.down_proj.weight[DRAFTED] = 0
            layer.mlp.down_proj.bias[DRAFTED] = -8 if layer is model.model.layers[2] else 0
    return exported(model, tmp_path_factory.mktemp("overdrafting"))


@pytest.mark.parametrize(
    "runs",
    [
        Backend("cpu", "cpu", "fp32", 1e-4),
        Backend("cpu", "standard", "fp32", 1e-4),
        Backend("host", "engines", "fp32", 1e-4),
        pytest.param(Backend("cuda", "standard", "fp32", 1e-4), marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("picking", [{}, {"temperature": 0.3, "seed": 4, "frequency_penalty": 0.1}], ids=str)
@pytest.mark.parametrize(
    "drafting",
    [
        {"confidence_threshold": 0, "num_speculations": 4},
        {"draft": "auto"},
        {"mode": "early-exit", "confidence_threshold": 0.999},
    ],
    ids=str,
)
def test_wrong_drafts_that_overflow_spoil_no_text(drafting, picking, runs, overdrafting):
    prompt, more = [5, 6, 7, 8, 9], {"max_new_tokens": 12, "logprobs": 0, **picking}
    with runs.load(overdrafting) as model:
        plain = model.complete(prompt, mode="autoregressive", **more)
        scores = model.score([*prompt, *plain.token_ids])
        ours = model.complete(prompt, **drafting, **more)
        assert ours.token_ids == plain.token_ids
        assert [one.logprob for one in ours.logprobs] == pytest.approx(
            [one.logprob for one in plain.logprobs], abs=1e-3
        )
        for _ in model.generate(prompt, **drafting, **more):
            break  # what is under way has such a draft, and nobody sees what it gives
        assert model.score([*prompt, *plain.token_ids]) == scores


def test_statistics_count_what_the_rounds_did(backend, bundles):
    with backend.load(bundles("llama-gqa", exit_layer=3, dtype=backend.dtype)) as model:
        g = model.complete([5, 6, 7], num_speculations=4, max_new_tokens=40)
    s = g.statistics
    assert (s.prompt_tokens, s.new_tokens, len(g.token_ids)) == (3, 40, 40)
    assert s.acceptance_rate == pytest.approx(s.accepted / s.drafted)
    assert s.match_rate == pytest.approx(s.accepted / s.tested)
    assert s.accepted <= s.tested <= s.drafted
    assert s.tokens_per_round == pytest.approx(39 / s.rounds)
    assert s.tokens_per_second == pytest.approx(1e3 / s.ms_per_token)
    assert set(s.stage_ms) == ({"draft", "verify", "head"} if backend.device == "cpu" else {"device"})
    assert all(ms > 0 for ms in s.stage_ms.values())
    assert json.loads(json.dumps(dataclasses.asdict(g)))["stop_reason"] == "max_new_tokens"


@pytest.mark.parametrize(
    ("drafts", "targets", "accepted"),
    [([], [7], 0), ([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 9, 3, 4], 1), ([1, 2], [9, 2, 3], 0)],
)
def test_the_longest_matching_prefix_is_accepted(drafts, targets, accepted):
    assert count_accepted(drafts, targets) == accepted
