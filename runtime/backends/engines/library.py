"""TensorRT, of either flavour, imported late."""

from __future__ import annotations

import importlib
from typing import Any

from edgeskip.runtime.bundle.engines import EngineBackend
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.packages import install

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
        fix = INSTALL[backend] + (", or JetPack 7.2 on a Jetson" if backend == "tensorrt" else "")
        raise BackendError(MODULES[backend], f"not usable ({error})", fix=fix) from None


def served_by(library: Any) -> list[int]:
    """SMs that this TensorRT-RTX serves, 86 for 8.6."""
    return sorted(int(name[2:]) for name in library.ComputeCapability.__members__ if name.startswith("SM"))


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
