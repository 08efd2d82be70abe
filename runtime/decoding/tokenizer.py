"""The tokenizers library: reading a tokenizer and encoding text, all bounded, and what it raises as one line."""

from __future__ import annotations

import base64
import json
import math
import os
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from tokenizers import Tokenizer

from edgeskip.runtime.errors import EdgeskipError, RequestError
from edgeskip.runtime.reading import read_text

T = TypeVar("T")

MOST_BYTES = 1 << 26
"""Of a tokenizer.json; those of the largest vocabularies have half of it."""

_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
_MOST_GROWTH, _MOST_AROUND = 64, 64  # of a text by what is done to it, in characters; of tokens that are put around it
_SHORT = 1 << 16  # characters that are encoded at no cost worth a look
_CHANGED = 256  # tokens that the end of a text may change, and more
_SECONDS, _CHARACTERS_PER_SECOND = 10, 10_000  # a fiftieth of what a workstation encodes
_STDERR = threading.RLock()


def read_tokenizer(path: Path, error: type[EdgeskipError], *, fix: str = "") -> Tokenizer:
    """Reads a tokenizer.json. It neither cuts nor fills up a text, whatever the file says.

    Raises:
        error: no such file, or not a tokenizer.
    """
    return tokenizer_from_json(read_text(path, error, fix=fix, most=MOST_BYTES), path, error, fix=fix)


def tokenizer_from_json(text: str, place: object, error: type[EdgeskipError], *, fix: str = "") -> Tokenizer:
    """As `read_tokenizer`, from the file's text; `place` is where it is from.

    Raises:
        error: not a tokenizer, or not one that encodes and decodes in little memory and time, tokens one after another.
    """
    with tokenizers_errors(lambda reason: error(place, f"not a tokenizer ({reason})", fix=fix)):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        steps = decoder_steps(tokenizer)
        before = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer), *_steps(tokenizer.post_processor)]
        around = tokenizer.num_special_tokens_to_add(is_pair=False)
    for name, growing in (("normalizer, pre-tokenizer and post-processor", before), ("decoder", steps)):
        if (growth := math.prod(map(_growth, growing), start=1.0)) > _MOST_GROWTH:
            found = f"its {name} may make a text {growth:.3g} times as long"
            raise error(place, found, wanted=f"at most {_MOST_GROWTH} times", fix=fix)
    if around > _MOST_AROUND:
        raise error(place, f"it puts {around} tokens around a text", wanted=f"at most {_MOST_AROUND}", fix=fix)
    for step in steps:
        if step["type"] not in _DECODERS:
            raise error(place, f"its decoder is {step['type']}", wanted=", ".join(_DECODERS), fix=fix)
        if "Regex" in step.get("pattern", {}):
            raise error(place, "its decoder replaces a regular expression", wanted="a text to replace", fix=fix)
    return tokenizer


def decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What the decoder does to tokens, one step after another, each as in tokenizer.json."""
    return _steps(tokenizer.decoder)


def _steps(part: Any) -> list[dict[str, Any]]:
    """What a part of a tokenizer does, one step after another."""
    steps = [] if part is None else [json.loads(part.__getstate__())]
    names = ("normalizers", "pretokenizers", "processors", "decoders")
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in next((step[name] for name in names if name in step), [step])]
    return steps


def _growth(step: dict[str, Any]) -> float:
    """How many times as long a step may make a text; Unicode's own forms, which end after one time, are not counted."""
    if step["type"] == "Replace":
        content, pattern = len(step["content"]), len(step["pattern"].get("String", ""))
        return max(1.0, content / pattern) if pattern else 1.0 + content
    if step["type"] == "Prepend":
        return 1.0 + len(step["prepend"])
    if step["type"] == "ByteLevel":
        return 4.0
    if step["type"] == "Precompiled":  # a trie, after its size, and what it leads to
        table = base64.b64decode(step["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return float(max(1, *map(len, texts.split(b"\0"))))
    if step["type"] == "TemplateProcessing":
        return float(max(1, sum("Sequence" in piece for piece in step["single"])))
    return 1.0


def encode(
    tokenizer: Tokenizer, text: str, capacity: int, *, add_special_tokens: bool, most: int | None = None
) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: encodes.
        text: is refused unread where it is longer than `capacity` tokens can be.
        capacity: tokens that there is room for; a few more may come back.
        add_special_tokens: whether the tokenizer's own go around it, such as BOS.
        most: the first so many tokens will do, and the text may be of any length.

    Raises:
        RequestError: text that is not Unicode or too long, or that the tokenizer fails on.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("prompt", f"not valid Unicode ({error.reason})", wanted="a text in UTF-8") from None
    if most is not None:
        return _beginning(tokenizer, text, most, add_special_tokens)
    if len(text) > _SHORT:
        _check_length(tokenizer, text, capacity)
    return _encode(tokenizer, text, add_special_tokens)


@contextmanager
def tokenizers_errors(told: Callable[[str], EdgeskipError]) -> Iterator[None]:
    """Turns whatever the library raises into one of our errors, a panic of Rust's too, which also prints a trace."""
    with _held_stderr() as drop:
        try:
            yield
        except EdgeskipError:
            raise
        except BaseException as caught:  # a panic is no Exception, and its class has no public name
            panic = type(caught).__name__ == "PanicException"
            if not panic and not isinstance(caught, Exception):
                raise
            if panic:
                drop()
            raise told(str(caught) or type(caught).__name__) from None


def _beginning(tokenizer: Tokenizer, text: str, most: int, add_special_tokens: bool) -> list[int]:
    """The first `most` token ids, from no more of the text than they need: its end may change the last few."""
    size = max(8 * most, _SHORT)
    while True:
        ids = _encode(tokenizer, text[:size], add_special_tokens)
        if len(ids) > most + _CHANGED or size >= len(text):
            return ids[:most]
        size *= 4


def _check_length(tokenizer: Tokenizer, text: str, capacity: int) -> None:
    """Refuses at little cost what cannot be `capacity` tokens; encoding takes 200 times the memory of the text."""

    def too_long(found: str, wanted: str) -> RequestError:
        return RequestError("prompt", found, wanted=wanted, fix="shorten it or export with a larger --max-length")

    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
    room = max(capacity * longest, _SHORT)
    normalizer = b"" if tokenizer.normalizer is None else tokenizer.normalizer.__getstate__()
    form: Literal["NFKC", "NFC"] | None = "NFKC" if b'"NFK' in normalizer else "NFC" if b'"NF' in normalizer else None
    if len(unicodedata.normalize(form, text) if form else text) > room:
        raise too_long(f"{len(text)} characters", f"at most {room}, which {capacity} tokens can hold")
    tokens = 0
    for start in range(0, len(text), _SHORT):
        tokens += len(_encode(tokenizer, text[start : start + _SHORT], add_special_tokens=False))
        if tokens > 2 * capacity:  # cutting a text makes a few tokens more, never twice as many
            raise too_long(f"more than {capacity} tokens", f"at most {capacity}, the bundle's capacity")


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Encodes in a thread of its own, so that a pattern which takes for ever does not."""
    seconds = _SECONDS + len(text) / _CHARACTERS_PER_SECOND

    def fails(reason: str) -> RequestError:
        return RequestError("prompt", f"the tokenizer fails on it ({reason})", fix="shorten it or change it")

    def work() -> list[int]:
        # unlike `encode`, it lets other threads run
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(encoding.ids)

    with tokenizers_errors(fails):
        return _in_time(work, seconds, fails(f"no end after {seconds:.0f} s"))


def _in_time(work: Callable[[], T], seconds: float, late: EdgeskipError) -> T:
    """What `work` returns or raises, or the error where it takes longer; it then goes on and keeps nobody waiting."""
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as caught:
            done.put((None, caught))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, raised = done.get(timeout=seconds)
    except Empty:
        raise late from None
    if raised is not None:
        raise raised
    return result  # type: ignore[return-value]  # None where `work` returns it


@contextmanager
def _held_stderr() -> Iterator[Callable[[], None]]:
    """Holds back what is written to stderr meanwhile, and writes it at the end unless it was dropped."""
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr
            yield lambda: None
            return
        held = os.memfd_create("stderr") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        os.dup2(held, 2)
        dropped: list[bool] = []
        try:
            yield lambda: dropped.append(True)
        finally:
            os.dup2(kept, 2)
            os.lseek(held, 0, os.SEEK_SET)
            with suppress(OSError):  # nobody reads it
                while not dropped and (written := os.read(held, 1 << 16)):
                    os.write(2, written)
            os.close(held)
            os.close(kept)
