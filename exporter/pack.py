"""What a device needs of a bundle that has engines, and no more.

packed/
  manifest.json         the bundle's, with the graphs and weights that its engines were built from
  weights.safetensors   the embedding table alone, for prompts; every other weight is in the engines
  tokenizer.json config.json chat_template.jinja LICENSE*
  engines/<backend>-sm<SM>-<version>/...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.engines import BUILD, FOLDER, Engines, check_engine
from edgeskip.runtime.bundle.formats import FORMATS
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
from edgeskip.runtime.bundle.tensors import EMBEDDINGS
from edgeskip.runtime.bundle.weights import header_of, lay_out, read_bytes, stored_arrays
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
    graphs = {dialect.file.format(graph) for dialect in DIALECTS.values() for graph in manifest.graphs}
    kept = [name for name in manifest.files if name not in graphs | {WEIGHTS}]
    table = manifest.tensors[EMBEDDINGS]
    total = FORMATS[table.format].bytes(table.shape, manifest.dtype)
    total += sum(record.bytes for one in engines for record in one.build.engines.values())
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
            for graph in manifest.graphs:
                copied = _copy(one.path(graph), target / one.path(graph).name, count)
                check_engine(one.path(graph), copied.sha256, one.build.engines[graph])
            write_hashed(target / BUILD, [one.build.to_json().encode()])
        weights_sha256, onnx_sha256 = manifest.engine_sources
        packed = Packed(weights_sha256, onnx_sha256, read_bytes(bundle))
        made = dataclasses.replace(manifest, files=files, packed=packed)
        write_hashed(folder / MANIFEST, [made.to_json().encode()])
    return Bundle(destination, made)


def _write_table(bundle: Bundle, path: Path, count: Callable[[int], None]) -> FileRecord:
    """Writes a safetensors file of the embedding table alone."""
    arrays, manifest = stored_arrays(bundle), bundle.manifest
    laid = lay_out([manifest.tensors[EMBEDDINGS]], manifest.dtype)
    with bundle.path(WEIGHTS).open("rb") as source:

        def blocks() -> Iterator[bytes]:
            yield header_of(laid)
            for name, array in laid.items():
                if name in arrays:
                    source.seek(arrays[name].offset)
                    yield from blocks_of(source, count, array.bytes)
                else:
                    yield bytes(array.bytes)

        return FileRecord(*write_hashed(path, blocks()))


def _copy(source: Path, target: Path, count: Callable[[int], None]) -> FileRecord:
    """Copies a file; the hash is that of what was written."""
    with open_plain(source) as file:
        return FileRecord(*write_hashed(target, blocks_of(file, count)))
