"""Streamed text is the text: whole characters, cut at stop strings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.conftest import make_tokenizer

import edgeskip
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
        (b"abc", {}, "prompt: a bytes"),
        ("\ud800", {}, "not valid Unicode"),
        ("a", {"max_new_tokens": 2.5}, "max new tokens: 2.5"),
        ("a", {"num_speculations": 2.5}, "num speculations: 2.5"),
        ("x" * 96, {}, "97 tokens; wanted at most 96"),
        ("a", {"mode": "fast"}, "mode: 'fast'; wanted one of self-speculative, autoregressive, early-exit"),
        ("a", {"num_speculations": 0}, "num speculations: 0; wanted 1 to 16"),
        ("a", {"num_speculations": 17}, "wanted 1 to 16"),
        ("a", {"max_new_tokens": 0}, "max new tokens: 0"),
        ("a", {"stop": [""]}, "stop: an empty text"),
        ([{"role": "user", "content": "hi"}], {}, "no chat template"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt, settings, message, bundles):
    with edgeskip.load(bundles("llama-gqa").folder) as model:
        with pytest.raises(RequestError, match=message):
            model.generate(prompt, **settings)
        assert model.complete("a", max_new_tokens=2).statistics.new_tokens == 2


@pytest.fixture
def chat(bundles, tmp_path):
    """Encodes a chat by a template, in a bundle that has it."""

    def encode(template, messages=({"role": "user", "content": "hi"},)):
        bundle = bundles("llama-gqa")
        (tmp_path / "chat_template.jinja").write_text(template)
        files = bundle.manifest.files | {"chat_template.jinja": FileRecord(0, "")}
        manifest = dataclasses.replace(bundle.manifest, files=files, bos_token="<s>", eos_token="</s>")
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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "refuses"),
        ("{{ 1/0 }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ ''.__class__.mro() }}", "refuses"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message, chat):
    with pytest.raises(RequestError, match=message):
        chat(template)


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
