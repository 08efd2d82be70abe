"""A session on TensorRT engines, of either flavour: `tensorrt` and `tensorrt_rtx` have one interface."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from edgeskip.runtime.backends.cuda_session import CudaSession
from edgeskip.runtime.backends.device import ALIGNMENT, CudaDevice, DeviceArray, out_of_memory
from edgeskip.runtime.backends.trt import make_logger
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES
from edgeskip.runtime.bundle.engines import Engines, build_command, open_engines
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName, present_name
from edgeskip.runtime.bundle.manifest import Bundle, Progress
from edgeskip.runtime.decoding.rounds import Call, Round, View, speculative_round
from edgeskip.runtime.errors import BackendError, BundleError
from edgeskip.runtime.files import keep, kept

DECODE, PREFILL = 0, 1
"""Optimization profiles of graphs of layers: up to HEAD_ROWS rows, and up to a prompt's chunk. Heads have the first."""


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

    There is an execution context for each graph and number of rows; they run in turn, so all share one block of scratch
    memory. Caches are bound, past and present, to one address, which the engine itself must expect.

    Args:
        bundle: the bundle that the engines belong to.
        engines: built for this GPU by the installed version.
        device: where they are loaded to; the session closes it.
        library: the TensorRT module.
        exit_layer: the exit that drafts; by default the bundle's own.
        progress: called while the engines are checked.

    Raises:
        BundleError: the engines are for another GPU or version, are damaged, or do not have this bundle's tensors.
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
        self._engines: dict[GraphName, Any] = {}
        self._contexts: dict[tuple[GraphName, int], Any] = {}
        self._aligned: dict[View, DeviceArray] = {}
        self._runtime_caches: dict[str, Any] = {}
        try:
            super().__init__(bundle, device, sum(record.bytes for record in engines.build.engines.values()), exit_layer)
            again = build_command(bundle, engines.build.backend, device.compute_capability)
            if reason := why_not(engines, device.compute_capability, library.__version__):
                raise BundleError(engines.folder, reason, fix=again)
            self._logger = make_logger(library)
            self._runtime = library.Runtime(self._logger)
            with open_engines(engines, progress) as files:
                for graph in self._graph_table:
                    self._engines[graph] = self._deserialized(engines.path(graph), files[graph], again)
                    self._check_tensors(engines.path(graph), graph, again)
            self._scratch = self._shared_scratch(bundle)
            self._warm_up(bundle.manifest.prefill_chunk)
            k = min(bundle.manifest.num_speculations, bundle.manifest.max_length - 1)
            for _ in range(2):  # enqueued, then captured
                self._try(speculative_round(self._split, k))
        except BaseException:
            self.close()
            raise
        self.description = f"{engines.build.backend} {library.__version__}, {device.name}, {bundle.manifest.dtype}"

    def _deserialized(self, path: Path, file: IO[bytes], again: str) -> Any:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = self._runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise BackendError(path, f"TensorRT refuses it ({self._logger.last})", fix=again)
        return engine

    def _check_tensors(self, path: Path, graph: GraphName, again: str) -> None:
        """Compares an engine with the manifest's table: memory is bound by address, so nothing later would notice."""
        engine, dtypes = self._engines[graph], self._library.DataType
        names = {"float": NUMBER_TYPES[self._dtype].tensorrt, "int64": NUMBER_TYPES["int64"].tensorrt}
        tensors = (*self._graph_table[graph].inputs, *self._graph_table[graph].outputs)
        wanted = {t.name: (getattr(dtypes, names[t.dtype]), self._shape(graph, t, -1)) for t in tensors}
        found_names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))) for name in found_names}
        if found != wanted:
            raise BundleError(path, "its tensors are not those of the manifest", fix=again)
        for past in (tensor.name for tensor in self._graph_table[graph].inputs if tensor.is_cache):
            alias = engine.get_aliased_input_tensor(present_name(past))
            if alias != past:
                raise BundleError(path, f"{present_name(past)} is not {past} updated in place but {alias}", fix=again)

    def _shared_scratch(self, bundle: Bundle) -> DeviceArray:
        """One block for the activations of whichever context runs."""
        size = max(
            engine.get_device_memory_size_for_profile_v2(profile)
            for engine in self._engines.values()
            for profile in range(engine.num_optimization_profiles)
        )
        free = self._device.free_bytes()
        if size > free:
            raise out_of_memory(bundle.folder, size, free, "for scratch and activations")
        (scratch,) = self._device.zeros([(max(size, ALIGNMENT), 1)])
        self._workspace_bytes += scratch.bytes
        self.planned_bytes += scratch.bytes
        return scratch

    def _enqueued(self, call: Call) -> Callable[[], None]:
        rows = call.rows
        context = self._context(call.graph, rows)
        addresses, before, after = self._placed(call)
        shapes = {
            tensor.name: self._shape(call.graph, tensor, rows)
            for tensor in self._graph_table[call.graph].inputs
            if "T" in tensor.shape
        }
        stream = int(self._device.stream.handle)

        def enqueue() -> None:
            for copy in before:
                copy()
            taken = all(context.set_input_shape(name, shape) for name, shape in shapes.items())
            taken = taken and all(context.set_tensor_address(name, at) for name, at in addresses.items())
            if not (taken and context.execute_async_v3(stream)):
                raise BackendError(f"the {call.graph} engine", f"does not run ({self._logger.last})")
            for copy in after:
                copy()

        return enqueue

    def _context(self, graph: GraphName, rows: int) -> Any:
        """The context of a graph for this many rows; prompts, which can have any length, share one."""
        key = (graph, rows if rows <= HEAD_ROWS else 0)
        if key not in self._contexts:
            engine = self._engines[graph]
            strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
            if hasattr(engine, "create_runtime_config"):
                context = engine.create_execution_context(self._runtime_config(graph, strategy, is_fixed=bool(key[1])))
            else:
                context = engine.create_execution_context(strategy)
            if context is None:
                raise BackendError(f"the {graph} engine", f"gives no context ({self._logger.last})")
            context.set_device_memory(self._scratch.address, self._scratch.bytes)
            profile = DECODE if key[1] else PREFILL
            if profile and not context.set_optimization_profile_async(profile, int(self._device.stream.handle)):
                raise BackendError(f"the {graph} engine", f"has no profile for {rows} rows", fix="build it again")
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

    def _placed(self, call: Call) -> tuple[dict[str, int], list[Callable[[], None]], list[Callable[[], None]]]:
        """Addresses by tensor, each on a 256-byte boundary: a row that starts elsewhere is copied to one."""
        addresses: dict[str, int] = {}
        before: list[Callable[[], None]] = []
        after: list[Callable[[], None]] = []
        for tensor in self._graph_table[call.graph].inputs:
            if tensor.is_cache:
                address = self._caches[call.cache(tensor.name)].address
                addresses[tensor.name] = addresses[present_name(tensor.name)] = address
        for copies, views in ((before, call.inputs), (after, call.outputs)):
            for name, view in views:
                address = addresses[name] = self._address(view)
                if address % ALIGNMENT:
                    staged = self._staged(view)
                    addresses[name] = staged.address
                    pair = (staged.address, address) if copies is before else (address, staged.address)
                    copies.append(self._device.copier(*pair, staged.bytes))
        misplaced = [name for name, address in addresses.items() if address % ALIGNMENT]
        if misplaced:
            raise BackendError(f"the {call.graph} engine", f"{misplaced[0]} off the {ALIGNMENT}-byte grid")
        return addresses, before, after

    def _staged(self, view: View) -> DeviceArray:
        if view not in self._aligned:
            size = self._buffers[view.buffer].row_bytes * view.rows
            (self._aligned[view],) = self._device.zeros([(size, 1)])
        return self._aligned[view]

    def _is_capturable(self, round_: Round) -> bool:
        contexts = [self._context(*call.key) for call in round_.calls]
        stream = int(self._device.stream.handle)
        return all(getattr(c, "is_stream_capturable", lambda _: True)(stream) for c in contexts)

    def _release(self) -> None:
        for name, cache in self._runtime_caches.items():
            with contextlib.suppress(Exception):  # it only saves time
                keep("kernels", name, bytes(cache.serialize()))
        self._contexts.clear()
        self._runtime_caches.clear()
        self._engines.clear()
