"""Attention between engines: kernels of ours, compiled on the device; attention.cu and long_attention.cu have them.

    qkv [T, (Nq+2N) D]  ->  queries and keys normed and rotated, keys and values into the caches  ->  attended [T, Nq D]

That is one kernel for calls of few rows. Those of many rotate first and then attend in tensor cores, if GPU and model
have what those need. The first row's position is read on the device, so the launches can be part of a captured round.
Only the cache rows in use are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice, DeviceArray
from edgeskip.runtime.backends.engines.products import STORES, source
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.bundle.layers import LEAST_SM

WARPS = 4
"""Of a block; each takes some of its query rows. As in attention.cu."""

LONG_ROWS = 16 * WARPS
"""Query rows of a block of long_attention.cu."""

_BLOCK = (32 * WARPS, 1, 1)

_BLOCKS_PER_MULTIPROCESSOR = 8
"""What the cache rows are split for, at most."""


@dataclass(frozen=True)
class Operands:
    """Addresses for one layer's attention: input and output, caches, positions, and norms, 0 for none."""

    qkv: int
    attended: int
    keys: int
    values: int
    positions: int
    q_norm: int = 0
    k_norm: int = 0


@dataclass(frozen=True)
class Tiling:
    """How `attend` divides the work: query rows of a warp, cache rows of a tile and of a split, and the grid."""

    rows: int
    keys: int
    split_rows: int
    grid: tuple[int, int, int]

    @property
    def tile_rows(self) -> int:
        """Query rows of a block."""
        return WARPS * self.rows


def tiling(architecture: Architecture, capacity: int, rows: int, blocks: int) -> Tiling:
    """How to divide a call of this many rows over about so many blocks."""
    a = architecture
    query_rows, wide = rows * a.num_heads // a.num_kv_heads, a.head_dim > 128
    keys = 32 if wide else 64  # more would not fit into shared memory
    most = 2 if wide else 4
    per_warp = next((n for n in (1, 2) if n < most and n * WARPS >= query_rows), most)
    tiles = -(-query_rows // (WARPS * per_warp))
    splits = max(1, min(-(-blocks // (tiles * a.num_kv_heads)), -(-capacity // keys)))
    # the calls of a round are split alike, so that a row's sums are added in one order, however many rows there are
    split_rows = keys if rows <= HEAD_ROWS else -(-capacity // (splits * keys)) * keys
    return Tiling(per_warp, keys, split_rows, (tiles, -(-capacity // split_rows), a.num_kv_heads))


def macros(dtype: DType, head_dim: int, tiles: Tiling) -> dict[str, str]:
    """What the kernels are compiled with."""
    return {"STORE": STORES[dtype], "HEAD": str(head_dim), "ROWS": str(tiles.rows), "KEYS": str(tiles.keys)}


def has_long(architecture: Architecture, dtype: DType, compute_capability: int) -> bool:
    """Whether calls of many rows attend in tensor cores: what long_attention.cu asks for."""
    return dtype != "fp32" and compute_capability >= LEAST_SM and architecture.head_dim in range(16, 129, 16)


class Attention:
    """The kernels of a model, and the memory between them.

    Args:
        device: where they run.
        architecture: the model's.
        dtype: of all numbers in memory.
        capacity: C, the rows of the caches.
        longest: the most rows of a call.
        tables: addresses of the RoPE tables' cosines and sines, [C, D/2] each.

    Raises:
        BackendError: the kernels cannot be compiled here, or there is not enough device memory.
    """

    def __init__(
        self,
        device: CudaDevice,
        architecture: Architecture,
        dtype: DType,
        capacity: int,
        longest: int,
        tables: tuple[int, int],
    ) -> None:
        self._device, self._architecture, self._dtype = device, architecture, dtype
        self._capacity, self._tables = capacity, tables
        self._blocks = device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
        self._source = source("attention.cu")
        a = architecture
        self._has_long = has_long(a, dtype, device.compute_capability)
        every = [self._tiling(rows) for rows in range(1, longest + 1) if not self._is_long(rows)]
        partials = max(t.grid[0] * t.grid[1] * t.grid[2] * t.tile_rows for t in every) * (a.head_dim + 2) * 4
        counters = max(t.grid[0] * t.grid[2] for t in every) * 4
        queries = (longest if self._has_long else 0) * a.num_heads * a.head_dim * ITEMSIZE[dtype]
        self._queries, self._partials, self._counters = device.zeros([(queries, 1), (partials, 1), (counters, 1)])
        self.enqueued(1, Operands(0, 0, 0, 0, 0))  # compiles, so that what is missing shows now

    @property
    def memory(self) -> tuple[DeviceArray, ...]:
        """What it took of the device."""
        return self._queries, self._partials, self._counters

    def enqueued(self, rows: int, at: Operands) -> Callable[[], None]:
        """Binds an attention of this many rows; calling the result enqueues it."""
        return (self._long if self._is_long(rows) else self._short)(rows, at)

    def _is_long(self, rows: int) -> bool:
        return rows > HEAD_ROWS and self._has_long

    def _short(self, rows: int, at: Operands) -> Callable[[], None]:
        tiles = self._tiling(rows)
        attend = self._device.kernel(self._source, "attend", macros(self._dtype, self._architecture.head_dim, tiles))
        read = (at.qkv, at.keys, at.values, at.positions, *self._tables, at.q_norm, at.k_norm)
        written = (at.attended, self._partials.address, self._counters.address)
        counts = (np.uint32(rows), np.uint32(tiles.split_rows), self._scale)
        arguments = (*map(np.uint64, read), *self._heads, self._eps, *map(np.uint64, written), *counts)
        return lambda: attend(tiles.grid, _BLOCK, *arguments)

    def _long(self, rows: int, at: Operands) -> Callable[[], None]:
        a, queries = self._architecture, self._queries.address
        rotate = self._device.kernel(self._source, "rotate", macros(self._dtype, a.head_dim, self._tiling(1)))
        rotate_grid = (rows, -(-(a.num_heads + 2 * a.num_kv_heads) // WARPS), 1)
        rotates = (at.qkv, at.keys, at.values, queries, at.positions, *self._tables, at.q_norm, at.k_norm)
        defined = {"STORE": STORES[self._dtype], "HEAD": str(a.head_dim)}
        attend = self._device.kernel(source("mma.cuh", "copies.cuh", "long_attention.cu"), "attend_long", defined)
        attend_grid = (-(-rows * a.num_heads // a.num_kv_heads // LONG_ROWS), 1, a.num_kv_heads)
        attends = (queries, at.keys, at.values, at.positions, at.attended)
        first = (*map(np.uint64, rotates), *self._heads, self._eps)
        second = (*map(np.uint64, attends), *self._heads, np.uint32(rows), self._scale)

        def enqueue() -> None:
            rotate(rotate_grid, _BLOCK, *first)
            attend(attend_grid, _BLOCK, *second)

        return enqueue

    def _tiling(self, rows: int) -> Tiling:
        return tiling(self._architecture, self._capacity, rows, self._blocks)

    @property
    def _heads(self) -> tuple[Any, ...]:
        a = self._architecture
        return np.uint32(a.num_heads), np.uint32(a.num_kv_heads), np.uint32(self._capacity)

    @property
    def _scale(self) -> Any:
        return np.float32(self._architecture.head_dim**-0.5)

    @property
    def _eps(self) -> Any:
        return np.float32(self._architecture.rms_norm_eps)
