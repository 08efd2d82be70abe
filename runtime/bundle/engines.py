"""TensorRT engines on disk: what build.json says of a set of them, and whether they are what it says.

    tensorrt-rtx-sm86-1.7.1.116-0123456789abcdef/   {draft,verify,head}.engine, build.json

No weight is in an engine, so one set serves every bundle that has the same graphs. Its name ends in a key, a hash of
all that decides what the engines are. An engine holds kernels, so it is code: it is loaded only if its sha256 is the
one in build.json, and only from the user's own cache (store.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, get_args

from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS, Dialect
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.bundle.manifest import (
    MANIFEST,
    SEAL,
    Bundle,
    FileSize,
    Manifest,
    Progress,
    Sha256,
    check_hash,
    check_seal,
    counted,
    sealed,
)
from edgeskip.runtime.bundle.profiles import EngineProfile, engine_profiles
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.files import blocks_of, open_plain, sha256_of, shared, write_hashed
from edgeskip.runtime.reading import read_json
from edgeskip.runtime.structure import Pattern, Range, structure

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_BACKENDS: tuple[EngineBackend, ...] = get_args(EngineBackend)
BUILD = "build.json"
BUILD_VERSION = 3

SM = Annotated[int, Range(50, 999)]
"""A compute capability as a number: 86 for 8.6."""

EngineDialect = Annotated[str, Pattern("|".join(ENGINE_DIALECTS), " or ".join(map(repr, ENGINE_DIALECTS)))]
Version = Annotated[str, Pattern("[0-9A-Za-z][0-9A-Za-z.+_-]{0,60}", "a version")]
WorkspaceMB = Annotated[int, Range(1, 1 << 20)]


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
class EngineKind:
    """Which engines of a bundle: by which TensorRT, for which GPU, from the graphs of which dialect.

    `workspace_mb` is the most device memory for a kernel's own use; null if there was no limit.
    """

    backend: EngineBackend
    backend_version: str
    compute_capability: int
    dialect: str
    workspace_mb: int | None = None


@dataclass(frozen=True)
class Build:
    """What build.json says: which TensorRT built these engines, for which GPU, from the graphs of which dialect.

    `gpu` is the name of the GPU that was present, or null if they were built ahead of time for another machine.
    `source` and `manifest_sha256` are those of the bundle that they were built for first, or came with: the name of its
    checkpoint, and the hash of its manifest.json.
    """

    build_version: int
    edgeskip_version: str
    backend: EngineBackend
    backend_version: Version
    compute_capability: SM
    gpu: str | None
    dtype: DType
    dialect: EngineDialect
    workspace_mb: WorkspaceMB | None
    source: str
    manifest_sha256: Sha256
    engines: dict[str, EngineRecord]

    @property
    def kind(self) -> EngineKind:
        """What tells these engines from others of the same bundle."""
        return EngineKind(self.backend, self.backend_version, self.compute_capability, self.dialect, self.workspace_mb)

    @property
    def bytes(self) -> int:
        """Size of all engines together."""
        return sum(record.bytes for record in self.engines.values())

    def to_json(self) -> str:
        """The text of build.json."""
        return sealed(dataclasses.asdict(self))


@dataclass(frozen=True)
class Engines:
    """A folder of engines and its build.json, read and checked to belong to a bundle."""

    folder: Path
    build: Build

    @property
    def dialect(self) -> Dialect:
        """The dialect of the graphs that they were built from."""
        return ENGINE_DIALECTS[self.build.dialect]

    def path(self, graph: GraphName) -> Path:
        """Where a graph's engine is."""
        return self.folder / f"{graph}.engine"


def engines_name(manifest: Manifest, kind: EngineKind) -> str:
    """The name of a bundle's engines of a kind, which every bundle that they serve gives them, and no other.

    Its key is a hash of all that decides what they are.
    """
    dialect = ENGINE_DIALECTS[kind.dialect]
    profiles = engine_profiles(manifest, dialect, kind.compute_capability)
    decided_by = {
        "build_version": BUILD_VERSION,
        "kind": dataclasses.asdict(kind),
        "dtype": manifest.dtype,
        "graphs": manifest.graph_hashes(dialect),
        "profiles": {graph: [dataclasses.astuple(one) for one in profiles[graph]] for graph in profiles},
    }
    key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
    return f"{kind.backend}-sm{kind.compute_capability}-{kind.backend_version}-{key}"


