"""What this machine has, which backends work on it, and the command that mends each one that does not.

Nothing here fails: a fact that cannot be found out is null, and `unknown` says why. Libraries are imported to see
whether they can be, and what they print is dropped; the GPU is opened the way a session opens it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import edgeskip
from edgeskip.runtime.backends.engines.targets import RTX_SERVES, dialect_for, dialect_text
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import ENGINE_BACKENDS, EngineBackend
from edgeskip.runtime.doctor.hardware import Hardware, Jetson, check_base, error_line, read_hardware
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.packages import (
    BASE,
    LEAST_VERSIONS,
    NEEDS,
    PACKAGES,
    install,
    missing_modules,
    version_numbers,
    versions,
)

LEAST_SM = 75
"""The oldest GPUs that TensorRT 10 and the libraries of CUDA 13 serve."""

_WHEEL_CUDA, _WHEEL_PYTHON = 13, (3, 11)
"""What the wheels of onnxruntime-gpu are built for."""

_LEAST_L4T = (36, 4)
"""JetPack 6.1's, the first whose TensorRT reads a dialect: 6.1 and 6.2 have 10.3, 7.1 has 10.13 and 7.2 has 10.16."""


@dataclass(frozen=True)
class Software:
    """The Python that runs this, and the versions of the packages that it has."""

    python: str
    executable: str
    packages: dict[str, str]


@dataclass(frozen=True)
class BackendState:
    """Whether a backend works on a device; if not, the reason, and the command that mends it, if there is one.

    `engines` says which dialect they are best built from by the TensorRT that works here, and why.
    """

    name: str
    device: str
    works: bool
    version: str | None
    reason: str | None
    fix: str | None
    engines: str | None = None


@dataclass(frozen=True)
class Verb:
    """Whether a verb has the modules it needs, those it lacks, and the command that installs them."""

    name: str
    works: bool
    missing: tuple[str, ...]
    fix: str | None


@dataclass(frozen=True)
class Doctor:
    """The whole report. `now` says what runs here, `next` what to do; `unknown` says why a fact was not found out."""

    edgeskip: str
    hardware: Hardware
    software: Software
    backends: tuple[BackendState, ...]
    verbs: tuple[Verb, ...]
    now: str
    next: str
    unknown: dict[str, str]


def examine(root: Path = Path("/")) -> Doctor:
    """Looks at everything.

    Args:
        root: where the system's own files are; tests have files of their own.
    """
    unknown: dict[str, str] = {}
    with Path(os.devnull).open("w", encoding="utf-8", errors="replace") as nowhere, redirect_stdout(nowhere):
        hardware, refusal = read_hardware(root, unknown)
        backends = (
            _judged("onnxruntime", "cpu", _onnxruntime_cpu),
            _judged("onnxruntime", "cuda", partial(_onnxruntime_cuda, hardware, refusal)),
            *(_with_engines(name, hardware, refusal, root) for name in ENGINE_BACKENDS),
        )
        verbs = _verbs(hardware, backends)
        found = versions(PACKAGES)
    software = Software(found.pop("python"), sys.executable or "", found)
    now, then = _verdict(hardware, backends, verbs)
    return Doctor(edgeskip.__version__, hardware, software, backends, verbs, now, then, unknown)


# Backends


def _judged(name: str, device: str, check: Callable[[], str]) -> BackendState:
    """What comes of a check, which returns a version or raises."""
    try:
        return BackendState(name, device, True, check(), None, None)
    except BackendError as error:
        command = error.fix if _is_command(error.fix) else ""
        parts = (f"{error.place}: {error.found}", error.wanted and f"wanted {error.wanted}", error.fix)
        reason = "; ".join(part for part in parts if part and part != command)
        return BackendState(name, device, False, None, " ".join(reason.split()), command or None)
    except Exception as error:
        return BackendState(name, device, False, None, error_line(error), None)


def _is_command(fix: str) -> bool:
    """Whether a fix can be pasted into a shell, and is not a sentence."""
    return fix.split(" ", 1)[0] in ("pip", "python3", "sudo", "unset")


