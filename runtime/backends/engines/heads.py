"""Picking tokens from logits, and the embeddings of tokens: kernels of ours, in pick.cu.

logits [T, V]  ->  token ids [T], their logits [T], their rows of the embedding table [T, H]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines.products import STORES, Matrix, source
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS

THREADS = 256
"""Of a block. As in best.cuh."""

_PARTS = 128
"""Blocks that share a row of logits, at most."""


@dataclass(frozen=True)
class Picked:
    """Addresses of a head's logits and of what is picked from them."""

    logits: int
    token_ids: int
    token_logits: int
    embeddings: int


def room(rows: int = HEAD_ROWS) -> tuple[int, int]:
    """Bytes of memory, zeroed, that a launch of this many rows needs: for parts of rows, and for counters."""
    return rows * _PARTS * 8, rows * 4


def picker(
    device: CudaDevice, table: Matrix, size: int, dtype: DType, memory: tuple[int, int]
) -> Callable[[Picked, int, int], Callable[[], None]]:
    """Picks with this embedding table, whose rows have `size` numbers; `memory` is where its `room` is.

    The result binds a pick to addresses, for so many rows of so many logits; calling what it gives enqueues it.
    """
    kernel = _kernel(device, "pick", table, size, dtype)

    def bind(at: Picked, rows: int, vocabulary: int) -> Callable[[], None]:
        grid = (max(1, min(_PARTS, vocabulary // (4 * THREADS))), rows, 1)
        outputs = (at.token_ids, at.token_logits, at.embeddings)
        places = map(np.uint64, (at.logits, table.address, table.scales, *outputs, *memory))
        arguments = (*places, np.uint32(vocabulary))
        return lambda: kernel(grid, (THREADS, 1, 1), *arguments)

    return bind


def embedder(device: CudaDevice, table: Matrix, size: int, dtype: DType) -> Callable[[int, int, int], None]:
    """Reads rows of this embedding table, which have `size` numbers: called with the addresses of token ids and their
    rows, and how many there are, the result enqueues it.
    """
    kernel = _kernel(device, "embed", table, size, dtype)

    def enqueue(token_ids: int, rows: int, count: int) -> None:
        places = map(np.uint64, (token_ids, table.address, table.scales, rows))
        kernel((count, 1, 1), (THREADS, 1, 1), *places)

    return enqueue


def _kernel(device: CudaDevice, name: str, table: Matrix, size: int, dtype: DType) -> Callable[..., None]:
    defined = {"STORE": STORES[dtype], **table.macros, "IN": str(size)}
    return device.kernel(source("mma.cuh", "packs.cuh", "best.cuh", "pick.cu"), name, defined)
