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
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS

HERE = Path(__file__).parent
_THREADS = 256

STORES: dict[DType, str] = {"fp16": "16", "bf16": "17", "fp32": "32"}
"""What numbers.cuh calls the dtypes."""


@cache
def source(*names: str) -> str:
    """The source of a kernel: files of this folder, one after the other, with what all of them share before them."""
    return "".join((HERE / name).read_text(encoding="utf-8") for name in ("numbers.cuh", *names))


@dataclass(frozen=True)
class Matrix:
    """A stored matrix on the device: addresses of its numbers and their scales, bits of a number, and how many numbers
    have a scale in common, where that is not a whole row.

    Numbers of 16 bits have the dtype, and no scales.
    """

    address: int
    scales: int = 0
    bits: int = 16
    block: int = 0

    @property
    def macros(self) -> dict[str, str]:
        """What packs.cuh has to know of it."""
        return {"BITS": str(self.bits), "BLOCK": str(self.block)}


@dataclass(frozen=True)
class Product:
    """One linear layer: its matrix, and addresses of what else it takes, 0 where it does without; sizes in numbers.

    `outputs` counts the numbers of a row that goes out, half as many as the matrix has rows where it is gated.
    """

    weight: Matrix
    inputs: int
    outputs: int
    bias: int = 0
    norm: int = 0
    residual: int = 0
    gated: bool = False


def macros(product: Product, dtype: DType, rows: int, multiprocessors: int) -> dict[str, str]:
    """What the kernel is compiled with for a product of this many rows."""
    return {
        "STORE": STORES[dtype],
        **product.weight.macros,
        "IN": str(product.inputs),
        "TILES": str(tiles(rows)),
        "BANDS": str(bands(product, rows, multiprocessors)),
        "WARPS": str(warps(product, multiprocessors)),
        "NORM": str(int(product.norm != 0)),
        "BIAS": str(int(product.bias != 0)),
        "RESIDUAL": str(int(product.residual != 0)),
        "GATE": str(int(product.gated)),
    }


def tiles(rows: int) -> int:
    """Of eight rows each."""
    return -(-rows // 8)


def has_many_lines(product: Product, multiprocessors: int) -> bool:
    """Whether two bands for a block of a quantized matrix still leave a block for each multiprocessor."""
    lines = product.outputs * (2 if product.gated else 1)
    return product.weight.bits < 16 and lines >= 32 * multiprocessors


def bands(product: Product, rows: int, multiprocessors: int) -> int:
    """Bands of 16 lines of a matrix that a block takes: two where numbers of 4 bits make arithmetic the bound, so that
    what is done for x serves both.
    """
    many = has_many_lines(product, multiprocessors)
    return 2 if many and product.weight.bits == 4 and tiles(rows) <= 2 else 1


def warps(product: Product, multiprocessors: int) -> int:
    """Warps of a block, which share the sum: enough of them to have memory busy.

    It does not depend on the rows, so that a row's sum is added in one order, however many rows there are.
    """
    return 8 if product.inputs < 2048 or has_many_lines(product, multiprocessors) else 16


def enqueued(
    device: CudaDevice, product: Product, x: int, out: int, *, rows: int, dtype: DType, eps: float
) -> Callable[[], None]:
    """Binds a product of at most HEAD_ROWS rows to addresses [rows, inputs] and [rows, outputs]; calling the result
    enqueues it.
    """
    assert rows <= HEAD_ROWS
    defined = macros(product, dtype, rows, device.multiprocessors)
    kernel = device.kernel(source("mma.cuh", "packs.cuh", "product.cu"), "product", defined)
    grid = (-(-product.outputs // (int(defined["BANDS"]) * (8 if product.gated else 16))), 1, 1)
    weight = product.weight
    addresses = map(np.uint64, (x, weight.address, weight.scales, product.bias, product.norm, product.residual, out))
    arguments = (*addresses, np.uint32(rows), np.uint32(product.outputs), np.float32(eps))
    return lambda: kernel(grid, (32 * int(defined["WARPS"]), 1, 1), *arguments)


def widened(device: CudaDevice, matrix: Matrix, shape: tuple[int, ...], whole: int, dtype: DType) -> Callable[[], None]:
    """Binds the widening of a stored matrix [N,K] to the dtype, at `whole`; calling the result enqueues it."""
    defined = {"STORE": STORES[dtype], **matrix.macros, "IN": str(shape[1])}
    kernel = device.kernel(source("mma.cuh", "packs.cuh", "widen.cu"), "widen", defined)
    eights = shape[0] * shape[1] // 8
    grid, block = (-(-eights // _THREADS), 1, 1), (_THREADS, 1, 1)
    arguments = (*map(np.uint64, (matrix.address, matrix.scales, whole, eights)),)
    return lambda: kernel(grid, block, *arguments)
