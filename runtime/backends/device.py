"""A CUDA device: memory, the one stream, copies and graphs, through cuda-core. Importing this touches no GPU.

Everything that a session does on the device is enqueued on one stream, in order, so only reading back waits.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.errors import BackendError, reason
from edgeskip.runtime.files import keep, kept
from edgeskip.runtime.host import has_nvidia_gpu
from edgeskip.runtime.packages import install

ALIGNMENT = 256
"""Bytes; TensorRT refuses addresses that are not multiples of it."""

INSTALL = install("cuda")

LEAST_CUDA_FOR_CONDITIONS = (12, 4)
"""The first CUDA whose driver has graphs with conditional nodes."""

Step = Callable[[], None]
"""What enqueues something."""

_KERNELS: dict[Any, Any] = {}

_COLLECTOR = threading.Lock()


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python's collector from running, for one thread at a time: the first to end would set it going again."""
    with _COLLECTOR:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@dataclass(frozen=True)
class DeviceArray:
    """Rows in device memory: `address` of the first, bytes of each, and how many."""

    address: int
    row_bytes: int
    rows: int

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * self.rows


def no_gpu(wanted: str = "", fix: str = "") -> BackendError:
    """What to say where there is no GPU at all, so that installing a library would not help."""
    return BackendError("GPU", "there is no NVIDIA GPU in this machine", wanted=wanted, fix=fix)


def open_gpu(fix: str = "") -> CudaDevice:
    """The GPU of this machine; `fix` is what to do where there is none.

    Raises:
        BackendError: there is none, or it cannot be used.
    """
    try:
        return CudaDevice()
    except BackendError:
        if has_nvidia_gpu():
            raise
        raise no_gpu(fix=fix) from None