def build_command(bundle: Bundle, backend: EngineBackend, compute_capability: int | None = None) -> str:
    """The command that builds engines."""
    target = f" --sm {compute_capability}" if backend == "tensorrt-rtx" and compute_capability else ""
    return f"edgeskip build {bundle.folder} --backend {backend}{target}"


def manifest_sha256(bundle: Bundle) -> str:
    """The hash of the file manifest.json.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle.path(MANIFEST)
    try:
        with open_plain(path) as file:
            return sha256_of(file)
    except OSError as error:
        raise BundleError(path, f"cannot be read ({reason(error)})") from None


def read_build(folder: Path) -> Build:
    """What the build.json of a folder says.

    Raises:
        BundleError: it is missing, malformed, of another version, or was changed by accident.
    """
    path, fix = folder / BUILD, "build the engines again"
    data = read_json(path, BundleError, fix=fix)
    if not isinstance(data, dict) or data.get("build_version") != BUILD_VERSION:
        found = data.get("build_version") if isinstance(data, dict) else data
        raise BundleError(path, f"build version {found!r:.40}", wanted=f"{BUILD_VERSION}", fix=fix)
    seal = data.pop(SEAL, None)
    build = structure(Build, data, path, BundleError)
    check_seal(path, data, seal, fix)
    return build


def check_engines(bundle: Bundle, folder: Path, build: Build) -> Engines:
    """The engines of a folder, if they were built from this bundle's graphs and have the sizes that they had then.

    Raises:
        BundleError: they were not, or an engine is missing or has another size.
    """
    path, manifest, engines = folder / BUILD, bundle.manifest, Engines(folder, build)
    again = build_command(bundle, build.backend, build.compute_capability)
    if build.dialect not in manifest.engine_dialects:
        wanted = ", ".join(manifest.engine_dialects)
        raise BundleError(path, f"engines of {build.dialect}, for quantized weights", wanted=wanted, fix=again)
    onnx_sha256 = manifest.graph_hashes(engines.dialect)
    profiles = engine_profiles(manifest, engines.dialect, build.compute_capability)
    if set(build.engines) != set(profiles):
        found = f"engines of {', '.join(build.engines) or 'nothing'}"
        raise BundleError(path, found, wanted=", ".join(profiles), fix=again)
    if build.dtype != manifest.dtype:
        raise BundleError(path, f"engines in {build.dtype}", wanted=manifest.dtype, fix=again)
    for graph, record in build.engines.items():
        if record.onnx_sha256 != onnx_sha256[graph]:
            raise BundleError(path, f"built from another {graph} graph", fix=again)
        if record.profiles != profiles[graph]:
            raise BundleError(path, f"{graph} built for other numbers of rows", fix=again)
        engine = engines.path(graph)
        size = engine.stat().st_size if engine.is_file() else None
        if size != record.bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise BundleError(engine, found, wanted=f"{record.bytes} bytes, as built", fix=again)
    return engines


@contextmanager
def open_engines(engines: Engines, progress: Progress = lambda *_: None) -> Iterator[dict[GraphName, IO[bytes]]]:
    """Opens the engines and compares each with its sha256, so that what is read from them later is what was compared.

    Meanwhile nobody else removes them.

    Raises:
        BundleError: an engine was cut short or changed.
    """
    records = engines.build.engines
    count = counted("checking the engines", sum(record.bytes for record in records.values()), progress)
    files: dict[GraphName, IO[bytes]] = {}
    with ExitStack() as stack:
        try:
            stack.enter_context(shared(engines.folder))
        except OSError as error:
            raise BundleError(engines.folder, f"cannot be opened ({reason(error)})", fix="try again") from None
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


def copy_engines(engines: Engines, folder: Path, manifest_hash: str, progress: Progress = lambda *_: None) -> None:
    """Copies engines into an empty folder, as those of the bundle whose manifest.json has this hash.

    Raises:
        BundleError: an engine was cut short or changed.
        OSError: the folder cannot be written.
    """
    with open_engines(engines, progress) as files:
        for graph, file in files.items():
            _, copied = write_hashed(folder / engines.path(graph).name, blocks_of(file))
            check_engine(engines.path(graph), copied, engines.build.engines[graph])
    build = dataclasses.replace(engines.build, manifest_sha256=manifest_hash)
    write_hashed(folder / BUILD, [build.to_json().encode()])
