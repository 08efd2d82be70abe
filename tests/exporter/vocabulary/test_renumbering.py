"""A bundle whose frequent tokens come first is the same model: its tokenizer and its tables are in one order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.check.golden import Golden
from edgeskip.exporter.check.run import run_check
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.quantization.layouts import QuantizedTensor
from edgeskip.exporter.vocabulary import frequency
from edgeskip.exporter.vocabulary.frequency import levels_of, write_levels
from edgeskip.exporter.vocabulary.renumbering import by_frequency, order_of
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.runtime.bundle.manifest import WEIGHTS, read_bundle
from edgeskip.runtime.errors import RequestError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "zz quick brown foxes jumped over 12 lazy dogs; zebras doze. " * 200
PROMPTS = ["zebra", "def f(x):\n    return", "12 dogs \u00e9\u4e2d"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("zzz" * 200)
    return folder


@pytest.fixture
def exported(bundles, texts):
    """A bundle of the variant whose ids are in the order of frequency, and one as they were."""

    def get(variant, **settings):
        settings = {"exit_layer": 3} | settings
        own = {"calibration": texts} if settings.get("quantizer") == "gptq" else {}
        new = bundles(variant, draft_vocabulary=150, calibration=texts, **settings)
        return new, bundles(variant, **settings, **own)

    return get


def test_the_tokens_that_occur_most_come_first_and_special_ones_stay(texts):
    checkpoint = open_checkpoint(str(CHECKPOINT))
    made, before = by_frequency(checkpoint, texts), checkpoint.tokenizer.tokenizer
    after = made.tokenizer.tokenizer
    counted = Counter(token for text in (TEXT, "zzz" * 200) for token in before.encode(text).tokens)
    special = {token["content"]: token["id"] for token in json.loads(made.tokenizer.json)["added_tokens"]}
    assert special == {token.content: id_ for id_, token in before.get_added_tokens_decoder().items()}
    ranked = [token for token, _ in sorted(after.get_vocab().items(), key=lambda pair: pair[1]) if token not in special]
    counts = [counted[token] for token in ranked]
    assert counts == sorted(counts, reverse=True)
    unseen = [before.token_to_id(token) for token in ranked if not counted[token]]
    assert unseen == sorted(unseen)
    np.testing.assert_array_equal(order_of(after, before, 4096), made.order)


def test_any_text_has_the_same_tokens_under_other_ids(texts):
    checkpoint = open_checkpoint(str(CHECKPOINT))
    made, before = by_frequency(checkpoint, texts), checkpoint.tokenizer.tokenizer
    after = made.tokenizer.tokenizer
    for text in [*PROMPTS, TEXT[:200], "</s> <s>x\n\n\t  y", "", "\U0001f600"]:
        one, other = before.encode(text), after.encode(text)
        assert one.tokens == other.tokens
        assert one.ids == made.order[other.ids].tolist() if other.ids else one.ids == []
        assert before.decode(one.ids) == after.decode(other.ids)


def vocabulary(checkpoint):
    return json.loads(checkpoint.tokenizer.json)["model"]["vocab"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Frequencies of a checkpoint's first 200 tokens, which ship in place of the others; the last ones occur most."""

    def ship(vocab):
        levels = levels_of(2.0 ** -np.arange(25, 0, -1).repeat(8))
        levels[100:120] = 0
        write_levels(tmp_path / "f.safetensors", {"other": ({"a": 0}, levels[:1]), "own": (vocab, levels)})
        monkeypatch.setattr(frequency, "FREQUENCIES", tmp_path / "f.safetensors")
        return levels

    return ship


def test_a_tokenizer_whose_frequencies_ship_needs_no_texts(shipped):
    checkpoint = open_checkpoint(str(CHECKPOINT))
    levels = np.pad(shipped(vocabulary(checkpoint)).astype(int), (0, 4096 - 200))
    made = by_frequency(checkpoint, None)
    fixed = [token["id"] for token in json.loads(made.tokenizer.json)["added_tokens"]]
    order = made.order[~np.isin(np.arange(4096), fixed)]
    assert levels[order].tolist() == sorted(np.delete(levels, fixed), reverse=True)
    assert all(one < other for one, other in pairwise(order) if levels[one] == levels[other])
    after = made.tokenizer.tokenizer
    np.testing.assert_array_equal(order_of(after, checkpoint.tokenizer.tokenizer, 4096), made.order)


def test_another_tokenizer_keeps_its_order_without_texts(shipped):
    checkpoint = open_checkpoint(str(CHECKPOINT))
    one, other = ((token, id_) for token, id_ in vocabulary(checkpoint).items() if id_ in (150, 151))
    shipped(vocabulary(checkpoint) | {one[0]: other[1], other[0]: one[1]})
    assert by_frequency(checkpoint, None) is checkpoint


def test_frequencies_ship_for_widespread_tokenizers():
    sizes = {name.partition(":")[0]: len(levels) for name, levels in load_file(frequency.FREQUENCIES).items()}
    assert sizes == {"llama-2": 32_000, "llama-3": 128_000, "qwen": 151_643}


