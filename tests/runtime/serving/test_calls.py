"""Calls of tools are read out of answers as families of models write them; all else stays the text that it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeskip.runtime.serving.calls import (
    FORMATS,
    HERMES,
    LLAMA,
    MISTRAL,
    Call,
    CallReader,
    call_format,
    demanded_calls,
)

NAMES = ["weather", "time"]
PARIS, NOW = ("weather", {"city": "Paris"}), ("time", {})
P, T = '"city": "Paris"', '{"name": "time", "arguments": {}}'
W = f'{{"name": "weather", "arguments": {{{P}}}}}'
L = f'{{"name": "weather", "parameters": {{{P}}}}}'
UNKNOWN = '{"name": "fly", "arguments": {}}'

ANSWERS = [
    (HERMES, "Just text: 1 < 2, a <tool, {}.\n ", ["Just text: 1 < 2, a <tool, {}.\n "]),
    (HERMES, f"<tool_call>\n{W}\n</tool_call>", [PARIS]),
    (HERMES, f"I look.\n\n<tool_call>{W}</tool_call>\n<tool_call>\n{T}</tool_call>\n", ["I look.", PARIS, NOW]),
    (HERMES, f"<tool_call>{T}</tool_call>\nSo be it.\n", [NOW, "So be it."]),
    (HERMES, f"<tool_call>\n{W}", [PARIS]),  # EOS came in place of the end
    (HERMES, f"<tool_call>{W[:-3]}", [f"<tool_call>{W[:-3]}"]),
    (HERMES, f"<tool_call>{UNKNOWN}</tool_call> ", [f"<tool_call>{UNKNOWN}</tool_call> "]),
    (HERMES, f"<tool_call>no <tool_call>{T}</tool_call> end", ["<tool_call>no", NOW, " end"]),
    (HERMES, '<tool_call>{"name": "time", "arguments": [1]}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": NaN}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": 1e999}}</tool_call>', None),
    (HERMES, f'<tool_call>{{"name": "time", "arguments": {{"a": {"[" * 4000}}}</tool_call>', None),
    (HERMES, '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>', [NOW]),
    (HERMES, f"{W}", None),
    (MISTRAL, f"[TOOL_CALLS] [{W}, {T}]", [PARIS, NOW]),
    (MISTRAL, f" [{W}]", [PARIS]),  # the sign was a special token
    (MISTRAL, f"I look. [TOOL_CALLS][{T}]", ["I look.", NOW]),
    (MISTRAL, "[1, 2] is a list", None),
    (MISTRAL, f"See [{W}]", None),
    (LLAMA, f"<|python_tag|>{L}", [PARIS]),
    (LLAMA, L, [PARIS]),
    (LLAMA, f"{L}; {L}", [PARIS, PARIS]),
    (LLAMA, '{"type": "function", "name": "time", "parameters": {}}', [NOW]),
    (LLAMA, f"{L} is how I would call it", None),
    (LLAMA, '{"name": "Paris", "parameters": {}}', None),
    (LLAMA, '<|python_tag|>print("a")', None),
    (LLAMA, "", []),
]


@pytest.mark.parametrize(("form", "answer", "wanted"), ANSWERS)
def test_calls_are_read_in_whatever_pieces_they_come(form, answer, wanted):
    wanted, random = [answer] if wanted is None else wanted, np.random.default_rng(0)
    for mean in (1, 3, 1000):
        reader, parts, rest = CallReader(form, NAMES), [], answer
        while rest:
            size = 1 + random.poisson(mean - 1)
            parts += reader.push(rest[:size])
            rest = rest[size:]
        parts += reader.finish()
        read = []
        for part in parts:
            if isinstance(part, Call):
                read.append((part.name, json.loads(part.arguments)))
            elif read and isinstance(read[-1], str):
                read[-1] += part
            else:
                read.append(part)
        assert read == wanted
        assert reader.has_called == any(isinstance(part, tuple) for part in wanted)
        ids = [part.id for part in parts if isinstance(part, Call)]
        assert len(set(ids)) == len(ids)
        assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_text_is_not_held_back_longer_than_a_call_may_begin_in_it():
    reader = CallReader(HERMES, NAMES)
    assert [reader.push(text) for text in ("Hi", " <", "b", " ", "<tool_", "x")] == [
        ["Hi"],
        [],
        [" <b"],
        [],
        [],
        [" <tool_x"],
    ]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (HERMES, f"<tool_call>{W}</tool_call>\n<tool_call>{T}</tool_call> Now wait."),
        (MISTRAL, f"[TOOL_CALLS] [{W}, {T}]"),
    ],
)
def test_where_one_call_is_wanted_the_answer_ends_with_it(form, answer, size):
    reader = CallReader(form, NAMES, several=False)
    parts = [part for at in range(0, len(answer), size) for part in reader.push(answer[at : at + size])]
    assert [part.name for part in parts + reader.finish()] == ["weather"]


def test_a_template_tells_the_format():
    assert call_format("{{ m.content }}") is None
    assert call_format("'<tool_call>' + name") is HERMES
    assert call_format("[TOOL_CALLS]{{ calls }}") is MISTRAL
    assert call_format('Answer {"name": a name, "parameters": a table}') is LLAMA


@pytest.mark.parametrize("form", FORMATS, ids=["hermes", "mistral", "llama"])
def test_a_demanded_answer_is_calls_that_are_read_back(form):
    """Whatever the grammar has, read token by token in random order, is calls with arguments that fit their schema."""
    from tests.conftest import VOCAB, make_tokenizer

    from edgeskip.runtime.grammar.masks import TokenMask, token_table

    ref = {"$ref": "#/$defs/one"}  # each schema has its own
    schemas = {
        "weather": {"type": "object", "properties": {"city": ref}, "required": ["city"], "additionalProperties": False},
        "time": {"type": "object", "properties": {"zone": ref}, "required": ["zone"], "additionalProperties": False},
    }
    schemas["weather"]["$defs"] = {"one": {"enum": ["Paris", 'a "b"']}}
    schemas["time"]["$defs"] = {"one": {"type": "integer", "minimum": -9, "maximum": 9}}
    tokenizer, random, seen = make_tokenizer(), np.random.default_rng(0), set()
    table = token_table(tokenizer, VOCAB, [1])
    for several in (True, False) * 4:
        mask, ids = TokenMask(demanded_calls(form, schemas, several=several), table), []
        while not ids or ids[-1] != 1:
            allowed = np.flatnonzero(mask.allowed(np.array(ids, np.int64)))
            ids.append(int(random.choice(allowed)))
        mask.check(ids)
        reader = CallReader(form, list(schemas))
        parts = reader.push(tokenizer.decode(ids[:-1])) + reader.finish()
        assert parts
        assert several or len(parts) == 1
        for call in parts:
            arguments = json.loads(call.arguments)
            assert arguments.get("city") in ("Paris", 'a "b"') or arguments["zone"] in range(-9, 10)
            seen.add((call.name, *arguments))
    assert seen == {("weather", "city"), ("time", "zone")}
