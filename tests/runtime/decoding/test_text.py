"""Streamed text is the text: whole characters, cut at stop strings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.conftest import make_model, make_tokenizer, save_checkpoint
from tokenizers import AddedToken

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bundle.manifest import Bundle, FileRecord
from edgeskip.runtime.decoding.text import TextStream, encode_prompt
from edgeskip.runtime.errors import RequestError


def streamed(text, stop=(), drafted=lambda index: False):
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, [0], stop)
    spans = []
    for index, token_id in enumerate(tokenizer.encode(text, add_special_tokens=False).ids):
        spans += stream.push(token_id, drafted=drafted(index))
        if stream.stopped:
            break
    return spans + stream.finish(), stream


@pytest.mark.parametrize("text", ["plain", "naïve café", "a😀b", "日本語", "tab\tnew\r\nline", " leading"])
def test_pieces_join_to_the_text_and_are_whole_characters(text):
    spans, _ = streamed(text)
    assert "".join(s.text for s in spans) == text
    assert all("\ufffd" not in s.text for s in spans)


def test_a_character_cut_off_by_the_end_is_shown_as_replaced():
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, [0], ())
    ids = tokenizer.encode("a😀", add_special_tokens=False).ids
    spans = [s for token_id in ids[:-1] for s in stream.push(token_id, drafted=False)]
    assert "".join(s.text for s in spans + stream.finish()) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("ends with a beginning", ["ing!"], "ends with a beginning"),
        ("first or second", ["second", "or"], "first "),
        ("abc", ["abcdef", "bc"], "a"),
    ],
)
def test_a_stop_string_is_cut_off_and_its_beginning_is_never_shown(text, stop, wanted):
    spans, stream = streamed(text, stop)
    assert "".join(s.text for s in spans) == wanted
    assert stream.stopped == (wanted != text)


def with_markers():
    """The tests' tokenizer with three more tokens: two special ones, which are not shown, and one that is."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|end|>", "<|call|>"])
    tokenizer.add_tokens(["<|shown|>"])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "stopped"),
    [
        ("one<|end|>two", [], "onetwo", False),
        ("one<|end|>two", ["<|end|>"], "one", True),
        ("one<|end|>two", ["<|end|>t"], "one", True),
        ("one<|end|>two", ["e<|end|>t"], "on", True),
        ("one<|end|>two", ["<|call|>"], "onetwo", False),
        ("one<|end|>two", ["etw"], "on", True),  # what is seen, whatever is between
        ("one<|end|>two", ["<|end|>x", "o"], "", True),
        ("one<|end|><|call|>two", ["<|call|>"], "one", True),
        ("one<|end|><|call|>two", ["<|end|><|call|>"], "one", True),
        ("one<|end|>two<|end|>three", ["o<|end|>three"], "onetw", True),
        ("one<|end|>two", ["wo", "<|end|>"], "one", True),
        ("one <|shown|> two", ["<|shown|>"], "one ", True),
        ("one <|shown|> two", ["<|sh"], "one ", True),
        ("one<|end", ["<|end|>"], "one<|end", False),
        ("<|end|>", ["<|end|>"], "", True),
    ],
)
def test_a_stop_string_is_looked_for_in_what_is_seen_and_with_special_tokens_spelled_out(text, stop, wanted, stopped):
    tokenizer = with_markers()
    stream = TextStream(tokenizer, [0], stop)
    spans = []
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        spans += stream.push(token_id, drafted=False)
        if stream.stopped:
            break
    assert "".join(s.text for s in spans + stream.finish()) == wanted
    assert stream.stopped == stopped


def test_text_is_held_back_only_as_long_as_a_stop_string_may_come():
    tokenizer = with_markers()
    stream = TextStream(tokenizer, [0], ["b<|end|>c", "xyz"])
    pieces = [
        "".join(span.text for span in stream.push(token_id, drafted=False))
        for token_id in tokenizer.encode("ab<|end|>dxy<|call|>z", add_special_tokens=False).ids
    ]
    assert pieces == ["a", "", "", "bd", "", "", "", ""]  # at last it is xyz that is seen
    assert stream.stopped


