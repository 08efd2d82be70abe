"""Sessions on ONNX Runtime: the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.graphs import GRAPHS, GraphName, Tensor, dimensions, present_name
from edgeskip.runtime.manifest import Bundle
from edgeskip.runtime.rounds import Call, Round, View, workspace
from edgeskip.runtime.session import BoundRound, RoundResult, Session

_NUMPY = {"fp32": np.float32, "fp16": np.float16}
_ORT_NAMES: dict[Any, str] = {np.float32: "tensor(float)", np.float16: "tensor(float16)"}


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

    confidence_threshold = 0.5  # a wasted draft costs as much as a right one, and looking costs next to nothing

    def __init__(self, bundle: Bundle, *, threads: int = 0, dialect: str = "ort") -> None:
        manifest = bundle.manifest
        if manifest.dtype == "bf16":
            raise BackendError(
                bundle.folder,
                "in bf16, which ONNX Runtime does not compute on a CPU",
                fix="export with --dtype fp32",
            )
        ort = _onnxruntime()
        self._dtypes: dict[str, Any] = {"float": _NUMPY[manifest.dtype], "int64": np.int64}
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        self._table = manifest.table
        self._sessions = {}
        options = _session_options(ort, threads)
        for graph in GRAPHS:
            path = bundle.graph_path(graph, dialect)
            try:
                self._sessions[graph] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its errors share no base but Exception
                raise BackendError(
                    path, f"ONNX Runtime {ort.__version__} refuses it ({error})", fix="upgrade onnxruntime"
                ) from None
            self._check_tensors(path, graph)
        self._buffers = {
            name: _zeros((rows, *([] if dim is None else [self._dims[dim]])), self._dtypes[dtype])
            for name, (dim, dtype, rows) in workspace(manifest.prefill_chunk).items()
        }
        self._caches = {
            tensor.name: _zeros(self._shape(tensor, 0), self._dtypes["float"])
            for graph in self._table.values()
            for tensor in graph.inputs
            if tensor.is_cache
        }
        self._scratch, self._ones = np.empty(self._dims["V"], np.float32), np.ones(self._dims["V"], np.float32)
        self._bound: dict[Round, BoundRound] = {}
        self._stage_ns: dict[str, int] = dict.fromkeys(GRAPHS, 0)
        self.description = f"ONNX Runtime {ort.__version__}, CPU, {dialect} dialect, {manifest.dtype}"

    def _check_tensors(self, path: Path, graph: GraphName) -> None:
        """Compares a loaded graph with the manifest's: memory is bound by address, so nothing later would notice."""
        session, names = self._sessions[graph], {"float": _ORT_NAMES[self._dtypes["float"]], "int64": "tensor(int64)"}
        for tensors, nodes in (
            (self._table[graph].inputs, session.get_inputs()),
            (self._table[graph].outputs, session.get_outputs()),
        ):
            wanted = [(t.name, names[t.dtype], [self._dims.get(dim, dim) for dim in t.shape]) for t in tensors]
            if [(node.name, node.type, node.shape) for node in nodes] != wanted:
                raise BundleError(path, "its tensors are not those of the manifest", fix="export the bundle again")

    @property
    def stage_ns(self) -> Mapping[str, int]:
        """Time spent in each graph so far."""
        return dict(self._stage_ns)

    def bind(self, round_: Round) -> BoundRound:
        """Fixes shapes and memory of a round's calls; the same round is bound once."""
        if round_ not in self._bound:
            self._bound[round_] = self._bind(round_)
        return self._bound[round_]

    def _bind(self, round_: Round) -> BoundRound:
        calls = [(call.graph, self._sessions[call.graph], self._binding(call)) for call in round_.calls]
        stage_ns = self._stage_ns
        positions = self._buffers["position_ids"][: round_.rows]
        rows = np.arange(round_.rows)
        drafts = self._buffers["draft_token_ids"][: round_.num_drafts]
        targets = self._buffers["target_token_ids"][: round_.num_targets]

        def run(position: int) -> RoundResult:
            np.add(rows, position, out=positions)
            before = perf_counter_ns()
            for graph, session, binding in calls:
                session.run_with_iobinding(binding)
                after = perf_counter_ns()
                stage_ns[graph] += after - before
                before = after
            return RoundResult(drafts.tolist(), targets.tolist())

        return run

    def _binding(self, call: Call) -> Any:
        binding = self._sessions[call.graph].io_binding()
        graph = self._table[call.graph]
        inputs, outputs = dict(call.inputs), dict(call.outputs)
        for tensor in graph.inputs:
            array = self._caches[tensor.name] if tensor.is_cache else self._view(tensor, inputs[tensor.name])
            binding.bind_input(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            if tensor.is_cache:
                name = present_name(tensor.name)
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor in graph.outputs:
            if not tensor.is_cache:
                array = self._view(tensor, outputs[tensor.name])
                binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding

    def _view(self, tensor: Tensor, view: View) -> npt.NDArray[Any]:
        rows = self._buffers[view.buffer][view.start : view.start + view.rows]
        return rows.reshape(self._shape(tensor, view.rows))

    def _shape(self, tensor: Tensor, rows: int) -> tuple[int, ...]:
        return tuple(rows if dim == "T" else self._dims[dim] for dim in tensor.shape)

    def write_embeddings(self, rows: npt.NDArray[Any]) -> None:
        """Puts [T,H] embedding rows into the first T rows of `inputs_embeds`."""
        self._buffers["inputs_embeds"][: len(rows)] = rows

    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""
        self._buffers["inputs_embeds"][0] = self._buffers["target_embeds"][row]

    def draft_confidence(self, row: int) -> float:
        """The probability that the exit gave to the token it drafted in this row."""
        logits, scratch = self._buffers["logits"][row], self._scratch
        np.subtract(logits, logits[self._buffers["draft_token_ids"][row]], out=scratch)
        np.exp(scratch, out=scratch)
        return 1.0 / float(scratch.dot(self._ones))  # a sum, by one kernel

    def read_logits(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows of the last head call's logits, [rows,V]."""
        return self._buffers["logits"][:rows].astype(np.float32)

    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""
        self._bound.clear()
        self._sessions.clear()
        self._buffers.clear()
        self._caches.clear()


_pool_threads: int | None = None


def _session_options(ort: Any, threads: int) -> Any:
    """Options for a session on the process's one thread pool: pools of their own would spin against each other."""
    global _pool_threads
    if _pool_threads is None:
        _pool_threads = threads or _usable_cores()
        ort.set_global_thread_pool_sizes(_pool_threads, 1)
    elif threads not in (0, _pool_threads):
        raise BackendError(
            "threads",
            f"{threads}",
            wanted=f"{_pool_threads}, as in this process so far",
            fix="start a new process",
        )
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime", f"not usable ({error})", fix='pip install "edgeskip[cpu]"') from None
    return onnxruntime


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeroed memory on a 64-byte boundary."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned: npt.NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return aligned
