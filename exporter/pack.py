"""What a device needs of a bundle that has engines, and no more.

packed/
  manifest.json         as the bundle's, and which graphs and weights its engines were built from
  weights.safetensors   the embedding table alone, for prompts; every other weight is in the engines
  tokenizer.json config.json chat_template.jinja LICENSE*
  engines/<backend>-sm<SM>-<version>/...
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from edgeskip.exporter.folder import check_destination, sync, whole_or_absent
from edgeskip.runtime.bundle.engines import BUILD, FOLDER, Engines, verify_engines
from edgeskip.runtime.bundle.graphs import DIALECTS, GRAPHS
from edgeskip.runtime.bundle.manifest import (
    MANIFEST,
    WEIGHTS,
    Bundle,
    FileRecord,
    Packed,
    Progress,
    counted,
    verify_hashes,
)
from edgeskip.runtime.bundle.weights import EMBEDDINGS, read_bytes, stored_tensors
from edgeskip.runtime.errors import BundleError

_BLOCK_BYTES = 1 << 22


def pack(bundle: Bundle, engines: Sequence[Engines], destination: Path, progress: Progress = lambda *_: None) -> Bundle:
    """Writes the packed bundle with these engines.

    Raises:
        BundleError: no engines, damaged ones or weights, or a destination that exists or cannot be written.
    """
    manifest = bundle.manifest
    if not engines:
        raise BundleError(
            bundle.folder, "no engines to pack", fix=f"build them: edgeskip build {bundle.folder} --backend ..."
        )
    check_destination(destination)
    verify_hashes(bundle, progress)
    for one in engines:
        verify_engines(one, progress)
    graphs = {pattern.format(graph) for pattern in DIALECTS.values() for graph in GRAPHS}
    kept = [name for name in manifest.files if name not in graphs | {WEIGHTS}]
    table = stored_tensors(bundle)[EMBEDDINGS]
    total = table.bytes + sum(record.bytes for one in engines for record in one.build.engines.values())
    count = counted("packing", total, progress)
    with whole_or_absent(destination, total) as folder:
        files = {WEIGHTS: _write_table(bundle, folder / WEIGHTS, count)}
        for name in kept:
            _copy(bundle.path(name), folder / name, lambda _: None)
            files[name] = manifest.files[name]
        for one in engines:
            target = folder / FOLDER / one.folder.name
            target.mkdir(parents=True)
            for graph in GRAPHS:
                _copy(one.path(graph), target / one.path(graph).name, count)
            _copy(one.folder / BUILD, target / BUILD, lambda _: None)
        weights_sha256, onnx_sha256 = manifest.engine_sources
        packed = Packed(weights_sha256, onnx_sha256, read_bytes(bundle))
        made = dataclasses.replace(manifest, files=files, packed=packed)
        with (folder / MANIFEST).open("wb") as file:
            file.write(made.to_json().encode())
            sync(file)
    return Bundle(destination, made)


def _write_table(bundle: Bundle, path: Path, count: Callable[[int], None]) -> FileRecord:
    """A safetensors file of the embedding table alone."""
    table = stored_tensors(bundle)[EMBEDDINGS]
    entry = {"dtype": table.dtype, "shape": list(table.shape), "data_offsets": [0, table.bytes]}
    header = json.dumps({EMBEDDINGS: entry}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)
    digest = hashlib.sha256()
    with bundle.path(WEIGHTS).open("rb") as source, path.open("wb") as target:
        source.seek(table.offset)
        blocks = _blocks(source, table.bytes, count)
        for block in chain((len(header).to_bytes(8, "little"), header), blocks):
            target.write(block)
            digest.update(block)
        sync(target)
    return FileRecord(8 + len(header) + table.bytes, digest.hexdigest())


def _copy(source: Path, target: Path, count: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        for block in _blocks(reader, source.stat().st_size, count):
            writer.write(block)
        sync(writer)


def _blocks(file: IO[bytes], size: int, count: Callable[[int], None]) -> Iterator[bytes]:
    """The next `size` bytes of a file, told as they are read."""
    while size and (block := file.read(min(size, _BLOCK_BYTES))):
        size -= len(block)
        count(len(block))
        yield block
