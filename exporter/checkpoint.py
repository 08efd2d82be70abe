"""A checkpoint: a folder or a hub id, its config, and its tensors read lazily by rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from edgeskip.exporter.config import architecture_from_config, read_json, sliding_window
from edgeskip.exporter.folder import is_own, refuse_other_kinds
from edgeskip.exporter.formats import NUMPY_DTYPES
from edgeskip.exporter.index import SourceTensor, Warn, index_tensors, tensor_rows
from edgeskip.exporter.quantization.layouts import QuantizedTensor, with_quantized
from edgeskip.exporter.quantization.methods import method_of
from edgeskip.exporter.tokenizer import (
    CheckpointTokenizer,
    chat_template_files,
    check_vocabulary,
    read_checkpoint_tokenizer,
)
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.tensors import TABLES, TensorRecord
from edgeskip.runtime.errors import CheckpointError, RequestError
from edgeskip.runtime.hub.access import hub_errors
from edgeskip.runtime.reading import expanded, kind_of
from edgeskip.runtime.sampling import Sampling

Array = npt.NDArray[Any]

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]
# Folders hold the same weights in other layouts, except for additional_chat_templates.
_HUB_DUPLICATES = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]
_CHANGES_GREEDY = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "bad_words_ids": [],
    "suppress_tokens": [], "begin_suppress_tokens": [], "forced_bos_token_id": None, "forced_eos_token_id": None,
    "min_length": 0, "min_new_tokens": 0, "sequence_bias": {}, "exponential_decay_length_penalty": None,
    "num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1, "stop_strings": [],
}  # fmt: skip
"""What generation_config.json can ask for that changes a greedy text, each with the value that changes nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose files are all there and agree with its config.

    `sampling` is what generation_config.json says of how tokens are drawn. `tensors` maps each tensor's name to its
    file, shape and dtype; no data has been read. `licences` are licence and notice files, which travel with the
    weights. `quantized_by` is the method of one that comes quantized. `order` [V], if token ids were put in another
    order than in the files, has the row of the files' tables for each; the tokenizer is then in the new one.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    sampling: Sampling
    tokenizer: CheckpointTokenizer
    tensors: dict[str, SourceTensor]
    licences: tuple[Path, ...]
    quantized_by: str | None = None
    order: Array | None = None


