"""Which tokens are frequent: counted on texts like those that the model will read and write, or, for some widespread
tokenizers, on permissively licensed texts of many kinds (docs/token-counts).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.decoding.tokenizer import encode
from edgeskip.runtime.errors import RequestError

Array = npt.NDArray[Any]

LEAST_TOKENS = 256
"""In all texts together."""

FREQUENCIES = Path(__file__).with_name("frequencies.safetensors")
"""The levels of each tokenizer's tokens [n], by its name and the fingerprint of these n tokens."""

_LEVELS = 8
"""To an octave. A byte has room for 255 of them, which is more than 31 octaves, and for none."""

_PIECE, _MOST_PIECES = 1 << 16, 512
"""Characters that are encoded at a time, and how often: 32 million in all."""


def count_tokens(path: Path, tokenizer: Tokenizer, vocab_size: int) -> Array:
    """How often each token id [V] occurs in the texts of a file or a folder's files; of many, in parts from all over.

    Raises:
        RequestError: no text there, too little of it, or one that the tokenizer fails on.
    """
    pieces = [text[start : start + _PIECE] for text in load_prompts(path) for start in range(0, len(text), _PIECE)]
    chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), _MOST_PIECES)).round().astype(int)
    encoded = (encode(tokenizer, pieces[index], _PIECE, add_special_tokens=False) for index in chosen)
    counts = counts_of(encoded, vocab_size)
    if (tokens := int(counts.sum())) < LEAST_TOKENS:
        raise RequestError(path, f"{tokens} tokens", wanted=f"at least {LEAST_TOKENS}", fix="give more text")
    return counts


def counts_of(encoded: Iterable[Sequence[int]], vocab_size: int) -> Array:
    """How often each token id [V] occurs in all these texts together."""
    counts = np.zeros(vocab_size, np.int64)
    for text in encoded:
        ids = np.array(text, np.int64)
        counts += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
    return counts


def covered_share(tokenizer: Tokenizer, rows: int) -> float:
    """The share of the tokens in the prompts that ship with edgeskip whose ids are among the first ones."""
    texts = load_prompts()
    ids = [id_ for text in texts for id_ in encode(tokenizer, text, len(text), add_special_tokens=False)]
    return sum(id_ < rows for id_ in ids) / len(ids)


def shipped_levels(vocab: Mapping[str, int], vocab_size: int) -> Array | None:
    """The levels of frequency of all token ids [V], if edgeskip has them for the tokenizer with this vocabulary.

    A tokenizer is known by its first tokens, as those that were made from it have more of them: these have level 0.
    """
    for name, levels in load_file(FREQUENCIES).items():
        if len(levels) <= vocab_size and name.endswith(fingerprint(vocab, len(levels))):
            return np.pad(levels, (0, vocab_size - len(levels)))
    return None


def write_levels(path: Path, levels: Mapping[str, tuple[Mapping[str, int], Array]]) -> None:
    """Writes the file of frequencies, from a tokenizer's vocabulary and levels by its name."""
    save_file({f"{name}:{fingerprint(vocab, len(array))}": array for name, (vocab, array) in levels.items()}, path)


def levels_of(frequencies: Array) -> Array:
    """Frequencies [n] in eighths of an octave, as uint8: 255 for 1, and 0 for 0."""
    with np.errstate(divide="ignore"):
        levels = 255 + _LEVELS * np.log2(frequencies)
    return np.where(frequencies > 0, levels.round().clip(1), 0).astype(np.uint8)


def fingerprint(vocab: Mapping[str, int], size: int) -> str:
    """The hash of a vocabulary's first tokens in the order of their ids."""
    first = sorted((id_, token) for token, id_ in vocab.items() if id_ < size)
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()


def frequency_order(counts: Array, movable: Collection[int]) -> Array:
    """Which token id [V] takes the place of each: among the movable ones, those that occur more often come first, and
    equally frequent ones stay in order.
    """
    order, places = np.arange(len(counts)), np.array(sorted(movable), np.int64)
    order[places] = places[np.argsort(-counts[places].astype(np.int64), kind="stable")]
    return order
