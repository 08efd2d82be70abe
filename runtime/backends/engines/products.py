"""Linear layers of few rows, as a kernel of ours: product.cu says how, and why rows do not depend on each other.

Such a product only reads its matrix, which takes as long as memory takes. TensorRT 10.6 reads it at half of that pace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.bundle.layers import has_products

HERE = Path(__file__).parent
STORES: dict[DType, str] = {"fp16": "16", "bf16": "17", "fp32": "32"}
"""What numbers.cuh calls the dtypes."""

LEAST_SM = 80
"""The first with these tensor cores' instructions for both fp16 and bf16."""


@cache
def source(name: str) -> str:
    """The source of a kernel file, with what all of them share before it."""
    return "".join((HERE / part).read_text(encoding="utf-8") for part in ("numbers.cuh", name))


@dataclass(frozen=True)
class Product:
    """One linear layer: addresses of its matrix and of what else it takes, 0 where it does without; sizes in numbers.

    `outputs` counts the numbers of a row that goes out, half as many as the matrix has rows where it is gated.
    """

    weight: int
    inputs: int
    outputs: int
    bias: int = 0
    norm: int = 0
    residual: int = 0
    gated: bool = False


def serves(architecture: Architecture, dtype: DType, compute_capability: int) -> bool:
    """Whether the kernel has what a model and a GPU need."""
    return compute_capability >= LEAST_SM and has_products(architecture, dtype)


def macros(product: Product, dtype: DType, rows: int) -> dict[str, str]:
    """What the kernel is compiled with for a product of this many rows."""
    return {
        "STORE": STORES[dtype],
        "IN": str(product.inputs),
        "TILES": str(-(-rows // 8)),
        "WARPS": str(warps(product)),
        "NORM": str(int(product.norm != 0)),
        "BIAS": str(int(product.bias != 0)),
        "RESIDUAL": str(int(product.residual != 0)),
        "GATE": str(int(product.gated)),
    }


def warps(product: Product) -> int:
    """Warps of a block, which share the sum: enough of them to have memory busy, and to hold what is normalized.

    It does not depend on the rows, so that a row's sum is added in one order, however many rows there are.
    """
    return 8 if product.inputs < 2048 else 16


def enqueued(
    device: CudaDevice, product: Product, x: int, out: int, *, rows: int, dtype: DType, eps: float
) -> Callable[[], None]:
    """Binds a product of at most HEAD_ROWS rows to addresses [rows, inputs] and [rows, outputs]; calling the result
    enqueues it.
    """
    assert rows <= HEAD_ROWS
    kernel = device.kernel(source("product.cu"), "product", macros(product, dtype, rows))
    grid = (-(-product.outputs // (8 if product.gated else 16)), 1, 1)
    addresses = map(np.uint64, (x, product.weight, product.bias, product.norm, product.residual, out))
    arguments = (*addresses, np.uint32(rows), np.uint32(product.outputs), np.float32(eps))
    return lambda: kernel(grid, (32 * warps(product), 1, 1), *arguments)
