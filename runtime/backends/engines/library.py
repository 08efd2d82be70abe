"""TensorRT, of either flavour, imported late."""

from __future__ import annotations

import importlib
from typing import Any

from edgeskip.runtime.bundle.engines import EngineBackend
from edgeskip.runtime.errors import BackendError, reason
from edgeskip.runtime.packages import install, version_numbers, versions

MODULES: dict[EngineBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL: dict[EngineBackend, str] = {"tensorrt": install("tensorrt"), "tensorrt-rtx": install("rtx")}


def import_tensorrt(backend: EngineBackend) -> Any:
    """The library, imported late.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        fix = INSTALL[backend] + (", or JetPack 6.1 or later on a Jetson" if backend == "tensorrt" else "")
        raise BackendError(MODULES[backend], f"not usable ({error})", fix=fix) from None


def served_by(library: Any) -> list[int]:
    """SMs that this TensorRT-RTX serves, 86 for 8.6."""
    return sorted(int(name[2:]) for name in library.ComputeCapability.__members__ if name.startswith("SM"))


def check_nvrtc(compute_capability: int | None, is_jetson: bool) -> None:
    """Looks for the compiler of our own kernels, and whether it knows this GPU. Needs no GPU.

    Raises:
        BackendError: NVRTC is not there, or too old for the GPU.
    """
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        _, architectures = nvrtc.nvrtcGetSupportedArchs()
    except Exception as error:  # of an import, or of a library that is looked for late
        fix = "sudo apt install nvidia-jetpack" if is_jetson else _nvrtc_package()
        raise BackendError("NVRTC", f"not found ({reason(error)})", fix=fix) from None
    if compute_capability is not None and compute_capability not in architectures:
        raise BackendError(
            "NVRTC", f"{major}.{minor} has no SM {compute_capability}", fix="install a newer CUDA toolkit"
        )


def _nvrtc_package() -> str:
    """The command that installs it, of the CUDA that cuda-bindings is for."""
    cuda, _ = version_numbers(versions(["cuda-bindings"]).get("cuda-bindings"))
    return f'pip install "cuda-core[cu{cuda or 13}]"'


def make_logger(library: Any) -> Any:
    """Keeps the last error for our own message, and prints nothing."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.ERROR:
                self.last = message

    return Logger()
