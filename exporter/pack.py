"""What a device needs of a bundle that has engines, and no more.

packed/
  manifest.json         as the bundle's, and which graphs and weights its engines were built from
  weights.safetensors   the embedding table alone, for prompts; every other weight is in the engines
  tokenizer.json config.json chat_template.jinja LICENSE*
  engines/<backend>-sm<SM>-<version>/...
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from edgeskip.runtime.bundle.engines import BUILD, FOLDER, Engines, check_engine
from edgeskip.runtime.bundle.graphs import DIALECTS, GRAPHS
from edgeskip.runtime.bundle.manifest import (
    MANIFEST,
    WEIGHTS,
    Bundle,
    FileRecord,
    Packed,
    Progress,
    check_hash,
    counted,
    verify_hashes,
)
from edgeskip.runtime.bundle.weights import EMBEDDINGS, read_bytes, stored_tensors
from edgeskip.runtime.errors import BundleError
from edgeskip.runtime.files import blocks_of, check_destination, open_plain, whole_folder, write_hashed


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
    graphs = {pattern.format(graph) for pattern in DIALECTS.values() for graph in GRAPHS}
    kept = [name for name in manifest.files if name not in graphs | {WEIGHTS}]
    table = stored_tensors(bundle)[EMBEDDINGS]
    total = table.bytes + sum(record.bytes for one in engines for record in one.build.engines.values())
    count = counted("packing", total, progress)
    with whole_folder(destination, total) as folder:
        files = {WEIGHTS: _write_table(bundle, folder / WEIGHTS, count)}
        for name in kept:
            path, wanted = bundle.path(name), manifest.files[name]
            files[name] = _copy(path, folder / name, lambda _: None)
            check_hash(path, files[name].sha256, wanted.sha256, "as exported", "export the bundle again")
        for one in engines:
            target = folder / FOLDER / one.folder.name
            target.mkdir(parents=True)
            for graph in GRAPHS:
                copied = _copy(one.path(graph), target / one.path(graph).name, count)
                check_engine(one.path(graph), copied.sha256, one.build.engines[graph])
            write_hashed(target / BUILD, [one.build.to_json().encode()])
        weights_sha256, onnx_sha256 = manifest.engine_sources
        packed = Packed(weights_sha256, onnx_sha256, read_bytes(bundle))
        made = dataclasses.replace(manifest, files=files, packed=packed)
        write_hashed(folder / MANIFEST, [made.to_json().encode()])
    return Bundle(destination, made)


def _write_table(bundle: Bundle, path: Path, count: Callable[[int], None]) -> FileRecord:
    """A safetensors file of the embedding table alone."""
    table = stored_tensors(bundle)[EMBEDDINGS]
    entry = {"dtype": table.dtype, "shape": list(table.shape), "data_offsets": [0, table.bytes]}
    header = json.dumps({EMBEDDINGS: entry}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)
    with bundle.path(WEIGHTS).open("rb") as source:
        source.seek(table.offset)
        start = (len(header).to_bytes(8, "little"), header)
        return FileRecord(*write_hashed(path, chain(start, blocks_of(source, count, table.bytes))))


def _copy(source: Path, target: Path, count: Callable[[int], None]) -> FileRecord:
    """Copies a file; its hash is of what was written."""
    with open_plain(source) as file:
        return FileRecord(*write_hashed(target, blocks_of(file, count)))
