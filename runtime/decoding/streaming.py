"""Token ids in, text out as soon as nothing that follows can change it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

from tokenizers import Tokenizer

from edgeskip.runtime.decoding.tokenizer import decoder_steps, tokenizers_errors
from edgeskip.runtime.errors import BundleError

_CONTEXT = 8  # tokens before those in question, which decide about leading spaces
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level tokens write as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class TextDecoder(Protocol):
    """Decodes token by token. All that it gives out is what the tokens add to the prompt when all are decoded at once.

    Special tokens are not text, and it is given none.
    """

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that is now certain."""

    def finish(self) -> str:
        """The rest, where the last tokens break off within a character."""


def text_decoder(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> TextDecoder:
    """The decoder that suits a tokenizer, for what follows these tokens."""
    return _ByteLevel(tokenizer, prompt_ids) if _is_byte_level(tokenizer) else _Runs(tokenizer, prompt_ids)


def token_spelling(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What gives the bytes of UTF-8 that a token stands for within a text, such as those of a part of a character."""
    if _is_byte_level(tokenizer):
        return lambda token_id: _raw(tokenizer, token_id)

    has_bytes = any(step["type"] == "ByteFallback" for step in decoder_steps(tokenizer))

    def spelled(token_id: int) -> bytes:
        token = tokenizer.id_to_token(token_id) or ""
        if has_bytes and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        # after itself, as the first token of a text may lose a space
        once, twice = (str(tokenizer.decode([token_id] * count, skip_special_tokens=False)) for count in (1, 2))
        return twice[len(once) :].encode()

    return spelled


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return [step["type"] for step in decoder_steps(tokenizer)] == ["ByteLevel"]


def _raw(tokenizer: Tokenizer, token_id: int) -> bytes:
    token = tokenizer.id_to_token(token_id) or ""
    if all(symbol in _BYTES for symbol in token):
        return bytes(_BYTES[symbol] for symbol in token)
    return token.encode()  # an added token, written as it is


class _ByteLevel:
    """Tokens are bytes of UTF-8: a character is certain with its last byte."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = ""  # of the prompt's last character, where that is not whole
        for token_id in prompt_ids[-4:]:  # no character has more bytes
            self.push(token_id)
        self._shown = self._decoder.getstate()[0].decode("utf-8", "replace")

    def push(self, token_id: int) -> str:
        return self._new(self._decoder.decode(_raw(self._tokenizer, token_id)))

    def finish(self) -> str:
        return self._new(self._decoder.decode(b"", final=True))

    def _new(self, text: str) -> str:
        known = _common(text, self._shown)
        text, self._shown = text[known:], self._shown[known:]
        if text:  # it parts from what was shown
            self._shown = ""
        return text


class _Runs:
    """Some tokens are text, and some are bytes, which are UTF-8 or nothing together with all bytes beside them.

    So a run of bytes is certain with the first token of text after it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._is_byte: dict[int, bool] = {}
        prompt_ids = [token_id for token_id in prompt_ids if tokenizer.id_to_token(token_id) is not None]
        end = len(prompt_ids) - sum(1 for _ in takewhile(self._part_of_a_run, reversed(prompt_ids)))
        self._context, self._run = list(prompt_ids[max(end - _CONTEXT, 0) : end]), list(prompt_ids[end:])
        self._shown = self._added() if self._run else ""  # of the prompt's last run, as it stands there

    def push(self, token_id: int) -> str:
        if self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._run.append(token_id)
        return "" if self._part_of_a_run(token_id) else self.finish()

    def finish(self) -> str:
        text = self._added()
        text, self._shown = text[_common(text, self._shown) :], ""
        self._context, self._run = [*self._context, *self._run][-_CONTEXT:], []
        return text

    def _added(self) -> str:
        """What the run adds to the text before it."""
        before, whole = self._decode(self._context), self._decode([*self._context, *self._run])
        return whole[_common(before, whole) :]

    def _part_of_a_run(self, token_id: int) -> bool:
        if token_id not in self._is_byte:
            token = self._tokenizer.id_to_token(token_id) or ""
            self._is_byte[token_id] = bool(_BYTE.fullmatch(token)) or "\ufffd" in self._decode([token_id])
        return self._is_byte[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        with tokenizers_errors(lambda why: BundleError("tokenizer.json", f"its decoder fails on {token_ids} ({why})")):
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
