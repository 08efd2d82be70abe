"""Which session serves a bundle on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from edgeskip.runtime.errors import BackendError

if TYPE_CHECKING:
    from edgeskip.runtime.manifest import Bundle
    from edgeskip.runtime.session import Session

DeviceChoice = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[DeviceChoice, ...] = get_args(DeviceChoice)


def open_session(
    bundle: Bundle, *, device: DeviceChoice = "auto", threads: int = 0, dialect: str | None = None
) -> Session:
    """Loads a bundle's graphs on a device.

    Args:
        bundle: what to load.
        device: `auto` takes the GPU where the installed ONNX Runtime and the machine have one, else the CPU; the
            session's description says why not.
        threads: of the CPU; 0 means one a core.
        dialect: `ort` or `standard`; by default what suits the device.

    Raises:
        BackendError: the device or its libraries are missing, refuse the bundle, or lack memory.
    """
    from edgeskip.runtime.cuda import CudaDevice
    from edgeskip.runtime.ort_session import OrtCpuSession, OrtCudaSession, onnxruntime

    if device == "cuda":
        return OrtCudaSession(bundle, CudaDevice(), dialect=dialect)
    why = ""
    if device == "auto" and "CUDAExecutionProvider" in onnxruntime().get_available_providers():
        try:
            gpu = CudaDevice()
        except BackendError as error:
            why = f"; not the GPU: {error}"
        else:
            return OrtCudaSession(bundle, gpu, dialect=dialect)
    session = OrtCpuSession(bundle, threads=threads, dialect=dialect or "ort")
    session.description += why
    return session