class TensorReader:
    """Opens shards as they are needed and reads tensors by blocks of rows; a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def blocks(self, name: str, block_bytes: int = 1 << 24) -> Iterator[npt.NDArray[Any]]:
        """Yields a tensor's rows in order, about `block_bytes` at a time, in the stored dtype; of one that is stored
        quantized, what they stand for, in fp32. Tables of tokens are in the order of the ids.
        """
        stored, order = self.checkpoint.tensors[name], self.checkpoint.order
        if order is not None and name in TABLES:
            view = self._slices(stored)
            for start, stop in _spans(stored.shape, block_bytes):
                yield np.concatenate([view[first:last] for first, last in _runs(order[start:stop])])
        elif isinstance(stored, QuantizedTensor):
            for start, stop in _spans(stored.shape, block_bytes):
                yield self._values(stored, start, stop)
        else:
            yield from tensor_rows(self._opened(stored), stored, block_bytes)

    def rows(self, tensor: TensorRecord, dtype: DType) -> Iterator[npt.NDArray[Any]]:
        """A bundle's tensor by blocks of rows, in order, put together from its sources.

        Numbers are in the dtype if that is the tensor's format, and else as they are stored.

        Raises:
            CheckpointError: a number is not finite in the dtype.
        """
        for source, _ in tensor.sources:
            for block in self.blocks(source):
                with np.errstate(over="ignore", invalid="ignore"):
                    converted = block.astype(NUMPY_DTYPES[dtype], copy=False)
                if not _is_finite(converted):
                    raise CheckpointError(
                        self.checkpoint.tensors[source].file,
                        f"{source} has values that are not finite in {dtype}",
                        fix="export in another dtype" if np.isfinite(block).all() else "the checkpoint is damaged",
                    )
                yield converted if tensor.format == dtype else block

    def stored_parts(self, tensor: TensorRecord, dtype: DType) -> Iterator[tuple[Array, Array]]:
        """A bundle's tensor whose sources are stored quantized, by blocks of rows, with scales in the dtype.

        Raises:
            CheckpointError: a source that is not symmetric, or a scale that is not finite in the dtype.
        """
        for source, _ in tensor.sources:
            stored = self.checkpoint.tensors[source]
            assert isinstance(stored, QuantizedTensor)
            stored.check(self._slices)
            for start, stop in _spans(stored.shape):
                numbers, scales = stored.rows(self._slices, start, stop)
                with np.errstate(over="ignore", invalid="ignore"):
                    converted = np.ascontiguousarray(scales).astype(NUMPY_DTYPES[dtype], copy=False)
                if not _is_finite(converted):
                    found = f"{source} has scales that are not finite in {dtype}"
                    raise CheckpointError(stored.file, found, fix="export in another dtype")
                yield numbers, converted

    def sample(self, name: str, runs: int = 16, rows: int = 16) -> npt.NDArray[np.float32]:
        """Some rows from all over a matrix, or a whole vector, in fp32."""
        stored = self.checkpoint.tensors[name]
        count = stored.shape[0]
        whole = len(stored.shape) == 1 or count <= runs * rows
        starts = [0] if whole else np.linspace(0, count - rows, runs).astype(int).tolist()
        spans = [(start, count if whole else start + rows) for start in starts]
        if isinstance(stored, QuantizedTensor):
            return np.concatenate([self._values(stored, *span) for span in spans])
        view = self._slices(stored)
        return np.concatenate([np.asarray(view[start:stop], np.float32) for start, stop in spans])

    def _values(self, stored: QuantizedTensor, start: int, stop: int) -> Array:
        """Rows of a tensor that is stored quantized."""
        numbers, scales = stored.rows(self._slices, start, stop)
        values: Array = FORMATS[stored.dtype].decode((numbers, np.asarray(scales, np.float32)), "fp32")
        return values

    def _slices(self, stored: SourceTensor) -> Any:
        return self._opened(stored).get_slice(stored.name)

    def _opened(self, stored: SourceTensor) -> Any:
        if stored.file not in self._files:
            self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, "numpy"))
        return self._files[stored.file]


def _spans(shape: tuple[int, ...], block_bytes: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """The rows of a matrix by blocks of about so many bytes in fp32; whole eights."""
    count = max(8, block_bytes // (4 * shape[1]) // 8 * 8)
    return ((start, min(start + count, shape[0])) for start in range(0, shape[0], count))


def _runs(rows: Array) -> Iterator[tuple[int, int]]:
    """Rows as spans of those that follow one another."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for first, last in pairwise((0, *breaks.tolist(), len(rows))):
        yield int(rows[first]), int(rows[last - 1]) + 1


