"""ONNX Runtime, imported late: its options, its providers, and a bundle's graphs bound by address."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from edgeskip.runtime.backends.device import INSTALL
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.dtypes import BY_SAFETENSORS, ITEMSIZE, NUMBER_TYPES, DType
from edgeskip.runtime.bundle.graphs import GraphName, Tensor, dimensions, past_name
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.tensors import TABLES
from edgeskip.runtime.bundle.weights import read_bytes, stored_arrays
from edgeskip.runtime.decoding.rounds import Call, View
from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.host import release_freed_memory, usable_cores
from edgeskip.runtime.packages import install

CUDA_PROVIDER = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""With fp32 as it is: by default, products round it to the 10 bits of TF32."""


class OrtGraphs:
    """A bundle's graphs, `at_once` of them loaded at a time; their calls are bound by address."""

    def __init__(
        self,
        ort: Any,
        bundle: Bundle,
        dialect: str,
        options: Callable[[GraphName], Any],
        providers: list[tuple[str, dict[str, str]]],
        at_once: int = 1,
    ) -> None:
        manifest = bundle.manifest
        self._table, self._dtype, self._dialect = manifest.graphs, manifest.dtype, DIALECTS[dialect]
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        self._weights = stored_arrays(bundle) if self._dialect.weights == "inputs" else {}
        paths = {graph: bundle.graph_path(graph, dialect) for graph in manifest.graphs}

        def session(graph: GraphName) -> Any:
            with ort_errors(paths[graph]):
                made = ort.InferenceSession(paths[graph], options(graph), providers=providers)
            release_freed_memory()  # copies of weights that it packed
            return made

        # A graph takes more memory while it is loaded than afterwards: so the largest first, while there are no others.
        # It packs its weights on one thread.
        largest_first = [graph for graph, _ in sorted(read_bytes(bundle).items(), key=lambda pair: -pair[1])]
        with ThreadPoolExecutor(at_once) as pool:
            sessions = (pool.map if at_once > 1 else map)(session, largest_first)
            self._sessions = dict(zip(largest_first, sessions, strict=True))
        for graph in largest_first:
            self._check_tensors(paths[graph], graph)

    def _check_tensors(self, path: Path, graph: GraphName) -> None:
        """Compares a loaded graph with the manifest's: memory is bound by address, so nothing later would notice."""
        session, record = self._sessions[graph], self._table[graph]
        dims = record.dimensions(self._dims)
        wanted = [
            {
                t.name: (NUMBER_TYPES[t.number_type(self._dtype)].ort, [dims.get(dim, dim) for dim in shape])
                for t, shape in tensors
            }
            for tensors in (
                [(t, t.shape) for t in record.inputs],
                [(t, self._dialect.output_shape(t)) for t in record.outputs],
            )
        ]
        found = [
            {node.name: (node.type, node.shape) for node in nodes}
            for nodes in (session.get_inputs(), session.get_outputs())
        ]
        for name in found[0].keys() & self._weights.keys():
            array, number = self._weights[name], NUMBER_TYPES[BY_SAFETENSORS[self._weights[name].dtype]]
            rows = record.head.vocabulary if record.head and name.startswith(TABLES) else array.shape[0]
            wanted[0][name] = (number.ort, [rows, *array.shape[1:]])  # of a table, the rows that its head knows
        if found != wanted:
            raise BundleError(path, "its tensors are not those of the manifest", fix="export the bundle again")

    def bound(
        self, call: Call, device: str, address: Callable[[str | View], int], run_options: Any = None
    ) -> Callable[[], None]:
        """Binds a call to memory; calling the result runs it.

        Args:
            call: the graph and its rows.
            device: where the memory is.
            address: of a cache, by its input's name; of the new rows of one, by its output's; of weights that are
                inputs, by their name in the weights file; of rows of the workspace.
            run_options: ONNX Runtime's.
        """
        session, graph = self._sessions[call.graph], self._table[call.graph]
        binding = session.io_binding()
        dims = graph.dimensions(self._dims) | {"T": call.rows}
        in_place = self._dialect.caches == "in-place"
        views = dict(call.inputs), dict(call.outputs)

        def bind(method: Callable[..., None], tensor: Tensor, shape: Sequence[str], place: str | View) -> None:
            element = NUMBER_TYPES[tensor.number_type(self._dtype)].onnx
            method(tensor.name, device, 0, element, [dims[dim] for dim in shape], address(place))

        for tensor in graph.inputs:
            bind(binding.bind_input, tensor, tensor.shape, views[0].get(tensor.name) or call.cache(tensor.name))
        for tensor in graph.outputs:
            place: str | View = views[1].get(tensor.name) or call.cache(tensor.name)
            if tensor.is_cache and in_place:
                place = past_name(str(place))
            bind(binding.bind_output, tensor, self._dialect.output_shape(tensor), place)
        for node in session.get_inputs():
            if node.name in self._weights:
                element = NUMBER_TYPES[BY_SAFETENSORS[self._weights[node.name].dtype]].onnx
                binding.bind_input(node.name, device, 0, element, node.shape, address(node.name))

        def run() -> None:
            with ort_errors(call.graph):
                session.run_with_iobinding(binding, run_options)

        return run

    def close(self) -> None:
        """Frees the graphs and their weights."""
        self._sessions.clear()
        self._weights.clear()