def test_spans_keep_which_token_was_drafted():
    spans, _ = streamed("abcd", ["cx"], drafted=lambda index: index % 2 == 1)
    assert [(s.text, s.drafted) for s in spans] == [("a", False), ("b", True), ("c", False), ("d", True)]


def test_generation_ends_at_a_stop_string(bundles):
    with edgeskip.load(bundles("llama-gqa").folder) as model:
        whole = model.complete([40, 41], max_new_tokens=30)
        stop = whole.text[4:6]
        cut = model.complete([40, 41], max_new_tokens=30, stop=[stop])
        pieces = list(model.generate([40, 41], max_new_tokens=30, stop=[stop]))
    assert cut.stop_reason == "stop_string"
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(p.text for p in pieces)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt: empty"),
        ([], {}, "prompt: empty"),
        ([1, 300], {}, "token id 300; wanted 0 to 299"),
        ([-1], {}, "token id -1"),
        ([True], {}, "token id True"),
        ([1.5], {}, "token id 1.5"),
        (b"abc", {}, "prompt: of type bytes"),
        ("\ud800", {}, "not valid Unicode"),
        ("a", {"max_new_tokens": 2.5}, "max new tokens: 2.5"),
        ("a", {"num_speculations": 2.5}, "num speculations: 2.5"),
        ("x" * 96, {}, "97 tokens; wanted at most 96"),
        ("a", {"mode": "fast"}, "mode: 'fast'; wanted one of self-speculative, autoregressive, early-exit"),
        ("a", {"num_speculations": 0}, "num speculations: 0; wanted 1 to 16"),
        ("a", {"num_speculations": 17}, "wanted 1 to 16"),
        ("a", {"num_speculations": "4"}, "num speculations: '4'; wanted 1 to 16 or 'auto'"),
        ("a", {"draft": ""}, "draft: ''; wanted one of exit, ngram, auto"),
        ("a", {"mode": "autoregressive", "num_speculations": 3}, "num speculations: 3, beside the mode autoregressive"),
        (
            "a",
            {"mode": "early-exit", "draft": "exit"},
            "draft: 'exit', beside the mode early-exit, which drafts nothing",
        ),
        ("a", {"mode": "autoregressive", "confidence_threshold": 0}, "confidence threshold: 0, beside the mode"),
        ("a", {"draft": "ngram", "confidence_threshold": 0.5}, "confidence threshold: 0.5, beside drafts of the text"),
        ("a", {"max_new_tokens": 0}, "max new tokens: 0"),
        ("a", {"max_new_tokens": "3"}, "max new tokens: '3'; wanted"),
        ("a", {"confidence_threshold": "x"}, "confidence threshold: 'x'; wanted 0 to 1"),
        ("a", {"stop": [""]}, "stop: an empty text"),
        ("a", {"stop": 5}, "stop: 5"),
        ("a", {"max_tokens": 5}, "setting: 'max_tokens'; wanted one of .*, max_new_tokens, stop"),
        ("a", {"stop": ["a", 5]}, "stop: 5; wanted a text of at least one character"),
        ([{"role": "user", "content": "hi"}], {}, "no chat template"),
        (None, {}, "prompt: of type NoneType; wanted a text, token ids or a list of messages"),
        ("x" * 20_000_000, {}, "prompt: 20000000 characters; wanted at most 65536"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt, settings, message, bundles):
    with edgeskip.load(bundles("llama-gqa").folder) as model:
        with pytest.raises(RequestError, match=message):
            model.generate(prompt, **settings)
        assert model.complete("a", max_new_tokens=2).statistics.new_tokens == 2