def _is_finite(block: npt.NDArray[Any]) -> bool:
    """Whether there is no infinity and no NaN; told from the bits of 16-bit numbers, which is faster."""
    if block.dtype.itemsize != 2:
        return bool(np.isfinite(block).all())
    infinity = 0x7C00 if block.dtype == np.float16 else 0x7F80
    return bool((block.view(np.uint16) & 0x7FFF).max(initial=0) < infinity)


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    warn: Warn = lambda _: None,
) -> Checkpoint:
    """Finds a checkpoint, downloading it where `source` is a hub id, and checks it whole before any work is done.

    Args:
        source: a folder, or a hub id such as `facebook/layerskip-llama3.2-1B`.
        revision: branch, tag or commit on the hub.
        token: access token; without one, what `hf auth login` stored.
        offline: use only what has been downloaded before.
        warn: gets a line for each thing that is used although the folder says two things about it.

    Raises:
        CheckpointError: not found, not readable, not supported, or incomplete.
    """
    folder = expanded(source, CheckpointError)
    local = kind_of(folder, CheckpointError) == "a folder"
    if local and revision is not None:
        raise CheckpointError(source, f"a folder, which has no revision {revision!r:.60}", fix="leave out --revision")
    if not local:
        folder = _download(source, revision, token, offline)
    refuse_other_kinds(folder)
    config = read_json(folder / "config.json", f"{folder} is not a checkpoint in transformers' format")
    architecture = architecture_from_config(config, folder / "config.json")
    for path in chat_template_files(folder).values():
        if path.is_file() and not is_own(folder, path):
            fix = "put a copy of the template in its place"
            raise CheckpointError(path, "is a link out of the checkpoint", fix=fix)
    tokenizer = read_checkpoint_tokenizer(folder, config)
    eos_token_ids = _eos_token_ids(folder, config, architecture.vocab_size)
    method = method_of(folder, config)
    joined = partial(with_quantized, layout=method.layout, bits=method.bits) if method else dict
    tensors, architecture = index_tensors(folder, architecture, warn, joined)
    check_vocabulary(tokenizer, architecture.vocab_size, folder, warn)
    _warn_of_generation(folder, warn)
    return Checkpoint(
        source=folder.resolve().name if local else source,
        folder=folder,
        config=config,
        architecture=architecture,
        sliding_window=sliding_window(config, folder / "config.json"),
        eos_token_ids=eos_token_ids,
        sampling=_sampling(folder),
        tokenizer=tokenizer,
        tensors=tensors,
        quantized_by=method.name if method else None,
        licences=tuple(_licences(folder, warn)),
    )


def _sampling(folder: Path) -> Sampling:
    """Temperature and filters of generation_config.json, as far as it has them; nothing is drawn unless it says so."""
    path = folder / "generation_config.json"
    config = read_json(path) if kind_of(path, CheckpointError) else {}
    keys = ("temperature", "top_k", "top_p", "min_p")
    asked = {"temperature": 1.0} | {key: config[key] for key in keys if config.get(key) is not None}
    if config.get("do_sample") is not True:
        asked["temperature"] = 0.0
    try:
        return Sampling(**asked)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error.place}", error.found, wanted=error.wanted) from None


def _warn_of_generation(folder: Path, warn: Warn) -> None:
    """Says what generation_config.json asks for that changes transformers' greedy text."""
    path = folder / "generation_config.json"
    config = read_json(path) if kind_of(path, CheckpointError) else {}
    asked = [key for key, off in _CHANGES_GREEDY.items() if config.get(key) not in (None, off)]
    if asked:
        settings = ", ".join(f"{key} {config[key]!r:.40}" for key in asked)
        warn(f"{path}: asks for {settings}, which is not applied: a text is what the model itself finds most likely")


def _licences(folder: Path, warn: Warn) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")) and path.is_file():
            if is_own(folder, path):
                yield path
            else:
                warn(f"{path}: left out, as it is a link out of the checkpoint")


def download_config(source: str) -> Path:
    """A hub model's config.json, downloaded by itself or found in the hub's cache.

    Raises:
        CheckpointError: not a hub id, not found, gated, or the hub was not reached.
    """
    return _download(source, None, None, offline=False, patterns=["config.json"]) / "config.json"


def _download(
    source: str,
    revision: str | None,
    token: str | None,
    offline: bool,
    patterns: Sequence[str] = _HUB_PATTERNS,
) -> Path:
    if Path(source).is_file():
        raise CheckpointError(source, "a file", wanted="the folder that it is in")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_like_path:
        raise CheckpointError(source, "no such folder", wanted="a model folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    unreached = "run once without --offline" if offline else "check the network, or give a local folder"
    login = "log in with `hf auth login` or pass --token"
    with hub_errors(source, CheckpointError, login=login, unreached=unreached):
        return Path(
            snapshot_download(
                source,
                revision=revision,
                token=token,
                local_files_only=offline,
                allow_patterns=list(patterns),
                ignore_patterns=_HUB_DUPLICATES,
            )
        )


def _eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """EOS ids from generation_config.json, else from config.json: a number or a list."""
    generation = folder / "generation_config.json"
    value = read_json(generation).get("eos_token_id") if kind_of(generation, CheckpointError) else None
    value = config.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(folder, f"eos_token_id is {value!r:.60}", wanted=f"token ids from 0 to {vocab_size - 1}")
    return tuple(ids)
