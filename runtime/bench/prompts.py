"""The texts that are measured with: those that ship, or the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.errors import RequestError, reason
from edgeskip.runtime.reading import kind_of, read_text


def load_prompts(path: Path | None = None) -> list[str]:
    """The held-out prompts that ship with edgeskip, or the text files of a folder, or one file.

    Raises:
        RequestError: nothing there, or not text.
    """
    if path is None:
        text = (resources.files("edgeskip.runtime.bench") / "prompts.json").read_text(encoding="utf-8")
        return [prompt["text"] for prompt in json.loads(text)]
    fix = "give a text file or a folder of them"
    if kind_of(path, RequestError) == "a folder":
        texts = [read_text(file, RequestError, fix=fix) for file in _files(path)]
    else:
        texts = [read_text(path, RequestError, fix=fix, streams=True)]
    if not any(texts):
        raise RequestError(path, "no text in it", fix=fix)
    return [text for text in texts if text]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise RequestError(folder, f"cannot be read ({reason(error)})") from None


def encoded_prompts(
    model: Model, prompts: Sequence[str], prompt_tokens: int | None, max_new_tokens: int
) -> list[list[int]]:
    """The prompts' ids, each cut to `prompt_tokens`, if given; they leave room for the new tokens.

    Raises:
        RequestError: a prompt or a number of new tokens that is too long for the bundle, or fewer than two new tokens.
    """
    capacity = model.bundle.manifest.max_length
    prompt_ids = [model.encode(prompt, most=prompt_tokens) for prompt in prompts]
    longest = max(map(len, prompt_ids))
    room = capacity - longest
    if room < 2:
        raise RequestError("prompts", f"one of {longest} tokens", wanted=f"at most {capacity - 2}")
    if not 2 <= max_new_tokens <= room:
        wanted = f"2 to {room}, after the longest prompt"
        raise RequestError("max new tokens", f"{max_new_tokens}", wanted=wanted)
    return prompt_ids
