"""Between text and tokens: prompts, chats, streamed decoding and stop strings."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.errors import BundleError, RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages with `role` and `content`."""


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Reads the bundle's tokenizer.json.

    Raises:
        BundleError: the file is not a tokenizer.
    """
    path = bundle.path("tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise BundleError(path, f"not a tokenizer ({error})", fix="export from a checkpoint with a sound one") from None


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, bundle: Bundle) -> list[int]:
    """Token ids of a prompt; special tokens are added to a text, a chat template brings its own.

    Raises:
        RequestError: nothing to start from, ids outside the vocabulary, or a chat without a template.
    """
    if isinstance(prompt, str):
        ids = _encode(tokenizer, prompt, add_special_tokens=True) if prompt else []
    elif isinstance(prompt, (bytes, Mapping)):
        raise RequestError("prompt", f"a {type(prompt).__name__}", wanted="a text, token ids or a list of messages")
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = _encode(tokenizer, _render_chat(prompt, bundle), add_special_tokens=False)
    else:
        ids = [_token_id(i, bundle.manifest.architecture.vocab_size) for i in prompt]
    if not ids:
        raise RequestError("prompt", "empty", wanted="at least one token")
    return ids


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("prompt", f"not valid Unicode ({error.reason})", wanted="a text in UTF-8") from None
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _token_id(value: Any, vocab_size: int) -> int:
    try:
        token_id = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        token_id = -1
    if not 0 <= token_id < vocab_size:
        raise RequestError("prompt", f"token id {value!r}", wanted=f"0 to {vocab_size - 1}")
    return token_id


def _render_chat(messages: Any, bundle: Bundle) -> str:
    """The messages as the model was trained to see them, by the variables that transformers gives a template."""
    path, manifest = bundle.path("chat_template.jinja"), bundle.manifest
    if path.name not in manifest.files:
        raise RequestError(path, "no chat template, so this model takes no chat", fix="give a plain text")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=True,
            bos_token=manifest.bos_token,
            eos_token=manifest.eos_token,
        )
    except Exception as error:  # a template can fail in any way
        raise RequestError(path, f"the chat template refuses ({error})", fix="give a plain text") from None


@dataclass(frozen=True)
class Span:
    """A stretch of text and whether its token was an accepted draft."""

    text: str
    drafted: bool


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and no beginning of a stop string.

    Args:
        tokenizer: decodes.
        prompt_ids: what came before, which decides about leading spaces.
        stop: texts that end the generation; they are cut off.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # A prompt that ends within a character would be decoded again with what follows.
        whole = not tokenizer.decode(list(prompt_ids[-8:]), skip_special_tokens=True).endswith("\ufffd")
        self._decoder = DecodeStream(ids=list(prompt_ids) if whole else [], skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._held: list[Span] = []
        self.stopped = False

    def push(self, token_id: int, *, drafted: bool) -> list[Span]:
        """Takes one token; returns the text that is now certain. Sets `stopped` at a stop string."""
        text = self._decoder.step(self._tokenizer, token_id)
        if not text:
            self._undecoded.append(token_id)
            return []
        self._undecoded.clear()
        if not self._stop:
            return [Span(text, drafted)]
        self._held.append(Span(text, drafted))
        return self._release()

    def finish(self) -> list[Span]:
        """The rest: held text, and tokens that stopped in the middle of a character."""
        if self.stopped:
            return []
        tail = self._tokenizer.decode(self._undecoded, skip_special_tokens=True) if self._undecoded else ""
        spans, self._held = [*self._held, *([Span(tail, False)] if tail else [])], []
        return spans

    def _release(self) -> list[Span]:
        held = "".join(span.text for span in self._held)
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        return self._cut(len(held) - max((_overlap(held, stop) for stop in self._stop), default=0))

    def _cut(self, length: int) -> list[Span]:
        """Takes the first `length` characters off the held text."""
        released = []
        while length > 0:
            span = self._held.pop(0)
            released.append(Span(span.text[:length], span.drafted))
            if len(span.text) > length:
                self._held.insert(0, Span(span.text[length:], span.drafted))
            length -= len(span.text)
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
