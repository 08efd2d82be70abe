"""The texts that a model reads while it is quantized, so that what its matrices are multiplied with is known.

Texts are cut into passages, of which some are taken, evenly over all of them; of each passage, the first tokens. Those
at the beginning of a text have the tokenizer's special tokens before them, such as BOS, and the others have none, as a
model gives other states to one than to the other. The same texts and tokenizer give the same sequences.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.decoding.tokenizer import encode
from edgeskip.runtime.errors import RequestError

MOST_SEQUENCES, MOST_TOKENS = 32, 512
"""Sequences, and tokens of one."""

LEAST_TOKENS = 256
"""In all sequences together."""

_PASSAGE = 3072  # characters, which are at least MOST_TOKENS with most tokenizers


@dataclass(frozen=True)
class Calibration:
    """Sequences of token ids, the tokenizer's special tokens included, and the sha256 of all texts, one after another,
    in UTF-8.
    """

    sequences: tuple[tuple[int, ...], ...]
    sha256: str

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The tokens that occur, in rising order."""
        return np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in self.sequences]))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    def shortened(self, most_sequences: int, most_tokens: int) -> Calibration:
        """Fewer sequences, evenly over all, and the first tokens of each."""
        sequences = tuple(self.sequences[i][:most_tokens] for i in _evenly(len(self.sequences), most_sequences))
        return Calibration(sequences, self.sha256)


def read_calibration(path: Path | None, tokenizer: Tokenizer, context: int) -> Calibration:
    """The texts of a file or of a folder's files, as a model reads them.

    Args:
        path: by default, the texts that ship with edgeskip.
        tokenizer: the checkpoint's.
        context: the most tokens that the model takes.

    Raises:
        RequestError: no text there, too little of it, or one that the tokenizer fails on.
    """
    texts = _shipped() if path is None else load_prompts(path)
    places = [(text, start) for text in texts for start in range(0, len(text), _PASSAGE)]
    most = min(MOST_TOKENS, context)
    sequences: list[tuple[int, ...]] = []
    for i in _evenly(len(places), MOST_SEQUENCES):
        text, start = places[i]
        passage = text[start : start + _PASSAGE]
        sequences.append(tuple(encode(tokenizer, passage, most, add_special_tokens=start == 0, most=most)))
    sequences = [sequence for sequence in sequences if sequence]
    if (tokens := sum(map(len, sequences))) < LEAST_TOKENS:
        place = "calibration texts" if path is None else path
        raise RequestError(place, f"{tokens} tokens", wanted=f"at least {LEAST_TOKENS}", fix="give more text")
    return Calibration(tuple(sequences), hashlib.sha256("".join(texts).encode()).hexdigest())


def _evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of `count` places."""
    chosen: npt.NDArray[np.int64] = np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
    return chosen


def _shipped() -> list[str]:
    """Passages of prose and of source code, by the authors of edgeskip."""
    text = (resources.files("edgeskip.exporter.quantization.calibrated") / "texts.json").read_text(encoding="utf-8")
    passages: list[dict[str, Any]] = json.loads(text)
    return [passage["text"] for passage in passages]
