"""Judging drafts on the device: a kernel of ours, in confidence.cu, captured after each head that drafts.

logits [V], the one that was picked, a threshold  ->  whether the round drafts on, and how many drafts it makes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines.heads import THREADS
from edgeskip.runtime.backends.engines.products import STORES, source
from edgeskip.runtime.bundle.dtypes import DType

_PARTS = 128
"""Blocks that share a row of logits, at most; fewer than a block has threads."""

FILES = ("best.cuh", "confidence.cu")
"""What the kernel is made of."""


@dataclass(frozen=True)
class Scales:
    """Addresses of memory, zeroed: the threshold in fp32, sums of parts of a row, and a counter."""

    threshold: int
    parts: int
    counter: int


def room() -> tuple[int, int, int]:
    """Bytes of each part of `Scales`."""
    return 4, 4 * _PARTS, 4


Judge = Callable[[int], None]
"""Enqueues a judgement, in a capture: called with the handle of what runs if drafting goes on."""


Bind = Callable[[tuple[int, int], int, int], Judge]
"""Binds a judgement: see `judge`."""


def judge(device: CudaDevice, dtype: DType, scales: Scales, made: int) -> Bind:
    """Judges drafts by the threshold that is in `scales`, and leaves at `made` how many are made, in int64.

    The result binds a judgement to the addresses of a head's logits and of the one that it picked, to how many logits
    there are, and to the draft's number, from 1.

    Raises:
        BackendError: the kernel cannot be compiled here.
    """
    kernel = device.kernel(source(*FILES), "judge", {"STORE": STORES[dtype]})

    def bind(at: tuple[int, int], vocabulary: int, number: int) -> Judge:
        grid = (max(1, min(_PARTS, vocabulary // (4 * THREADS))), 1, 1)
        places = map(np.uint64, (*at, scales.threshold, made, scales.parts, scales.counter))
        arguments = (*places, np.uint32(vocabulary), np.uint32(number))
        return lambda handle: kernel(grid, (THREADS, 1, 1), *arguments, np.uint64(handle))

    return bind
