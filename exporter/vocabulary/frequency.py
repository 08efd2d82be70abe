"""Which tokens are frequent, counted on texts like those that the model will read and write."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.decoding.tokenizer import encode
from edgeskip.runtime.errors import RequestError

Array = npt.NDArray[Any]

LEAST_TOKENS = 256
"""In all texts together."""

_PIECE, _MOST_PIECES = 1 << 16, 512
"""Characters that are encoded at a time, and how often: 32 million in all."""


def count_tokens(path: Path, tokenizer: Tokenizer, vocab_size: int) -> Array:
    """How often each token id [V] occurs in the texts of a file or a folder's files; of many, in parts from all over.

    Raises:
        RequestError: no text there, too little of it, or one that the tokenizer fails on.
    """
    pieces = [text[start : start + _PIECE] for text in load_prompts(path) for start in range(0, len(text), _PIECE)]
    chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), _MOST_PIECES)).round().astype(int)
    counts = np.zeros(vocab_size, np.int64)
    for index in chosen:
        ids = np.array(encode(tokenizer, pieces[index], _PIECE, add_special_tokens=False), np.int64)
        counts += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
    if (tokens := int(counts.sum())) < LEAST_TOKENS:
        raise RequestError(path, f"{tokens} tokens", wanted=f"at least {LEAST_TOKENS}", fix="give more text")
    return counts


def frequency_order(counts: Array, movable: Collection[int]) -> Array:
    """Which token id [V] takes the place of each: among the movable ones, those that occur more often come first, and
    equally frequent ones stay in order.
    """
    order, places = np.arange(len(counts)), np.array(sorted(movable), np.int64)
    order[places] = places[np.argsort(-counts[places], kind="stable")]
    return order
