"""Which session serves a bundle on this machine."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Literal, get_args

from edgeskip.runtime.errors import BackendError, BundleError, EdgeskipError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeskip.runtime.bundle.engines import EngineBackend, Engines
    from edgeskip.runtime.bundle.manifest import Bundle, Progress
    from edgeskip.runtime.decoding.session import MeasuredSession

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
BackendChoice = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendChoice, ...] = get_args(BackendChoice)
DeviceChoice = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[DeviceChoice, ...] = get_args(DeviceChoice)


def open_session(
    bundle: Bundle,
    *,
    backend: BackendChoice = "auto",
    device: DeviceChoice = "auto",
    threads: int = 0,
    dialect: str | None = None,
    exit_layer: int | None = None,
    progress: Progress = lambda *_: None,
) -> MeasuredSession:
    """Loads a bundle on a device.

    Args:
        bundle: what to load.
        backend: `auto` takes TensorRT engines of the user's cache that fit this machine, else ONNX Runtime.
        device: ONNX Runtime's; `auto` takes the GPU if both library and machine have one, else the CPU. The session's
            description then says why.
        threads: CPU threads; 0 means one per core.
        dialect: that of ONNX Runtime's graphs, `cpu`, `ort` or `standard`; by default what suits the device.
        exit_layer: the exit that drafts, for what a device compiles beforehand; by default the bundle's own.
        progress: called while engines are checked.

    Raises:
        RequestError: there is no such backend, device or dialect, or no such number of threads.
        BundleError: there are no engines for the backend, or they do not fit this machine.
        BackendError: the backend, the device or its libraries are missing, refuse the bundle, or lack memory.
    """
    from edgeskip.runtime.bundle.dialects import WHOLE
    from edgeskip.runtime.bundle.manifest import verify_hashes
    from edgeskip.runtime.bundle.store import find_engines, not_loaded
    from edgeskip.runtime.bundle.weights import stored_arrays

    for place, asked, choices in (
        ("backend", backend, BACKENDS),
        ("device", device, DEVICES),
        ("dialect", dialect, (None, *WHOLE)),
    ):
        if asked not in choices:
            raise RequestError(place, f"{asked!r:.60}", wanted=f"one of {', '.join(filter(None, choices))}")
    if type(threads) is not int or threads < 0:
        raise RequestError("threads", f"{threads!r:.60}", wanted="a whole number; 0 means one per core")
    if backend in ("tensorrt", "tensorrt-rtx"):
        return _open_engines(bundle, backend, *find_engines(bundle), exit_layer, progress)
    why: list[str] = []
    if backend == "auto" and device != "cpu" and dialect is None:
        found, problems = find_engines(bundle)
        for name in dict.fromkeys(engines.build.backend for engines in found):
            try:
                return _open_engines(bundle, name, found, problems, exit_layer, progress)
            except EdgeskipError as error:
                why.append(f"not {name}: {error}")
        why += map(str, problems)
        if not found and (came := not_loaded(bundle)):
            why.append(str(came))
    verify_hashes(bundle, progress)
    stored_arrays(bundle)  # a header that does not fit is found before any memory is taken by it
    session = _open_onnxruntime(bundle, device, threads, dialect, exit_layer, why)
    session.description = "; ".join([session.description, *why])
    return session


def open_elsewhere(
    bundle: Bundle, exit_layer: int, backend: BackendChoice, *, engines: bool, progress: Progress
) -> tuple[Bundle, MeasuredSession]:
    """The bundle cut at an exit that it has no graphs for, on engines of parts of layers, which do without them;
    `engines` says whether any may be used.

    Raises:
        RequestError: the model cannot exit there, or there are no such engines.
        BundleError: they do not fit this machine.
        BackendError: the backend or the device is missing, or lacks memory.
    """
    from edgeskip.runtime.bundle.manifest import Bundle
    from edgeskip.runtime.bundle.store import find_engines

    cut = Bundle(bundle.folder, bundle.manifest.cut_at(exit_layer))
    found, problems = find_engines(cut)
    serving = [one for one in found if engines and one.dialect.in_parts and backend in ("auto", one.build.backend)]
    if not serving:
        bundle.manifest.split(exit_layer)  # says where it is cut
    *others, last = dict.fromkeys(one.build.backend for one in serving)
    for name in others:
        with suppress(EdgeskipError):
            return cut, _open_engines(cut, name, serving, problems, exit_layer, progress)
    return cut, _open_engines(cut, last, serving, problems, exit_layer, progress)


def _open_engines(
    bundle: Bundle,
    backend: EngineBackend,
    found: Sequence[Engines],
    problems: Sequence[BundleError],
    exit_layer: int | None,
    progress: Progress,
) -> MeasuredSession:
    from edgeskip.runtime.backends.device import open_gpu
    from edgeskip.runtime.backends.engines.layers import LayersSession
    from edgeskip.runtime.backends.engines.library import import_tensorrt
    from edgeskip.runtime.backends.engines.session import TrtSession, why_not
    from edgeskip.runtime.bundle.engines import build_command
    from edgeskip.runtime.bundle.store import mark_used, not_loaded

    built = [engines for engines in found if engines.build.backend == backend]
    if not built:
        none = BundleError(
            bundle.folder, f"no {backend} engines for it in the cache", fix=build_command(bundle, backend)
        )
        raise next(iter(problems), not_loaded(bundle, backend) or none)
    device = open_gpu()
    try:
        library = import_tensorrt(backend)
        sm = device.compute_capability
        reasons = {engines.folder: why_not(engines, sm, library.__version__) for engines in built}
        fitting = next((engines for engines in built if not reasons[engines.folder]), None)
        if fitting is None:
            folder, reason = next(iter(reasons.items()))
            raise BundleError(folder, reason, fix=build_command(bundle, backend, sm))
        kind = LayersSession if fitting.dialect.in_parts else TrtSession
        session = kind(bundle, fitting, device, library, exit_layer, progress)
        mark_used(fitting)
        return session
    except BaseException:
        device.close()
        raise


def why_not_here(engines: Engines) -> str:
    """What keeps engines from running on this machine; empty if nothing does."""
    from edgeskip.runtime.backends.device import open_gpu
    from edgeskip.runtime.backends.engines.library import import_tensorrt
    from edgeskip.runtime.backends.engines.session import why_not

    try:
        with open_gpu() as device:
            version = import_tensorrt(engines.build.backend).__version__
            return why_not(engines, device.compute_capability, version)
    except BackendError as error:
        return str(error)


def _open_onnxruntime(
    bundle: Bundle,
    device: DeviceChoice,
    threads: int,
    dialect: str | None,
    exit_layer: int | None,
    why: list[str],
) -> MeasuredSession:
    from edgeskip.runtime.backends.cpu_session import OrtCpuSession
    from edgeskip.runtime.backends.device import open_gpu
    from edgeskip.runtime.backends.ort import onnxruntime
    from edgeskip.runtime.backends.ort_cuda_session import OrtCudaSession

    if device == "cuda":
        return OrtCudaSession(bundle, open_gpu("give --device cpu"), dialect=dialect, exit_layer=exit_layer)
    if device == "auto" and "CUDAExecutionProvider" in onnxruntime().get_available_providers():
        try:
            gpu = open_gpu()
        except BackendError as error:
            why.append(f"not the GPU: {error}")
        else:
            return OrtCudaSession(bundle, gpu, dialect=dialect, exit_layer=exit_layer)
    return OrtCpuSession(bundle, threads=threads, dialect=dialect or "cpu")
