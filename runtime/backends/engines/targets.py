"""What each flavour of TensorRT serves: its first version that reads a dialect, its GPUs, and their dtypes."""

from __future__ import annotations

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.engines import EngineBackend
from edgeskip.runtime.packages import version_numbers

NAMES: dict[EngineBackend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

VERSIONS: dict[EngineBackend, dict[str, tuple[int, int]]] = {
    "tensorrt": {"standard": (10, 15), "layers": (10, 3), "primitive": (10, 3)},
    "tensorrt-rtx": {"standard": (1, 4), "layers": (1, 4), "primitive": (1, 4)},
}
"""The first version that reads a dialect, the better dialect first. TensorRT has layers for attention, RoPE and caches
since 10.15.1, by its release notes; JetPack 7.2 has 10.16, JetPack 6 has 10.3. RTX 1.4 to 1.7 build the shipped bundle.
"""


def dialect_for(backend: EngineBackend, version: str) -> str | None:
    """The dialect that engines of this TensorRT are best built from; None if it is too old for any."""
    reads = (dialect for dialect, least in VERSIONS[backend].items() if version_numbers(version) >= least)
    return next(reads, None)


def dialect_text(backend: EngineBackend, version: str) -> str:
    """Which dialect engines of this TensorRT are best built from, and why no better one, for people."""
    best = dialect_for(backend, version)
    if best is None:
        return f"no dialect; wanted {versions_text(backend)}"
    newer = {dialect: least for dialect, least in VERSIONS[backend].items() if version_numbers(version) < least}
    why = ", ".join(f"{dialect} needs {'.'.join(map(str, least))}" for dialect, least in newer.items())
    return f"the {best} dialect" + (f", as {why}" if why else "")


def readers_text() -> str:
    """Who reads which dialect, for people."""
    least = ((dialect, ".".join(map(str, version))) for dialect, version in VERSIONS["tensorrt"].items())
    listed = ", ".join(f"{dialect} with TensorRT {version} or later" for dialect, version in least)
    return f"{listed}; {versions_text('tensorrt-rtx')} reads all"


def versions_text(backend: EngineBackend) -> str:
    """The least version of a backend that reads any dialect, for people."""
    return f"{NAMES[backend]} {'.'.join(map(str, min(VERSIONS[backend].values())))} or later"


RTX_SERVES = (75, 80, 86, 89, 120, 121)
"""SMs of TensorRT-RTX 1.7, as its `ComputeCapability` lists them."""

RTX_REFUSED = "Jetsons (87, 110) and data center GPUs (90, 100) are served by --backend tensorrt, run on them"

LEAST_DTYPE_SM: dict[DType, int] = {"fp16": 75, "bf16": 80}
"""The lowest compute capability for a dtype. None serves fp32 in `standard`: fused attention has no such kernel.

Table 1 of TensorRT-RTX's support matrix; for fp32, RTX 1.7.1 says "Attention operation was not supported by a dedicated
kernel" on SM 86 and "FP32 GEMM is not supported" on SM 75.
"""


def dtype_problem(dtype: DType, compute_capability: int, dialect: str) -> str:
    """What TensorRT wants in place of a dtype that it or the GPU does not compute in; empty if there is no problem."""
    if dtype == "fp32" and dialect != "standard":
        return ""
    if dtype not in LEAST_DTYPE_SM:
        return "fp16 or bf16: TensorRT has no attention in fp32"
    if compute_capability < LEAST_DTYPE_SM[dtype]:
        return f"SM {LEAST_DTYPE_SM[dtype]} or later for {dtype}"
    return ""


HEAD_SIZES = range(16, 257, 8)
"""Sizes of attention heads that TensorRT-RTX 1.7.1 builds, of the even ones from 2 to 1024; SM 75, 86 and 120 alike."""


def heads_problem(architecture: Architecture, dialect: str) -> str:
    """What TensorRT wants in place of attention heads that it does not compute; empty if there is no problem.

    An attention in parts takes heads of any size, and ours what fits into a block's shared memory. Of one that is
    fused, TensorRT itself only reports a failed check in one of its source files.
    """
    if dialect == "layers" and architecture.head_dim > HEAD_SIZES[-1]:
        return f"a head size of at most {HEAD_SIZES[-1]}"
    if dialect != "standard":
        return ""
    if architecture.head_dim not in HEAD_SIZES:
        return f"a head size of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} in steps of {HEAD_SIZES.step}"
    return "two attention heads or more" if architecture.num_heads == 1 else ""
