"""Between text and tokens: prompts in, streamed text and stop strings out."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.chat import render_chat
from edgeskip.runtime.decoding.streaming import text_decoder
from edgeskip.runtime.decoding.tokenizer import encode, read_tokenizer
from edgeskip.runtime.errors import BundleError, RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or chat messages with `role` and `content`."""


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Reads the bundle's tokenizer.json.

    Raises:
        BundleError: the file is not a tokenizer.
    """
    tokenizer = read_tokenizer(
        bundle.path("tokenizer.json"), BundleError, fix="export from a checkpoint with a sound one"
    )
    tokenizer.encode_special_tokens = bundle.manifest.split_special_tokens
    return tokenizer


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, bundle: Bundle, most: int | None = None, tools: Sequence[Any] = ()
) -> list[int]:
    """Token ids of a prompt, or the first `most`. Special tokens are added to a text; a chat template brings its own,
    and is given `tools`.

    Raises:
        RequestError: nothing to start from, far more than the bundle holds, ids outside the vocabulary, or a chat that
            is malformed or without a template.
    """
    manifest = bundle.manifest
    if tools and not (isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping)):
        raise RequestError("tools", "beside a prompt that is no chat", fix="give messages, or leave them out")
    if isinstance(prompt, str):
        ids = encode(tokenizer, prompt, manifest.max_length, add_special_tokens=True, most=most) if prompt else []
    elif (
        isinstance(prompt, (bytes, Mapping))
        or not (hasattr(prompt, "__getitem__") and hasattr(prompt, "__len__"))
        or getattr(prompt, "shape", None) == ()  # one number, as NumPy has it
    ):
        raise RequestError(
            "prompt", f"of type {type(prompt).__name__}", wanted="a text, token ids or a list of messages"
        )
    elif len(prompt) and isinstance(prompt[0], Mapping):
        text = render_chat(prompt, bundle, tools)
        ids = encode(tokenizer, text, manifest.max_length, add_special_tokens=False, most=most)
    else:
        return _token_ids(prompt, manifest.architecture.vocab_size)
    if not ids:
        raise RequestError("prompt", "empty", wanted="at least one token")
    if max(ids) >= manifest.architecture.vocab_size:
        found = f"token {max(ids)}, {tokenizer.id_to_token(max(ids))!r}, which the tokenizer has and the model has not"
        raise RequestError(
            "prompt", found, wanted=f"tokens below {manifest.architecture.vocab_size}", fix="leave it out"
        )
    return ids


def _token_ids(prompt: Sequence[Any], vocab_size: int) -> list[int]:
    ids = list(prompt)
    if not ids:
        raise RequestError("prompt", "empty", wanted="at least one token")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:  # at once, as a text waits for it
        return ids
    return [_token_id(value, vocab_size) for value in ids]


def _token_id(value: Any, vocab_size: int) -> int:
    try:
        token_id = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        token_id = -1
    if not 0 <= token_id < vocab_size:
        raise RequestError("prompt", f"token id {value!r:.60}", wanted=f"0 to {vocab_size - 1}")
    return token_id


@dataclass(frozen=True)
class Span:
    """A stretch of text, whether its token was an accepted draft, and how many tokens were read for it, with those
    before it that show no text.
    """

    text: str
    drafted: bool
    tokens: int = 0


@dataclass(frozen=True)
class _Held(Span):
    """A span that a stop string may begin in; `shown` is false of a special token, which only a stop string sees."""

    shown: bool = True


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and no beginning of a stop string.

    Args:
        tokenizer: the tokenizer that decodes.
        prompt_ids: what came before, on which leading spaces depend.
        stop: texts that end the generation; they are cut off. One may name special tokens, which are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._decoder = text_decoder(tokenizer, [i for i in prompt_ids if i not in self._special])
        self._stop = tuple(stop)
        self._held: list[_Held] = []
        self._tokens = 0  # without a span of theirs so far
        self.stopped = False

    def push(self, token_id: int, *, drafted: bool) -> list[Span]:
        """Takes one token; returns the text that is now certain. Sets `stopped` at a stop string."""
        self._tokens += 1
        if token_id in self._special:
            self._hold(self._special[token_id], drafted, shown=False)
        elif text := self._decoder.push(token_id):
            self._hold(text, drafted)
        return self._release()

    def finish(self) -> list[Span]:
        """The rest: text that was held back, and tokens that stopped in the middle of a character."""
        if self.stopped:
            return []
        if text := self._decoder.finish():
            self._hold(text, drafted=False)
        released = self._release()
        return released if self.stopped else [*released, *self._cut(sum(len(span.text) for span in self._held))]

    def _hold(self, text: str, drafted: bool, *, shown: bool = True) -> None:
        self._held.append(_Held(text, drafted, self._tokens, shown))
        self._tokens = 0

    def _release(self) -> list[Span]:
        """Gives out what is before a stop string, or what no stop string can begin in."""
        everything = "".join(span.text for span in self._held)
        seen = "".join(span.text for span in self._held if span.shown)
        found = [everything.find(stop) for stop in self._stop]
        found += [self._place(at) if at >= 0 else -1 for at in map(seen.find, self._stop)]
        if found := [at for at in found if at >= 0]:
            self.stopped = True
            return self._cut(min(found))
        safe = [len(everything) - overlap(everything, stop) for stop in self._stop]
        safe += [self._place(len(seen) - overlap(seen, stop)) for stop in self._stop]
        return self._cut(min(safe, default=len(everything)))

    def _place(self, seen: int) -> int:
        """Where in all that is held a character of the shown text stands."""
        place = 0
        for span in self._held:
            if span.shown:
                if seen < len(span.text):
                    return place + seen
                seen -= len(span.text)
            place += len(span.text)
        return place

    def _cut(self, length: int) -> list[Span]:
        """Takes the first `length` characters off what is held."""
        released, tokens = [], 0
        while length > 0:
            span = self._held.pop(0)
            tokens += span.tokens
            if span.shown:
                released.append(Span(span.text[:length], span.drafted, tokens))
                tokens = 0
            if len(span.text) > length:
                self._held.insert(0, _Held(span.text[length:], span.drafted, 0, span.shown))
            length -= len(span.text)
        if self._held:
            self._held[0] = replace(self._held[0], tokens=self._held[0].tokens + tokens)
        else:
            self._tokens += tokens
        return released


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
