"""A checkpoint with its token ids in another order: its tokenizer and its tables of tokens say the same of it.

So nothing that runs, quantizes or measures a bundle has to know: an id is a row of the tables, as ever. Only ids from
elsewhere, such as those of the checkpoint's own tokenizer, mean other tokens to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgeskip.exporter.checkpoint import Checkpoint
from edgeskip.exporter.quantization.layouts import QuantizedTensor
from edgeskip.exporter.vocabulary.frequency import count_tokens, frequency_order, shipped_levels
from edgeskip.runtime.bundle.tensors import TABLES
from edgeskip.runtime.decoding.tokenizer import tokenizer_from_json
from edgeskip.runtime.errors import CheckpointError, RequestError

Array = npt.NDArray[Any]

_FIX = "leave out --calibration: drafts then come from the first token ids"


def by_frequency(checkpoint: Checkpoint, texts: Path | None) -> Checkpoint:
    """The checkpoint with the tokens first that occur most often in the texts of a file or a folder. Without texts, it
    is the order that ships for its tokenizer, or else that of the ids, which is the checkpoint as it is.

    Tokens that are added to the vocabulary, that go around texts or that end them keep their ids.

    Raises:
        RequestError: texts with too little in them, or for a checkpoint whose tokens cannot be put in order.
    """
    vocab_size = checkpoint.architecture.vocab_size
    data = json.loads(checkpoint.tokenizer.json)
    vocab = data["model"].get("vocab")
    quantized = [name for name in TABLES if isinstance(checkpoint.tensors.get(name), QuantizedTensor)]
    if texts is None:
        counts = shipped_levels(vocab, vocab_size) if isinstance(vocab, dict) and not quantized else None
        if counts is None:
            return checkpoint
    elif quantized:
        raise RequestError(quantized[0], f"comes quantized by {checkpoint.quantized_by}, as it must stay", fix=_FIX)
    elif not isinstance(vocab, dict):
        found = f"a tokenizer of the kind {data['model'].get('type')}, where a token's place is its id"
        raise RequestError("calibration", found, wanted="BPE, WordPiece or WordLevel", fix=_FIX)
    else:
        counts = count_tokens(texts, checkpoint.tokenizer.tokenizer, vocab_size)
    order = frequency_order(counts, _movable(vocab, data, checkpoint.eos_token_ids, vocab_size))
    new_ids = np.argsort(order).tolist()
    moved = {token: new_ids[id_] if id_ < vocab_size else id_ for token, id_ in vocab.items()}
    data["model"]["vocab"] = dict(sorted(moved.items(), key=lambda pair: pair[1]))
    text = json.dumps(data, ensure_ascii=False)
    tokenizer = tokenizer_from_json(text, checkpoint.folder / "tokenizer.json", CheckpointError)
    tokenizer.encode_special_tokens = checkpoint.tokenizer.split_special_tokens
    return replace(checkpoint, tokenizer=replace(checkpoint.tokenizer, tokenizer=tokenizer, json=text), order=order)


def order_of(renumbered: Tokenizer, tokenizer: Tokenizer, vocab_size: int) -> Array:
    """Which of a tokenizer's ids [V] each id of a renumbered one stands for."""
    order, ids = np.arange(vocab_size), tokenizer.get_vocab(with_added_tokens=True)
    for token, id_ in renumbered.get_vocab(with_added_tokens=True).items():
        if max(id_, old := ids.get(token, id_)) < vocab_size:
            order[id_] = old
    return order


def _movable(vocab: Mapping[str, int], data: Mapping[str, Any], eos: Iterable[int], vocab_size: int) -> set[int]:
    """The ids that other tokens may take: of the ordinary ones, which nothing but the vocabulary names."""
    fixed = {token["id"] for token in data["added_tokens"]} | {*eos, *_around(data.get("post_processor") or {})}
    return {id_ for id_ in vocab.values() if id_ < vocab_size} - fixed


def _around(step: Mapping[str, Any]) -> Iterator[int]:
    """The ids that a post-processor puts around texts."""
    for inner in step.get("processors", ()):
        yield from _around(inner)
    for token in step.get("special_tokens", {}).values():
        yield from token["ids"]
    yield from (step[name][1] for name in ("sep", "cls") if name in step)