def test_levels_are_eighths_of_an_octave():
    frequencies = np.array([1, 0.5, 0.5**3.5, 1e-30, 0])
    assert levels_of(frequencies).tolist() == [255, 247, 227, 1, 0]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("llama-tied", {"dtype": "fp16"}),
        ("llama-gqa", {"dtype": "fp16", "weights": "int8"}),
        ("llama-tied", {"weights": "int4", "head": "int4"}),
        ("llama-tied", {"weights": "int4", "head": "int4", "quantizer": "gptq"}),
    ],
)
def test_the_tables_are_those_of_the_checkpoint_in_the_tokenizer_s_order(variant, settings, exported):
    """And so is each part of a quantized table; all else has the same bytes, GPTQ's rounding too."""
    new, old = exported(variant, **settings)
    assert (new.manifest.renumbered, old.manifest.renumbered) == (True, False)
    order = order_of(*(Tokenizer.from_file(str(one.path("tokenizer.json"))) for one in (new, old)), 300)
    assert sorted(order) == list(range(300)) != order.tolist()
    arrays, wanted = (load_file(one.path(WEIGHTS)) for one in (new, old))
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        moved = name.startswith((EMBEDDINGS, HEAD))
        np.testing.assert_array_equal(array, wanted[name][order] if moved else wanted[name])


@pytest.mark.parametrize("settings", [{}, {"dtype": "fp16", "weights": "int4", "head": "int4"}])
def test_texts_are_the_same(settings, exported):
    new, old = exported("llama-tied", **settings)
    with edgeskip.load(new.folder, device="cpu") as model, edgeskip.load(old.folder, device="cpu") as judge:
        for prompt in PROMPTS:
            wanted = judge.complete(prompt, mode="autoregressive", max_new_tokens=30)
            for k in (1, 4):
                ours = model.complete(prompt, num_speculations=k, confidence_threshold=0, max_new_tokens=30)
                assert ours.text == wanted.text
                assert ours.stop_reason == wanted.stop_reason


def test_it_is_checked_against_its_checkpoint(exported, checkpoints):
    new, _ = exported("llama-gqa")
    with edgeskip.load(new.folder, device="cpu", dialect="standard") as model:
        report = run_check(model, Golden(new, str(checkpoints("llama-gqa"))), PROMPTS[:1])
    assert report.passed
    assert "draft_head" in {one.graph for one in report.tensors}
    assert report.agreed == {"autoregressive": 1, "self-speculative": 1}


def test_what_cannot_be_put_in_order_is_said_in_one_line(texts, tmp_path, checkpoints):
    opened = open_checkpoint(str(checkpoints("llama-gqa")))
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(RequestError, match=r"3 tokens; wanted at least 256; give more text"):
        by_frequency(opened, tmp_path / "short.txt")
    pieces = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    other = replace(opened, tokenizer=replace(opened.tokenizer, json=pieces.to_str()))
    with pytest.raises(RequestError, match=r"a tokenizer of the kind Unigram.*leave out --calibration"):
        by_frequency(other, texts)
    stored = opened.tensors[HEAD]
    packed = QuantizedTensor.__new__(QuantizedTensor)
    object.__setattr__(packed, "__dict__", vars(stored) | {"dtype": "int8"})
    with pytest.raises(RequestError, match=r"lm_head.weight: comes quantized"):
        by_frequency(replace(opened, tensors=opened.tensors | {HEAD: packed}), texts)


def test_commands_say_which_tokens_are_drafted(texts, checkpoints, tmp_path, shipped):
    def run(*arguments):
        return CliRunner().invoke(main, [*map(str, arguments)])

    export = ("export", checkpoints("llama-gqa"), tmp_path / "b", "-e", 2, "--draft-vocabulary")
    refused = run(*export, 300)
    assert refused.exit_code == RequestError.exit_code
    assert "draft vocabulary: 300; wanted 128 to 299 rows, or all: the vocabulary has 300" in refused.stderr
    assert not (tmp_path / "b").exists()
    made = run(*export, 150, "--calibration", texts)
    assert "Drafts are among the 150 tokens that are frequent in your texts." in made.output
    shipped(vocabulary(open_checkpoint(str(checkpoints("llama-gqa")))))
    made = run(*export[:2], tmp_path / "c", *export[3:], 150)
    assert "150 tokens that are frequent in texts of many kinds, as counted for this tokenizer." in made.output
    made = run(*export[:2], tmp_path / "d", *export[3:], 150, "--keep-token-ids")
    assert "Drafts are among the 150 tokens that have the first ids." in made.output
    assert [read_bundle(tmp_path / name).manifest.renumbered for name in "bcd"] == [True, True, False]
    refused = run(*export[:2], tmp_path / "e", "-e", 2, "--keep-token-ids")
    assert (refused.exit_code, "give --draft-vocabulary" in refused.stderr) == (2, True)
    shown = run("inspect", tmp_path / "b").output
    assert "token ids are numbered by how frequent tokens are, and not those of the checkpoint" in shown
    assert "150 tokens, greedy" in shown
    on_h100 = run("plan", tmp_path / "b", "-d", "h100", "--dtype", "fp16", "--weights", "int8", "--head", "int8")
    assert "draft_head weights" in on_h100.output
