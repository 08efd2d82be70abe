"""Chats: messages checked, and rendered by the model's own template in a process that has little time and memory."""

from __future__ import annotations

import atexit
import importlib.util
import json
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


def render_chat(messages: Sequence[Any], bundle: Bundle) -> str:
    """The messages as the model was trained to see them, as transformers' `apply_chat_template` writes them.

    Raises:
        RequestError: no template, a malformed message, or a template that refuses, fails or takes too much.
    """
    check_takes_chats(bundle)
    variables = dict(bundle.manifest.special_tokens) | {
        "messages": [_message(number, message) for number, message in enumerate(messages, 1)],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    job = {"template": read_text(bundle.path(CHAT_TEMPLATE), BundleError, most=_MOST_BYTES), "variables": variables}
    answer = _render(json.dumps(job).encode())
    if "text" not in answer:
        raise RequestError("messages", f"the chat template {answer['failed']}", fix="give a plain text")
    return str(answer["text"])


def check_takes_chats(bundle: Bundle) -> None:
    """Looks for a chat template.

    Raises:
        RequestError: there is none.
    """
    if CHAT_TEMPLATE not in bundle.manifest.files:
        raise RequestError("messages", "the bundle has no chat template, so it takes no chat", fix="give a plain text")


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message as templates expect it: keys without a value left out, and the reasoning under its usual names."""
    place = f"message {number}"
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise RequestError(place, f"{message!r:.60}", wanted="a mapping with `role` and `content`")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = f"its {key} is {message[key]!r:.60}" if key in message else f"has no {key}"
            raise RequestError(place, found, wanted=f"a text as its {key}")
    made = {key: value for key, value in message.items() if value is not None}
    try:
        made = json.loads(json.dumps(made))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(place, f"not plain data ({error})", wanted="texts, numbers, lists and tables") from None
    reasoning = next((made[key] for key in _REASONING if key in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    return made


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
