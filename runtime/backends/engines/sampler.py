"""Drawing tokens from logits: kernels of ours, in sample.cu, enqueued after a head that has picked the largest ones.

logits [T, V], largest logits [T]  ->  token ids [T], their logits [T], their rows of the embedding table [T, H]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines.heads import THREADS, Picked
from edgeskip.runtime.backends.engines.products import STORES, Matrix, source
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.decoding.sampling import least_scaled
from edgeskip.runtime.sampling import Sampling

_TOKENS = 2048
"""Of a row, that a block looks at. As in sample.cu."""

SETTINGS = np.dtype([("seed", "<u8"), ("top_p", "<f8"), ("temperature", "<f4"), ("least", "<f4"), ("top_k", "<u8")])
"""How to draw, as the kernels read it from the device."""


def settings_of(sampling: Sampling) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """What the kernels have to know of it: SETTINGS [1]."""
    s = sampling
    return np.array([(s.seed or 0, s.top_p, s.temperature, least_scaled(s.min_p), s.top_k)], SETTINGS)


Filters = tuple[int, ...]
"""Filters whose bounds the kernels must find, in order: 0 is top-k, 1 top-p."""

Draw = Callable[[Picked, int, tuple[int, int], Filters], Callable[[], None]]
"""Binds a draw: see `sampler`."""


def filters_of(sampling: Sampling) -> Filters:
    """Those that draws like this have; min-p is a bound by itself."""
    return tuple(number for number, used in enumerate((sampling.top_k > 0, sampling.top_p < 1)) if used)


@dataclass(frozen=True)
class Scratch:
    """Addresses of memory, zeroed: how to draw, bounds and sums of each row, parts of rows, and counters."""

    settings: int
    bounds: int
    sums: int
    parts: int
    counters: int


def room(vocabulary: int, rows: int = HEAD_ROWS) -> tuple[int, ...]:
    """Bytes of each part of `Scratch`, for draws of this many rows."""
    return SETTINGS.itemsize, rows * 32, rows * 256 * 8, rows * _parts(vocabulary) * 8, rows * 4


def sampler(device: CudaDevice, table: Matrix, size: int, dtype: DType, scratch: Scratch) -> Draw:
    """Draws with this embedding table, whose rows have `size` numbers.

    The result binds a draw to addresses: those of a head's outputs, with its own picks, and of the positions of the
    rows that it read, for so many rows of so many logits, and to filters. Calling what it gives enqueues it: one
    launch, and before it for each filter one for 8 bits of a logit.
    """
    defined = {"STORE": STORES[dtype], **table.macros, "IN": str(size)}
    narrow, draw = (device.kernel(source(*sources(table)), name, defined) for name in ("narrow", "draw"))
    s, levels, block = scratch, range(4 if dtype == "fp32" else 2), (THREADS, 1, 1)

    def bind(at: Picked, positions: int, shape: tuple[int, int], filters: Filters) -> Callable[[], None]:
        rows, vocabulary = shape
        grid, count = (_parts(vocabulary), rows, 1), np.uint32(vocabulary)
        bounding = [*map(np.uint64, (at.logits, at.token_logits, s.settings, s.bounds, s.sums, s.counters)), count]
        inputs = (at.logits, positions, table.address, table.scales, s.settings, s.bounds)
        outputs = (at.token_ids, at.token_logits, at.embeddings, s.parts, s.counters)
        drawing = [*map(np.uint64, (*inputs, *outputs)), count]

        def enqueue() -> None:
            for number in filters:
                for level in levels:
                    narrow(grid, block, *bounding, np.uint32(number), np.uint32(level))
            draw(grid, block, *drawing)

        return enqueue

    return bind


def sources(table: Matrix) -> tuple[str, ...]:
    """The files that the kernels are made of for this table."""
    quantized = ("mma.cuh", "packs.cuh", "best.cuh", "pick.cu") if table.bits < 16 else ("best.cuh",)
    return (*quantized, "sample.cu")


def _parts(vocabulary: int) -> int:
    return -(-vocabulary // _TOKENS)