@pytest.mark.parametrize("prompt", ["a", [1, 2]])
def test_tools_go_with_messages_alone(prompt, bundles):
    said = "tools: beside a prompt that is no chat"
    with edgeskip.load(bundles("llama-gqa").folder) as model, pytest.raises(RequestError, match=said):
        model.encode(prompt, tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize("most", [0, "3", 1.5, True])
def test_a_wrong_number_of_tokens_is_refused(most, bundles):
    said = "wanted a whole number from 1"
    with edgeskip.load(bundles("llama-gqa").folder) as model, pytest.raises(RequestError, match=said):
        model.encode("abc", most=most)


@pytest.fixture
def chat(bundles, tmp_path):
    """Encodes a chat by a template, in a bundle that has it."""

    def encode(template, messages=({"role": "user", "content": "hi"},)):
        bundle = bundles("llama-gqa")
        (tmp_path / "chat_template.jinja").write_text(template)
        files = bundle.manifest.files | {"chat_template.jinja": FileRecord(0, "")}
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        manifest = dataclasses.replace(bundle.manifest, files=files, special_tokens=special)
        return encode_prompt(make_tokenizer(), list(messages), Bundle(tmp_path, manifest))

    return encode


def test_a_chat_is_rendered_by_its_template_with_one_bos(chat):
    ids = chat(
        "{{ bos_token }}{% if tools is not none %}[tools]{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[you]{% endif %}"
    )
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ids.count(1) == 1
    assert make_tokenizer().decode(ids) == "[user]hi[you]"


def test_closing_the_model_ends_its_generator_with_an_error(bundles):
    with edgeskip.load(bundles("llama-gqa").folder) as model:
        pieces = model.generate("abc", max_new_tokens=20)
        next(pieces)
    with pytest.raises(RequestError, match="model: is closed"):
        list(pieces)


def test_a_prompt_that_ends_within_a_character_is_not_repeated():
    tokenizer = make_tokenizer()
    prompt = tokenizer.encode("x = 😀", add_special_tokens=False).ids[:-2]
    stream = TextStream(tokenizer, prompt, ())
    spans = [s for i in tokenizer.encode("ab", add_special_tokens=False).ids for s in stream.push(i, drafted=False)]
    assert "".join(s.text for s in spans) == "ab"


def test_token_ids_may_be_an_array(bundles):
    with edgeskip.load(bundles("llama-gqa").folder) as model:
        listed = model.complete([0, 40, 41], max_new_tokens=4)
        assert model.complete(np.array([0, 40, 41]), max_new_tokens=4).token_ids == listed.token_ids


@pytest.fixture
def outgrown(checkpoints, tmp_path):
    """A model with rows for the tokens of its tokenizer but one: it was given [PAD] and not resized."""
    folder = save_checkpoint(make_model("llama-gqa", vocab_size=258), tmp_path / "checkpoint")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": "[PAD]{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(exit_layer=2))


def test_a_token_that_the_model_has_not_is_refused_at_once(outgrown):
    with edgeskip.load(outgrown.folder) as model:
        for prompt in ("a [PAD]", [{"role": "user", "content": "a"}]):
            with pytest.raises(RequestError, match=r"prompt: token 258, '\[PAD\]', which .*; wanted tokens below 258"):
                model.generate(prompt)
        assert model.complete("a", max_new_tokens=2).statistics.new_tokens == 2


def test_special_tokens_in_a_prompt_are_text_where_the_checkpoint_says_so(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    bundle = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(exit_layer=2))
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    with edgeskip.load(bundle.folder) as model:
        assert model.encode("a</s>") == judge("a</s>").input_ids
        assert 1 not in model.encode("a</s>")


@pytest.mark.parametrize("special", [True, False])
def test_an_eos_is_no_text_whether_special_or_not(special, checkpoints, tmp_path):
    """Of a model that is made to say "yes" and then its EOS, whatever it is asked."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=special, normalized=False)])
    said = [tokenizer.token_to_id(token) for token in (*"?yes", "<|turn_end|>")]
    model = make_model("llama-gqa", vocab_size=320, hidden_size=320, intermediate_size=16, eos_token_id=said[-1])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        model.lm_head.weight.zero_()
        for this, following in pairwise(said):
            model.lm_head.weight[following, this] = 1
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    tokenizer.save(str(folder / "tokenizer.json"))
    bundle = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(exit_layer=2))
    with edgeskip.load(bundle.folder) as loaded:
        made = loaded.complete("really?", max_new_tokens=12)
    assert (made.token_ids, made.text, made.stop_reason) == (tuple(said[1:]), "yes", "eos")


@pytest.mark.parametrize("place", ["backend", "device"])
def test_a_backend_or_device_that_nobody_knows_is_refused(place, bundles):
    with pytest.raises(RequestError, match=f"{place}: 'tpu'; wanted one of auto, "):
        edgeskip.load(bundles("llama-gqa").folder, **{place: "tpu"})
