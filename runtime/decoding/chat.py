"""Chats: messages checked, and rendered by the model's own template in a process that has little time and memory."""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding import template
from edgeskip.runtime.errors import BundleError, RequestError
from edgeskip.runtime.reading import read_text

CHAT_TEMPLATE = "chat_template.jinja"
_MOST_BYTES = 1 << 20  # of a template; real ones have a few thousand
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(messages: Sequence[Any], bundle: Bundle, tools: Sequence[Any] = ()) -> str:
    """The messages as the model was trained to see them, as transformers' `apply_chat_template` writes them.

    Args:
        messages: what was said; see `check_message`.
        bundle: has the template.
        tools: functions that the model may call, as the template takes them: JSON schemas in OpenAI's shape.

    Raises:
        RequestError: no template, or none that takes tools; a malformed message; or a template that refuses, fails or
            takes too much.
    """
    check_takes_chats(bundle)
    template_text = chat_template(bundle)
    if not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RequestError("tools", f"{tools!r:.60}", wanted="a list of functions, as tables")
    if tools and not re.search(r"\btools\b", template_text):
        raise RequestError("tools", "the model's chat template takes none", fix="leave them out")
    checked = [check_message(f"message {number}", message) for number, message in enumerate(messages, 1)]
    variables = dict(bundle.manifest.special_tokens) | {
        "messages": [_with_reasoning(message) for message in checked],
        "tools": _plain("tools", list(tools)) or None,
        "documents": None,
        "add_generation_prompt": True,
    }
    answer = _render(json.dumps({"template": template_text, "variables": variables}).encode())
    if "text" not in answer:
        raise RequestError("messages", f"the chat template {answer['failed']}", fix="give a plain text")
    return str(answer["text"])


def chat_template(bundle: Bundle) -> str:
    """The text of a bundle's chat template; an empty one if it has none.

    Raises:
        BundleError: it cannot be read.
    """
    if CHAT_TEMPLATE not in bundle.manifest.files:
        return ""
    return read_text(bundle.path(CHAT_TEMPLATE), BundleError, most=_MOST_BYTES)


def check_takes_chats(bundle: Bundle) -> None:
    """Looks for a chat template.

    Raises:
        RequestError: there is none.
    """
    if CHAT_TEMPLATE not in bundle.manifest.files:
        raise RequestError("messages", "the bundle has no chat template, so it takes no chat", fix="give a plain text")


def check_message(place: object, message: Any) -> dict[str, Any]:
    """A message as plain data, without keys that have no value. It has a role and a content; an assistant's that calls
    tools may have no content, and the arguments of its calls are tables, which may come as JSON.

    Raises:
        RequestError: it is malformed; `place` is where it is.
    """
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise RequestError(place, f"{message!r:.60}", wanted="a mapping with `role` and `content`")
    given = {key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])}
    if "tool_calls" in given:
        given["tool_calls"] = _called(place, given["tool_calls"])
        given.setdefault("content", "")
    for key in ("role", "content"):
        if not isinstance(given.get(key), str):
            found = f"its {key} is {message[key]!r:.60}" if key in message else f"has no {key}"
            raise RequestError(place, found, wanted=f"a text as its {key}")
    made: dict[str, Any] = _plain(place, given)
    return made


def _called(place: object, calls: Any) -> list[dict[str, Any]]:
    """Calls of tools as templates expect them."""
    made = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        name, arguments = map((function if isinstance(function, Mapping) else {}).get, ("name", "arguments"))
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not (isinstance(name, str) and isinstance(arguments, Mapping)):
            wanted = "a function with a name and arguments, which are a table"
            found = f"{function if isinstance(function, Mapping) else call!r:.60}"
            raise RequestError(place, f"one of its tool_calls is {found}", wanted=wanted)
        made.append({**call, "function": {"name": name, "arguments": arguments}})  # in the order that models write
    return made


def _plain(place: object, data: Any) -> Any:
    """A copy of data that JSON can hold.

    Raises:
        RequestError: it cannot.
    """
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(place, f"not plain data ({error})", wanted="texts, numbers, lists and tables") from None


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message that has its reasoning, if any, under all its usual names."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _folders(*libraries: str) -> list[str]:
    """Where the libraries are, and nothing else that happens to be on this process's path."""
    found = (importlib.util.find_spec(library) for library in libraries)
    return [str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin]


def expect_chats() -> None:
    """From now on, the process that renders the next chat is started ahead, which takes longer than most chats do: for
    whoever has many to render.
    """
    global _ahead
    if not _ahead:
        _ahead = True
        atexit.register(_dismiss)
    _start_ahead()


_ahead = False
_SPARE: list[subprocess.Popen[bytes]] = []
_LOCK = threading.Lock()


def _start_ahead() -> None:
    with _LOCK, suppress(OSError):
        if not _SPARE:
            _SPARE.append(_started())


def _dismiss() -> None:
    with _LOCK:
        while _SPARE:
            _end(_SPARE.pop())


def _started() -> subprocess.Popen[bytes]:
    """A process that waits for a job. A Ctrl-C on the terminal is not for it."""
    script = str(Path(template.__file__).resolve())
    return subprocess.Popen(
        [sys.executable or "", "-I", "-S", script, *_folders("jinja2", "markupsafe")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes its pipes and waits
        process.kill()


def _render(job: bytes) -> dict[str, Any]:
    """Runs template.py, which knows its limits; they cannot be kept within a process that has other things to do."""
    with _LOCK:
        process = _SPARE.pop() if _SPARE else None
    try:
        if process is not None and process.poll() is not None:  # something has ended it
            _end(process)
            process = None
        process = process or _started()
        try:
            out, err = process.communicate(job, timeout=template.WALL_SECONDS)
        except BaseException:
            _end(process)
            raise
    except subprocess.TimeoutExpired:
        return {"failed": f"takes more than {template.WALL_SECONDS} s"}
    except OSError as error:
        return {"failed": f"cannot be run ({error})"}
    finally:
        if _ahead:
            _start_ahead()
    if process.returncode < 0:  # the system has ended it
        return {"failed": f"takes more than {template.SECONDS} s"}
    if process.returncode:
        return {"failed": f"cannot be run ({err.decode(errors='replace')[-200:]})"}
    answer: dict[str, Any] = json.loads(out)
    return answer
