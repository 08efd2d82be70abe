"""What every session on a CUDA device shares: workspace and caches in device memory, rounds that run without the host.

A round is enqueued whole on one stream:

    positions (pinned) -> device | the round's calls, in order | draft and target ids -> pinned

and the host waits once, for the ids. The first run of a round enqueues its calls one by one, which lets the backend
settle its memory; the second captures the same sequence into one CUDA graph, and all others replay that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.backends.device import CudaDevice, DeviceArray, out_of_memory
from edgeskip.runtime.backends.memory import buffer_sizes, cache_sizes
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, Tensor, dimensions
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.rounds import Call, Round, View, prefill_round
from edgeskip.runtime.decoding.session import BoundRound, Memory, RoundResult, Session

_NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_IDS = ("draft_token_ids", "target_token_ids")


class CudaSession(Session):
    """A session whose memory is on a CUDA device; a backend adds how one call is enqueued.

    Args:
        bundle: what is loaded.
        device: where to; the session closes it.
        weights_bytes: that the backend will take for weights.

    Raises:
        BackendError: not enough device memory for weights, caches and workspace.
    """

    device = "cuda"

    def __init__(self, bundle: Bundle, device: CudaDevice, weights_bytes: int) -> None:
        manifest = bundle.manifest
        self._device, self._dtype = device, manifest.dtype
        self._bound: dict[Round, BoundRound] = {}
        self._carry: list[Callable[[], None]] = []
        self._device_ns = self._captured_rounds = 0
        self.hardware = device.name
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        self._table = manifest.table
        self._weights_bytes = weights_bytes
        buffers = buffer_sizes(manifest.architecture, manifest.dtype, manifest.prefill_chunk)
        caches = cache_sizes(manifest.architecture, self._table, manifest.dtype, manifest.max_length)
        self._caches_bytes = sum(caches.values())
        self._workspace_bytes = sum(row_bytes * rows for row_bytes, rows in buffers.values())
        self.planned_bytes = self._weights_bytes + self._caches_bytes + self._workspace_bytes
        free = device.free_bytes()
        if self.planned_bytes > free:
            raise out_of_memory(bundle.folder, self.planned_bytes, free)
        self._caches = dict(zip(caches, device.zeros([(size, 1) for size in caches.values()]), strict=True))
        self._buffers = dict(zip(buffers, device.zeros(buffers.values()), strict=True))
        # the two arrays of ids lie side by side on the device, so that one copy reads both
        self._buffers |= dict(zip(_IDS, self._adjacent(HEAD_ROWS), strict=True))
        self._ids = device.pinned((2, HEAD_ROWS), np.int64)
        self._positions = device.pinned((buffers["position_ids"][1],), np.int64)
        self._staging = device.pinned((max(size * rows for size, rows in buffers.values()),), np.uint8)
        first, size = self._buffers["inputs_embeds"].address, buffers["inputs_embeds"][0]
        self._carry = [
            device.copier(first, self._address(View("target_embeds", row, 1)), size) for row in range(HEAD_ROWS)
        ]

    @abstractmethod
    def _enqueued(self, call: Call) -> Callable[[], None]:
        """Binds a call's shapes and memory; calling the result enqueues it on the device's stream."""

    def _is_capturable(self, round_: Round) -> bool:
        """Whether a round that has run before can be captured now."""
        return True

    @abstractmethod
    def _release(self) -> None:
        """Frees what the backend holds."""

    def _warm_up(self, chunk: int) -> None:
        """Runs the largest calls once, so that memory that does not suffice is found now."""
        self.bind(prefill_round(chunk, last=True, early_exit=False))(0)()

    def _bind(self, round_: Round) -> BoundRound:
        device, watch = self._device, self._device.stopwatch()
        calls = [self._enqueued(call) for call in round_.calls]
        rows, positions = np.arange(round_.rows), self._positions[: round_.rows]
        target, ids = self._buffers["position_ids"].address, self._buffers[_IDS[0]].address
        write_positions = device.copier(target, positions.ctypes.data, positions.nbytes)
        read_ids = device.copier(self._ids.ctypes.data, ids, self._ids.nbytes)
        drafts, targets = self._ids[0, : round_.num_drafts], self._ids[1, : round_.num_targets]
        replayed = round_.rows <= HEAD_ROWS  # prompts come in many lengths, and each but once
        runs, launch = 0, None

        def enqueue() -> None:
            write_positions()
            for call in calls:
                call()
            read_ids()

        def start(position: int) -> Callable[[], RoundResult]:
            nonlocal runs, launch
            if runs and replayed and launch is None and self._is_capturable(round_):
                launch = device.captured(enqueue)
            np.add(rows, position, out=positions)
            watch.start()
            (launch or enqueue)()
            watch.stop()
            runs += 1
            return wait

        def wait() -> RoundResult:
            self._device_ns += watch.elapsed_ns()
            self._captured_rounds += launch is not None and round_.num_targets > 0
            return RoundResult(drafts.tolist(), targets.tolist())

        return start

    @property
    def captured_rounds(self) -> int:
        """Rounds so far that ran as one CUDA graph."""
        return self._captured_rounds

    @property
    def stage_ns(self) -> Mapping[str, int]:
        """Device time of all rounds so far: what runs within one is not the host's to see."""
        return {"device": self._device_ns}

    def write(self, buffer: str, rows: npt.NDArray[Any]) -> None:
        """Puts rows in the bundle's dtype into the first rows of a buffer."""
        self._device.stream.sync()  # a round that nobody waited for may still be reading
        target = self._buffers[buffer]
        part = self._staging[: target.row_bytes * len(rows)]
        part.view(_NUMPY[self._dtype]).reshape(rows.shape)[:] = rows
        self._device.copier(target.address, part.ctypes.data, part.nbytes)()

    def read(self, view: View) -> npt.NDArray[Any]:
        """Rows of a workspace buffer: ids as they are, all else in fp32."""
        size = self._buffers[view.buffer].row_bytes * view.rows
        raw = self._fetched(self._address(view), size)
        return raw.view(np.int64).copy() if view.buffer in _IDS else self._widened(raw).reshape(view.rows, -1)

    def read_cache(self, name: str) -> npt.NDArray[Any]:
        """A whole cache, [N,C,D] in fp32."""
        cache, step = self._caches[name], self._staging.nbytes
        parts = [
            self._widened(self._fetched(cache.address + start, min(step, cache.bytes - start)))
            for start in range(0, cache.bytes, step)
        ]
        return np.concatenate(parts).reshape([self._dims[dim] for dim in "NCD"])

    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""
        self._carry[row]()

    def draft_confidence(self, row: int) -> float:
        """The probability that the exit gave to the token it drafted in this row."""
        logits = self.read_logits(row + 1)[row]
        return float(1.0 / np.exp(logits - logits.max()).sum())

    def time_call_ms(self, call: Call, position: int, repeats: int) -> float:
        """Median device time of one call by itself, as a graph of its own, its first row at `position`."""
        self._device.stream.sync()
        self._positions[:] = position + np.arange(len(self._positions))
        target = self._buffers["position_ids"]
        self._device.copier(target.address, self._positions.ctypes.data, target.bytes)()
        enqueue, watch, times = self._enqueued(call), self._device.stopwatch(), []
        enqueue()
        alone = Round((call,), rows=0, num_drafts=0, num_targets=0)
        launch = self._device.captured(enqueue) if self._is_capturable(alone) else enqueue
        for _ in range(repeats + 2):
            watch.start()
            launch()
            watch.stop()
            times.append(watch.elapsed_ns() / 1e6)
        return float(np.median(times[2:]))

    def copy_bytes_per_second(self) -> float:
        """Rate of copies within the device's memory, bytes read plus bytes written."""
        return self._device.copy_bytes_per_second()

    def memory(self) -> Memory:
        """Device memory by kind; what is not ours by name is the backend's: scratch, kernels, libraries."""
        other = max(self._device.used_bytes() - self.planned_bytes, 0)
        return Memory(self._weights_bytes, self._caches_bytes, self._workspace_bytes, other)

    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""
        with suppress(Exception):  # a device that failed cannot be waited for
            self._device.stream.sync()
        self._bound.clear()
        self._carry.clear()
        try:
            self._release()
        finally:
            self._device.close()

    def _adjacent(self, rows: int) -> tuple[DeviceArray, DeviceArray]:
        (block,) = self._device.zeros([(8, 2 * rows)])
        return DeviceArray(block.address, 8, rows), DeviceArray(block.address + 8 * rows, 8, rows)

    def _fetched(self, address: int, size: int) -> npt.NDArray[Any]:
        """Bytes of device memory, when all that was started is done; good until the next copy."""
        part = self._staging[:size]
        self._device.copier(part.ctypes.data, address, size)()
        self._device.stream.sync()
        return part

    def _widened(self, raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bytes of the bundle's dtype, in fp32."""
        if self._dtype == "bf16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return raw.view(_NUMPY[self._dtype]).astype(np.float32)

    def _address(self, view: View) -> int:
        buffer = self._buffers[view.buffer]
        return buffer.address + view.start * buffer.row_bytes

    def _shape(self, tensor: Tensor, rows: int) -> tuple[int, ...]:
        return tuple(rows if dim == "T" else self._dims[dim] for dim in tensor.shape)
