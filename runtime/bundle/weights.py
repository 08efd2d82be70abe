"""Reading a bundle's weights file: the token embeddings, mapped, and what each graph has to read of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.graphs import GRAPHS, GraphName
from edgeskip.runtime.bundle.manifest import WEIGHTS, Bundle

EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its dtype as safetensors spells it, shape, first byte in the file and size."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def stored_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The file's tensors by name, from its header; fillers left out."""
    with bundle.path(WEIGHTS).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith("padding."):
            start, end = entry["data_offsets"]
            tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
    return tensors


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
