"""Encoding is bounded in length, time and memory, and the library's failures are one line."""

from __future__ import annotations

import base64
import json
import os

import pytest
from tests.conftest import make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgeskip.runtime.decoding import tokenizer as tokenizer_module
from edgeskip.runtime.decoding.streaming import text_decoder
from edgeskip.runtime.decoding.tokenizer import encode, read_tokenizer, tokenizer_from_json
from edgeskip.runtime.errors import BundleError, RequestError


def splitting(pattern):
    """The tests' tokenizer, after its text has been split by a pattern."""
    made = make_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    return made


def long_words():
    """A tokenizer whose longest token has 64 characters."""
    words = {"a" * length: index for index, length in enumerate((1, 2, 4, 8, 16, 32, 64))}
    return Tokenizer(models.BPE(words | {"é": 7}, [("a" * length, "a" * length) for length in (1, 2, 4, 8, 16, 32)]))


def test_what_is_stored_about_truncation_and_padding_is_left_alone(tmp_path):
    stored = make_tokenizer()
    stored.enable_truncation(3)
    stored.enable_padding(length=50)
    stored.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path / "tokenizer.json", BundleError)
    assert read.encode("a longer text").ids == make_tokenizer().encode("a longer text").ids


@pytest.mark.parametrize("content", ["", "{}", "[]", "\0", '{"version": "1.0"}'])
def test_a_file_that_is_not_a_tokenizer_is_one_line(content, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer.json: not a tokenizer \(.+\); do this") as caught:
        read_tokenizer(tmp_path / "tokenizer.json", BundleError, fix="do this")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_that_blows_up_is_one_line_and_the_next_text_is_encoded(capfd):
    hostile = splitting("(a+)+$")
    with pytest.raises(
        RequestError, match=r"the tokenizer fails on it \(.*retry-limit-in-match over\); shorten"
    ) as caught:
        encode(hostile, "a" * 40 + "b", 2048, add_special_tokens=True)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library prints a trace
    assert encode(hostile, "b", 2048, add_special_tokens=True) == make_tokenizer().encode("b").ids


def test_what_others_write_to_stderr_meanwhile_is_kept(capfd):
    with tokenizer_module.tokenizers_errors(lambda reason: RequestError("x", reason)):
        os.write(2, b"kept\n")
    assert capfd.readouterr().err == "kept\n"


def test_a_pattern_that_takes_for_ever_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_SECONDS", 0.1)
    monkeypatch.setattr(tokenizer_module, "_CHARACTERS_PER_SECOND", 1e9)
    with pytest.raises(RequestError, match=r"the tokenizer fails on it \(no end after 0 s"):
        encode(splitting(r"(?:.*)\d"), "ab" * 15_000, 10**6, add_special_tokens=True)


def test_the_longest_text_that_can_fit_is_taken_and_a_longer_one_is_not_looked_at(monkeypatch):
    tokenizer = long_words()
    longest = "a" * 64 * 2000
    assert encode(tokenizer, longest, 2000, add_special_tokens=True) == [6] * 2000
    monkeypatch.setattr(tokenizer_module, "_encode", None)
    with pytest.raises(RequestError, match="128001 characters; wanted at most 128000, which 2000 tokens can hold"):
        encode(tokenizer, longest + "a", 2000, add_special_tokens=True)


def test_a_text_that_is_composed_first_counts_as_it_is_then():
    tokenizer = long_words()
    tokenizer.normalizer = normalizers.NFC()
    text = "e\u0301" * 70_000
    assert encode(tokenizer, text, 70_000, add_special_tokens=True) == [7] * 70_000
    with pytest.raises(RequestError, match="140000 characters; wanted at most 69952"):
        encode(tokenizer, text, 1093, add_special_tokens=True)


def test_a_text_that_is_far_too_long_is_never_encoded_whole(monkeypatch):
    """Encoding takes 200 bytes of memory for each character: so it is done in parts until there are too many tokens."""
    parts, really = [], tokenizer_module._encode

    def watched(tokenizer, text, add_special_tokens):
        parts.append(len(text))
        return really(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(tokenizer_module, "_encode", watched)
    for size, capacity, wanted in (
        (20_000_000, 131_072, "20000000 characters; wanted at most 524288"),
        (1_000_000, 250_000, "more than 250000 tokens; wanted at most 250000, the bundle's capacity"),
    ):
        parts.clear()
        with pytest.raises(RequestError, match=wanted):
            encode(make_tokenizer(), "x = 1 # " * (size // 8), capacity, add_special_tokens=True)
        assert max(parts, default=0) <= 1 << 16
        assert sum(parts) <= 2 * capacity + (1 << 16)
        assert bool(parts) == (size < 20_000_000)


@pytest.mark.parametrize("most", [1, 7, 5000])
def test_the_first_tokens_of_a_text_of_any_length(most):
    text = "some words and more. " * 6_000
    whole = make_tokenizer().encode(text).ids
    assert encode(make_tokenizer(), text, 10, add_special_tokens=True, most=most) == whole[:most]
    assert (
        encode(make_tokenizer(), "ab", 10, add_special_tokens=True, most=most)
        == make_tokenizer().encode("ab").ids[:most]
    )


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT, TOKEN = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
BOTH = [TEXT, {"Sequence": {"id": "B", "type_id": 0}}]
LONG = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"x" * 65 + b"\0").decode()}


def template(single, ids=(0,)):
    tokens = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": BOTH, "special_tokens": tokens}


BEFORE = "its normalizer, pre-tokenizer and post-processor may make a text"
GROWING = {
    "a text that doubles": ({"normalizer": [DOUBLE] * 40}, f"{BEFORE} 4.4e\\+12 times as long; wanted at most 64"),
    "beyond any number": ({"normalizer": [DOUBLE] * 2000}, f"{BEFORE} inf times"),
    "a pattern": ({"normalizer": [DOUBLE | {"pattern": {"Regex": "|a"}, "content": "a" * 64}]}, f"{BEFORE} 260 times"),
    "a beginning": ({"normalizer": [{"type": "Prepend", "prepend": "a" * 64}]}, f"{BEFORE} 260 times"),
    "a table": ({"normalizer": [LONG]}, f"{BEFORE} 260 times"),
    "bytes of bytes": ({"pre_tokenizer": [BYTES] * 4}, f"{BEFORE} 256 times"),
    "one text many times": ({"post_processor": [template([TEXT] * 33)]}, f"{BEFORE} 132 times"),
    "tokens": ({"post_processor": [template([TOKEN] * 13, [0] * 5)]}, "it puts 65 tokens around a text; wanted at"),
    "a decoder": ({"decoder": [DOUBLE] * 40}, "its decoder may make a text 1.1e\\+12 times as long; wanted at most 64"),
}
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"} | {"post_processor": "processors"}


def with_parts(parts):
    """The tests' tokenizer.json with other parts, each several steps."""
    data = json.loads(make_tokenizer().to_str())
    for name, steps in parts.items():
        data[name] = {"type": "Sequence", SEQUENCES.get(name, "decoders"): steps}
    return json.dumps(data)


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_makes_texts_grow_without_bounds_is_refused_before_it_does(name):
    parts, message = GROWING[name]
    with pytest.raises(BundleError, match=message):
        tokenizer_from_json(with_parts(parts), "tokenizer.json", BundleError)


def test_a_tokenizer_may_make_texts_somewhat_longer():
    parts = {"normalizer": [{"type": "NFKC"}, DOUBLE, DOUBLE], "pre_tokenizer": [BYTES]}
    read = tokenizer_from_json(with_parts(parts), "tokenizer.json", BundleError)
    assert encode(read, "ba", 100, add_special_tokens=False) == make_tokenizer().encode("baaaa").ids[1:]


def test_a_panic_while_decoding_is_one_line(capfd):
    made = make_tokenizer()
    made.decoder = decoders.Strip("a", 1, 1)  # of one character, both
    with pytest.raises(BundleError, match=r"tokenizer.json: its decoder fails on \[\d+\] \(") as caught:
        text_decoder(made, []).push(made.token_to_id("a"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
