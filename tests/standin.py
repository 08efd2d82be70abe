"""Stand-ins for what TensorRT's session needs and this machine may lack.

`StandInTensorRT` speaks the part of TensorRT's interface that the session uses, in its full or its RTX flavour; an
"engine" is a text that names the ONNX file, and a context computes it with ONNX Runtime on the very addresses that were
set, on the same stream. `HostDevice` is a CUDA device made of host memory: its stream runs at once, and a capture
records what it is given, addresses and all, to be run again later.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import re
import shutil
import time
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from edgeskip.runtime.backends import ort
from edgeskip.runtime.backends.device import ALIGNMENT, CudaDevice, DeviceArray, out_of_memory
from edgeskip.runtime.backends.engines.layers import LayersSession
from edgeskip.runtime.backends.engines.sampler import SETTINGS
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES
from edgeskip.runtime.bundle.engines import (
    BUILD,
    BUILD_VERSION,
    Build,
    EngineKind,
    EngineRecord,
    manifest_sha256,
)
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.bundle.profiles import engine_profiles
from edgeskip.runtime.bundle.store import engines_place, read_engines
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.decoding.sampling import HostSampler
from edgeskip.runtime.decoding.session import softmax_of
from edgeskip.runtime.sampling import Sampling

VERSION = "10.99.1"
ELEMENTS = {"tensor(float)": ("FLOAT", 1), "tensor(float16)": ("HALF", 10), "tensor(int64)": ("INT64", 7)}


class HostStream:
    """Runs what is submitted when somebody waits, or records it."""

    def __init__(self):
        self.queued, self.recorded = [], None
        self.handle = id(self)
        STREAMS[self.handle] = self

    def submit(self, operation):
        (self.queued if self.recorded is None else self.recorded).append(operation)

    def sync(self):
        assert self.recorded is None, "a stream that is captured cannot be waited for"
        while self.queued:
            self.queued.pop(0)()


STREAMS: dict[int, HostStream] = {}
CONDITIONS: dict[int, bool] = {}


class HostDevice:
    """A CUDA device made of host memory, of a given size."""

    name = "host memory"
    compute_capability = 87
    has_conditions = True

    def __init__(self, size=1 << 30):
        self.size, self.taken, self.captures, self.graphs = size, 0, 0, 0
        self.stream, self._kept, self._allocated = HostStream(), [], {}
        self.free_at_start, self.index = size, id(self)

    def make_current(self):
        pass

    def free_bytes(self):
        self.stream.sync()
        return self.size - self.taken

    def used_bytes(self):
        return self.taken

    def copy_bytes_per_second(self):
        return 1e10

    def zeros(self, shapes):
        shapes = list(shapes)
        sizes = [-(-row_bytes * rows // ALIGNMENT) * ALIGNMENT for row_bytes, rows in shapes]
        if sum(sizes) > self.free_bytes():
            raise out_of_memory("CUDA", sum(sizes), self.free_bytes())
        block = np.zeros(sum(sizes) + ALIGNMENT, np.uint8)
        self._kept.append(block)
        self.taken += sum(sizes)
        start = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        starts = np.cumsum([start, *sizes])[:-1]
        return [DeviceArray(int(address), *shape) for address, shape in zip(starts, shapes, strict=True)]

    def zero(self, array):
        self.stream.submit(lambda: ctypes.memset(array.address, 0, array.bytes))

    def allocate(self, size):
        (array,) = self.zeros([(size, 1)])
        self._allocated[array.address] = self._kept.pop(), -(-size // ALIGNMENT) * ALIGNMENT
        return array.address

    def free(self, address):
        _, size = self._allocated.pop(address)
        self.taken -= size

    @contextmanager
    def borrowed(self, size):
        yield np.zeros(size, np.uint8)

    def pinned(self, shape, dtype):
        return np.zeros(shape, dtype)

    multiprocessors = 2

    def kernel(self, source, name, macros, shared_bytes=0):
        """A kernel that this file has in Python."""
        assert re.search(rf"__global__ void (__launch_bounds__\(.*\) )?{name}\(", source)
        run = KERNELS[name]
        return lambda grid, block, *arguments: self.stream.submit(lambda: run(macros, grid, block, *arguments))

    def copier(self, target, source, size):
        return lambda: self.stream.submit(lambda: ctypes.memmove(target, source, size))

    def captured(self, enqueue):
        self.captures, self.graphs = self.captures + 1, self.graphs + 1
        operations = self._recorded(enqueue)
        return lambda: [self.stream.submit(operation) for operation in operations]

    def _recorded(self, enqueue):
        self.stream.recorded = []
        enqueue()
        operations, self.stream.recorded = self.stream.recorded, None
        return operations

    @contextmanager
    def captured_for_now(self, enqueue):
        yield self.captured(enqueue)
        self.graphs -= 1

    def captured_while(self, stages, last):
        self.captures, self.graphs = self.captures + 1, self.graphs + 1
        first = len(CONDITIONS) + 1
        handles = [*range(first, first + len(stages) - 1), 0]
        cleared = dict.fromkeys(handles, False)
        CONDITIONS.update(cleared)
        parts = [self._recorded(partial(stage, handle)) for stage, handle in zip(stages, handles, strict=True)]
        end = self._recorded(last)

        def run():
            CONDITIONS.update(cleared)
            for part, handle in zip(parts, handles, strict=True):
                for operation in part:
                    operation()
                if not CONDITIONS[handle]:
                    break
            for operation in end:
                operation()

        return lambda: self.stream.submit(run)

    def stopwatch(self):
        watch = types.SimpleNamespace(begin=0, end=0)
        watch.start = lambda: self.stream.submit(lambda: setattr(watch, "begin", time.perf_counter_ns()))
        watch.stop = lambda: self.stream.submit(lambda: setattr(watch, "end", time.perf_counter_ns()))

        def elapsed_ns():
            self.stream.sync()
            return watch.end - watch.begin

        watch.elapsed_ns = elapsed_ns
        return watch

    def close(self):
        self.stream.sync()
        self._kept.clear()
        self.taken = sum(size for _, size in self._allocated.values())


def array_at(address, shape, kind):
    """Memory as an array."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(int(address)), kind).reshape(shape)


