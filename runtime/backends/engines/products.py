"""Linear layers as kernels of ours, which read a matrix as it is stored: product.cu for few rows, long_product.cu for
many. They say how, and why rows do not depend on each other.

A product of few rows only reads its matrix, which takes as long as memory takes. TensorRT 10.6 reads it at half of that
pace. One of many rows is bound by arithmetic, and for matrices in the dtype itself TensorRT has the faster kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice, Step, in_order
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS

HERE = Path(__file__).parent
_LONG_ROWS = 64
_NORM_THREADS = 256

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

    `outputs` counts the numbers of a row that goes out, half as many as the matrix has rows where it is gated. At
    `normalized` is room for [rows, inputs] numbers, where many rows are normalized before.
    """

    weight: Matrix
    inputs: int
    outputs: int
    bias: int = 0
    norm: int = 0
    residual: int = 0
    normalized: int = 0
    gated: bool = False

    @property
    def lines(self) -> int:
        """Rows of the matrix."""
        return self.outputs * (2 if self.gated else 1)


def macros(product: Product, dtype: DType, rows: int, multiprocessors: int) -> dict[str, str]:
    """What the kernel is compiled with for a product of this many rows."""
    return {
        **_macros_of_both(product, dtype),
        "TILES": str(tiles(rows)),
        "BANDS": str(bands(product, rows, multiprocessors)),
        "WARPS": str(warps(product, multiprocessors)),
        "NORM": str(int(product.norm != 0)),
    }


def _macros_of_both(product: Product, dtype: DType) -> dict[str, str]:
    """What the kernels for few and for many rows have to know of a product."""
    return {
        "STORE": STORES[dtype],
        **product.weight.macros,
        "IN": str(product.inputs),
        "BIAS": str(int(product.bias != 0)),
        "RESIDUAL": str(int(product.residual != 0)),
        "GATE": str(int(product.gated)),
    }


def tiles(rows: int) -> int:
    """Of eight rows each."""
    return -(-rows // 8)


def has_many_lines(product: Product, multiprocessors: int) -> bool:
    """Whether two bands for a block of a quantized matrix still leave a block for each multiprocessor."""
    return product.weight.bits < 16 and product.lines >= 32 * multiprocessors


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


def enqueued(device: CudaDevice, product: Product, x: int, out: int, *, rows: int, dtype: DType, eps: float) -> Step:
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


def long_macros(product: Product, dtype: DType, multiprocessors: int) -> dict[str, str]:
    """What the kernel for many rows is compiled with.

    A block has many lines where prompts of 256 rows then still have blocks for every multiprocessor. It does not depend
    on the rows, so that a row's sum is added in one order, however many rows there are.
    """
    has_many = 2 * (256 // _LONG_ROWS) * -(-product.lines // 128) >= 3 * multiprocessors
    return {
        **_macros_of_both(product, dtype),
        "ROWS": str(_LONG_ROWS),
        "LINES": "128" if has_many else "32",
        "K": "64" if has_many else "128",
        "STAGES": "4",
        "WARPS": "4",
    }


def long_enqueued(
    device: CudaDevice, product: Product, x: int, out: int, *, rows: int, dtype: DType, eps: float
) -> Step:
    """Binds a product of any number of rows likewise."""
    defined, weight = long_macros(product, dtype, device.multiprocessors), product.weight
    lines, step, stages, num_warps = (int(defined[name]) for name in ("LINES", "K", "STAGES", "WARPS"))
    shared = stages * step * (_LONG_ROWS * 16 + lines * weight.bits) // 8
    code = source("mma.cuh", "packs.cuh", "copies.cuh", "long_product.cu")
    kernel = device.kernel(code, "long_product", defined, shared)
    grid, block = (-(-rows // _LONG_ROWS), -(-product.lines // lines), 1), (32 * num_warps, 1, 1)
    from_ = product.normalized if product.norm else x
    addresses = map(np.uint64, (from_, weight.address, weight.scales, product.bias, product.residual, out))
    arguments = (*addresses, np.uint32(rows), np.uint32(product.outputs))

    def multiply() -> None:
        kernel(grid, block, *arguments)

    if not product.norm:
        return multiply
    norm = device.kernel(source("normalize.cu"), "normalize", {"STORE": STORES[dtype], "IN": str(product.inputs)})
    given = (*map(np.uint64, (x, product.norm, product.normalized)), np.float32(eps))
    return partial(in_order, [lambda: norm((rows, 1, 1), (_NORM_THREADS, 1, 1), *given), multiply])
