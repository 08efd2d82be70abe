"""The tensors of a checkpoint: which file each is in and what the model calls it, as transformers loads them.

model.safetensors, or else the shards of model.safetensors.index.json; of a tensor that several shards hold, the
one where the index places it
layers.0..., model.model.layers.0...   ->  model.layers.0...       as base models and wrappers save them
a head that is tied, and one stored    ->  the stored one, where it has values of its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from edgeskip.exporter.config import read_json
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD
from edgeskip.runtime.errors import CheckpointError, reason
from edgeskip.runtime.reading import kind_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OF_A_BASE_MODEL = ("embed_tokens.", "layers.", "norm.")
READABLE = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Stored dtypes that can be converted, by safetensors' names."""

Warn = Callable[[str], None]
"""Called with one line for the user."""


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor is stored, and under which name; dtype is fp64, fp32, fp16, bf16, one that is not read, or the
    format of a matrix that is stored quantized.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path, warn: Warn = lambda _: None) -> tuple[list[Path], dict[str, str]]:
    """The files with a checkpoint's weights, in the order of their names, and the file's name for each tensor in the
    index.

    Raises:
        CheckpointError: there are none, or the index is not an index.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    has_index = kind_of(index, CheckpointError)
    if kind_of(single, CheckpointError) or not has_index:
        if has_index:
            warn(f"{folder}: {WEIGHTS} is used, as in transformers, and not the shards of {INDEX}")
        return [_file(single)], {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(index, "no weight_map of tensors to files", fix="download the checkpoint again")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for path in shards:
        if path.parent != folder or "\0" in path.name:
            raise CheckpointError(index, f"shard {path.name!r} leads out of the folder")
    return [_file(path) for path in shards], weight_map


def index_tensors(
    folder: Path,
    architecture: Architecture,
    warn: Warn = lambda _: None,
    joined: Callable[[dict[str, SourceTensor]], dict[str, SourceTensor]] = lambda tensors: tensors,
) -> tuple[dict[str, SourceTensor], Architecture]:
    """Reads the headers of all files: where each tensor is, by the model's name for it.

    The architecture comes back with a head of its own if the files have one. No data is read, except to compare two
    heads. What several tensors stand for is `joined` from them.

    Raises:
        CheckpointError: a file that is missing or damaged, two tensors with one name, or no head.
    """
    files, weight_map = weight_files(folder, warn)
    stored: dict[str, SourceTensor] = {}
    for path in files:
        for tensor in _headers(path):
            placed = weight_map.get(tensor.name)
            if placed in (None, path.name):
                stored[tensor.name] = tensor
            elif tensor.name in stored:
                warn(
                    f"{path}: also has {tensor.name}, which transformers would use; "
                    f"the one in {placed} is used, as the index says"
                )
    for name, shard in weight_map.items():
        if name not in stored:
            raise CheckpointError(folder / shard, f"lacks {name}, which the index places there")
    tensors: dict[str, SourceTensor] = {}
    for tensor in stored.values():
        other = tensors.setdefault(_model_name(tensor.name), tensor)
        if other is not tensor:
            raise CheckpointError(tensor.file, f"{other.name} and {tensor.name} are one tensor of the model")
    tensors = joined(tensors)
    return tensors, _resolve_head(folder, architecture, tensors, warn)


def tensor_rows(file: Any, tensor: SourceTensor, block_bytes: int = 1 << 24) -> Iterator[npt.NDArray[Any]]:
    """Rows of a tensor in order, about `block_bytes` at a time, in the stored dtype, from its open file."""
    view = file.get_slice(tensor.name)
    row_bytes = 4 * int(np.prod(tensor.shape[1:], dtype=np.int64))
    rows = max(1, block_bytes // max(row_bytes, 1))
    for start in range(0, tensor.shape[0], rows):
        yield view[start : min(start + rows, tensor.shape[0])]


def _file(path: Path) -> Path:
    """The path, checked to be a file."""
    found = kind_of(path, CheckpointError) or ("a link to nothing" if path.is_symlink() else "no such file")
    if found != "a file":
        raise CheckpointError(path, found, wanted="a file of weights", fix="download the checkpoint again")
    return path


def _model_name(name: str) -> str:
    """What the model calls a tensor with this name: one `model.` more or less, as transformers tries it."""
    if name.startswith("model.model.") or name == f"model.{LM_HEAD}":
        return name.removeprefix("model.")
    return f"model.{name}" if name.startswith(_OF_A_BASE_MODEL) else name


def _resolve_head(
    folder: Path, architecture: Architecture, tensors: dict[str, SourceTensor], warn: Warn
) -> Architecture:
    """Leaves one table if the head is tied, and two if it is not.

    Transformers 5 ties two tables that are equal, uses one for both, and does not tie tables that differ.
    """
    if not architecture.tie_word_embeddings:
        if LM_HEAD not in tensors and EMBEDDINGS in tensors:
            raise CheckpointError(
                folder,
                f"a model without a head: no tensor {LM_HEAD}, and config.json does not tie it to the embeddings",
                fix="save the whole model (AutoModelForCausalLM), or set tie_word_embeddings if it is tied",
            )
        return architecture
    if LM_HEAD not in tensors:
        return architecture
    if EMBEDDINGS in tensors and not _equal(tensors[LM_HEAD], tensors[EMBEDDINGS]):
        warn(f"{folder}: config.json ties the head to the embeddings, but the weights have a separate one; it is used")
        return replace(architecture, tie_word_embeddings=False)
    tensors.setdefault(EMBEDDINGS, tensors[LM_HEAD])
    del tensors[LM_HEAD]
    return architecture


def _equal(one: SourceTensor, other: SourceTensor) -> bool:
    if one.shape != other.shape or not one.shape or not {one.dtype, other.dtype} <= set(READABLE.values()):
        return False
    with safe_open(one.file, "numpy") as first, safe_open(other.file, "numpy") as second:
        pairs = zip(tensor_rows(first, one), tensor_rows(second, other), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)


def _headers(path: Path) -> Iterator[SourceTensor]:
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                view = file.get_slice(name)
                dtype = view.get_dtype()
                yield SourceTensor(path, name, tuple(view.get_shape()), READABLE.get(dtype, dtype))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({reason(error)})") from None
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    path, "a pointer of Git LFS, not the file", fix="run `git lfs pull` there"
                ) from None
        raise CheckpointError(
            path, f"not a whole safetensors file ({error})", fix="download the checkpoint again"
        ) from None