def _loaded(place: str, load: Callable[[], Any], installed: Sequence[str], fix: str) -> Any:
    """A library, imported; where it is installed and cannot be imported, installing it again is what mends it."""
    again = f"pip install --force-reinstall {' '.join(installed)}" if installed else ""
    try:
        library = load()
        str(library.__version__)  # a folder that pip left behind has none
        return library
    except BackendError as error:
        raise BackendError(error.place, error.found, fix=again or fix) from None
    except Exception as error:
        raise BackendError(place, f"broken ({type(error).__name__}: {error})", fix=again or fix) from None


def _check_version(place: str, package: str, version: str, fix: str) -> None:
    least = LEAST_VERSIONS[package]
    if version_numbers(version) < least:
        raise BackendError(place, f"{version} is too old", wanted=f"{'.'.join(map(str, least))} or later", fix=fix)


def _installed(*packages: str) -> list[str]:
    found = versions(packages)
    return [package for package in packages if package in found]


def _sm(hardware: Hardware) -> int | None:
    return hardware.gpu.compute_capability if hardware.gpu else None


def _driver_cuda(hardware: Hardware) -> str | None:
    return hardware.gpu.driver_cuda_version if hardware.gpu else None


def _check_gpu(hardware: Hardware, refusal: BackendError | None) -> None:
    """Refuses a machine without a GPU, or with one that cannot be used. What cuda-core lacks is looked at later."""
    if not hardware.has_gpu:
        raise BackendError("GPU", "there is no NVIDIA GPU in this machine")
    if refusal is None or refusal.place != "CUDA":
        return
    if hardware.gpu is None:
        fix = "install its driver, and give a container the GPU (--gpus all)"
        if hardware.jetson is None and shutil.which("ubuntu-drivers"):
            fix = "sudo ubuntu-drivers install"
        raise BackendError("GPU", f"there is one, and it cannot be used ({refusal.found})", fix=fix)
    hidden = "CUDA_VISIBLE_DEVICES"
    if hidden in os.environ and not refusal.fix:
        raise BackendError("CUDA", f"{refusal.found}, with {hidden}={os.environ[hidden]}", fix=f"unset {hidden}")
    raise refusal


def _check_sm(hardware: Hardware, what: str) -> None:
    sm = _sm(hardware)
    if sm is not None and sm < LEAST_SM:
        raise BackendError("GPU", f"SM {sm} is too old; {what} {LEAST_SM} and later")


def _check_driver(hardware: Hardware, wanted: int, whose: str) -> None:
    found = _driver_cuda(hardware)
    if found is not None and version_numbers(found)[0] < wanted:
        fix = "take JetPack's own" if hardware.jetson else "upgrade the NVIDIA driver"
        raise BackendError("CUDA", f"a driver for CUDA {found}", wanted=f"one for {whose} CUDA {wanted}", fix=fix)


# ONNX Runtime


def _onnxruntime(extra: str) -> Any:
    from edgeskip.runtime.backends.ort import onnxruntime

    installed = _installed("onnxruntime", "onnxruntime-gpu")
    if len(installed) > 1:
        return _loaded("onnxruntime", onnxruntime, (), _one_of_two(extra))
    return _loaded("onnxruntime", onnxruntime, installed, install(extra))


def _one_of_two(extra: str) -> str:
    """Both packages fill the same folder, so neither is mended while the other is there."""
    return f"pip uninstall onnxruntime onnxruntime-gpu && {install(extra)}"


def _onnxruntime_cpu() -> str:
    check_base()
    ort = _onnxruntime("cpu")
    fix = install("cuda" if _installed("onnxruntime-gpu") else "cpu")
    _check_version("onnxruntime", "onnxruntime", ort.__version__, fix)
    if "CPUExecutionProvider" not in ort.get_available_providers():
        raise BackendError("onnxruntime", f"{ort.__version__} has no CPU provider", fix=fix)
    return str(ort.__version__)


