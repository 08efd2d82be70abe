"""The machine as it is found: processor, memory, disks, GPU, and a Jetson's own facts.

A fact that cannot be found out is null, and `unknown` has the reason under the fact's name.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgeskip.runtime.doctor.jetson import (
    gpu_clock_mhz,
    is_jetson,
    jetpack_version,
    jetson_model,
    l4t_release,
    power_mode,
)
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.files import user_cache
from edgeskip.runtime.host import (
    Disk,
    HostMemory,
    command_output,
    cpu_name,
    disk,
    has_nvidia_gpu,
    host_memory,
    usable_cores,
)
from edgeskip.runtime.packages import BASE, missing_modules, versions

T = TypeVar("T")

_AGAIN = "pip install --force-reinstall cuda-core cuda-bindings"


@dataclass(frozen=True)
class Gpu:
    """The first GPU of `count`, which is the one that is used.

    `compute_capability` is the SM as a number, 86 for 8.6; `driver_cuda_version` is the newest CUDA that the driver
    serves. Where `shares_host_memory`, as on a Jetson, its bytes are the host's.
    """

    name: str
    count: int | None
    compute_capability: int | None
    driver_version: str | None
    driver_cuda_version: str | None
    memory_bytes: int | None
    free_bytes: int | None
    shares_host_memory: bool | None


@dataclass(frozen=True)
class Jetson:
    """A Jetson's own facts; `gpu_max_clock_mhz` is the highest clock that the power mode allows."""

    model: str | None
    l4t: str | None
    jetpack: str | None
    power_mode: str | None
    gpu_clock_mhz: float | None
    gpu_max_clock_mhz: float | None


@dataclass(frozen=True)
class Hardware:
    """The machine. `disk` is where the command runs, `cache_disk` where the user's cache folder is.

    `has_gpu` says whether there is an NVIDIA GPU; if there is and `gpu` is null, it cannot be used as things are.
    """

    system: str
    cpu: str | None
    cores: int | None
    memory: HostMemory | None
    disk: Disk | None
    cache_disk: Disk | None
    has_gpu: bool
    gpu: Gpu | None
    jetson: Jetson | None


def read_hardware(root: Path, unknown: dict[str, str]) -> tuple[Hardware, BackendError | None]:
    """The machine, and what keeps a session from using its GPU.

    Args:
        root: where the system's own files are.
        unknown: gets the reason for each fact that is null.
    """
    jetson = _jetson(root, unknown) if is_jetson(root) else None
    gpu, refusal = _gpu(root, jetson is not None, unknown)
    hardware = Hardware(
        system=" ".join((platform.system(), platform.release(), platform.machine())),
        cpu=_attempt(unknown, "cpu", lambda: cpu_name(root)),
        cores=_attempt(unknown, "cores", usable_cores),
        memory=_attempt(unknown, "memory", lambda: host_memory(root)),
        disk=_attempt(unknown, "disk", lambda: disk(Path.cwd())),
        cache_disk=_attempt(unknown, "cache_disk", lambda: disk(user_cache())),
        has_gpu=gpu is not None or jetson is not None or has_nvidia_gpu(root),
        gpu=gpu,
        jetson=jetson,
    )
    return hardware, refusal


def check_base() -> None:
    """Checks for the packages of the base install that every session needs.

    Raises:
        BackendError: one of them is missing, or numpy is broken.
    """
    if missing := missing_modules(BASE):
        raise BackendError(", ".join(missing), "not installed", fix="pip install edgeskip")
    try:
        importlib.import_module("numpy")
    except Exception as error:
        fix = "pip install --force-reinstall numpy"
        raise BackendError("numpy", f"broken ({type(error).__name__}: {error})", fix=fix) from None


def error_line(error: Exception) -> str:
    """An error as one line of bounded length."""
    kind = "" if isinstance(error, (BackendError, OSError, ImportError)) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:300]


def _attempt(unknown: dict[str, str], what: str, probe: Callable[[], T]) -> T | None:
    """What a probe finds, or else null, with the reason in `unknown`."""
    try:
        return probe()
    except Exception as error:
        unknown[what] = error_line(error)
        return None


