"""Reading a bundle's weights file: the token embeddings, mapped, and what each graph has to read of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.architecture import ITEMSIZE
from edgeskip.runtime.bundle.graphs import GRAPHS, GraphName
from edgeskip.runtime.bundle.manifest import WEIGHTS, Bundle, Manifest
from edgeskip.runtime.bundle.tensors import bundle_tensors
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.reading import MOST_BYTES, parse_json

EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"

_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_ALIGNMENT = 64
_FIX = "export the bundle again"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its dtype as safetensors spells it, shape, first byte in the file and size."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def stored_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The file's tensors by name, fillers left out: those that the manifest calls for, in its order.

    Raises:
        BundleError: the file's header is none, or has another tensor, dtype, shape or place.
    """
    path = bundle.path(WEIGHTS)
    header, start, end = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BundleError(path, f"__metadata__ is {metadata!r:.60}", wanted="a table of texts", fix=_FIX)
    tensors = _wanted_tensors(bundle.manifest, start, end)
    last = max(tensor.offset + tensor.bytes for tensor in tensors.values())
    if last != end:
        raise BundleError(path, f"{end} bytes", wanted=f"{last}, by the manifest", fix=_FIX)
    for name, tensor in tensors.items():
        offset = tensor.offset - start
        offsets = [offset, offset + tensor.bytes]
        wanted = _text({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets})
        found = _text(header.pop(name, None))
        if found != wanted:
            raise BundleError(path, f"{name} is {found:.120}", wanted=f"{wanted}, by the manifest", fix=_FIX)
    if header:
        raise BundleError(path, f"has {next(iter(header))!r}, which the manifest does not call for", fix=_FIX)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("padding.")}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, the first byte after it, and the file's size."""
    try:
        with path.open("rb") as file:
            size, end = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if not 0 < size <= min(end - 8, MOST_BYTES):
                raise BundleError(path, f"a header of {size} bytes in a file of {end}", fix=_FIX)
            header = parse_json(file.read(size), path, BundleError, fix=_FIX)
    except OSError as error:
        raise BundleError(path, f"cannot be read ({reason(error)})") from None
    if not isinstance(header, dict):
        raise BundleError(path, f"its header is {header!r:.60}", wanted="a table of tensors", fix=_FIX)
    return header, 8 + size, end


def _wanted_tensors(manifest: Manifest, start: int, end: int) -> dict[str, StoredTensor]:
    """The tensors that a manifest calls for and the fillers that align them, in a file with data from `start` on."""
    a = manifest.architecture
    shapes: dict[str, tuple[int, ...]]
    if manifest.packed:
        shapes = {EMBEDDINGS: (a.vocab_size, a.hidden_size)}
    else:
        shapes = {name: shape for name, (shape, _) in bundle_tensors(a).items()}
        shapes |= dict.fromkeys(("rope.cos", "rope.sin"), (manifest.max_length, a.head_dim // 2))
    tensors: dict[str, StoredTensor] = {}
    position = start

    def place(name: str, dtype: str, shape: tuple[int, ...], itemsize: int) -> None:
        nonlocal position
        tensors[name] = StoredTensor(dtype, shape, position, math.prod(shape) * itemsize)
        position += tensors[name].bytes

    for name, shape in shapes.items():
        if gap := (start - position) % _ALIGNMENT:
            place(f"padding.{position - start}", "U8", (gap,), 1)
        place(name, _NAMES[manifest.dtype], shape, ITEMSIZE[manifest.dtype])
    if 0 < end - position < _ALIGNMENT:
        place(f"padding.{position - start}", "U8", (end - position,), 1)
    return tensors


def _text(entry: Any) -> str:
    """An entry of the header, to compare: a shape of [1.0] is not one of [1]."""
    return "missing" if entry is None else json.dumps(entry, sort_keys=True)


def embedding_table(bundle: Bundle) -> npt.NDArray[Any]:
    """The token embeddings [V,H], mapped from the weights file; bf16 as raw 16-bit words."""
    table = stored_tensors(bundle)[EMBEDDINGS]
    return np.memmap(bundle.path(WEIGHTS), _NUMPY[table.dtype], "r", offset=table.offset, shape=table.shape)


def read_bytes(bundle: Bundle) -> dict[GraphName, int]:
    """Bytes of weights that one call of each graph has to read, however few its rows."""
    manifest = bundle.manifest
    if manifest.packed:
        return {graph: manifest.packed.read_bytes[graph] for graph in GRAPHS}
    sizes = {name: tensor.bytes for name, tensor in stored_tensors(bundle).items()}
    return bytes_by_graph(sizes, manifest.exit_layer, tied=manifest.architecture.tie_word_embeddings)


def bytes_by_graph(sizes: Mapping[str, int], exit_layer: int, *, tied: bool) -> dict[GraphName, int]:
    """What one call of each graph reads of tensors of these sizes: of the embedding table, a tied head alone."""
    read: dict[GraphName, int] = {"draft": 0, "verify": 0, "head": 0}
    for name, size in sizes.items():
        if layer := _LAYER.match(name):
            read["draft" if int(layer[1]) < exit_layer else "verify"] += size
    read["head"] = sizes[EMBEDDINGS if tied else LM_HEAD] + sizes[NORM]
    return read
