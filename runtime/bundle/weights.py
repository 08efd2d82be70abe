"""Reading a bundle's weights file: the token embeddings, mapped, and how much of it each graph has to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import BY_SAFETENSORS, NUMBER_TYPES, DType
from edgeskip.runtime.bundle.formats import FORMATS, Format, is_quantized
from edgeskip.runtime.bundle.graphs import Graph, GraphName
from edgeskip.runtime.bundle.manifest import WEIGHTS, Bundle
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, TensorRecord, graph_tensors
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.reading import MOST_BYTES, parse_json

_ALIGNMENT = 256
_FILLER = "padding."
_FIX = "export the bundle again"


@dataclass(frozen=True)
class StoredArray:
    """An array of the file: its number type as safetensors spells it, its shape, first byte in the file and size."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def lay_out(tensors: Iterable[TensorRecord], dtype: DType) -> dict[str, StoredArray]:
    """The arrays of a weights file in order, offsets counted from the end of its header.

    Each begins on a 256-byte boundary, so that TensorRT reads it where it lies. safetensors allows no holes, so fillers
    are arrays too, and the last one ends the file on such a boundary.
    """
    arrays: dict[str, StoredArray] = {}
    end = 0

    def place(name: str, number: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        arrays[name] = StoredArray(
            NUMBER_TYPES[number].safetensors, shape, end, math.prod(shape) * NUMBER_TYPES[number].bytes
        )
        end += arrays[name].bytes

    for record in tensors:
        for part in FORMATS[record.format].parts:
            place(record.name + part.suffix, part.number_type(dtype), part.shape(record.shape))
            if gap := -end % _ALIGNMENT:
                place(f"{_FILLER}{end}", "uint8", (gap,))
    return arrays


def header_of(arrays: Mapping[str, StoredArray]) -> bytes:
    """The beginning of a weights file with these arrays, up to the first one."""
    entries = {"__metadata__": {"format": "edgeskip"}} | {name: _entry(array) for name, array in arrays.items()}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _entry(array: StoredArray) -> dict[str, Any]:
    offsets = [array.offset, array.offset + array.bytes]
    return {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": offsets}


def stored_arrays(bundle: Bundle) -> dict[str, StoredArray]:
    """The file's arrays by name, without fillers: those that the manifest calls for, in its order.

    Raises:
        BundleError: the file has no such header, or its header has another array, number type, shape or place.
    """
    path, manifest = bundle.path(WEIGHTS), bundle.manifest
    header, start, end = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BundleError(path, f"__metadata__ is {metadata!r:.60}", wanted="a table of texts", fix=_FIX)
    arrays = lay_out(manifest.tensors.values(), manifest.dtype)
    last = start + max(array.offset + array.bytes for array in arrays.values())
    if last != end:
        raise BundleError(path, f"{end} bytes", wanted=f"{last}, by its manifest", fix=_FIX)
    for name, array in arrays.items():
        wanted, found = _text(_entry(array)), _text(header.pop(name, None))
        if found != wanted:
            raise BundleError(path, f"{name} is {found:.120}", wanted=f"{wanted}, by its manifest", fix=_FIX)
    if header:
        raise BundleError(path, f"has {next(iter(header))!r}, which the manifest does not call for", fix=_FIX)
    if start != len(header_of(arrays)):  # the graphs count from the beginning of the file
        raise BundleError(path, f"a header of {start} bytes", wanted=f"{len(header_of(arrays))}", fix=_FIX)
    return {
        name: replace(array, offset=start + array.offset)
        for name, array in arrays.items()
        if not name.startswith(_FILLER)
    }


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


def _text(entry: Any) -> str:
    """An entry of the header as a text, to compare it: a shape of [1.0] is not a shape of [1]."""
    return "missing" if entry is None else json.dumps(entry, sort_keys=True)


class StoredTensor:
    """A tensor of the bundle in any format, mapped from the weights file."""

    def __init__(self, bundle: Bundle, record: TensorRecord, arrays: Mapping[str, StoredArray]) -> None:
        self._format: Format = FORMATS[record.format]
        self._dtype: DType = bundle.manifest.dtype
        self._parts = [
            mapped(bundle, arrays[record.name + part.suffix], part.number_type(self._dtype))
            for part in self._format.parts
        ]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        """Rows [n, ...] in the bundle's dtype, bf16 as raw 16-bit words."""
        return self._format.decode(self.stored(rows), self._dtype)

    def stored(self, rows: Any) -> list[npt.NDArray[Any]]:
        """Rows as they are stored, [n, ...] of each part of the format."""
        return [part[rows] for part in self._parts]

    def read(self, rows: Sequence[int], out: npt.NDArray[Any]) -> None:
        """Puts rows into [n, ...] in the bundle's dtype, without a copy on the way if they are stored so."""
        if is_quantized([self._format.name]):
            out[:] = self[list(rows)]
        else:
            np.take(self._parts[0], rows, axis=0, out=out, mode="clip")  # a mode that raises copies first


@dataclass(frozen=True)
class TokenRows:
    """Embeddings [T,H] of tokens, read from their table only where they are wanted as numbers: a session that has the
    table itself needs the ids alone.
    """

    table: StoredTensor
    token_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: slice) -> TokenRows:
        return TokenRows(self.table, self.token_ids[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """In the bundle's dtype, bf16 as raw 16-bit words."""
        rows = self.table[list(self.token_ids)]
        return rows if dtype is None else rows.astype(dtype)

    def read(self, out: npt.NDArray[Any]) -> None:
        """Puts them into [T,H] in the bundle's dtype."""
        self.table.read(self.token_ids, out)


Rows: TypeAlias = "npt.NDArray[Any] | TokenRows"
"""States [T,H] as numbers, or the embeddings of tokens."""


def read_rows(rows: Rows, out: npt.NDArray[Any]) -> None:
    """Puts rows into [T,H] in the bundle's dtype."""
    if isinstance(rows, TokenRows):
        rows.read(out)
    else:
        out[:] = rows


def embedding_table(bundle: Bundle) -> StoredTensor:
    """The token embeddings [V,H]."""
    return StoredTensor(bundle, bundle.manifest.tensors[EMBEDDINGS], stored_arrays(bundle))


def mapped(bundle: Bundle, array: StoredArray, number: str) -> npt.NDArray[Any]:
    """An array of the weights file, mapped; bf16 as raw 16-bit words."""
    kind = np.dtype(NUMBER_TYPES[number].numpy)
    return np.memmap(bundle.path(WEIGHTS), kind, "r", offset=array.offset, shape=array.shape)


def mapped_weights(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """Every array of the weights file, mapped; bf16 as raw 16-bit words."""
    return {name: mapped(bundle, one, BY_SAFETENSORS[one.dtype]) for name, one in stored_arrays(bundle).items()}


def held_bytes(bundle: Bundle) -> int:
    """Bytes of weights where each graph holds its own, but for tables in the dtype, which all heads share: of a
    quantized one, each head holds its rows, and twice if it both multiplies and gathers from them, as these read two
    layouts.
    """
    manifest = bundle.manifest
    tables = (EMBEDDINGS, EMBEDDINGS if manifest.architecture.tie_word_embeddings else LM_HEAD)
    own = [manifest.tensors[name] for name in tables if is_quantized([manifest.tensors[name].format])]

    def size(record: TensorRecord, rows: int) -> int:
        return FORMATS[record.format].bytes((rows, *record.shape[1:]), manifest.dtype)

    in_file = sum(size(record, record.shape[0]) for record in {record.name: record for record in own}.values())
    held = sum(size(record, head.vocabulary) for head in manifest.heads.values() for record in own)
    return manifest.weights_bytes - in_file + held


def bytes_by_format(tensors: Iterable[TensorRecord], dtype: DType) -> dict[str, int]:
    """Bytes of these tensors by their format, the one with most bytes first."""
    sizes: dict[str, int] = {}
    for record in tensors:
        sizes[record.format] = sizes.get(record.format, 0) + FORMATS[record.format].bytes(record.shape, dtype)
    return dict(sorted(sizes.items(), key=lambda pair: -pair[1]))


def read_bytes(bundle: Bundle) -> dict[GraphName, int]:
    """Bytes of weights that one call of each graph has to read, however few its rows."""
    manifest = bundle.manifest
    return bytes_by_graph(manifest.architecture, manifest.graphs, manifest.tensors, manifest.dtype)


def bytes_by_graph(
    architecture: Architecture, graphs: Mapping[GraphName, Graph], tensors: Mapping[str, TensorRecord], dtype: DType
) -> dict[GraphName, int]:
    """How much of these tensors one call of each graph reads; only a tied head reads the embedding table."""

    def size(name: str, graph: Graph) -> int:
        record = tensors[name]
        shape = record.shape
        if graph.head and name in (EMBEDDINGS, LM_HEAD):
            shape = (graph.head.vocabulary, *shape[1:])
        return FORMATS[record.format].bytes(shape, dtype)

    return {
        name: sum(size(tensor, graph) for tensor in graph_tensors(architecture, graph.layers))
        for name, graph in graphs.items()
    }