class CudaDevice:
    """The first CUDA device and a stream on it; a context manager.

    Raises:
        BackendError: cuda-core is missing, there is no GPU, or its driver is not usable.
    """

    def __init__(self) -> None:
        try:
            import cuda.core as core
            from cuda.bindings import driver
        except ImportError as error:
            raise BackendError("cuda-core", f"not usable ({error})", fix=INSTALL) from None
        self._core, self._driver = core, driver
        try:
            self._device = core.Device(0)
            self._device.set_current()
            self.stream = self._device.create_stream()
            _, self._context = driver.cuCtxGetCurrent()
        except Exception as error:  # its type depends on what is missing: driver, device, a newer driver
            if "OUT_OF_MEMORY" in str(error):  # a context takes some 400 MB
                raise BackendError("CUDA", "no memory free for a context", fix="free the device's memory") from None
            raise BackendError(
                "CUDA", f"no usable GPU ({reason(error)})", wanted="an NVIDIA GPU and its driver"
            ) from None
        self.name, self.index = str(self._device.name), 0
        self.free_at_start = self.free_bytes()
        self._owned: list[Callable[[], object]] = []

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def compute_capability(self) -> int:
        """SM version, 90 for 9.0."""
        major, minor = self._device.compute_capability
        return 10 * int(major) + int(minor)

    @property
    def driver_cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that the driver serves, as (13, 0)."""
        version = int(self._checked(self._driver.cuDriverGetVersion()))
        return version // 1000, version % 1000 // 10

    @property
    def has_conditions(self) -> bool:
        """Whether the driver has graphs of which parts run under a condition."""
        return self.driver_cuda_version >= LEAST_CUDA_FOR_CONDITIONS

    @property
    def is_integrated(self) -> bool:
        """Whether its memory is the host's, as on a Jetson."""
        return bool(self._device.properties.integrated)

    @property
    def total_bytes(self) -> int:
        """Device memory in all."""
        return int(self._checked(self._driver.cuMemGetInfo())[1])

    @property
    def count(self) -> int:
        """CUDA devices in this machine; this one is the first."""
        return int(self._checked(self._driver.cuDeviceGetCount()))

    @property
    def multiprocessors(self) -> int:
        """How many blocks run side by side at least."""
        return int(self._device.properties.multiprocessor_count)

    def make_current(self) -> None:
        """Lets the calling thread use this device, as the thread that opened it can."""
        self._checked(self._driver.cuCtxSetCurrent(self._context))

    def free_bytes(self) -> int:
        """Device memory that is free."""
        self.stream.sync()
        return int(self._checked(self._driver.cuMemGetInfo())[0])

    def used_bytes(self) -> int:
        """Device memory taken since this device was opened."""
        return self.free_at_start - self.free_bytes()

    def zeros(self, shapes: Iterable[tuple[int, int]]) -> list[DeviceArray]:
        """Zeroed arrays in one block of device memory, each (bytes of a row, rows), each on a 256-byte boundary.

        Raises:
            BackendError: not enough device memory.
        """
        shapes = list(shapes)
        offsets, size = [], 0
        for row_bytes, rows in shapes:
            offsets.append(size)
            size += -(-row_bytes * rows // ALIGNMENT) * ALIGNMENT
        start = self.allocate(size)
        self._owned.append(partial(self.free, start))
        self.zero(DeviceArray(start, size, 1))
        return [DeviceArray(start + offset, *shape) for offset, shape in zip(offsets, shapes, strict=True)]

    def zero(self, array: DeviceArray) -> None:
        """Enqueues zeros for all rows."""
        self._checked(self._driver.cuMemsetD8Async(array.address, 0, array.bytes, int(self.stream.handle)))

    def allocate(self, size: int) -> int:
        """The address of so many bytes of device memory, which outlive this device unless they are freed: it takes them
        by themselves, not from a pool that would keep them.

        Raises:
            BackendError: not enough device memory.
        """
        status, address = self._driver.cuMemAlloc(size)
        if int(status):
            raise out_of_memory("CUDA", size, self.free_bytes(), status.name)
        if int(address) % ALIGNMENT:
            raise BackendError("CUDA", f"memory at {int(address):#x}", wanted=f"a multiple of {ALIGNMENT}")
        return int(address)

    def free(self, address: int) -> None:
        """Gives memory back that was allocated."""
        self._checked(self._driver.cuMemFree(address))

    @contextmanager
    def borrowed(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Bytes of page-locked host memory, for a while."""
        block = self._core.LegacyPinnedMemoryResource().allocate(size)
        try:
            yield np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(block.handle)))
        finally:
            block.close()

    def kernel(self, source: str, name: str, macros: Mapping[str, str], shared_bytes: int = 0) -> Callable[..., None]:
        """Compiles a kernel from CUDA C++ for this device, once for each process.

        The result is called with a grid and a block, each (x, y, z), and the kernel's arguments, NumPy scalars, and
        enqueues it. A block has `shared_bytes` of shared memory besides what the source itself declares.

        Raises:
            BackendError: there is no NVRTC, or it refuses the source.
        """
        arch = f"sm_{self.compute_capability}"
        key = (source, name, tuple(sorted(macros.items())), arch)
        if key not in _KERNELS:
            load = self._core.ObjectCode.from_cubin
            try:
                with suppress(Exception):  # the driver may refuse what is kept
                    _KERNELS[key] = load(self._compiled(key)).get_kernel(name)
                if key not in _KERNELS:
                    _KERNELS[key] = load(self._compiled(key, anew=True)).get_kernel(name)
            except Exception as error:  # no library, or its complaint about the source
                raise BackendError("NVRTC", f"does not compile {name} ({reason(error)})", fix=INSTALL) from None
        kernel, launch, config, stream = _KERNELS[key], self._core.launch, self._core.LaunchConfig, self.stream
        overlaps = self.compute_capability >= 90 and "griddepcontrol.wait" in source  # see numbers.cuh
        if shared_bytes:
            most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._checked(self._driver.cuKernelSetAttribute(most, shared_bytes, kernel.handle, self.index))

        def enqueue(grid: tuple[int, int, int], block: tuple[int, int, int], *arguments: Any) -> None:
            how = config(grid=grid, block=block, shmem_size=shared_bytes, programmatic_stream_serialization=overlaps)
            launch(stream, how, kernel, *arguments)

        return enqueue

    def _compiled(self, key: tuple[str, str, tuple[tuple[str, str], ...], str], *, anew: bool = False) -> bytes:
        """The code of a kernel, from the user's cache if it has been compiled before, unless it is wanted `anew`."""
        source, _, macros, arch = key
        version = self._core.__version__
        name = f"{hashlib.sha256(repr((source, macros, arch, version)).encode()).hexdigest()[:32]}.cubin"
        if anew or (code := kept("kernels", name)) is None:
            settings = self._core.ProgramOptions(arch=arch, std="c++17", define_macro=[*macros])
            code = bytes(self._core.Program(source, "c++", settings).compile("cubin").code)
            keep("kernels", name, code)
        return code

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """A zeroed array in page-locked host memory, which the device copies from and to without the host's help."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._core.LegacyPinnedMemoryResource().allocate(size)
        self._owned.append(block.close)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(block.handle)))
        raw[:] = 0
        array: npt.NDArray[Any] = raw.view(dtype).reshape(shape)
        return array

    def copier(self, target: int, source: int, size: int) -> Callable[[], None]:
        """A copy of `size` bytes between two addresses, device or pinned, that can be enqueued as often as wanted."""
        buffer, stream = self._core.Buffer, self.stream
        to, from_ = buffer.from_handle(target, size), buffer.from_handle(source, size)
        return lambda: to.copy_from(from_, stream=stream)

    def captured(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts on the stream, as one CUDA graph, which is kept; calling the result launches it."""
        graph = self._graph(enqueue)
        self._owned.append(graph.close)
        return lambda: graph.launch(self.stream)

    @contextmanager
    def captured_for_now(self, enqueue: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """The same, for a while."""
        graph = self._graph(enqueue)
        try:
            yield lambda: graph.launch(self.stream)
        finally:
            graph.close()

    def _graph(self, enqueue: Callable[[], None]) -> Any:
        builder = self.stream.create_graph_builder()
        with uncollected():  # a destructor that waits for a device would end the capture
            try:
                builder.begin_building("relaxed")
                enqueue()
                graph = builder.end_building().complete()
            except BaseException:
                builder.close()  # the stream is not left in the middle of a capture
                raise
        graph.upload(self.stream)
        return graph

    def captured_while(self, stages: Sequence[Callable[[int], None]], last: Callable[[], None]) -> Callable[[], None]:
        """Stages as one CUDA graph, which is kept, each but the first only if the one before it says so, and then what
        comes last in any case; calling the result launches it. Each is within the condition of the one before it, so
        that what does not run costs nothing.

        A stage is called once, to enqueue it, with the handle that a kernel of its own gives to
        `cudaGraphSetConditional` for the next one to run: 0 if it is the last.

        Raises:
            BackendError: the driver refuses such a graph.
        """
        driver, stream = self._driver, self.stream.handle
        graph = self._checked(driver.cuGraphCreate(0))
        self._owned.append(partial(driver.cuGraphDestroy, graph))
        cleared = driver.CU_GRAPH_COND_ASSIGN_DEFAULT  # to 0, at each launch
        handles = [
            self._checked(driver.cuGraphConditionalHandleCreate(graph, self._context, 0, cleared)) for _ in stages[1:]
        ]
        following = [*map(int, handles), 0]
        with uncollected():
            ends = tail = self._captured_into(graph, [], partial(stages[0], following[0]))
            body = graph
            for stage, handle, next_ in zip(stages[1:], handles, following[1:], strict=True):
                node, inner = self._condition(body, tail, handle)
                ends = [node] if body is graph else ends
                body, tail = inner, self._captured_into(inner, [], partial(stage, next_))
            self._captured_into(graph, ends, last)
        executable = self._checked(driver.cuGraphInstantiate(graph, 0))
        self._owned.append(partial(driver.cuGraphExecDestroy, executable))
        self._checked(driver.cuGraphUpload(executable, stream))
        return lambda: self._checked(driver.cuGraphLaunch(executable, stream))

    def _captured_into(self, graph: Any, after: list[Any], enqueue: Callable[[], None]) -> list[Any]:
        """Adds what `enqueue` puts on the stream to a graph, after some of its nodes: those that it ends with."""
        driver, stream = self._driver, self.stream.handle
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._checked(driver.cuStreamBeginCaptureToGraph(stream, graph, after, None, len(after), mode))
        try:
            enqueue()
            # older bindings have both
            info = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)
            ends = list(self._checked(info(stream))[3])
        finally:
            ended = driver.cuStreamEndCapture(stream)  # the stream is not left in the middle of a capture
        self._checked(ended)
        return ends

    def _condition(self, graph: Any, after: list[Any], handle: Any) -> tuple[Any, Any]:
        """A node that runs the graph which comes with it, empty yet, if the handle's value is not 0."""
        driver = self._driver
        params = driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle, params.conditional.ctx = handle, self._context
        params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        params.conditional.size = 1
        add = getattr(driver, "cuGraphAddNode_v2", driver.cuGraphAddNode)
        node = self._checked(add(graph, after, None, len(after), params))
        return node, params.conditional.phGraph_out[0]

    def stopwatch(self) -> DeviceTimer:
        """Two events around what is enqueued between them."""
        options = self._core.EventOptions(timing_enabled=True)
        return DeviceTimer(self.stream, self._device.create_event(options), self._device.create_event(options))

    def copy_bytes_per_second(self, size: int = 1 << 29, repeats: int = 10) -> float:
        """Median rate of copies within device memory, bytes read plus bytes written."""
        size = min(size, self.free_bytes() // 4)
        start = self.allocate(2 * size)
        copy, watch, seconds = self.copier(start + size, start, size), self.stopwatch(), []
        try:
            for _ in range(repeats + 2):
                watch.start()
                copy()
                watch.stop()
                seconds.append(watch.elapsed_ns() / 1e9)
        finally:
            with suppress(Exception):  # after an error that sticks, nothing can be freed
                self.free(start)
        return 2 * size / float(np.median(seconds[2:]))

    def close(self) -> None:
        """Frees all memory and graphs; the device is of no use afterwards."""
        with suppress(Exception):  # after an error that sticks, nothing can be waited for or freed in order
            self.stream.sync()
        while self._owned:
            with suppress(Exception):
                self._owned.pop()()

    def _checked(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status):
            raise BackendError("CUDA", f"{status!r}")
        return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class DeviceTimer:
    """Device time between two points of a stream."""

    stream: Any
    begin: Any
    end: Any

    def start(self) -> None:
        """Marks the beginning."""
        self.stream.record(self.begin)

    def stop(self) -> None:
        """Marks the end."""
        self.stream.record(self.end)

    def elapsed_ns(self) -> int:
        """Waits for the end and says how long it took."""
        self.end.sync()
        return int((self.end - self.begin) * 1e6)


def in_order(steps: Iterable[Step]) -> None:
    """Enqueues one after another."""
    for step in steps:
        step()


def out_of_memory(place: object, wanted_bytes: int, free_bytes: int, error: object = "") -> BackendError:
    """The error line for a lack of device memory."""
    return BackendError(
        place,
        f"out of device memory, {free_bytes / 1e6:.0f} MB free" + (f" ({error})" if error else ""),
        wanted=f"{wanted_bytes / 1e6:.0f} MB",
        fix="export with a smaller --max-length or in fp16, or free the device's memory",
    )