def write_rows(macros, grid, block, caches, rows, position, cache_bytes, rows_bytes, capacity, padded, written, units):
    """The kernel of row_writer.py."""
    unit = {"uint4": 16, "uint2": 8, "unsigned": 4, "unsigned short": 2}[macros["UNIT"]]
    assert grid[0] * block[0] >= written * units
    row_bytes, (first,) = int(units) * unit, array_at(position, [1], np.int64)
    count = min(int(written), int(capacity) - int(first))
    for index in range(grid[2]):
        cache = array_at(int(caches) + index * int(cache_bytes), [grid[1], int(capacity), row_bytes], np.uint8)
        new = array_at(int(rows) + index * int(rows_bytes), [grid[1], int(padded), row_bytes], np.uint8)
        cache[:, first : first + count] = new[:, :count]


def rotate(
    macros, grid, block, qkv, keys, values, queries, positions, cos, sin, q_norm, k_norm, n_q, n_kv, capacity, eps
):
    """The kernel of attention.cu that rotates alone."""
    kind, size, rows = NUMBERS[macros["STORE"]], int(macros["HEAD"]), grid[0]
    n_q, n_kv, capacity, (first,) = int(n_q), int(n_kv), int(capacity), array_at(positions, [1], np.int64)
    assert grid[1] * block[0] // 32 >= n_q + 2 * n_kv
    heads = array_at(qkv, [rows, n_q + 2 * n_kv, size], kind).astype(np.float32)
    rows = min(rows, capacity - int(first))
    at = slice(int(first), int(first) + rows)
    c, s = (array_at(table, [capacity, size // 2], kind)[at, None].astype(np.float32) for table in (cos, sin))

    def turned(part, norm):
        if norm:
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + float(eps))
            part = (part.astype(kind) * array_at(norm, [size], kind)).astype(np.float32)
        a, b = np.split(part, 2, axis=-1)
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    array_at(queries, [rows, n_q, size], kind)[:] = turned(heads[:rows, :n_q], q_norm)
    caches = [array_at(cache, [n_kv, capacity, size], kind) for cache in (keys, values)]
    caches[0][:, at] = turned(heads[:rows, n_q : n_q + n_kv], k_norm).swapaxes(0, 1)
    caches[1][:, at] = heads[:rows, n_q + n_kv :].swapaxes(0, 1)


def attend(
    macros,
    grid,
    block,
    qkv,
    keys,
    values,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    n_q,
    n_kv,
    capacity,
    eps,
    out,
    partials,
    counters,
    rows,
    split,
    scale,
):
    """The kernel of attention.cu, without its splits."""
    size, query_rows = int(macros["HEAD"]), int(rows) * int(n_q) // int(n_kv)
    assert grid[0] * 4 * int(macros["ROWS"]) >= query_rows
    assert grid[1] * int(split) >= int(capacity)
    queries = np.empty(int(rows) * int(n_q) * size, NUMBERS[macros["STORE"]])
    at, heads = queries.ctypes.data, (n_q, n_kv, capacity)
    each = (int(rows), -(-(int(n_q) + 2 * int(n_kv)) // 4), 1)
    rotate(macros, each, block, qkv, keys, values, at, positions, cos, sin, q_norm, k_norm, *heads, eps)
    attended(macros, grid, at, keys, values, positions, out, *heads, rows, scale)


def attended(macros, grid, queries, keys, values, positions, out, n_q, n_kv, capacity, rows, scale):
    """What both kernels of attention do once queries and keys are rotated."""
    kind, size, (first,) = NUMBERS[macros["STORE"]], int(macros["HEAD"]), array_at(positions, [1], np.int64)
    n_q, n_kv, capacity, rows = int(n_q), int(n_kv), int(capacity), int(rows)
    assert grid[2] == n_kv
    used = min(int(first) + rows, capacity)
    q = array_at(queries, [rows, n_kv, n_q // n_kv, size], kind).astype(np.float32) * float(scale)
    k, v = (array_at(x, [n_kv, capacity, size], kind)[:, :used].astype(np.float32) for x in (keys, values))
    scores = np.einsum("tngd,ncd->ntgc", q, k)
    hidden = np.arange(used) > int(first) + np.arange(rows)[:, None]
    scores = np.where(hidden[None, :, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found = np.einsum("ntgc,ncd->tngd", weights / weights.sum(-1, keepdims=True), v)
    array_at(out, found.shape, kind)[:] = found


def attend_long(macros, grid, block, queries, keys, values, positions, out, n_q, n_kv, capacity, rows, scale):
    """The kernel of long_attention.cu."""
    assert grid[0] * 64 >= int(rows) * int(n_q) // int(n_kv)
    attended(macros, grid, queries, keys, values, positions, out, n_q, n_kv, capacity, rows, scale)


def matrix_at(macros, address, scales, lines):
    """A stored matrix [lines, IN] in fp32, rounded as the kernels have it where its scales are those of blocks."""
    kind, inputs, bits = NUMBERS[macros["STORE"]], int(macros["IN"]), int(macros["BITS"])
    if bits == 16:
        return array_at(address, [lines, inputs], kind).astype(np.float32)
    if bits == 8:
        return array_at(address, [lines, inputs], np.int8) * array_at(scales, [lines, 1], kind).astype(np.float32)
    packed, block = array_at(address, [lines, inputs // 2], np.uint8), int(macros["BLOCK"])
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.float32)
    numbers = np.where(numbers > 7, numbers - 16, numbers).reshape(lines, -1, block)
    whole = numbers * array_at(scales, [lines, inputs // block, 1], kind).astype(np.float32)
    return whole.reshape(lines, inputs).astype(kind).astype(np.float32)


def pick(macros, grid, block, logits, table, scales, token_ids, token_logits, embeddings, parts, counters, vocabulary):
    """The kernel of pick.cu."""
    kind, rows, vocabulary = NUMBERS[macros["STORE"]], grid[1], int(vocabulary)
    found = array_at(logits, [rows, vocabulary], kind)
    ids = found.argmax(1)
    array_at(token_ids, [rows], np.int64)[:] = ids
    array_at(token_logits, [rows], kind)[:] = found[np.arange(rows), ids]
    out = array_at(embeddings, [rows, int(macros["IN"])], kind)
    out[:] = matrix_at(macros, table, scales, int(ids.max()) + 1)[ids]


def narrow(macros, grid, block, logits, tops, settings, bounds, sums, counters, vocabulary, number, level):
    """The kernel of sample.cu that finds the bounds of filters: here it counts, as `draw` finds them itself."""
    found = array_at(bounds, [grid[1], 32], np.uint8)[:, int(number)]
    assert (found == int(level)).all()
    found += 1


def draw(
    macros,
    grid,
    block,
    logits,
    positions,
    table,
    scales,
    settings,
    bounds,
    token_ids,
    token_logits,
    embeddings,
    parts,
    counters,
    vocabulary,
):
    """The kernel of sample.cu that draws, as a host does."""
    kind, rows, vocabulary = NUMBERS[macros["STORE"]], grid[1], int(vocabulary)
    assert grid[0] * block[0] * 8 >= vocabulary
    narrowed = array_at(bounds, [rows, 32], np.uint8)
    seed, top_p, temperature, least, top_k = array_at(settings, [1], SETTINGS)[0].tolist()
    for number, used in enumerate((top_k > 0, top_p < 1)):
        assert (narrowed[:, number] == used * kind().nbytes).all(), "a launch for 8 bits of each filter"
    narrowed[:] = 0
    sampler = HostSampler(Sampling(temperature, top_k, top_p, math.exp(least), seed), (), 1 << 12)
    found, at = array_at(logits, [rows, vocabulary], kind), array_at(positions, [rows], np.int64)
    ids = np.array([sampler.pick(row, int(position) + 1) for row, position in zip(found, at, strict=True)])
    own = array_at(token_logits, [rows], kind)
    assert np.array_equal(own, found.max(1), equal_nan=True), "the head's own pick comes first"
    array_at(token_ids, [rows], np.int64)[:] = ids
    array_at(token_logits, [rows], kind)[:] = found[np.arange(rows), ids]
    out = array_at(embeddings, [rows, int(macros["IN"])], kind)
    out[:] = matrix_at(macros, table, scales, int(ids.max()) + 1)[ids]


def judge(macros, grid, block, logits, picked, threshold, made, parts, counter, vocabulary, number, following):
    """The kernel of confidence.cu."""
    kind = NUMBERS[macros["STORE"]]
    found = array_at(logits, [int(vocabulary)], kind).astype(np.float32)
    confidence = softmax_of(found, float(array_at(picked, [1], kind)[0]))
    CONDITIONS[int(following)] = goes_on = not confidence < array_at(threshold, [1], np.float32)[0]
    array_at(made, [1], np.int64)[0] = int(number) + goes_on


def embed(macros, grid, block, token_ids, table, scales, embeddings):
    """The kernel of pick.cu for a prompt's tokens."""
    ids = array_at(token_ids, [grid[0]], np.int64)
    out = array_at(embeddings, [grid[0], int(macros["IN"])], NUMBERS[macros["STORE"]])
    out[:] = matrix_at(macros, table, scales, int(ids.max()) + 1)[ids]


def product(macros, grid, block, x, weight, scales, bias, norm, residual, out, rows, outs, eps):
    """The kernel of product.cu."""
    assert grid[0] * int(macros["BANDS"]) * (8 if macros["GATE"] == "1" else 16) >= outs
    assert int(macros["TILES"]) * 8 >= rows
    states = array_at(x, [int(rows), int(macros["IN"])], NUMBERS[macros["STORE"]])
    if macros["NORM"] == "1":
        states = normalized(states, norm, eps)
    multiplied(macros, states, weight, scales, bias, residual, out, outs)


def long_product(macros, grid, block, x, weight, scales, bias, residual, out, rows, outs):
    """The kernel of long_product.cu."""
    assert grid[0] * 64 >= rows
    assert grid[1] * int(macros["LINES"]) >= outs * (2 if macros["GATE"] == "1" else 1)
    states = array_at(x, [int(rows), int(macros["IN"])], NUMBERS[macros["STORE"]])
    multiplied(macros, states, weight, scales, bias, residual, out, outs)


def normalize(macros, grid, block, x, norm, out, eps):
    """The kernel of normalize.cu."""
    shape, kind = [grid[0], int(macros["IN"])], NUMBERS[macros["STORE"]]
    array_at(out, shape, kind)[:] = normalized(array_at(x, shape, kind), norm, eps)


def normalized(states, norm, eps):
    """Rows over their root mean squares, times `norm`."""
    whole = states.astype(np.float32)
    whole = (whole / np.sqrt((whole**2).mean(-1, keepdims=True) + float(eps))).astype(states.dtype)
    return whole * array_at(norm, [states.shape[1]], states.dtype)


def multiplied(macros, states, weight, scales, bias, residual, out, outs):
    """A product, and what is done to it on the way."""
    kind, gated, (rows, _), outs = states.dtype, macros["GATE"] == "1", states.shape, int(outs)
    lines = 2 * outs if gated else outs
    y = states.astype(np.float32) @ matrix_at(macros, weight, scales, lines).T
    if macros["BIAS"] == "1":
        y += array_at(bias, [lines], kind)
    y = y.astype(kind)
    if gated:
        gate, up = np.split(y.astype(np.float32), 2, axis=1)
        y = ((gate / (1 + np.exp(-gate))).astype(kind) * up).astype(kind)
    if macros["RESIDUAL"] == "1":
        y = y + array_at(residual, [rows, outs], kind)
    array_at(out, [rows, outs], kind)[:] = y


NUMBERS = {"16": np.float16, "32": np.float32}
ROWS_AND_PRODUCTS = write_rows, rotate, attend, attend_long, product, long_product, normalize
KERNELS = {kernel.__name__: kernel for kernel in (*ROWS_AND_PRODUCTS, pick, embed, narrow, draw, judge)}


class StandInTensorRT:
    """The module; `rtx` for its RTX flavour. `faults` change what it answers, for tests of what is refused."""

    __version__ = VERSION

    def __init__(self, *, rtx=False, capturable=True, scratch=4096, faults=()):
        self.rtx, self.capturable, self.scratch, self.faults = rtx, capturable, scratch, set(faults)
        self.caches, self.contexts = [], 0
        self.DataType = types.SimpleNamespace(**{name: name for name in ("FLOAT", "HALF", "BF16", "INT64")})
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager", LAZY="lazy")

    class ILogger:
        ERROR = 1

    def Runtime(self, logger):  # noqa: N802
        return types.SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(bytes(data[:]), logger))

    def _engine(self, data, logger):
        if "refuses" in self.faults:
            logger.log(1, "no kernel image is available")
            return None
        return _Engine(self, json.loads(data))


def zeros_for(node):
    """Zeros for an input, with one row where their number is free."""
    shape = [1 if isinstance(dim, str) else dim for dim in node.shape]
    return np.zeros(shape, next(kind.numpy for kind in NUMBER_TYPES.values() if kind.ort == node.type))


class _Engine:
    def __init__(self, library, made):
        self.library, self.made = library, made
        options = ort.cpu_options(onnxruntime, 0)
        session = onnxruntime.InferenceSession(made["onnx"], options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in session.get_inputs()]
        nodes = [*session.get_inputs(), *session.get_outputs()]
        self.tensors = {node.name: (ELEMENTS[node.type], tuple(node.shape)) for node in nodes}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(made["profiles"])
        self.loaded = {}
        if library.rtx:
            self.create_runtime_config = lambda: _RuntimeConfig(library)

    def __del__(self):
        """Runs once more and waits, which gives back what runs without waiting hold (see OrtCudaSession._release): on
        memory of its own, as that which was bound may be gone.
        """
        for session in self.loaded.values():
            with contextlib.suppress(Exception):  # its device may be gone too
                session.run(None, {node.name: zeros_for(node) for node in session.get_inputs()})

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return self.tensors[name][0][0]

    def get_tensor_shape(self, name):
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.tensors[name][1])

    def get_aliased_input_tensor(self, name):
        if "alias" in self.library.faults:
            return None
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else None

    def get_device_memory_size_for_profile_v2(self, profile):
        assert profile < self.num_optimization_profiles
        return self.library.scratch

    def create_execution_context(self, config):
        assert config == "user managed" or config.strategy == "user managed"
        self.library.contexts += 1
        return _Context(self)

    def session(self, stream):
        """ONNX Runtime for this graph on a stream: ours of host memory, or a real one."""
        if stream not in self.loaded:
            options = ort.cpu_options(onnxruntime, 0)
            provider = "CPUExecutionProvider" if stream in STREAMS else "CUDAExecutionProvider"
            settings = {} if stream in STREAMS else {"user_compute_stream": str(stream), "use_tf32": "0"}
            loaded = onnxruntime.InferenceSession(self.made["onnx"], options, providers=[(provider, settings)])
            self.loaded[stream] = loaded
        return self.loaded[stream]


class _RuntimeConfig:
    def __init__(self, library):
        self.library, self.strategy, self.cache = library, None, None
        self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        cache = types.SimpleNamespace(found=None, serialize=lambda: b"kernels")
        cache.deserialize = lambda data: setattr(cache, "found", data)
        self.library.caches.append(cache)
        return cache

    def set_runtime_cache(self, cache):
        self.cache = cache


class _Context:
    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses, self.scratch = engine, 0, {}, {}, None
        if engine.library.rtx:
            self.is_stream_capturable = lambda stream: engine.library.capturable

    def set_device_memory(self, address, size):
        assert address % ALIGNMENT == 0
        assert size >= self.engine.library.scratch
        self.scratch = address

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        low, high = self.engine.made["profiles"][self.profile]
        rows = shape[[isinstance(dim, str) for dim in self.engine.tensors[name][1]].index(True)]
        assert low <= rows <= high, f"{rows} rows are not in profile {self.profile}"
        self.rows = rows
        self.shapes[name] = tuple(shape)
        return "shapes" not in self.engine.library.faults

    def set_tensor_address(self, name, address):
        assert address % ALIGNMENT == 0, f"{name} is bound off the grid"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert self.scratch, "no scratch memory was given"
        if "fails" in self.engine.library.faults:
            return False
        assert set(self.addresses) == set(self.engine.tensors), "a tensor has no address"
        if stream in STREAMS and STREAMS[stream].recorded is not None:
            assert self.engine.library.capturable or not self.engine.library.rtx, "captured what cannot be"
        session = self.engine.session(stream)
        binding = session.io_binding()
        rows = self.rows
        for name, ((_, element), shape) in self.engine.tensors.items():
            bind = binding.bind_input if name in self.engine.inputs else binding.bind_output
            shape = [rows if isinstance(dim, str) else dim for dim in shape]
            bind(name, "cpu" if stream in STREAMS else "cuda", 0, element, shape, self.addresses[name])
        if stream in STREAMS:
            STREAMS[stream].submit(lambda: session.run_with_iobinding(binding))
        else:
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            session.run_with_iobinding(binding, options)
        return True


def with_engines(bundle, folder, *, backend="tensorrt", sm=87, version=VERSION, dialect="standard"):
    """A copy of a bundle, and stand-in engines for it in the user's cache."""
    if not folder.exists():
        shutil.copytree(bundle.folder, folder, copy_function=shutil.copy2)
    copied = read_bundle(folder)
    put_engines(copied, EngineKind(backend, version, sm, dialect))
    return copied


def put_engines(copied, kind):
    """Puts stand-in engines of a kind into the user's cache, in place of any others; returns their folder."""
    manifest, dialect = copied.manifest, kind.dialect
    onnx_sha256 = manifest.graph_hashes(ENGINE_DIALECTS[dialect])
    target = engines_place(copied, kind)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    records = {}
    for graph, profiles in engine_profiles(manifest, ENGINE_DIALECTS[dialect], kind.compute_capability).items():
        path = copied.path(ENGINE_DIALECTS[dialect].file.format(graph))
        data = json.dumps({"onnx": str(path), "profiles": [(p.min_rows, p.max_rows) for p in profiles]}).encode()
        (target / f"{graph}.engine").write_bytes(data)
        hashed = hashlib.sha256(data).hexdigest()
        records[graph] = EngineRecord(onnx_sha256[graph], hashed, len(data), profiles, 1.0, None)
    built = (kind.backend, kind.backend_version, kind.compute_capability, None, manifest.dtype, dialect)
    origin = (kind.workspace_mb, manifest.source, manifest_sha256(copied))
    (target / BUILD).write_text(Build(BUILD_VERSION, "0", *built, *origin, records).to_json())
    return target


def standin_model(bundle, folder, device, dialect="standard", **settings):
    """A model on stand-in engines."""
    copied = with_engines(bundle, Path(folder), sm=device.compute_capability, dialect=dialect)
    engines = next(engines for engines in read_engines(copied) if engines.build.dialect == dialect)
    kind = LayersSession if dialect == "layers" else TrtSession
    return Model(copied, kind(copied, engines, device, StandInTensorRT(**settings)))


def make_device(kind):
    """A device of host memory, or the GPU."""
    return CudaDevice() if kind == "cuda" else HostDevice()