def _jetson(root: Path, unknown: dict[str, str]) -> Jetson:
    l4t = _attempt(unknown, "jetson.l4t", lambda: l4t_release(root))
    clocks = _attempt(unknown, "jetson.gpu_clock_mhz", lambda: gpu_clock_mhz(root))
    return Jetson(
        model=_attempt(unknown, "jetson.model", lambda: jetson_model(root)),
        l4t=l4t,
        jetpack=_attempt(unknown, "jetson.jetpack", lambda: jetpack_version(l4t, root)),
        power_mode=_attempt(unknown, "jetson.power_mode", lambda: power_mode(root)),
        gpu_clock_mhz=clocks and clocks[0],
        gpu_max_clock_mhz=clocks and clocks[1],
    )


def _gpu(root: Path, is_jetson: bool, unknown: dict[str, str]) -> tuple[Gpu | None, BackendError | None]:
    """The GPU as cuda-core sees it, else as nvidia-smi does; and what keeps cuda-core from using it."""
    try:
        check_base()
        from edgeskip.runtime.backends.device import CudaDevice

        with CudaDevice() as device:
            version = _attempt(unknown, "gpu.driver_cuda_version", lambda: device.driver_cuda_version)
            gpu = Gpu(
                name=device.name,
                count=_attempt(unknown, "gpu.count", lambda: device.count),
                compute_capability=_attempt(unknown, "gpu.compute_capability", lambda: device.compute_capability),
                driver_version=_attempt(unknown, "gpu.driver_version", lambda: _driver_version(root)),
                driver_cuda_version=version and ".".join(map(str, version)),
                memory_bytes=_attempt(unknown, "gpu.memory_bytes", lambda: device.total_bytes),
                free_bytes=_attempt(unknown, "gpu.free_bytes", device.free_bytes),
                shares_host_memory=_attempt(unknown, "gpu.shares_host_memory", lambda: device.is_integrated),
            )
        return gpu, None
    except BackendError as error:
        refusal = error
        if error.place == "cuda-core" and "cuda-core" in versions(["cuda-core"]):
            refusal = BackendError(error.place, error.found, fix=_AGAIN)
    except Exception as error:
        refusal = BackendError("cuda-core", f"broken ({type(error).__name__}: {error})", fix=_AGAIN)
    by_command = _attempt(unknown, "gpu", lambda: _gpu_by_command(root, is_jetson))
    if by_command is None:
        unknown["gpu"] = f"{refusal}; {unknown['gpu']}"
    return by_command, refusal


def _driver_version(root: Path) -> str:
    """The NVIDIA driver's version: that of its kernel module, where it can be seen."""
    module = root / "proc/driver/nvidia/version"
    if module.exists():
        text = module.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]+)", text):
            return found[1]
    return _nvidia_smi(root, "driver_version")[0][0]


def _gpu_by_command(root: Path, is_jetson: bool) -> Gpu:
    """The first GPU that nvidia-smi lists."""
    rows = _nvidia_smi(root, "name", "compute_cap", "driver_version", "memory.total", "memory.free")
    name, sm, driver, total, free = rows[0]
    cuda = re.search(r"CUDA[^:\n]*Version\s*:\s*(\d+\.\d+)", command_output("nvidia-smi", root=root))
    sizes = [int(size) << 20 if size.isdecimal() else None for size in (total, free)]  # not given for a Jetson
    number = int(sm.replace(".", "")) if re.fullmatch(r"\d+\.\d", sm) else None
    return Gpu(name, len(rows), number, driver, cuda and cuda[1], sizes[0], sizes[1], True if is_jetson else None)


def _nvidia_smi(root: Path, *fields: str) -> list[list[str]]:
    """Fields of each GPU.

    Raises:
        OSError, ValueError: no nvidia-smi, or it fails, or shows no GPU.
    """
    text = command_output(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", root=root, timeout_s=20
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == len(fields) and all(row)]
    if not rows:
        raise ValueError(f"nvidia-smi says {text[:60]!r}")
    return rows
