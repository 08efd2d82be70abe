"""The texts that are measured with: those that ship, or the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.errors import RequestError


def load_prompts(path: Path | None = None) -> list[str]:
    """The held-out prompts that ship with edgeskip, or the text files of a folder, or one file.

    Raises:
        RequestError: nothing there, or not text.
    """
    if path is None:
        text = (resources.files("edgeskip.runtime.bench") / "prompts.json").read_text(encoding="utf-8")
        return [prompt["text"] for prompt in json.loads(text)]
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(path, f"not readable as text ({error})", wanted="a text file or a folder of them") from None
    if not any(texts):
        raise RequestError(path, "no text in it", wanted="a text file or a folder of them")
    return [text for text in texts if text]


def encoded_prompts(
    model: Model, prompts: Sequence[str], prompt_tokens: int | None, max_new_tokens: int
) -> list[list[int]]:
    """The prompts' ids, cut to `prompt_tokens` each where it is given; they leave room for the new tokens.

    Raises:
        RequestError: a prompt or a number of new tokens that is too long for the bundle, or fewer than two of these.
    """
    capacity = model.bundle.manifest.max_length
    prompt_ids = [model.tokenizer.encode(prompt).ids[:prompt_tokens] for prompt in prompts]
    longest = max(map(len, prompt_ids))
    room = capacity - longest
    if room < 2:
        raise RequestError("prompts", f"one of {longest} tokens", wanted=f"at most {capacity - 2}")
    if not 2 <= max_new_tokens <= room:
        wanted = f"2 to {room}, behind the longest prompt"
        raise RequestError("max new tokens", f"{max_new_tokens}", wanted=wanted)
    return prompt_ids
