"""A session on TensorRT engines, of either flavour: `tensorrt` and `tensorrt_rtx` have one interface.

No weight is in an engine: each is an input, bound to its place in the one buffer that holds the weights file.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from edgeskip.runtime.backends.cuda_session import CudaSession, is_frequent
from edgeskip.runtime.backends.device import ALIGNMENT, CudaDevice, DeviceArray, out_of_memory
from edgeskip.runtime.backends.engines.library import make_logger
from edgeskip.runtime.backends.engines.products import Matrix
from edgeskip.runtime.backends.engines.row_writer import RowsLayout, row_writer
from edgeskip.runtime.backends.engines.weights import weights_on_device
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, NUMBER_TYPES
from edgeskip.runtime.bundle.engines import Engines, build_command, open_engines
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName, Tensor, present_name
from edgeskip.runtime.bundle.layers import files_of, weight_of
from edgeskip.runtime.bundle.manifest import Bundle, Progress
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, TABLES
from edgeskip.runtime.decoding.rounds import Call, Round, View, speculative_round
from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.files import keep, kept


def why_not(engines: Engines, compute_capability: int, version: str) -> str:
    """What keeps engines from running on a GPU of this SM with this TensorRT; empty if nothing does."""
    build = engines.build
    if build.compute_capability != compute_capability:
        return f"built for SM {build.compute_capability}, this GPU is SM {compute_capability}"
    if build.backend_version != version:
        return f"built by {build.backend} {build.backend_version}, {version} is installed"
    return ""


class TrtSession(CudaSession):
    """TensorRT engines on a stream of ours.

    There is an execution context for each graph and number of rows of a round; they run in turn, so all share one block
    of scratch memory. Caches are bound, past and present, to one address, which the engine itself must expect, or the
    new rows that a graph hands back are written into the caches after it.

    Args:
        bundle: the bundle whose graphs the engines were built from.
        engines: built for this GPU by the installed version.
        device: where they are loaded to; the session closes it.
        library: the TensorRT module.
        exit_layer: the exit that drafts; by default the bundle's own.
        progress: called while weights and engines are loaded.

    Raises:
        BundleError: the weights or an engine were changed, an engine does not fit this GPU or this TensorRT, or does
            not have this bundle's tensors.
        BackendError: TensorRT refuses an engine, or there is not enough device memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Engines,
        device: CudaDevice,
        library: Any,
        exit_layer: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self._library, self._build = library, engines.build
        self.dialect, self._conventions = engines.build.dialect, engines.dialect
        files = files_of(bundle.manifest.graphs, self._conventions)
        self._files = {graph: files[graph] for graph in engines.build.engines}
        self._new_rows = self._conventions.caches == "new-rows"
        self._engines: dict[GraphName, Any] = {}
        self._contexts: dict[tuple[GraphName, int, int], Any] = {}
        self._aligned: dict[tuple[View, int], DeviceArray] = {}
        self._runtime_caches: dict[str, Any] = {}
        self._rows: tuple[DeviceArray, RowsLayout] | None = None
        self._bundle = bundle
        again = build_command(bundle, engines.build.backend, device.compute_capability)
        if reason := why_not(engines, device.compute_capability, library.__version__):
            raise BundleError(engines.folder, reason, fix=again)
        self._weights = weights_on_device(bundle, device, progress)
        self._holds_weights = True
        try:
            super().__init__(bundle, device, self._weights.bytes, exit_layer, loaded=True)
            self._logger = make_logger(library)
            self._runtime = library.Runtime(self._logger)
            with open_engines(engines, progress) as opened:
                for graph in self._files:
                    self._engines[graph] = self._deserialized(engines.path(graph), opened[graph], again)
                    self._check_tensors(engines.path(graph), graph, again)
            self._scratch = self._shared_scratch()
            self._prepare()
            self._warm_up(bundle.manifest.prefill_chunk)
            k = min(bundle.manifest.num_speculations, bundle.manifest.max_length - 1)
            for _ in range(2):  # enqueued, then captured
                self._try(speculative_round(self._split, k))
        except BaseException:
            self.close()
            raise
        self.description = (
            f"{engines.build.backend} {library.__version__}, {device.name}, {self.dialect} dialect, "
            f"{bundle.manifest.dtype}"
        )

    def _prepare(self) -> None:
        """Takes what else the calls of these engines need."""
        if self._new_rows:
            self._rows = self._room_for_new_rows()

    def _deserialized(self, path: Path, file: IO[bytes], again: str) -> Any:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = self._runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise BackendError(path, f"TensorRT refuses it ({self._logger.last})", fix=again)
        return engine

    def _check_tensors(self, path: Path, graph: GraphName, again: str) -> None:
        """Compares an engine with the manifest's table: memory is bound by address, so nothing later would notice."""
        engine, record, dtypes = self._engines[graph], self._files[graph], self._library.DataType
        tensors = self._bundle.manifest.tensors
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))) for name in names}

        def expected(number: str, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
            return getattr(dtypes, NUMBER_TYPES[number].tensorrt), shape

        wanted = {
            tensor.name: expected(tensor.number_type(self._dtype), self._shape(graph, tensor, -1))
            for tensor in (*record.inputs, *record.outputs)
        }
        for name in found:
            if weight := tensors.get(weight_of(name, 0, 1)):
                rows = record.head.vocabulary if record.head and name in TABLES else weight.shape[0]
                wanted[name] = expected(self._dtype, (rows, *weight.shape[1:]))
        for name in {**wanted, **found}:
            if not _agree(found.get(name), wanted.get(name)):
                raise BundleError(
                    path, f"its tensor {name} is {found.get(name)}", wanted=f"{wanted.get(name)}", fix=again
                )
        for past in () if self._new_rows else (tensor.name for tensor in record.inputs if tensor.is_cache):
            alias = engine.get_aliased_input_tensor(present_name(past))
            if alias != past:
                raise BundleError(path, f"{present_name(past)} is not {past} updated in place but {alias}", fix=again)

    def _shape(self, graph: GraphName, tensor: Tensor, rows: int) -> tuple[int, ...]:
        record = self._files[graph]
        shape = self._conventions.output_shape(tensor) if tensor in record.outputs else tensor.shape
        sizes = record.dimensions(self._dims) | {"T": rows}
        return tuple(sizes[dim] for dim in shape)

    def _shared_scratch(self) -> DeviceArray:
        """One block for the activations of whichever context runs."""
        sizes = (
            engine.get_device_memory_size_for_profile_v2(profile)
            for engine in self._engines.values()
            for profile in range(engine.num_optimization_profiles)
        )
        return self._taken(max((ALIGNMENT, *sizes)), "for scratch and activations")

    def _room_for_new_rows(self) -> tuple[DeviceArray, RowsLayout]:
        """One block for the new rows of whichever graph runs, and how they and the caches lie."""
        row_bytes, heads = self._dims["D"] * ITEMSIZE[self._dtype], self._dims["N"]
        addresses = [cache.address for cache in self._caches.values()]
        stride = _aligned(heads * self._longest * row_bytes)
        most = max(len(self._caches_of(graph)) for graph in self._graph_table)
        layout = RowsLayout(heads, self._dims["C"], row_bytes, addresses[1] - addresses[0], stride)
        return self._taken(most * stride, "for new rows of the caches"), layout

    def _taken(self, size: int, what: str) -> DeviceArray:
        if size > (free := self._device.free_bytes()):
            raise out_of_memory(self._bundle.folder, size, free, what)
        (block,) = self._device.zeros([(size, 1)])
        self._workspace_bytes += block.bytes
        self.planned_bytes += block.bytes
        return block

    @property
    def _longest(self) -> int:
        """The most rows of a call, with those that pad it."""
        served = (profile.max_rows for record in self._build.engines.values() for profile in record.profiles)
        return max((self._bundle.manifest.prefill_chunk, HEAD_ROWS, *served))

    def _engines_of(self, call: Call) -> tuple[GraphName, ...]:
        """The engines that a call runs."""
        return (call.graph,)

    def _token_table(self) -> Matrix:
        return Matrix(self._weights.address_of(EMBEDDINGS))

    def _caches_of(self, graph: GraphName) -> list[str]:
        return [tensor.name for tensor in self._graph_table[graph].inputs if tensor.is_cache]

    def _profile(self, graph: GraphName, rows: int) -> tuple[int, int]:
        """The optimization profile for a call of this many rows, and the rows that it is padded to."""
        for number, profile in enumerate(self._build.engines[graph].profiles):
            if rows <= profile.max_rows:
                return number, max(rows, profile.min_rows)
        raise BackendError(f"the {graph} engine", f"has no profile for {rows} rows", fix="build it again")

    def _enqueued(self, call: Call) -> Callable[[], None]:
        profile, rows = self._profile(call.graph, call.rows)
        addresses, before, after = self._placed(call, rows)
        run = self._execution(call.graph, profile, rows, addresses)

        def enqueue() -> None:
            for step in (*before, run, *after):
                step()

        return enqueue

    def _execution(
        self, graph: GraphName, profile: int, rows: int, addresses: dict[str, int], layers: tuple[int, int] = (0, 0)
    ) -> Callable[[], None]:
        """Binds an engine to addresses and, if it is a part of layers, to the weights of these: the one that ends and
        the one that comes. Calling the result enqueues it.
        """
        engine, context = self._engines[graph], self._context(graph, profile, rows)
        stream = int(self._device.stream.handle)
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if (weight := weight_of(name, *layers)) in self._weights.arrays:
                addresses[name] = self._weights.address_of(weight)
        if misplaced := [name for name, address in addresses.items() if address % ALIGNMENT]:
            raise BackendError(f"the {graph} engine", f"{misplaced[0]} off the {ALIGNMENT}-byte grid")
        shapes = {
            tensor.name: self._shape(graph, tensor, rows) for tensor in self._files[graph].inputs if "T" in tensor.shape
        }

        def enqueue() -> None:
            taken = all(context.set_input_shape(name, shape) for name, shape in shapes.items())
            taken = taken and all(context.set_tensor_address(name, at) for name, at in addresses.items())
            if not (taken and context.execute_async_v3(stream)):
                raise BackendError(f"the {graph} engine", f"does not run ({self._logger.last})")

        return enqueue

    def _context(self, graph: GraphName, profile: int, rows: int) -> Any:
        """The context of a graph for this many rows; lengths of prompts that do not come again share one."""
        key = (graph, profile, rows if is_frequent(rows) else 0)
        if key not in self._contexts:
            engine = self._engines[graph]
            strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
            if hasattr(engine, "create_runtime_config"):
                config = self._runtime_config(graph, strategy, is_fixed=bool(key[-1]))
                context = engine.create_execution_context(config)
            else:
                context = engine.create_execution_context(strategy)
            if context is None:
                raise BackendError(f"the {graph} engine", f"gives no context ({self._logger.last})")
            context.set_device_memory(self._scratch.address, self._scratch.bytes)
            if profile and not context.set_optimization_profile_async(profile, int(self._device.stream.handle)):
                raise BackendError(f"the {graph} engine", f"refuses profile {profile} ({self._logger.last})")
            self._contexts[key] = context
        return self._contexts[key]

    def _runtime_config(self, graph: GraphName, strategy: Any, *, is_fixed: bool) -> Any:
        """TensorRT for RTX compiles kernels on the device: at once for fixed shapes, in the background for others.

        What it has compiled is kept in the user's cache folder for the next start.
        """
        config = self._engines[graph].create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        specialization = getattr(self._library, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return config
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER if is_fixed else specialization.LAZY
        name = f"{hashlib.sha256(self._build.engines[graph].sha256.encode()).hexdigest()[:32]}.bin"
        if name not in self._runtime_caches:
            cache = config.create_runtime_cache()
            if (kernels := kept("kernels", name)) is not None:
                cache.deserialize(kernels)  # it ignores what does not fit this machine
            self._runtime_caches[name] = cache
        config.set_runtime_cache(self._runtime_caches[name])
        return config

    def _placed(
        self, call: Call, rows: int
    ) -> tuple[dict[str, int], list[Callable[[], None]], list[Callable[[], None]]]:
        """Addresses by tensor for a call that is padded to so many rows, each on a 256-byte boundary: a row that starts
        elsewhere is copied to one.
        """
        addresses: dict[str, int] = {}
        before: list[Callable[[], None]] = []
        after: list[Callable[[], None]] = []
        for copies, views in ((before, call.inputs), (after, call.outputs)):
            for name, view in views:
                addresses[name] = self._on_grid(view, rows, copies, is_input=copies is before)
        caches = self._caches_of(call.graph)
        for index, name in enumerate(caches):
            addresses[name] = self._caches[call.cache(name)].address
            addresses[present_name(name)] = addresses[name] if self._rows is None else self._row_place(index)
        if caches and self._rows is not None:
            block, layout = self._rows
            position = self._address(dict(call.inputs)["position_ids"])
            pasts, new = (addresses[caches[0]], len(caches)), (block.address, rows, call.rows)
            after.append(row_writer(self._device, layout, pasts, new, position))
        return addresses, before, after

    def _on_grid(self, view: View, rows: int, copies: list[Callable[[], None]], *, is_input: bool) -> int:
        """Where a view is, or where it is copied from or to because it does not start on a boundary."""
        address = self._address(view)
        if not address % ALIGNMENT:
            return address
        staged, size = self._staged(view, rows), self._buffers[view.buffer].row_bytes * view.rows
        copies.append(
            self._device.copier(*((staged.address, address) if is_input else (address, staged.address)), size)
        )
        return staged.address

    def _row_place(self, index: int) -> int:
        """Where a call's new rows of its graph's cache with this number go."""
        assert self._rows is not None
        block, layout = self._rows
        return block.address + index * layout.rows_stride

    def _staged(self, view: View, rows: int) -> DeviceArray:
        if (view, rows) not in self._aligned:
            (self._aligned[view, rows],) = self._device.zeros([(self._buffers[view.buffer].row_bytes, rows)])
        return self._aligned[view, rows]

    def _is_capturable(self, round_: Round) -> bool:
        names = {(graph, call.rows) for call in round_.calls for graph in self._engines_of(call)}
        contexts = [self._context(graph, *self._profile(graph, rows)) for graph, rows in names]
        stream = int(self._device.stream.handle)
        return all(getattr(c, "is_stream_capturable", lambda _: True)(stream) for c in contexts)

    def _release(self) -> None:
        for name, cache in self._runtime_caches.items():
            with contextlib.suppress(Exception):  # it only saves time
                keep("kernels", name, bytes(cache.serialize()))
        self._contexts.clear()
        self._runtime_caches.clear()
        self._engines.clear()
        if self._holds_weights:
            self._holds_weights = False
            self._weights.close(self._device)


def _agree(found: tuple[Any, tuple[int, ...]] | None, wanted: tuple[Any, tuple[int, ...]] | None) -> bool:
    """Whether a tensor has the type and shape that it should; of outputs, TensorRT does not know every size."""
    if found is None or wanted is None or found[0] != wanted[0] or len(found[1]) != len(wanted[1]):
        return False
    return all(-1 in (size, other) or size == other for size, other in zip(found[1], wanted[1], strict=True))


def _aligned(size: int) -> int:
    """The size up to the next boundary."""
    return -(-size // ALIGNMENT) * ALIGNMENT
