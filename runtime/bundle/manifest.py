"""The bundle: what its manifest says, and whether its files are what the manifest says.

    bundle/
      manifest.json        this module's `Manifest`
      weights.safetensors  every tensor once; the graphs point into it
      draft.onnx verify.onnx head.onnx  draft.ort.onnx verify.ort.onnx head.ort.onnx
      tokenizer.json, chat_template.jinja, config.json, LICENSE*

A bundle is data: nothing in it is run as code, and no name in it leads out of its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edgeskip.runtime.bundle.architecture import Architecture, DType, Size
from edgeskip.runtime.bundle.graphs import CHAINS, DIALECTS, GRAPHS, MAX_SPECULATIONS, Graph, GraphName, graph_table
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.reading import kind_of, read_json
from edgeskip.runtime.structure import Range, structure
from edgeskip.runtime.user_cache import cache_folder, keep

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT_VERSION = 1

FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
"""Names of a bundle's files: flat, and the same on every file system."""

FileSize = Annotated[int, Range(0, 1 << 50)]

Progress = Callable[[str, int, int], None]
"""Called with what is under way, bytes done and bytes in all."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file of the bundle."""

    bytes: FileSize
    sha256: str


@dataclass(frozen=True)
class Packed:
    """What a packed bundle, engines and no graphs, was before: hashes of its weights and of the graphs that its engines
    were built from, by graph, and the bytes of weights that one call of each has to read.
    """

    weights_sha256: str
    onnx_sha256: dict[GraphName, str]
    read_bytes: dict[GraphName, FileSize]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    `max_length` is the cache capacity C in tokens, `num_speculations` the default number of drafts a round,
    `prefill_chunk` the prompt tokens of one call; `bos_token` and `eos_token` are texts for the chat template. `graphs`
    and `chains` repeat the contract for other readers. `synthetic` says that the weights are random, from
    `edgeskip synth`: good for measuring speed only.
    """

    format_version: int
    edgeskip_version: str
    source: str
    architecture: Architecture
    exit_layer: int
    dtype: DType
    max_length: Size
    num_speculations: Annotated[int, Range(1, MAX_SPECULATIONS)]
    prefill_chunk: Size
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    graphs: dict[str, Graph]
    chains: dict[str, tuple[str, ...]]
    files: dict[str, FileRecord]
    synthetic: bool = False
    packed: Packed | None = None

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def table(self) -> dict[GraphName, Graph]:
        """The graphs' tensors."""
        return graph_table(self.architecture.num_layers, self.exit_layer)

    @property
    def engine_sources(self) -> tuple[str, dict[GraphName, str]]:
        """sha256 of the weights and of each standard graph: what an engine of this bundle must have been built from."""
        if self.packed:
            return self.packed.weights_sha256, self.packed.onnx_sha256
        graphs = {graph: self.files[DIALECTS["standard"].format(graph)].sha256 for graph in GRAPHS}
        return self.files[WEIGHTS].sha256, graphs

    @property
    def weights_bytes(self) -> int:
        """Size of the weights file."""
        return self.files[WEIGHTS].bytes


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest, read and found consistent."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file of the bundle is."""
        return self.folder / name

    def require_graphs(self, fix: str) -> None:
        """Finds that the bundle has graphs and all weights, not only engines.

        Raises:
            BundleError: it is packed; `fix` says what to do instead.
        """
        if self.manifest.packed:
            raise BundleError(self.folder, "packed: it has engines, no graphs and not all weights", fix=fix)

    def graph_path(self, graph: GraphName, dialect: str) -> Path:
        """Where a graph is, in a dialect (`standard` or `ort`)."""
        return self.folder / DIALECTS[dialect].format(graph)


