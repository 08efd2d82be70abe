"""What clients ask for: OpenAI's parameters, checked. What cannot be served is refused, and nothing is passed over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.grammar import Grammar
from edgeskip.runtime.sampling import SamplingSettings

MOST_STOPS, MOST_TOOLS = 16, 128
_FUNCTION = {"name", "description", "parameters", "strict"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SAMPLING = tuple(SamplingSettings.__annotations__)
_SHARED = {"model", "stream", "stream_options", "stop", "n", "max_tokens", "logprobs", "response_format", *_SAMPLING}
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_ACCEPTED = {
    True: _SHARED | {"messages", "max_completion_tokens", "top_logprobs", *_TOOLS},
    False: _SHARED | {"prompt"},
}
_NOTES = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
"""Parameters that say nothing about the answer."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Parameters that are not served, and the values with which they change nothing."""


@dataclass(frozen=True)
class Tools:
    """Functions that the model may call.

    `given` is as clients write them and chat templates take them; `schemas` has the JSON schemas of the arguments of
    those that may be called, by name. They need not be called unless that is `required`; `several` says whether there
    may be more calls than one.
    """

    given: Sequence[Mapping[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    required: bool
    several: bool


@dataclass(frozen=True)
class Asked:
    """A request, checked: the prompt, tools, and how to generate, as for `Model.generate`."""

    model: str
    prompt: Any
    settings: Mapping[str, Any]
    is_chat: bool
    stream: bool = False
    include_usage: bool = False
    tools: Tools | None = None


def read_request(data: Any, *, is_chat: bool) -> Asked:
    """Reads the body of a request for a chat's next message or a text's continuation.

    Raises:
        RequestError: a parameter that is unknown or not served, or has a wrong value; the place is its name.
    """
    if not isinstance(data, dict):
        raise RequestError("body", f"a {type(data).__name__}", wanted="an object with the parameters")
    given = {name: value for name, value in data.items() if value is not None}
    for name, value in given.items():
        if name not in _ACCEPTED[is_chat] | _NOTES and value not in _WITHOUT_EFFECT.get(name, ()):
            raise RequestError(name, f"{value!r:.60} is not served here", fix="leave it out")
    if given.get("n", 1) != 1:
        raise RequestError("n", f"{given['n']!r:.60}", wanted="1, as one text is decoded at a time")
    if "model" not in given:
        raise RequestError("model", "missing", wanted="the name of the model")
    options = _value(given, "stream_options", _options, {})
    settings = {name: given[name] for name in _SAMPLING if name in given}
    if type(settings.get("seed")) is int:
        settings["seed"] %= 1 << 64  # clients may give negative ones
    settings["logprobs"] = _logprobs(given, is_chat)
    most = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if most in given:
        settings["max_new_tokens"] = _value(given, most, _count, None)
    if (grammar := _value(given, "response_format", _grammar, None)) is not None:
        settings["grammar"] = grammar
    if stops := _value(given, "stop", _stops, ()):
        settings["stop"] = stops
    return Asked(
        model=_value(given, "model", _text, ""),
        prompt=_messages(given.get("messages")) if is_chat else _prompt(given.get("prompt")),
        settings=settings,
        is_chat=is_chat,
        stream=_value(given, "stream", _flag, False),
        include_usage=_value(options, "include_usage", _flag, False),
        tools=_tools(given) if is_chat else None,
    )


def _logprobs(given: Mapping[str, Any], is_chat: bool) -> int | None:
    """How many of the most probable tokens to give with each; None gives no probabilities."""
    if not is_chat:
        count: int | None = _value(given, "logprobs", _natural, None)
        return count
    wanted, top = _value(given, "logprobs", _flag, False), _value(given, "top_logprobs", _natural, 0)
    if top and not wanted:
        raise RequestError("top_logprobs", f"{top}, without logprobs", wanted="`logprobs`: true beside it")
    return top if wanted else None


def _tools(given: Mapping[str, Any]) -> Tools | None:
    """The functions that may be called; None if none may."""
    functions = _value(given, "tools", _functions, {})
    several = _value(given, "parallel_tool_calls", _flag, True)
    choice = given.get("tool_choice", "auto")
    match choice:
        case {"type": "function", "function": {"name": str() as name}} if name in functions:
            schemas, required, several = {name: functions[name]}, True, False
        case "required" if functions:
            schemas, required = functions, True
        case "auto" | "none":
            schemas, required = functions, False
        case _:
            wanted = 'auto, none, required or {"type": "function", "function": {"name": ...}}, and tools to choose from'
            raise RequestError("tool_choice", f"{choice!r:.60}", wanted=wanted)
    if not functions or choice == "none":
        return None
    if given.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise RequestError("response_format", "beside tools, whose calls would not fit it", fix="leave out one of them")
    return Tools(given["tools"], schemas, required, several)


def _messages(messages: Any) -> list[Any]:
    """Messages as templates take them: contents that come in parts joined, and a developer's role as the system's."""
    if not isinstance(messages, list) or not messages:
        found = "missing" if messages is None else f"{messages!r:.60}"
        raise RequestError("messages", found, wanted="a list of at least one message")
    made = [_message(number, message) for number, message in enumerate(messages, 1)]
    _check_results(made)
    return made


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):  # a list of numbers would be a prompt
        raise RequestError(f"message {number}", f"{message!r:.60}", wanted="an object with `role` and `content`")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise RequestError("messages", "a part of a content that is not a text", wanted="texts alone")
        content = "".join(part["text"] for part in parts)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return message | {"role": role, "content": content}


def _check_results(messages: list[dict[str, Any]]) -> None:
    """Checks that the calls of a message have their results right after it, and that there are no others: models were
    trained on nothing else, and templates may leave out what does not fit.
    """
    caller, calls, left = 0, set[str](), set[str]()
    for number, message in enumerate([*messages, {}], 1):
        if message.get("role") == "tool":
            answered = message.get("tool_call_id")
            if not isinstance(answered, str) or answered not in calls:
                found = "has no tool_call_id" if answered is None else f"its tool_call_id is {answered!r:.60}"
                wanted = "the id of a call of the assistant's message that comes before the results"
                raise RequestError(f"message {number}", found, wanted=wanted)
            left.discard(answered)
            continue
        if left:
            wanted = "a message with the role `tool` and its id as `tool_call_id`"
            raise RequestError(f"message {caller}", f"its call {min(left)!r:.60} has no result after it", wanted=wanted)
        made = message.get("tool_calls") if message.get("role") == "assistant" else None
        caller, calls = number, set(_call_ids(number, made))
        left = set(calls)


def _call_ids(number: int, calls: Any) -> Iterator[str]:
    """The ids of an assistant's calls; all else about these is looked at where they are rendered."""
    for call in calls if isinstance(calls, list) else ():
        if not isinstance(call, dict) or not isinstance(call.get("id"), str):
            found, wanted = f"one of its tool_calls is {call!r:.60}", "each with an `id`"
            raise RequestError(f"message {number}", found, wanted=wanted)
        yield call["id"]


def _prompt(prompt: Any) -> Any:
    """One text or one list of token ids, which may be the only one of a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        (prompt,) = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return prompt
    found = "missing" if prompt is None else f"{prompt!r:.60}"
    raise RequestError("prompt", found, wanted="one text, or one list of token ids")


def _value(given: Mapping[str, Any], name: str, reads: Callable[[Any], Any], otherwise: Any) -> Any:
    if given.get(name) is None:
        return otherwise
    try:
        return reads(given[name])
    except ValueError as error:
        raise RequestError(name, f"{given[name]!r:.60}", wanted=str(error)) from None


def _grammar(value: Any) -> Grammar | None:
    """What the answer must be, by a response's format; None if it may be any text."""
    match value:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar.any_json_object()
        case {"type": "json_schema", "json_schema": {"schema": {} as schema}}:
            return Grammar.from_json_schema(schema)
    raise ValueError(
        'one of {"type": "text"}, {"type": "json_object"} and {"type": "json_schema", "json_schema": {"name": ..., '
        '"schema": {...}}}'
    )


def _functions(value: Any) -> dict[str, dict[str, Any]]:
    """The schemas of functions' arguments, by name."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ValueError(f"a list of up to {MOST_TOOLS} functions")
    found: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(value, 1):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        match function:
            case {"name": str() as name, **rest} if _NAME.fullmatch(name) and name not in found:
                _check_function(number, tool)
                schema = {} if rest.get("parameters") is None else rest["parameters"]
                if isinstance(schema, dict) and schema.get("type", "object") == "object":
                    found[name] = {"type": "object", **schema}
                    continue
        wanted = (
            'functions as {"type": "function", "function": {"name": ..., "parameters": {"type": "object", ...}}}, with '
            "names of their own of up to 64 letters, digits, _ and -"
        )
        raise RequestError("tools", f"number {number} is {function or tool!r:.60}", wanted=wanted)
    return found


def _check_function(number: int, tool: dict[str, Any]) -> None:
    """Looks for what would be passed over, and at what is there beside a name and parameters."""
    function = tool["function"]
    if unknown := [*(tool.keys() - {"type", "function"}), *(function.keys() - _FUNCTION)]:
        found, wanted = f"number {number} has {min(unknown)!r:.60}", f"a function of {', '.join(sorted(_FUNCTION))}"
        raise RequestError("tools", found, wanted=wanted, fix="leave it out")
    for key, reads in (("strict", _flag), ("description", _text)):
        try:
            _value(function, key, reads, None)
        except RequestError as error:
            found, wanted = f"{key} of number {number} is {error.found}", error.wanted
            raise RequestError("tools", found, wanted=wanted) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a whole number from 0")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("a whole number from 1")
    return value


def _options(value: Any) -> dict[str, Any]:
    """What a stream has beside its text."""
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(value, dict) or set(value) - known or value.get("include_obfuscation"):  # nothing is padded here
        raise ValueError('{"include_usage": true or false} and nothing else')
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"a text, or a list of up to {MOST_STOPS}")
    return tuple(stops)