def _onnxruntime_cuda(hardware: Hardware, refusal: BackendError | None) -> str:
    check_base()
    _check_gpu(hardware, refusal)
    from edgeskip.runtime.backends.ort import check_cuda_provider, has_cuda_provider

    version = _driver_cuda(hardware)
    driver = version_numbers(version) if version else (sys.maxsize, 0)  # unknown: what cuda-core says comes first
    try:
        ort = _onnxruntime("cuda")
        if not has_cuda_provider(ort):
            check_cuda_provider(ort, driver)
        _check_version("onnxruntime-gpu", "onnxruntime-gpu", ort.__version__, install("cuda"))
    except BackendError as error:
        _check_wheel(hardware)
        if len(_installed("onnxruntime", "onnxruntime-gpu")) > 1:
            raise BackendError(error.place, error.found, wanted=error.wanted, fix=_one_of_two("cuda")) from None
        raise
    if version_numbers(getattr(ort, "cuda_version", None))[0] >= _WHEEL_CUDA:
        _check_sm(hardware, "the libraries of CUDA 13 serve")
    if refusal is not None:
        raise refusal
    check_cuda_provider(ort, driver)
    return str(ort.__version__)


def _check_wheel(hardware: Hardware) -> None:
    """Looks for what would keep onnxruntime-gpu from working once it is installed."""
    if hardware.jetson is not None:
        fix = "use TensorRT, which comes with JetPack"
        raise BackendError("onnxruntime-gpu", "its wheels have no kernels that a Jetson runs", fix=fix)
    _check_sm(hardware, "the libraries of CUDA 13 serve")
    _check_driver(hardware, _WHEEL_CUDA, "onnxruntime-gpu, which is for")
    if sys.version_info < _WHEEL_PYTHON:
        least = ".".join(map(str, _WHEEL_PYTHON))
        raise BackendError("Python", platform.python_version(), wanted=f"{least} or later, for onnxruntime-gpu")


# TensorRT


def _with_engines(backend: EngineBackend, hardware: Hardware, refusal: BackendError | None, root: Path) -> BackendState:
    """A TensorRT, and the dialect of its engines."""
    state = _judged(backend, "cuda", partial(_tensorrt, backend, hardware, refusal, root))
    return replace(state, engines=dialect_text(backend, state.version)) if state.version else state


def _tensorrt(backend: EngineBackend, hardware: Hardware, refusal: BackendError | None, root: Path) -> str:
    check_base()
    _check_gpu(hardware, refusal)
    from edgeskip.runtime.backends.device import INSTALL as CUDA
    from edgeskip.runtime.backends.engines.library import INSTALL, MODULES, check_nvrtc, import_tensorrt, served_by

    module, fix, is_jetson = MODULES[backend], INSTALL[backend], hardware.jetson is not None
    try:
        library = _loaded(module, partial(import_tensorrt, backend), _installed(backend), fix)
    except BackendError as error:
        _check_served(backend, hardware, RTX_SERVES)
        if hardware.jetson is not None and error.fix == fix:
            raise _without_jetpacks(error, hardware.jetson, root) from None
        raise
    version = str(library.__version__)
    _check_served(backend, hardware, served_by(library) if backend == "tensorrt-rtx" else ())
    _check_version(module, backend, version, "JetPack 6.1 has 10.3, 7.2 has 10.16" if is_jetson else fix)
    if refusal is not None:
        extra = install("jetson") if is_jetson else fix
        raise BackendError(refusal.place, refusal.found, fix=extra if refusal.fix == CUDA else refusal.fix)
    if wheel := re.search(r"_cu(\d+)", " ".join(_requirements(backend))):
        _check_driver(hardware, int(wheel[1]), f"{backend}, which is for")
    if (dialect := dialect_for(backend, version)) and ENGINE_DIALECTS[dialect].padded:  # with kernels of ours
        check_nvrtc(_sm(hardware), is_jetson)
    return version


def _requirements(package: str) -> list[str]:
    """What a package needs: those of TensorRT are named after the CUDA that they are for."""
    from importlib import metadata

    try:
        return metadata.requires(package) or []
    except Exception:  # JetPack's has no metadata, or it is damaged
        return []


