"""A session on ONNX Runtime's CPU provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.backends.ort import OrtGraphs, cpu_options, onnxruntime
from edgeskip.runtime.bundle.graphs import GRAPHS, Tensor, dimensions
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.rounds import Call, Round, View, workspace
from edgeskip.runtime.decoding.session import BoundRound, Memory, RoundResult, Session
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.host import cpu_name, usable_cores

_NUMPY = {"fp32": np.float32, "fp16": np.float16}


class OrtCpuSession(Session):
    """The `ort` dialect on ONNX Runtime's CPU provider, updating caches in place.

    Args:
        bundle: what to load.
        threads: of the one pool that the three graphs share, and with it every session of this process; 0 means
            one a core.
        dialect: `ort`, or `standard` to run the graphs that TensorRT gets.

    Raises:
        BackendError: ONNX Runtime is missing or refuses the graphs, or the bundle is in bf16, which its CPU
            provider does not compute.
    """

    device = "cpu"
    confidence_threshold = 0.5  # a wasted draft costs as much as a right one, and looking costs next to nothing

    def __init__(self, bundle: Bundle, *, threads: int = 0, dialect: str = "ort") -> None:
        manifest = bundle.manifest
        if manifest.dtype == "bf16":
            raise BackendError(
                bundle.folder,
                "in bf16, which ONNX Runtime does not compute on a CPU",
                fix="export with --dtype fp32",
            )
        ort = onnxruntime()
        options = cpu_options(ort, threads)
        self._graphs = OrtGraphs(ort, bundle, dialect, options, [("CPUExecutionProvider", {})])
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        dtypes: dict[str, Any] = {"float": _NUMPY[manifest.dtype], "int64": np.int64}
        self._buffers = {
            name: _zeros((rows, *([] if dim is None else [self._dims[dim]])), dtypes[dtype])
            for name, (dim, dtype, rows) in workspace(manifest.prefill_chunk).items()
        }
        self._caches = {
            tensor.name: _zeros(tuple(self._dims[dim] for dim in tensor.shape), dtypes["float"])
            for graph in manifest.table.values()
            for tensor in graph.inputs
            if tensor.is_cache
        }
        self._weights_bytes = manifest.weights_bytes
        self._scratch, self._ones = np.empty(self._dims["V"], np.float32), np.ones(self._dims["V"], np.float32)
        self.dialect = dialect
        self._bound: dict[Round, BoundRound] = {}
        self._stage_ns: dict[str, int] = dict.fromkeys(GRAPHS, 0)
        self._threads = threads or usable_cores()
        self.hardware = f"{cpu_name()}, {self._threads} threads"
        self.description = f"ONNX Runtime {ort.__version__}, CPU, {dialect} dialect, {manifest.dtype}"

    @property
    def stage_ns(self) -> Mapping[str, int]:
        """Time spent in each graph so far."""
        return dict(self._stage_ns)

    def _bind(self, round_: Round) -> BoundRound:
        calls = [(call.graph, self._bound_call(call)) for call in round_.calls]
        stage_ns = self._stage_ns
        positions = self._buffers["position_ids"][: round_.rows]
        rows = np.arange(round_.rows)
        drafts = self._buffers["draft_token_ids"][: round_.num_drafts]
        targets = self._buffers["target_token_ids"][: round_.num_targets]

        def run(position: int) -> RoundResult:
            np.add(rows, position, out=positions)
            before = perf_counter_ns()
            for graph, call in calls:
                call()
                after = perf_counter_ns()
                stage_ns[graph] += after - before
                before = after
            return RoundResult(drafts.tolist(), targets.tolist())

        return lambda position: partial(run, position)

    def _bound_call(self, call: Call) -> Callable[[], None]:
        def address(place: Tensor | View) -> int:
            if isinstance(place, Tensor):
                return int(self._caches[place.name].ctypes.data)
            return int(self._buffers[place.buffer][place.start :].ctypes.data)

        return self._graphs.bound(call, "cpu", address)

    def write(self, buffer: str, rows: npt.NDArray[Any]) -> None:
        """Puts rows in the bundle's dtype into the first rows of a buffer."""
        self._buffers[buffer][: len(rows)] = rows

    def read(self, view: View) -> npt.NDArray[Any]:
        """Rows of a workspace buffer: ids as they are, all else in fp32."""
        rows: npt.NDArray[Any] = self._buffers[view.buffer][view.start : view.start + view.rows]
        return rows.copy() if rows.dtype == np.int64 else rows.astype(np.float32)

    def read_cache(self, name: str) -> npt.NDArray[Any]:
        """A whole cache, [N,C,D] in fp32."""
        cache: npt.NDArray[Any] = self._caches[name][0].astype(np.float32)
        return cache

    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""
        self._buffers["inputs_embeds"][0] = self._buffers["target_embeds"][row]

    def draft_confidence(self, row: int) -> float:
        """The probability that the exit gave to the token it drafted in this row."""
        logits, scratch = self._buffers["logits"][row], self._scratch
        np.subtract(logits, logits[self._buffers["draft_token_ids"][row]], out=scratch)
        np.exp(scratch, out=scratch)
        return 1.0 / float(scratch.dot(self._ones))  # a sum, by one kernel

    def time_call_ms(self, call: Call, position: int, repeats: int) -> float:
        """Median time of one call by itself, its first row at `position`; overwrites cache rows from there on."""
        self._buffers["position_ids"][:] = position + np.arange(len(self._buffers["position_ids"]))
        run, times = self._bound_call(call), []
        for _ in range(repeats + 2):
            start = perf_counter_ns()
            run()
            times.append((perf_counter_ns() - start) / 1e6)
        return float(np.median(times[2:]))

    def copy_bytes_per_second(self) -> float:
        """Rate of copies within the memory that holds the weights, bytes read plus bytes written, by all threads."""
        size, threads = 1 << 26, min(self._threads, usable_cores())
        pairs = [(np.zeros(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]
        times = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(9):
                start = perf_counter()
                list(pool.map(lambda pair: np.copyto(*pair), pairs))
                times.append(perf_counter() - start)
        return 2 * size * threads / float(np.median(times[2:]))

    def memory(self) -> Memory:
        """Host memory by kind; what the backend takes beyond the weights is not told apart from the process's."""
        caches = sum(cache.nbytes for cache in self._caches.values())
        return Memory(self._weights_bytes, caches, sum(buffer.nbytes for buffer in self._buffers.values()), None)

    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""
        self._bound.clear()
        self._graphs.close()
        self._buffers.clear()
        self._caches.clear()


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeroed memory on a 64-byte boundary."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned: npt.NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return aligned
