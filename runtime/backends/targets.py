"""What each flavour of TensorRT serves: its first version with the operators, its GPUs, and their dtypes."""

from __future__ import annotations

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.engines import EngineBackend

VERSIONS: dict[EngineBackend, str] = {
    "tensorrt": "TensorRT 10.15 or later (JetPack 7.2 has 10.16, JetPack 6 has 10.3)",
    "tensorrt-rtx": "TensorRT-RTX 1.4 or later",
}
"""The first versions with the layers that a graph becomes: TensorRT's release notes of 10.15.1; RTX 1.4 to 1.7 build
the shipped bundle."""

RTX_SERVES = (75, 80, 86, 89, 120, 121)
"""SMs of TensorRT-RTX 1.7, as its `ComputeCapability` lists them."""

RTX_REFUSED = "Jetsons (87, 110) and data center GPUs (90, 100) are served by --backend tensorrt, run on them"

LEAST_DTYPE_SM: dict[DType, int] = {"fp16": 75, "bf16": 80}
"""The lowest compute capability for a dtype. None serves fp32: fused attention has no such kernel.

Table 1 of TensorRT-RTX's support matrix; for fp32, RTX 1.7.1 says "Attention operation was not supported by a dedicated
kernel" on SM 86 and "FP32 GEMM is not supported" on SM 75.
"""


def dtype_problem(dtype: DType, compute_capability: int) -> str:
    """What TensorRT wants in place of a dtype that it or the GPU does not compute in; empty if there is no problem."""
    if dtype not in LEAST_DTYPE_SM:
        return "fp16 or bf16: TensorRT has no attention in fp32"
    if compute_capability < LEAST_DTYPE_SM[dtype]:
        return f"SM {LEAST_DTYPE_SM[dtype]} or later for {dtype}"
    return ""


HEAD_SIZES = range(16, 257, 8)
"""Sizes of attention heads that TensorRT-RTX 1.7.1 builds, of the even ones from 2 to 1024; SM 75, 86 and 120 alike."""


def heads_problem(architecture: Architecture) -> str:
    """What TensorRT wants in place of attention heads that it does not compute; empty if there is no problem.

    TensorRT itself only reports a failed check in one of its source files.
    """
    if architecture.head_dim not in HEAD_SIZES:
        return f"a head size of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} in steps of {HEAD_SIZES.step}"
    return "two attention heads or more" if architecture.num_heads == 1 else ""
