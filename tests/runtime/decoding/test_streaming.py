"""A streamed text is what all tokens decode to at once, after the prompt."""

from __future__ import annotations

import random

import pytest
from tests.conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models

from edgeskip.runtime.decoding.streaming import text_decoder, token_spelling
from edgeskip.runtime.decoding.text import TextStream

EURO, SMILE = "€".encode(), "😀".encode()


def byte_fallback(decoder="llama"):
    """Letters as tokens, all else as bytes: token 3 + byte, after <unk>, <s> and </s>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "▁▁", "▁a", "é", "\ufffd", "日本", "<0x4>", *map(chr, range(33, 127))):
        vocabulary.setdefault(piece, len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = {"llama": decoders.Sequence(steps), "metaspace": decoders.Metaspace(), "none": None}[decoder]
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<|added|>", special=False)])
    return made


def byte_level():
    made = make_tokenizer()
    made.add_tokens([AddedToken("not a byte: é", special=False), AddedToken("Ġbytes", special=False)])
    return made


def streamed(tokenizer, prompt_ids, ids):
    stream = TextStream(tokenizer, prompt_ids, ())
    spans = [span for token_id in ids for span in stream.push(token_id, drafted=False)]
    return "".join(span.text for span in spans + stream.finish())


@pytest.mark.parametrize(
    ("make", "sequences"),
    [
        (byte_fallback, 10_000),
        (byte_level, 10_000),
        (lambda: byte_fallback("metaspace"), 2000),
        (lambda: byte_fallback("none"), 2000),
    ],
)
def test_random_sequences_after_random_prompts(make, sequences):
    """Half of the tokens are bytes that begin, continue or break characters; some ids have no token."""
    tokenizer, chosen = make(), random.Random(0)
    hard = [tokenizer.token_to_id(t) for byte in (*EURO, *SMILE, 0x41, 0xED, 0xC3) for t in (f"<0x{byte:02X}>",)]
    if None in hard:
        hard = [tokenizer.token_to_id(symbol) for symbol in "âĤ¬ðŁĺĢAíÃ"]
    size = tokenizer.get_vocab_size() + 2
    for _ in range(sequences):
        ids = [chosen.choice(hard) if chosen.random() < 0.5 else chosen.randrange(size) for _ in range(14)]
        cut = chosen.randrange(10)
        before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        assert streamed(tokenizer, ids[:cut], ids[cut:]) == whole[same:], (ids, cut)


def test_a_character_is_given_out_with_its_last_byte():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("a😀", add_special_tokens=False).ids
    decoder = text_decoder(tokenizer, [])
    assert [decoder.push(token_id) for token_id in ids] == ["a", "", "", "", "😀"]
    assert decoder.finish() == ""


def test_bytes_wait_for_the_bytes_that_could_spoil_them():
    tokenizer, euro = byte_fallback(), [3 + byte for byte in EURO]
    decoder = text_decoder(tokenizer, [])
    assert [decoder.push(i) for i in (*euro, *euro, tokenizer.token_to_id("b"))] == [*[""] * 6, "€€b"]
    assert [decoder.push(i) for i in (*euro, 3 + 0xFF, tokenizer.token_to_id("b"))] == [*[""] * 4, "\ufffd" * 4 + "b"]


@pytest.mark.parametrize(("ids", "text"), [([3 + byte for byte in SMILE[2:]], "😀"), ([300], None)])
def test_a_character_that_the_prompt_begins_is_given_out_whole(ids, text):
    tokenizer = byte_fallback()
    prompt = [1, *(3 + byte for byte in SMILE[:2])]
    assert streamed(tokenizer, prompt, ids) == (text or tokenizer.decode(ids))


def test_a_space_before_a_word_is_left_out_only_where_the_text_begins():
    tokenizer = byte_fallback()
    word = [tokenizer.token_to_id("▁a")]
    assert streamed(tokenizer, [1], word) == "a"
    assert streamed(tokenizer, [1, *word], word) == " a"
    assert streamed(tokenizer, [1, tokenizer.token_to_id("▁")], word) == " a"


def test_a_long_text_costs_the_same_per_token():
    """Tokens of text are decoded with a few before them, whatever came earlier."""
    tokenizer = byte_fallback()
    decoder, seen = text_decoder(tokenizer, [1] * 1000), []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def decode(self, ids, **settings):
            seen.append(len(ids))
            return self.inner.decode(ids, **settings)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    decoder._tokenizer = Counting(tokenizer)
    for _ in range(500):
        decoder.push(tokenizer.token_to_id("▁a"))
    assert max(seen) <= 9


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_a_token_is_spelled_by_its_own_bytes(make):
    """Also where it is a part of a character, or would lose a space at the beginning of a text."""
    tokenizer = make()
    spelling, pieces = token_spelling(tokenizer), [" a" if make is byte_fallback else " ", "é", "€", "😀", "b", "  "]
    for text in pieces:
        ids = tokenizer.encode(text.replace(" ", "▁") if make is byte_fallback else text, add_special_tokens=False).ids
        assert b"".join(map(spelling, ids)) == text.encode()
    assert spelling(tokenizer.token_to_id("</s>")) == b"</s>"
    if make is byte_fallback:
        assert [spelling(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
        assert spelling(tokenizer.token_to_id("▁a")) == b" a"
        assert spelling(tokenizer.token_to_id("<0x4>")) == b"<0x4>"