def _check_served(backend: EngineBackend, hardware: Hardware, served: Sequence[int]) -> None:
    """Refuses a GPU that this TensorRT has no kernels for."""
    if backend == "tensorrt":
        _check_sm(hardware, "TensorRT serves")
        return
    sm = _sm(hardware)
    if sm in served or (sm is None and hardware.jetson is None):
        return
    this = "Jetsons" if sm is None else f"this GPU's SM {sm}"
    other = "; TensorRT does" if sm is None or sm >= LEAST_SM else ""
    raise BackendError("TensorRT-RTX", f"it serves SM {', '.join(map(str, served))} and not {this}{other}")


def _without_jetpacks(error: BackendError, jetson: Jetson, root: Path) -> BackendError:
    """On a Jetson, TensorRT comes with JetPack, and a virtual environment may not see it."""
    if jetson.l4t is not None and version_numbers(jetson.l4t) < _LEAST_L4T:
        least = ".".join(map(str, LEAST_VERSIONS["tensorrt"]))
        found = f"{error.found}, and {least} or later is not in JetPack {jetson.jetpack or f'of L4T {jetson.l4t}'}"
        return BackendError(error.place, found, wanted="JetPack 6.1 or later")
    if sys.prefix != sys.base_prefix and any((root / "usr/lib").glob("python3*/dist-packages/tensorrt")):
        fix = f"python3 -m venv --system-site-packages {shlex.quote(sys.prefix)}"
        return BackendError(error.place, f"JetPack's cannot be seen from {sys.prefix}", fix=fix)
    return BackendError(error.place, error.found, fix="sudo apt install nvidia-jetpack")


# Verbs, and what to make of it all


def _verbs(hardware: Hardware, backends: Sequence[BackendState]) -> tuple[Verb, ...]:
    runs = _verb("generate, bench", BASE, "pip install edgeskip")
    if runs.works and not any(backend.works for backend in backends):
        runs = Verb(runs.name, False, ("a backend that works",), backends[0].fix)
    others = {name: _verb(name, need.modules, need.fix) for name, need in NEEDS.items()}
    if not any(_is_there(name.replace("-", "_")) for name in ENGINE_BACKENDS):
        sm = _sm(hardware)
        here = "build,rtx" if sm in RTX_SERVES or (sm is None and hardware.jetson is None) else "build,tensorrt"
        missing = (*others["build"].missing, "tensorrt or tensorrt_rtx")
        fix = "sudo apt install nvidia-jetpack" if hardware.jetson else install(here)
        others["build"] = Verb("build", False, missing, fix)
    elif hardware.jetson is not None and others["build"].missing:
        others["build"] = replace(others["build"], fix=install("jetson"))
    return (runs, *others.values())


def _verb(name: str, modules: Sequence[str], fix: str) -> Verb:
    missing = tuple(module for module in modules if not _is_there(module))
    return Verb(name, not missing, missing, fix if missing else None)


def _is_there(module: str) -> bool:
    try:
        return not missing_modules([module])
    except Exception:  # damaged
        return False


def _verdict(hardware: Hardware, backends: Sequence[BackendState], verbs: Sequence[Verb]) -> tuple[str, str]:
    """What runs here now, and what to do next."""
    cpu, *on_gpu = backends
    working = [f"{backend.name} {backend.version}" for backend in on_gpu if backend.works]
    places = [f"on the GPU ({hardware.gpu.name}) with {' or '.join(working)}"] if working and hardware.gpu else []
    if cpu.works:
        places.append(f"on the CPU with {cpu.name} {cpu.version}")
    now = f"bundles run {', and '.join(places)}" if places else "no backend works, so no bundle runs"
    fixes = [backend.fix for backend in on_gpu if backend.fix] if hardware.has_gpu else []
    if not places:
        return now, next(iter(fixes), cpu.fix) or "see the reasons above"
    if not working and fixes:
        return now, f"{fixes[0]}  (to use the GPU)"
    usable = {verb.name for verb in verbs if verb.works}
    if "demo" in usable:
        return now, "edgeskip demo  (exports the model that ships with edgeskip, and runs it)"
    if "export" in usable:
        return now, "edgeskip export CHECKPOINT BUNDLE --exit-layer E"
    return now, 'edgeskip generate BUNDLE --prompt "..."'