class _Described(ctypes.Structure):
    """A matrix where it lies, as DLPack describes it, and its shape."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 2),
    )


def value_at(ort: Any, address: int, shape: tuple[int, int], dtype: DType, device: Literal["cpu", "cuda"]) -> Any:
    """ONNX Runtime's value for a matrix where it lies, in memory that must outlive it."""
    allocate, capsule = ctypes.pythonapi.PyMem_RawMalloc, ctypes.pythonapi.PyCapsule_New
    allocate.restype, allocate.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    place = allocate(ctypes.sizeof(_Described))  # ONNX Runtime frees it, at any time until the process ends
    free = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
    device_type, type_code = {"cpu": 1, "cuda": 2}[device], 4 if dtype == "bf16" else 2
    sizes = place + _Described.sizes.offset
    described = _Described(
        address, device_type, 0, len(shape), type_code, 8 * ITEMSIZE[dtype], 1, sizes, None, 0, None, free, shape
    )
    ctypes.memmove(place, ctypes.byref(described), ctypes.sizeof(_Described))
    return ort.OrtValue.from_dlpack(capsule(place, b"dltensor", None))


def has_cuda_provider(ort: Any) -> bool:
    """Whether this ONNX Runtime was built for CUDA."""
    return "CUDAExecutionProvider" in ort.get_available_providers()


def check_cuda_provider(ort: Any, driver_cuda_version: tuple[int, int]) -> None:
    """Refuses what would keep the CUDA provider from loading with a driver for this CUDA.

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
    """Options for a session on the process's one thread pool: separate pools would spin against each other.

    Raises:
        BackendError: more threads than there are cores, or a different number than so far in this process.
    """
    global _pool_threads
    if threads > usable_cores():
        wanted = f"at most {usable_cores()}, the cores that this process may use"
        raise BackendError("threads", f"{threads}", wanted=wanted)
    if _pool_threads is None:
        with ort_errors("threads"):
            ort.set_global_thread_pool_sizes(threads or usable_cores(), 1)
        _pool_threads = threads or usable_cores()
    elif threads not in (0, _pool_threads):
        raise BackendError(
            "threads",
            f"{threads}",
            wanted=f"{_pool_threads}, as in this process so far",
            fix="start a new process",
        )
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 4  # fatal: whatever it refuses, it raises too
    return options


@contextmanager
def ort_errors(place: object) -> Iterator[None]:
    """Whatever ONNX Runtime raises becomes one line.

    Raises:
        BackendError: with this place.
    """
    try:
        yield
    except Exception as error:  # its errors have no base in common but Exception
        lacking = any(word in str(error) for word in ("bad_alloc", "allocate memory", "pthread_create"))
        fix = "free some memory" if lacking else "upgrade onnxruntime"
        raise BackendError(place, f"ONNX Runtime {onnxruntime().__version__} refuses it ({error})", fix=fix) from None


def onnxruntime() -> Any:
    """The library, imported late.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if "failed to map segment" in str(error):
            raise MemoryError(str(error)) from None
        raise BackendError("onnxruntime", f"not usable ({error})", fix=install("cpu")) from None
    return onnxruntime
