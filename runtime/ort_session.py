"""Sessions on ONNX Runtime: the CPU, and a CUDA device."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.architecture import DType
from edgeskip.runtime.cuda import INSTALL, CudaDevice, out_of_memory
from edgeskip.runtime.cuda_session import CudaSession
from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.graphs import GRAPHS, GraphName, Tensor, dimensions, present_name
from edgeskip.runtime.host import cpu_name, usable_cores
from edgeskip.runtime.manifest import Bundle
from edgeskip.runtime.packages import install
from edgeskip.runtime.rounds import Call, Round, View, speculative_round, workspace
from edgeskip.runtime.session import BoundRound, Memory, RoundResult, Session

_ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16, "int64": 7}
"""Numbers of the dtypes in ONNX's TensorProto."""
_ELEMENT_NAMES = {
    "fp32": "tensor(float)",
    "fp16": "tensor(float16)",
    "bf16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}
_NUMPY = {"fp32": np.float32, "fp16": np.float16}
_LIBRARIES_BYTES = 256 << 20
"""About what cuBLAS, cuDNN and the kernels take beside the weights."""


CUDA_PROVIDER = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""With fp32 as it is: by default products round it to the 10 bits of TF32."""


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
        self._graphs = _Graphs(ort, bundle, dialect, options, [("CPUExecutionProvider", {})])
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


class OrtCudaSession(CudaSession):
    """ONNX Runtime's CUDA provider on a stream of ours: nothing in a round waits for the host.

    Args:
        bundle: what to load.
        device: where to; the session closes it.
        dialect: `ort` for fp16 and bf16 and `standard` for fp32, by default: the fused attention has no fp32.

    Raises:
        BackendError: ONNX Runtime lacks its CUDA provider, CUDA libraries are missing, the driver is too old, an
            operator has no kernel for CUDA, or device memory does not suffice.
    """

    def __init__(self, bundle: Bundle, device: CudaDevice, *, dialect: str | None = None) -> None:
        manifest = bundle.manifest
        dialect = dialect or ("standard" if manifest.dtype == "fp32" else "ort")
        self._graphs: _Graphs | None = None
        try:
            ort = onnxruntime()
            if dialect == "ort" and manifest.dtype == "fp32":
                found = "in fp32, which the ort dialect's attention lacks on CUDA"
                raise BackendError(bundle.folder, found, wanted="the standard dialect")
            check_cuda_provider(ort, device.driver_cuda_version)
            super().__init__(bundle, device, manifest.weights_bytes)
        except BaseException:
            device.close()
            raise
        try:
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._graphs = _Graphs(ort, bundle, dialect, _cuda_options(ort), [_cuda_provider(device)])
            self._warm_up(manifest.prefill_chunk)
        except BaseException as error:
            short = _is_out_of_memory(error, device)
            self.close()
            if short:
                raise out_of_memory(
                    bundle.folder, self.planned_bytes + _LIBRARIES_BYTES, device.free_at_start
                ) from None
            raise
        self.dialect = dialect
        self.description = f"ONNX Runtime {ort.__version__}, {device.name}, {dialect} dialect, {manifest.dtype}"

    def _enqueued(self, call: Call) -> Callable[[], None]:
        assert self._graphs is not None
        return self._graphs.bound(call, "cuda", self._place, self._run_options)

    def _place(self, place: Tensor | View) -> int:
        return self._caches[place.name].address if isinstance(place, Tensor) else self._address(place)

    def _release(self) -> None:
        if self._graphs is None:
            return
        # What runs left unsynchronized lent from the host goes back with one that is: left to its destructor, ONNX
        # Runtime frees it in a callback of the stream, where CUDA permits no such call, and aborts the process.
        with suppress(Exception):
            for call in speculative_round(0).calls:
                self._graphs.bound(call, "cuda", self._place)()
            self._device.stream.sync()
        self._graphs.close()


class _Graphs:
    """The three graphs, loaded, whose calls are bound by address."""

    def __init__(
        self, ort: Any, bundle: Bundle, dialect: str, options: Any, providers: list[tuple[str, dict[str, str]]]
    ) -> None:
        manifest = bundle.manifest
        bundle.require_graphs(fix="use the bundle that it was packed from, or --backend with its engines")
        self._table, self._dtype = manifest.table, manifest.dtype
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        self._sessions: dict[GraphName, Any] = {}
        for graph in GRAPHS:
            path = bundle.graph_path(graph, dialect)
            try:
                session = ort.InferenceSession(path, options, providers=providers)
            except Exception as error:  # its errors share no base but Exception
                self.close()
                raise BackendError(
                    path, f"ONNX Runtime {ort.__version__} refuses it ({error})", fix="upgrade onnxruntime"
                ) from None
            self._sessions[graph] = session
            self._check_tensors(path, graph)

    def _check_tensors(self, path: Path, graph: GraphName) -> None:
        """Compares a loaded graph with the manifest's: memory is bound by address, so nothing later would notice."""
        session = self._sessions[graph]
        for tensors, nodes in (
            (self._table[graph].inputs, session.get_inputs()),
            (self._table[graph].outputs, session.get_outputs()),
        ):
            wanted = [
                (t.name, _ELEMENT_NAMES[self._dtype_of(t)], [self._dims.get(dim, dim) for dim in t.shape])
                for t in tensors
            ]
            if [(node.name, node.type, node.shape) for node in nodes] != wanted:
                raise BundleError(path, "its tensors are not those of the manifest", fix="export the bundle again")

    def _dtype_of(self, tensor: Tensor) -> DType | str:
        return self._dtype if tensor.dtype == "float" else tensor.dtype

    def bound(
        self, call: Call, device: str, address: Callable[[Tensor | View], int], run_options: Any = None
    ) -> Callable[[], None]:
        """Binds a call to memory: `address` of a cache or of rows of the workspace. Calling the result runs it."""
        session, graph = self._sessions[call.graph], self._table[call.graph]
        binding = session.io_binding()
        inputs, outputs = dict(call.inputs), dict(call.outputs)

        def bind(method: Callable[..., None], name: str, tensor: Tensor, view: View | None) -> None:
            shape = [view.rows if view and dim == "T" else self._dims[dim] for dim in tensor.shape]
            place = address(view or tensor)
            method(name, device, 0, _ELEMENT_TYPES[self._dtype_of(tensor)], shape, place)

        for tensor in graph.inputs:
            bind(binding.bind_input, tensor.name, tensor, inputs.get(tensor.name))
            if tensor.is_cache:
                bind(binding.bind_output, present_name(tensor.name), tensor, None)
        for tensor in graph.outputs:
            if not tensor.is_cache:
                bind(binding.bind_output, tensor.name, tensor, outputs[tensor.name])
        if run_options is None:
            return lambda: session.run_with_iobinding(binding)
        return lambda: session.run_with_iobinding(binding, run_options)

    def close(self) -> None:
        """Frees the graphs and their weights."""
        self._sessions.clear()


def _is_out_of_memory(error: BaseException, device: CudaDevice) -> bool:
    """Whether it was memory: what the libraries say then is anything from an allocation to an internal error."""
    words = ("out of memory", "failed to allocate memory", "available memory of", "resource allocation failed")
    text = str(error).lower()
    if not isinstance(error, Exception) or isinstance(error, BundleError) or "out of device memory" in text:
        return False  # no error of memory, or said already
    return any(word in text for word in words) or device.free_bytes() < _LIBRARIES_BYTES


def _cuda_provider(device: CudaDevice) -> tuple[str, dict[str, str]]:
    name, options = CUDA_PROVIDER
    stream = str(int(device.stream.handle))
    more = {"device_id": "0", "user_compute_stream": stream, "arena_extend_strategy": "kSameAsRequested"}
    return name, options | more


def _cuda_options(ort: Any) -> Any:
    ort.set_default_logger_severity(4)  # it warns of providers that nobody asked for
    options = cpu_options(ort, 0)  # a process that has one pool of threads must share it
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an operator on the CPU is an error
    return options


def has_cuda_provider(ort: Any) -> bool:
    """Whether this ONNX Runtime was built for CUDA; one for the CPU was not."""
    return "CUDAExecutionProvider" in ort.get_available_providers()


def check_cuda_provider(ort: Any, driver_cuda_version: tuple[int, int]) -> None:
    """Says in one line what would keep the CUDA provider from loading with a driver for this CUDA.

    Raises:
        BackendError: no such provider, the driver is too old, or libraries are missing.
    """
    if not has_cuda_provider(ort):
        fix = f"pip uninstall onnxruntime && {INSTALL}"
        raise BackendError("onnxruntime", f"{ort.__version__} has no CUDA provider", fix=fix)
    wanted = tuple(int(part) for part in (getattr(ort, "cuda_version", "") or "0.0").split(".")[:2])
    if driver_cuda_version[0] < wanted[0]:
        found, needed = (".".join(map(str, version)) for version in (driver_cuda_version, wanted))
        fix = "upgrade the NVIDIA driver"
        raise BackendError("CUDA", f"a driver for CUDA {found}", wanted=f"one for CUDA {needed}", fix=fix)
    ort.preload_dlls()
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if library.exists():
        try:
            ctypes.CDLL(str(library.with_name("libonnxruntime_providers_shared.so")), ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library))
        except OSError as error:
            raise BackendError("CUDA", f"libraries missing ({error})", fix=INSTALL) from None


_pool_threads: int | None = None


def cpu_options(ort: Any, threads: int) -> Any:
    """Options for a session on the process's one thread pool: pools of their own would spin against each other."""
    global _pool_threads
    if _pool_threads is None:
        _pool_threads = threads or usable_cores()
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
    options.log_severity_level = 4  # fatal: what it refuses it raises too
    return options


def onnxruntime() -> Any:
    """The library, imported late.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime", f"not usable ({error})", fix=install("cpu")) from None
    return onnxruntime


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeroed memory on a 64-byte boundary."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned: npt.NDArray[Any] = raw[start : start + size].view(dtype).reshape(shape)
    return aligned
