"""A bundle's TensorRT engines: for which GPUs they can be built, and building them in a process of its own.

TensorRT-RTX compiles ahead of time for the GPU of another machine, and needs no GPU itself; TensorRT times kernels, so
it builds on the device that will run them. Both take the same path, through Polygraphy's loaders.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import edgeskip
from edgeskip.exporter.engines.process import PROGRESS_STEPS, Built, Job
from edgeskip.runtime.backends.device import no_gpu, open_gpu
from edgeskip.runtime.backends.engines.library import MODULES, import_tensorrt, served_by
from edgeskip.runtime.backends.engines.targets import (
    RTX_REFUSED,
    VERSIONS,
    dtype_problem,
    heads_problem,
    versions_text,
)
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import (
    BUILD,
    BUILD_VERSION,
    Build,
    EngineBackend,
    EngineKind,
    EngineRecord,
    Engines,
    manifest_sha256,
)
from edgeskip.runtime.bundle.formats import is_quantized
from edgeskip.runtime.bundle.graphs import Graph, dimensions
from edgeskip.runtime.bundle.layers import LEAST_SM, files_of, has_products
from edgeskip.runtime.bundle.manifest import Bundle, Manifest, Progress, verify_hashes
from edgeskip.runtime.bundle.profiles import EngineProfile, engine_profiles
from edgeskip.runtime.bundle.store import Outcome, engines_place, limit_bytes, make_room, whole_engines
from edgeskip.runtime.errors import BackendError, RequestError
from edgeskip.runtime.files import keep, kept, whole_folder, write_hashed
from edgeskip.runtime.host import has_nvidia_gpu
from edgeskip.runtime.packages import version_numbers

KERNEL_BYTES_PER_LAYER = 2_000_000
"""The most that an engine holds, per decoder layer; TensorRT-RTX 1.7.1: 0.7 MB, and 5 MB in all."""

_CHILD = (
    "import sys; sys.path = [*filter(None, sys.path), sys.argv[1]]; "
    "from edgeskip.exporter.engines.process import main; main()"
)
"""What the process that builds runs. With `-m`, Python would take modules from the current folder, which may be a
bundle; with `-c`, that folder is an empty entry of the path, removed before anything is imported. (`-P` needs Python
3.11.)
"""


@dataclass(frozen=True)
class BuildSettings:
    """How to build.

    Args:
        backend: the kind of TensorRT.
        compute_capabilities: SMs to build for, 86 for 8.6; empty means the GPU present.
        workspace_mb: device memory that a kernel may use besides weights and activations; by default all there is.
        dialect: `standard`, `layers` or `primitive`; by default the best that the installed version reads.
        force: whether engines that the cache has already are built again.
    """

    backend: EngineBackend
    compute_capabilities: tuple[int, ...] = ()
    workspace_mb: int | None = None
    dialect: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Target:
    """A GPU to build for: its SM, and its name if it is present."""

    compute_capability: int
    gpu: str | None


def build_engines(bundle: Bundle, settings: BuildSettings, progress: Progress = lambda *_: None) -> Outcome:
    """Builds the engines for each GPU asked for into the user's cache, unless it has them.

    Each folder is replaced whole, or left as it was. Afterwards, where all engines take more than the limit, those that
    were used least recently go.

    Raises:
        BackendError: TensorRT is missing, too old or refuses a graph, or there is no GPU.
        RequestError: a GPU or a dtype that the backend does not serve, or a limit that is no number.
        BundleError: the bundle is not as exported, or there is no cache that can be trusted or written.
    """
    limit_bytes()
    library = _library(settings.backend)
    version = str(library.__version__)
    dialect = _dialect(bundle, settings, version)
    targets = _targets(library, settings)
    _check_heads(bundle, dialect)
    had: dict[Target, Engines] = {}
    kinds: dict[Target, EngineKind] = {}
    for target in targets:
        _check_dtype(bundle, target.compute_capability, dialect)
        _check_formats(bundle, target.compute_capability)
        kinds[target] = EngineKind(settings.backend, version, target.compute_capability, dialect, settings.workspace_mb)
        if not settings.force and (engines := whole_engines(bundle, kinds[target])):
            had[target] = engines
    if len(had) < len(targets):
        verify_hashes(bundle, progress, weights=False)
    made = [had.get(target) or _build(bundle, kinds[target], target.gpu, progress) for target in targets]
    removed = make_room({engines.folder for engines in made})
    return Outcome(tuple(made), frozenset(engines.folder for engines in had.values()), removed)


def _library(backend: EngineBackend) -> Any:
    """The Python module of a backend."""
    try:
        return import_tensorrt(backend)
    except BackendError:
        if backend == "tensorrt-rtx" or has_nvidia_gpu():
            raise
        wanted = "the one that will run the engines, as TensorRT times kernels"
        raise no_gpu(wanted, "build there, or with --backend tensorrt-rtx") from None


def _dialect(bundle: Bundle, settings: BuildSettings, version: str) -> str:
    """The dialect to build from: the one that was asked for, or the best that the bundle has and this version reads."""
    backend, has = settings.backend, bundle.manifest.engine_dialects
    reads = [name for name, least in VERSIONS[backend].items() if version_numbers(version) >= least]
    if not reads:
        raise BackendError(f"{MODULES[backend]} {version}", "too old", wanted=versions_text(backend))
    best = next(name for name in reads if name in has)
    dialect = settings.dialect or best
    if dialect not in has:
        found = f"quantized bundles have engines of {' or '.join(has)} only"
        raise RequestError(f"--dialect {dialect}", found, fix=f"give --dialect {best}")
    if dialect not in reads:
        place, wanted = f"{MODULES[backend]} {version}", f"{'.'.join(map(str, VERSIONS[backend][dialect]))} or later"
        raise BackendError(place, f"does not read the {dialect} dialect", wanted=wanted, fix=f"give --dialect {best}")
    return dialect


def _targets(library: Any, settings: BuildSettings) -> list[Target]:
    if settings.backend == "tensorrt":
        if settings.compute_capabilities:
            raise RequestError(
                "--sm",
                "given with --backend tensorrt, which times kernels and so builds for the GPU it runs on",
                fix="run it there without --sm, or give --backend tensorrt-rtx",
            )
        return [_present()]
    served = served_by(library)
    listed = ", ".join(map(str, served))
    targets = [Target(sm, None) for sm in dict.fromkeys(settings.compute_capabilities)]
    targets = targets or [_present(f"give --sm, of {listed}, to build for another machine")]
    for target in targets:
        if target.compute_capability not in served:
            raise RequestError(
                f"SM {target.compute_capability}",
                f"not served by TensorRT-RTX {library.__version__}",
                wanted=listed,
                fix=RTX_REFUSED,
            )
    return targets


def _present(fix: str = "") -> Target:
    """The GPU of this machine."""
    try:
        with open_gpu() as device:
            return Target(device.compute_capability, device.name)
    except BackendError as error:
        raise BackendError(error.place, error.found, wanted=error.wanted, fix=fix or error.fix) from None


def _check_dtype(bundle: Bundle, compute_capability: int, dialect: str) -> None:
    """Refuses a bundle whose dtype TensorRT or the GPU does not compute in."""
    dtype = bundle.manifest.dtype
    if wanted := dtype_problem(dtype, compute_capability, dialect):
        found = f"in {dtype}, for SM {compute_capability}"
        raise RequestError(bundle.folder, found, wanted=wanted, fix="export the checkpoint with --dtype fp16")


def _check_formats(bundle: Bundle, compute_capability: int) -> None:
    """Refuses quantized weights that our kernels do not read: TensorRT itself never sees them."""
    manifest = bundle.manifest
    if not is_quantized(manifest.formats.values()) or manifest.has_products(compute_capability):
        return
    wanted = f"SM {LEAST_SM} or later, fp16 or bf16, and hidden, intermediate and attention sizes in steps of 16"
    found = f"quantized weights, in {manifest.dtype} and for SM {compute_capability}"
    in_fp16 = has_products(manifest.architecture, "fp16", manifest.formats.values(), compute_capability)
    fix = f"export the checkpoint {'with --dtype fp16' if in_fp16 else 'without --weights'}"
    raise RequestError(bundle.folder, found, wanted=wanted, fix=fix)


def _check_heads(bundle: Bundle, dialect: str) -> None:
    """Refuses a bundle with attention heads that TensorRT does not compute."""
    a = bundle.manifest.architecture
    if wanted := heads_problem(a, dialect):
        other = "layers" if dialect == "standard" and not heads_problem(a, "layers") else "primitive"
        found = f"{a.num_heads} attention heads of {a.head_dim}" if a.num_heads > 1 else f"one head of {a.head_dim}"
        fix = f"give --dialect {other}" if other in bundle.manifest.engine_dialects else "export it without --weights"
        raise RequestError(bundle.folder, found, wanted=f"{wanted}, for the attention of {dialect}", fix=fix)


def _build(bundle: Bundle, kind: EngineKind, gpu: str | None, progress: Progress) -> Engines:
    manifest, sm, rtx = bundle.manifest, kind.compute_capability, kind.backend == "tensorrt-rtx"
    dialect = ENGINE_DIALECTS[kind.dialect]
    onnx_sha256, profiles = manifest.graph_hashes(dialect), engine_profiles(manifest, dialect, sm)
    destination = engines_place(bundle, kind)
    size = KERNEL_BYTES_PER_LAYER * (manifest.architecture.num_layers + 4)
    records: dict[str, EngineRecord] = {}
    with whole_folder(destination, size, replace=True, mode=0o700) as folder, _builder(kind.backend) as run:
        timings, timings_name = folder / "timings", f"{kind.backend}-sm{sm}-{kind.backend_version}.cache"
        if not rtx and (measured := kept("timings", timings_name)):
            timings.write_bytes(measured)
        contracts = files_of(manifest.graphs, dialect)
        for graph in profiles:
            contract = contracts[graph]
            job = Job(
                onnx=str(bundle.path(dialect.file.format(graph))),
                engine=str(folder / f"{graph}.engine"),
                native_layers=0 if dialect.padded else len(contract.layers),
                profiles=[_shapes(manifest, contract, profile) for profile in profiles[graph]],
                compute_capability=list(divmod(sm, 10)) if rtx else None,
                workspace_bytes=kind.workspace_mb and kind.workspace_mb * 10**6,
                load_timing_cache=str(timings) if timings.is_file() else None,
                save_timing_cache=None if rtx else str(timings),
            )
            start = time.monotonic()
            built = run(job, partial(_report, progress, f"{graph} for SM {sm}"))
            records[graph] = EngineRecord(
                onnx_sha256[graph],
                built.sha256,
                built.bytes,
                profiles[graph],
                round(time.monotonic() - start, 3),
                built.peak_memory_bytes,
            )
            if timings.is_file():
                keep("timings", timings_name, timings.read_bytes())
        for left in folder.glob("timings*"):
            left.unlink()
        build = Build(
            build_version=BUILD_VERSION,
            edgeskip_version=edgeskip.__version__,
            backend=kind.backend,
            backend_version=kind.backend_version,
            compute_capability=sm,
            gpu=gpu,
            dtype=manifest.dtype,
            dialect=kind.dialect,
            workspace_mb=kind.workspace_mb,
            source=manifest.source,
            manifest_sha256=manifest_sha256(bundle),
            engines=records,
        )
        write_hashed(folder / BUILD, [build.to_json().encode()])
    return Engines(destination, build)


def _report(progress: Progress, what: str, done: int) -> None:
    progress(what, done, PROGRESS_STEPS)


def _shapes(manifest: Manifest, graph: Graph, profile: EngineProfile) -> dict[str, list[list[int]]]:
    """The smallest, best and largest shape of each input with rows."""
    sizes = graph.dimensions(dimensions(manifest.architecture, manifest.max_length))
    rows = (profile.min_rows, profile.opt_rows, profile.max_rows)
    return {
        tensor.name: [[sizes.get(dim, count) for dim in tensor.shape] for count in rows]
        for tensor in graph.inputs
        if "T" in tensor.shape
    }


@contextmanager
def _builder(backend: EngineBackend) -> Iterator[Callable[[Job, Callable[[int], None]], Built]]:
    """A process that does jobs in turn, and ends with the block, whatever happens: what it holds goes back then.

    Raises:
        BackendError: TensorRT refuses a graph, or the process dies.
    """
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == "tensorrt-rtx"))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(Path(edgeskip.__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
            text=True,
            encoding="utf-8",
        )
        try:
            yield partial(_run, process, log)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


def _run(process: subprocess.Popen[str], log: IO[bytes], job: Job, report: Callable[[int], None]) -> Built:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        event = json.loads(line)
        if "built" in event:
            report(PROGRESS_STEPS)
            return Built(**event["built"])
        if "failed" in event:
            raise BackendError(job.onnx, event["failed"])
        report(event["done"])
    code = process.wait()
    if code < 0:
        memory = "the system does that where memory is short: free some or add swap" if code == -9 else ""
        raise BackendError(job.onnx, f"building it was ended by {signal.Signals(-code).name}", fix=memory)
    log.seek(0)
    last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise BackendError(job.onnx, f"building it ended with exit code {code} ({last[-500:]})")
