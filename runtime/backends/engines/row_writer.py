"""Writes the rows of a call into the KV caches, where a graph hands back those rows alone: one launch for all layers.

    new rows, one [N, padded T, D] after the other     ->     caches, one [N,C,D] after the other, from the position on

The first row's position is read on the device, so the launch can be part of a captured round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice

_SOURCE = r"""
extern "C" __global__ void write_rows(
    char* caches, const char* rows, const long long* position, unsigned long long cache_bytes,
    unsigned long long rows_bytes, unsigned capacity, unsigned padded_rows, unsigned written_rows, unsigned row_units)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= written_rows * row_units) return;
    unsigned head = blockIdx.y, row = i / row_units, unit = i % row_units;
    unsigned long long place = *position + row;
    if (place >= capacity) return;
    const UNIT* from = reinterpret_cast<const UNIT*>(rows + blockIdx.z * rows_bytes);
    UNIT* to = reinterpret_cast<UNIT*>(caches + blockIdx.z * cache_bytes);
    to[(head * capacity + place) * row_units + unit] = from[(head * padded_rows + row) * row_units + unit];
}
"""
_UNITS = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short"}
_THREADS = 128


@dataclass(frozen=True)
class RowsLayout:
    """How caches and new rows lie: N heads of C rows of `row_bytes`; from one cache, and from the new rows of one, to
    those of the next, in bytes.
    """

    heads: int
    capacity: int
    row_bytes: int
    cache_stride: int
    rows_stride: int


def row_writer(
    device: CudaDevice, layout: RowsLayout, caches: tuple[int, int], rows: tuple[int, int, int], position: int
) -> Callable[[], None]:
    """What enqueues the copy.

    Args:
        device: where it runs.
        layout: of both sides.
        caches: the address of the first cache, and how many there are.
        rows: the address of the first new row, how many rows of each head there are, and how many of them are written.
        position: the address of the first row's position, an int64.
    """
    unit = max(size for size in _UNITS if layout.row_bytes % size == 0)
    kernel = device.kernel(_SOURCE, "write_rows", {"UNIT": _UNITS[unit]})
    row_units, (first_cache, num_caches), (first_row, padded, written) = layout.row_bytes // unit, caches, rows
    grid = (-(-written * row_units // _THREADS), layout.heads, num_caches)
    arguments = (
        np.uint64(first_cache),
        np.uint64(first_row),
        np.uint64(position),
        np.uint64(layout.cache_stride),
        np.uint64(layout.rows_stride),
        np.uint32(layout.capacity),
        np.uint32(padded),
        np.uint32(written),
        np.uint32(row_units),
    )
    return lambda: kernel(grid, (_THREADS, 1, 1), *arguments)
