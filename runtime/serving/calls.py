"""Calls of tools: how families of models write them, how they are read out of an answer, and how they are demanded."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeskip.runtime.decoding.text import overlap
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.grammar import MOST_CHARACTERS, Grammar
from edgeskip.runtime.reading import check_plain


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls: as JSON, among signs of which some are special tokens, and so no text.

    Args:
        sign: what chat templates of the family have in their text.
        opens: comes before calls.
        closes: comes after calls; empty where they go on to the end of the answer.
        bare: where an answer begins so, it may be calls without what opens them; empty where it may not.
        arguments: the key of a call's arguments; its name is under `name`.
        written: what goes before the first call, between two, and after the last one; empty between them where the
            model was not trained to make several at once.
    """

    sign: str
    opens: str
    closes: str
    bare: str
    arguments: str
    written: tuple[str, str, str]


_TAG, _END = "<tool_call>", "</tool_call>"
HERMES = CallFormat(  # and Qwen
    sign=_TAG,
    opens=_TAG,
    closes=_END,
    bare="",
    arguments="arguments",
    written=(f"{_TAG}\n", f"\n{_END}\n{_TAG}\n", f"\n{_END}"),
)
MISTRAL = CallFormat(
    sign="[TOOL_CALLS]",
    opens="[TOOL_CALLS]",
    closes="",
    bare="[",
    arguments="arguments",
    written=("[", ", ", "]"),
)
LLAMA = CallFormat(  # from 3.1 on
    sign='"parameters": ',
    opens="<|python_tag|>",
    closes="",
    bare="{",
    arguments="parameters",
    written=("", "", ""),
)
FORMATS = (HERMES, MISTRAL, LLAMA)


def call_format(template: str) -> CallFormat | None:
    """How a model with this chat template writes calls; None if the template shows none of these ways."""
    return next((form for form in FORMATS if form.sign in template), None)


@dataclass(frozen=True)
class Call:
    """A call of a function, with its arguments as JSON, and an id: 9 letters and digits, which all templates take."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])


class CallReader:
    """Text in, text and calls out, as soon as they are certain. What is no call of a known function stays text.

    White space before calls and at the end of an answer with calls is dropped. `has_called` says whether there was a
    call.

    Args:
        form: how the model writes calls.
        names: the functions.
        several: whether more calls than one are wanted; otherwise the answer ends with the first.
    """

    def __init__(self, form: CallFormat, names: Sequence[str], *, several: bool = True) -> None:
        self._form, self._names, self._several = form, names, several
        self._held = ""  # may be part of a call, or white space before one
        self._has_text = self.has_called = False

    def push(self, text: str) -> list[str | Call]:
        """Takes more of an answer; returns what is now certain."""
        self._held += text
        return list(self._certain(ended=False))

    def finish(self) -> list[str | Call]:
        """The rest, where the answer has ended."""
        return list(self._certain(ended=True))

    def _certain(self, *, ended: bool) -> Iterator[str | Call]:
        form = self._form
        while self._several or not self.has_called:
            begin, body = self._opening()
            if begin < 0:
                certain = self._held
                if not ended:  # a call may follow
                    certain = certain[: len(certain) - overlap(certain, form.opens)].rstrip()
                yield from self._text(len(certain))
                return
            end = self._held.find(form.closes, body) if form.closes else -1
            if end < 0 and not ended:
                return
            end = len(self._held) if end < 0 else end
            calls = read_calls(self._held[body:end], self._names)
            if calls:
                after = self._held[end + len(form.closes) :]
                yield from self._text(len(self._held[:begin].rstrip()))
                yield from calls if self._several else calls[:1]
                self._held, self.has_called = after, True
            else:
                yield from self._text(max(body, begin + 1))

    def _opening(self) -> tuple[int, int]:
        """Where calls begin in what is held, and where their JSON does; -1 where none do."""
        opens, bare, start = self._form.opens, self._form.bare, self._held.lstrip()
        is_opened = opens.startswith(start[: len(opens)])
        if bare and start.startswith(bare) and not (is_opened or self._has_text or self.has_called):
            return (len(self._held) - len(start),) * 2
        begin = self._held.find(opens)
        return begin, begin + len(opens)

    def _text(self, length: int) -> Iterator[str]:
        """Gives out the first characters of what is held."""
        text, self._held = self._held[:length], self._held[length:]
        if self.has_called and not (self._has_text and text.strip()):
            text = text.lstrip()
        if text:
            self._has_text = True
            yield text


def read_calls(text: str, names: Sequence[str]) -> list[Call]:
    """The calls that a text consists of: JSON objects, or lists of them, one after another. There are none if it is
    anything else, or calls any function but these.
    """
    decoder, at = json.JSONDecoder(parse_constant=_refuse), 0
    calls: list[Call] = []
    try:
        while rest := text[at:].lstrip("; \n\r\t"):
            value, length = decoder.raw_decode(rest)
            at = len(text) - len(rest) + length
            check_plain(value)
            calls += map(_call, value if isinstance(value, list) else [value])
    except (ValueError, RecursionError):
        return []
    return calls if all(call.name in names for call in calls) else []


def _call(value: Any) -> Call:
    match value:
        case {"name": str() as name, "arguments": arguments} | {"name": str() as name, "parameters": arguments}:
            if isinstance(arguments, str):  # JSON within JSON
                arguments = json.loads(arguments, parse_constant=_refuse)
            if isinstance(arguments, dict):
                return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    raise ValueError("no call")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def demanded_calls(form: CallFormat, functions: Mapping[str, Mapping[str, Any]], *, several: bool) -> Grammar:
    """An answer that is a call of one of these functions, or `several` calls, with arguments that fit.

    Args:
        form: how the model writes calls.
        functions: JSON schemas of their arguments, by name.
        several: whether there may be more calls than one, where the model makes such.

    Raises:
        RequestError: schemas that are too long together.
    """
    before, between, after = map(json.dumps, form.written)
    more = f"({between} call)*" if several and form.written[1] else ""
    rules = [f"start: {before} call {more} {after}", "call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for number, (name, schema) in enumerate(functions.items()):
        head = json.dumps(f'{{"name": "{name}", "{form.arguments}": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, **_COMPACT})}")
    if (size := len("\n".join(rules))) > MOST_CHARACTERS:
        found = f"{size} characters, with the schemas of all that may be called"
        raise RequestError("tools", found, wanted=f"at most {MOST_CHARACTERS}", fix="give fewer or simpler ones")
    return Grammar.from_lark("\n".join(rules))
