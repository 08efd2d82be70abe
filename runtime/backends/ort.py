"""ONNX Runtime, imported late: its options, its providers, and a bundle's graphs bound by address."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeskip.runtime.backends.device import INSTALL
from edgeskip.runtime.bundle.architecture import DType
from edgeskip.runtime.bundle.graphs import GRAPHS, GraphName, Tensor, dimensions, present_name
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.rounds import Call, View
from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.host import usable_cores
from edgeskip.runtime.packages import install

_ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16, "int64": 7}
"""Numbers of the dtypes in ONNX's TensorProto."""
_ELEMENT_NAMES = {
    "fp32": "tensor(float)",
    "fp16": "tensor(float16)",
    "bf16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}

CUDA_PROVIDER = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""With fp32 as it is: by default products round it to the 10 bits of TF32."""


class OrtGraphs:
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
