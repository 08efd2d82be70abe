"""A session on ONNX Runtime's CUDA provider."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.backends.cuda_session import CudaSession
from edgeskip.runtime.backends.device import CudaDevice, out_of_memory
from edgeskip.runtime.backends.engines.heads import embedder
from edgeskip.runtime.backends.engines.products import Matrix
from edgeskip.runtime.backends.ort import (
    CUDA_PROVIDER,
    OrtGraphs,
    check_cuda_provider,
    cpu_options,
    onnxruntime,
    value_at,
)
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.formats import FORMATS, is_quantized
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName
from edgeskip.runtime.bundle.manifest import Bundle, Manifest
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, TABLES, graph_tensors
from edgeskip.runtime.bundle.weights import Rows, StoredTensor, TokenRows, held_bytes, stored_arrays
from edgeskip.runtime.decoding.rounds import Call, View, speculative_round
from edgeskip.runtime.errors import BackendError, BundleError

_LEAST_OF_OTHER_PRODUCTS = 2048
"""The smallest hidden size that ONNX Runtime's second set of kernels for quantized products was right with."""

_LIBRARIES_BYTES = 256 << 20
"""About what cuBLAS, cuDNN and the kernels take besides the weights."""


class OrtCudaSession(CudaSession):
    """ONNX Runtime's CUDA provider on a stream of ours: nothing in a round waits for the host.

    Args:
        bundle: what to load.
        device: where it is loaded to; the session closes it.
        dialect: by default `ort` for fp16 and bf16, and `standard` for fp32, which the fused attention does not have.
        exit_layer: the exit that drafts; by default the bundle's own.

    Raises:
        BackendError: ONNX Runtime lacks its CUDA provider, CUDA libraries are missing, the driver is too old, an
            operator has no kernel for CUDA, or there is not enough device memory.
    """

    def __init__(
        self, bundle: Bundle, device: CudaDevice, *, dialect: str | None = None, exit_layer: int | None = None
    ) -> None:
        manifest = bundle.manifest
        dialect = dialect or ("standard" if manifest.dtype == "fp32" else "ort")
        self._graphs: OrtGraphs | None = None
        self._bundle = bundle
        self._tables: dict[str, int] = {}
        try:
            ort = onnxruntime()
            if dialect == "ort" and manifest.dtype == "fp32":
                found = "in fp32, which the ort dialect's attention lacks on CUDA"
                raise BackendError(bundle.folder, found, wanted="the standard dialect")
            if (DIALECTS[dialect].caches, DIALECTS[dialect].weights) != ("in-place", "initializers"):
                found = f"the {dialect} dialect, whose caches or weights ONNX Runtime's session on CUDA does not manage"
                raise BackendError(bundle.folder, found, wanted="ort or standard")
            check_cuda_provider(ort, device.driver_cuda_version)
            super().__init__(bundle, device, held_bytes(bundle), exit_layer)
        except BaseException:
            device.close()
            raise
        try:
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._tables = self._plain_tables()
            self._shared = {name: self._values(ort, name) for name, graph in self._graph_table.items() if graph.head}
            options = partial(_cuda_options, ort, manifest, self._shared)
            self._graphs = OrtGraphs(ort, bundle, dialect, options, [_cuda_provider(device)])
            most = max(manifest.prefill_chunk, HEAD_ROWS)
            self._read_by_ids(most)
            self._read_rows = self._row_reader(most)
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

    def _place(self, place: str | View) -> int:
        return self._address(place) if isinstance(place, View) else self._caches[place].address

    def _plain_tables(self) -> dict[str, int]:
        """Where the tables of tokens that are in the dtype are on the device, by name: for all heads and kernels."""
        bundle, arrays, row = self._bundle, stored_arrays(self._bundle), self._dims["H"] * ITEMSIZE[self._dtype]
        tables = [record for record in bundle.manifest.tensors.values() if record.name in TABLES]
        plain = [record for record in tables if not is_quantized([record.format])]
        return {record.name: self._uploaded(StoredTensor(bundle, record, arrays), row) for record in plain}

    def _values(self, ort: Any, graph: GraphName) -> dict[str, Any]:
        """What a head's graph uses in place of the tables that it would load, as ONNX Runtime's values."""
        head = self._graph_table[graph].head
        assert head is not None
        shape = head.vocabulary, self._dims["H"]
        return {name: value_at(ort, address, shape, self._dtype, "cuda") for name, address in self._tables.items()}

    def write(self, buffer: str, rows: Rows) -> None:
        """Puts rows into the first rows of a buffer; those of a quantized table are converted on the device."""
        if self._read_rows is None or not isinstance(rows, TokenRows):
            return super().write(buffer, rows)
        self._device.stream.sync()  # a round that nobody waited for may still be reading
        return self._read_rows(rows, self._buffers[buffer].address)

    def _read_by_ids(self, most: int) -> None:
        """Lets the device read up to so many rows of the embedding table by their ids, if it has the table in the dtype
        and the kernel reads that here.
        """
        if EMBEDDINGS in self._tables and self._bundle.manifest.has_products(self._device.compute_capability):
            (ids,) = self._device.zeros([(ITEMSIZE["int64"], most)])
            self._token_ids = ids.address
            self._embed = embedder(self._device, self._token_table(), self._dims["H"], self._dtype)

    def _row_reader(self, most: int) -> Callable[[TokenRows, int], None] | None:
        """What copies up to so many rows of the embedding table to the device as they are stored, and puts them in the
        dtype at an address; None if it is not quantized, or the kernel does not read it.
        """
        matrix = self._as_stored()
        if matrix is None:
            return None
        stored = self._host_table.stored(slice(0, 1))
        places = self._device.zeros([(part.nbytes, most) for part in stored] + [(ITEMSIZE["int64"], most)])
        self._workspace_bytes += (taken := sum(place.bytes for place in places))
        self.planned_bytes += taken
        numbers, scales, order = (place.address for place in places)
        host = self._staging[: most * ITEMSIZE["int64"]]
        host.view(np.int64)[:] = np.arange(most)
        self._device.copier(order, host.ctypes.data, host.nbytes)()
        self._device.stream.sync()
        embed = embedder(self._device, matrix(numbers, scales), self._dims["H"], self._dtype)

        def read(rows: TokenRows, address: int) -> None:
            start = 0
            for part, place in zip(rows.table.stored(list(rows.token_ids)), (numbers, scales), strict=True):
                raw = self._staging[start : start + part.nbytes]
                raw[:] = part.reshape(-1).view(np.uint8)
                self._device.copier(place, raw.ctypes.data, raw.nbytes)()
                start += raw.nbytes
            embed(order, address, len(rows))

        return read

    def _token_table(self) -> Matrix:
        """That of the heads, if it is in the dtype. If it is quantized, another one, as ONNX Runtime does not say where
        it keeps theirs: as it is stored, if the kernels read that here, or else in the dtype.
        """
        if EMBEDDINGS in self._tables:
            return Matrix(self._tables[EMBEDDINGS])
        matrix = self._as_stored()
        if matrix is None:
            return Matrix(self._taken(self._host_table, self._dims["H"] * ITEMSIZE[self._dtype]))
        arrays = self._host_table.stored(slice(None))
        return matrix(*(self._taken(array, array.nbytes // len(array)) for array in arrays))

    def _as_stored(self) -> Callable[..., Matrix] | None:
        """Makes the embedding table of addresses of its numbers and scales; None unless it is quantized, and the
        kernels read it here.
        """
        manifest = self._bundle.manifest
        format_ = FORMATS[manifest.tensors[EMBEDDINGS].format]
        if not (format_.bits and manifest.has_products(self._device.compute_capability)):
            return None
        return partial(Matrix, bits=format_.bits, block=format_.block_size or 0)

    def _taken(self, table: StoredTensor | npt.NDArray[Any], row_bytes: int) -> int:
        """The same as `_uploaded`, for memory that was not planned."""
        size, free = row_bytes * self._dims["V"], self._device.free_bytes()
        if size > free:
            raise out_of_memory(self._bundle.folder, size, free, "to draw tokens")
        self._weights_bytes += size
        self.planned_bytes += size
        return self._uploaded(table, row_bytes)

    def _uploaded(self, table: StoredTensor | npt.NDArray[Any], row_bytes: int) -> int:
        """Where an array [V, ...] is on the device, once it is copied there."""
        rows = self._dims["V"]
        (block,) = self._device.zeros([(row_bytes, rows)])
        step = self._staging.nbytes // row_bytes
        for first in range(0, rows, step):
            raw = np.ascontiguousarray(table[first : min(first + step, rows)]).view(np.uint8).reshape(-1)
            part = self._staging[: raw.nbytes]
            part[:] = raw
            self._device.copier(block.address + first * row_bytes, part.ctypes.data, part.nbytes)()
            self._device.stream.sync()
        return block.address

    def _release(self) -> None:
        if self._graphs is None:
            return
        # A synchronized run gives back what unsynchronized runs borrowed from the host. Left to its destructor, ONNX
        # Runtime frees it in a callback of the stream, where CUDA permits no such call, and aborts the process.
        with suppress(Exception):
            for call in speculative_round(self._split, 1).calls:  # every graph once at least
                self._graphs.bound(call, "cuda", self._place)()
            self._device.stream.sync()
        self._graphs.close()
        gc.collect()  # a session was found to stay in a cycle until then, and its weights on the device with it


def _is_out_of_memory(error: BaseException, device: CudaDevice) -> bool:
    """Whether it was memory: libraries then report anything from a failed allocation to an internal error."""
    words = ("out of memory", "failed to allocate memory", "available memory of", "resource allocation failed")
    text = str(error).lower()
    if not isinstance(error, Exception) or isinstance(error, BundleError) or "out of device memory" in text:
        return False  # not an error of memory, or already reported
    return any(word in text for word in words) or device.free_bytes() < _LIBRARIES_BYTES


def _cuda_provider(device: CudaDevice) -> tuple[str, dict[str, str]]:
    name, options = CUDA_PROVIDER
    stream = str(int(device.stream.handle))
    more = {"device_id": "0", "user_compute_stream": stream, "arena_extend_strategy": "kSameAsRequested"}
    return name, options | more


def _cuda_options(ort: Any, manifest: Manifest, shared: Mapping[GraphName, Mapping[str, Any]], graph: GraphName) -> Any:
    ort.set_default_logger_severity(4)  # it warns about providers that nobody asked for
    options = cpu_options(ort, 0)  # a process that has one pool of threads must share it
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an operator on the CPU is an error
    for name, value in shared.get(graph, {}).items():
        options.add_initializer(name, value)
    if manifest.dtype == "fp16" and _wants_other_products(manifest, graph):
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    return options


def _wants_other_products(manifest: Manifest, graph: GraphName) -> bool:
    """Whether a graph's quantized products are faster with ONNX Runtime's second set of kernels.

    The first set has nothing good for 8 bits. With 4 bits, the second verifies a little faster (0.73 for 0.76 ms, 4
    rows of a 1B on an H100) and takes a third more for a single row (0.86 for 0.64), more memory and time to load.
    A model with a hidden size of 64 in int8 gave NaN on an H100 with the second set, one with 2048 did not.
    """
    if manifest.architecture.hidden_size < _LEAST_OF_OTHER_PRODUCTS:
        return False
    names = graph_tensors(manifest.architecture, manifest.graphs[graph].layers)
    return any(manifest.tensors[name].format == "int8" for name in names)