def read_bundle(folder: str | Path) -> Bundle:
    """Reads a bundle's manifest and checks that its files are there and of the right size.

    Raises:
        BundleError: no bundle, another format version, a malformed manifest, or a file that is missing, of
            another size or outside the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    found = kind_of(folder, BundleError)
    if found != "a folder":
        raise BundleError(folder, found or "no such folder", fix="give the folder that `edgeskip export` wrote")
    if not kind_of(path, BundleError):
        raise BundleError(folder, f"no {MANIFEST}, so not a bundle", fix="make one with `edgeskip export`")
    data = read_json(path, BundleError, fix="export the bundle again")
    _check_version(path, data)
    manifest = structure(Manifest, data, path, BundleError)
    _check_consistent(path, manifest)
    for name, record in manifest.files.items():
        _check_file(folder, name, record)
    return Bundle(folder, manifest)


def verify_hashes(bundle: Bundle, progress: Progress = lambda *_: None) -> None:
    """Compares every file with its sha256, in full the first time.

    Later loads trust a stamp in the user's cache folder while size, modification time and inode stay as they were.

    Raises:
        BundleError: a file differs from what was exported.
    """
    stamp = _stamp(bundle)
    stamp_path: Path | None = None
    with suppress(BundleError, RuntimeError):  # no stamp, a damaged one, or no home folder
        stamp_path = _stamp_path(bundle)
        if read_json(stamp_path, BundleError) == stamp:
            return
    count = counted("checking the bundle", sum(record.bytes for record in bundle.manifest.files.values()), progress)
    for name, record in bundle.manifest.files.items():
        wanted, fix = f"{record.sha256[:12]}..., as exported", "copy the bundle again or export it again"
        verify_hash(bundle.path(name), record.sha256, count, wanted, fix)
    if stamp_path is None:
        return
    with suppress(OSError):  # a read-only home costs time at the next load, nothing else
        keep(stamp_path, json.dumps(stamp).encode())


def verify_hash(path: Path, sha256: str, count: Callable[[int], None], wanted: str, fix: str) -> None:
    """Compares one file with its sha256; `count` is told of the bytes as they are read.

    Raises:
        BundleError: it differs, with these `wanted` and `fix`, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                count(len(block))
    except OSError as error:
        raise BundleError(path, f"cannot be read ({reason(error)})") from None
    if digest.hexdigest() != sha256:
        raise BundleError(path, f"sha256 is {digest.hexdigest()[:12]}...", wanted=wanted, fix=fix)


def counted(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up bytes as they come, and tells `progress`."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(what, done, total)

    return count


def _check_version(path: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BundleError(path, "no format_version, so not a bundle's manifest", fix="export the bundle again")
    if version != FORMAT_VERSION:
        fix = "upgrade edgeskip" if version > FORMAT_VERSION else "export the bundle again"
        raise BundleError(path, f"format version {version}", wanted=f"{FORMAT_VERSION}", fix=fix)


def _check_consistent(path: Path, manifest: Manifest) -> None:
    layers, vocab_size = manifest.architecture.num_layers, manifest.architecture.vocab_size
    if not all(0 <= i < vocab_size for i in manifest.eos_token_ids):
        raise BundleError(path, f"eos_token_ids {manifest.eos_token_ids}", wanted=f"0 to {vocab_size - 1}")
    if not 1 <= manifest.exit_layer < layers:
        raise BundleError(path, f"exit_layer {manifest.exit_layer}", wanted=f"1 to {layers - 1}")
    context = manifest.architecture.max_position_embeddings
    if not 2 <= manifest.max_length <= context:
        raise BundleError(path, f"max_length {manifest.max_length}", wanted=f"2 to {context}, the model's context")
    if manifest.prefill_chunk > manifest.max_length:
        raise BundleError(path, f"prefill_chunk {manifest.prefill_chunk}", wanted=f"1 to {manifest.max_length}")
    if manifest.graphs != manifest.table or manifest.chains != CHAINS:
        raise BundleError(
            path, "its graphs are not those of this version", fix="export the bundle again with this version"
        )
    if manifest.packed and not set(manifest.packed.onnx_sha256) == set(manifest.packed.read_bytes) == set(GRAPHS):
        raise BundleError(path, "packed: not of every graph", wanted=", ".join(GRAPHS), fix="pack the bundle again")
    wanted = [WEIGHTS, "tokenizer.json"]
    if not manifest.packed:
        wanted += [pattern.format(graph) for pattern in DIALECTS.values() for graph in GRAPHS]
    for name in wanted:
        if name not in manifest.files:
            raise BundleError(path, f"lists no {name}", fix="export the bundle again")


def _check_file(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    if not FILE_NAME.fullmatch(name) or os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):  # noqa: PTH120
        raise BundleError(folder / MANIFEST, f"file {name!r} leads out of the bundle", fix="do not use this bundle")
    if kind_of(path, BundleError) != "a file":
        raise BundleError(path, "missing", fix="copy the bundle again or export it again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(
            path, f"{size} bytes", wanted=f"{record.bytes}", fix="copy the bundle again or export it again"
        )


def _stamp(bundle: Bundle) -> dict[str, Any]:
    stats = {name: bundle.path(name).stat() for name in bundle.manifest.files}
    return {
        name: [stat.st_size, stat.st_mtime_ns, stat.st_ino, bundle.manifest.files[name].sha256]
        for name, stat in stats.items()
    }


def _stamp_path(bundle: Bundle) -> Path:
    key = hashlib.sha256(str(bundle.folder.resolve()).encode()).hexdigest()[:32]
    return cache_folder("checked") / f"{key}.json"
