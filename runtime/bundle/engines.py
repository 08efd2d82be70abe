"""A bundle's TensorRT engines: what build.json says of them, and whether they are what it says and fit this machine.

    bundle/engines/
      tensorrt-rtx-sm86-1.7.1.116/   {draft,verify,head}.engine, build.json
      tensorrt-sm87-10.16.0.72/      ...

An engine holds kernels, so it is code: it is loaded only if its sha256 is the one in build.json. Its weights are the
bundle's, so an engine is stale as soon as the bundle's graphs or weights differ from those that it was built from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, get_args

from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.bundle.manifest import (
    SEAL,
    Bundle,
    FileSize,
    Progress,
    Sha256,
    check_hash,
    check_seal,
    counted,
    sealed,
)
from edgeskip.runtime.bundle.profiles import EngineProfile
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.files import open_plain, put_back, sha256_of
from edgeskip.runtime.reading import read_json
from edgeskip.runtime.structure import Range, structure

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_BACKENDS: tuple[EngineBackend, ...] = get_args(EngineBackend)

FOLDER = "engines"
BUILD = "build.json"
BUILD_VERSION = 2


@dataclass(frozen=True)
class EngineRecord:
    """One engine: the graph file it was built from, its own hash and size, and what building it took.

    `peak_memory_bytes` is the host memory of the process that built it; null where the system does not tell.
    """

    onnx_sha256: Sha256
    sha256: Sha256
    bytes: FileSize
    profiles: tuple[EngineProfile, ...]
    seconds: Annotated[float, Range(0)]
    peak_memory_bytes: FileSize | None


@dataclass(frozen=True)
class Build:
    """What build.json says: which TensorRT built these engines, for which GPU, from the graphs of which dialect.

    `manifest_sha256` is the hash of the manifest.json of the bundle that they were built for first.
    `compute_capability` is the SM as a number, 86 for 8.6; `gpu` is the name of the GPU that was present, or null if
    they were built ahead of time for another machine.
    """

    build_version: int
    edgeskip_version: str
    backend: EngineBackend
    backend_version: str
    compute_capability: Annotated[int, Range(50, 999)]
    gpu: str | None
    dtype: DType
    dialect: str
    manifest_sha256: Sha256
    engines: dict[str, EngineRecord]

    def to_json(self) -> str:
        """The text of build.json."""
        return sealed(dataclasses.asdict(self))


@dataclass(frozen=True)
class Engines:
    """A folder of engines and its build.json, read and checked to belong to its bundle."""

    folder: Path
    build: Build

    def path(self, graph: GraphName) -> Path:
        """Where a graph's engine is."""
        return self.folder / f"{graph}.engine"


def engines_folder(bundle: Bundle, backend: EngineBackend, compute_capability: int, version: str) -> Path:
    """Where engines of this backend, GPU and version belong."""
    return bundle.folder / FOLDER / f"{backend}-sm{compute_capability}-{version}"


def build_command(bundle: Bundle, backend: EngineBackend, compute_capability: int | None = None) -> str:
    """The command that builds engines again."""
    target = f" --sm {compute_capability}" if backend == "tensorrt-rtx" and compute_capability else ""
    return f"edgeskip build {bundle.folder} --backend {backend}{target}"


def find_engines(bundle: Bundle) -> tuple[list[Engines], list[BundleError]]:
    """Every set of engines in a bundle, without looking into the engines themselves, and what is wrong with the others:
    a malformed build.json, one for other graphs or weights than this bundle's, an engine that is missing or has another
    size.
    """
    root = bundle.folder / FOLDER
    found: list[Engines] = []
    problems: list[BundleError] = []
    try:
        check_within(bundle, root)
        put_back(root)
        folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    except BundleError as error:
        return [], [error]
    except OSError as error:
        return [], [BundleError(root, f"cannot be read ({reason(error)})")]
    for folder in folders:
        if folder.name.startswith("."):
            continue  # a build under way, or one that was killed
        try:
            if (folder / BUILD).is_file():
                found.append(_read(bundle, folder))
        except BundleError as error:
            problems.append(error)
        except OSError as error:
            problems.append(BundleError(folder, f"cannot be read ({reason(error)})"))
    return found, problems


def read_engines(bundle: Bundle) -> list[Engines]:
    """Every set of engines in a bundle.

    Raises:
        BundleError: something is wrong with one of them.
    """
    found, problems = find_engines(bundle)
    if problems:
        raise problems[0]
    return found


@contextmanager
def open_engines(engines: Engines, progress: Progress = lambda *_: None) -> Iterator[dict[GraphName, IO[bytes]]]:
    """Opens the engines and compares each with its sha256, so that what is read from them later is what was compared.

    Raises:
        BundleError: an engine was cut short or changed.
    """
    records = engines.build.engines
    count = counted("checking the engines", sum(record.bytes for record in records.values()), progress)
    files: dict[GraphName, IO[bytes]] = {}
    with ExitStack() as stack:
        for graph in records:
            path = engines.path(graph)
            try:
                files[graph] = stack.enter_context(open_plain(path))
                found = sha256_of(files[graph], count)
                files[graph].seek(0)
            except OSError as error:
                raise BundleError(path, f"cannot be read ({reason(error)})") from None
            check_engine(path, found, records[graph])
        yield files


def check_engine(path: Path, found: str, record: EngineRecord) -> None:
    """Compares an engine's sha256 with that of the one that was built.

    Raises:
        BundleError: they differ.
    """
    check_hash(path, found, record.sha256, "as built", "copy it again or build it again")


def check_within(bundle: Bundle, path: Path) -> None:
    """Checks that a file or folder of the bundle is not a link to elsewhere.

    Raises:
        BundleError: it leads out of the bundle.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle.folder)):
        raise BundleError(path, "leads out of the bundle", fix="do not use this bundle")


def _read(bundle: Bundle, folder: Path) -> Engines:
    path = folder / BUILD
    for own in (folder, path, *(folder / f"{graph}.engine" for graph in bundle.manifest.graphs)):
        check_within(bundle, own)
    data = read_json(path, BundleError, fix="build the engines again")
    if not isinstance(data, dict) or data.get("build_version") != BUILD_VERSION:
        found = data.get("build_version") if isinstance(data, dict) else data
        raise BundleError(
            path, f"build version {found!r:.40}", wanted=f"{BUILD_VERSION}", fix="build the engines again"
        )
    seal = data.pop(SEAL, None)
    build = structure(Build, data, path, BundleError)
    onnx_sha256 = bundle.manifest.graph_hashes(ENGINE_DIALECTS[build.dialect])
    graphs = list(onnx_sha256)
    if set(build.engines) != set(graphs):
        raise BundleError(path, f"engines of {', '.join(build.engines) or 'nothing'}", wanted=", ".join(graphs))
    again = build_command(bundle, build.backend, build.compute_capability)
    for graph in graphs:
        record = build.engines[graph]
        if record.onnx_sha256 != onnx_sha256[graph]:
            raise BundleError(path, f"built from another {graph} graph", fix=again)
        engine = folder / f"{graph}.engine"
        size = engine.stat().st_size if engine.is_file() else None
        if size != record.bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise BundleError(
                engine, found, wanted=f"{record.bytes} bytes, as built", fix=f"copy it again or run {again}"
            )
    check_seal(path, data, seal, f"copy it again or run {again}")
    return Engines(folder, build)
