"""The kernels of attention.cu: compiled for every SM that there are dialects for, and on a GPU against NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.standin import HostDevice

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import attention, products
from edgeskip.runtime.backends.engines.attention import Attention, Operands, tiling
from edgeskip.runtime.bundle.architecture import Architecture, Rope

KINDS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2, "fp32": 2e-5}


def architecture(heads, kv_heads, head_dim, *, qk_norm=False):
    return Architecture(
        model_type="llama",
        vocab_size=64,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=Rope(),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        qk_norm=qk_norm,
    )


@pytest.mark.parametrize("arch", ["sm_75", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "rows"), [("fp16", 64, 1), ("bf16", 128, 8), ("fp32", 256, 17), ("fp16", 18, 2)]
)
def test_the_kernels_compile_within_a_blocks_shared_memory(arch, dtype, head_dim, rows):
    tiles = tiling(architecture(8, 2, head_dim), 2048, rows, 64)
    source = products.source("attention.cu")
    macros = [*attention.macros(dtype, head_dim, tiles).items()]
    compiled = Program(source, "c++", ProgramOptions(arch=arch, define_macro=macros)).compile("cubin")
    assert compiled.code


@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize(("store", "head_dim"), [("16", 64), ("17", 128), ("16", 80), ("17", 16)])
def test_the_kernel_for_many_rows_compiles(arch, store, head_dim):
    source = products.source("mma.cuh", "copies.cuh", "long_attention.cu")
    macros = [("STORE", store), ("HEAD", str(head_dim))]
    assert Program(source, "c++", ProgramOptions(arch=arch, define_macro=macros)).compile("cubin").code


@pytest.mark.parametrize("rows", [1, 5, 17, 128, 500])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 64), (4, 4, 18), (7, 1, 256)])
@pytest.mark.parametrize("blocks", [1, 64, 1056])
def test_every_row_of_a_call_and_of_the_caches_is_in_a_tile(rows, heads, kv_heads, head_dim, blocks):
    tiles = tiling(architecture(heads, kv_heads, head_dim), 2000, rows, blocks)
    assert tiles.grid[0] * tiles.tile_rows >= rows * heads // kv_heads > (tiles.grid[0] - 1) * tiles.tile_rows
    assert tiles.grid[1] * tiles.split_rows >= 2000 > (tiles.grid[1] - 1) * tiles.split_rows
    assert tiles.split_rows % tiles.keys == 0
    floats = tiles.keys * (head_dim + 1) + (head_dim + tiles.keys) * tiles.tile_rows + 1
    assert floats * 4 <= 48 << 10, "more shared memory than a block has"


def wanted(a, kind, qkv, keys, values, first, tables, norms):
    """Attention as transformers defines it, in fp64: the caches with the new rows, and what is attended."""
    rows, size = len(qkv), a.head_dim
    heads = qkv.reshape(rows, -1, size).astype(np.float64)
    q, k, v = np.split(heads, [a.num_heads, a.num_heads + a.num_kv_heads], axis=1)
    cos, sin = (np.concatenate([table, table], -1)[first : first + rows, None].astype(np.float64) for table in tables)

    def turned(x, norm):
        if norm is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + a.rms_norm_eps) * norm.astype(np.float64)
        a_half, b_half = np.split(x, 2, -1)
        return x * cos + np.concatenate([-b_half, a_half], -1) * sin

    keys, values = keys.astype(np.float64), values.astype(np.float64)
    keys[:, first : first + rows] = turned(k, norms[1]).swapaxes(0, 1)
    values[:, first : first + rows] = v.swapaxes(0, 1)
    q = turned(q, norms[0]).reshape(rows, a.num_kv_heads, -1, size)
    scores = np.einsum("tngd,ncd->tngc", q, keys[:, : first + rows]) * size**-0.5
    seen = np.arange(first + rows) <= first + np.arange(rows)[:, None]
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("tngc,ncd->tngd", weights / weights.sum(-1, keepdims=True), values[:, : first + rows])
    return keys, values, out.reshape(rows, -1)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    made = CudaDevice() if request.param == "cuda" else HostDevice()
    yield made
    made.close()


@pytest.mark.parametrize("dtype", ["fp16", "fp32", pytest.param("bf16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "qk_norm"),
    [
        (32, 8, 64, False),
        (8, 8, 128, False),
        (4, 2, 18, False),
        (14, 2, 80, True),
        (4, 1, 256, True),
        (9, 3, 96, False),
    ],
)
def test_attention_is_that_of_the_model(device, heads, kv_heads, head_dim, qk_norm, dtype):
    if dtype == "bf16" and isinstance(device, HostDevice):
        pytest.skip("the stand-in has no bf16")
    a, kind, capacity = architecture(heads, kv_heads, head_dim, qk_norm=qk_norm), KINDS[dtype], 700
    random = np.random.default_rng(heads)
    tables = [random.normal(size=(capacity, head_dim // 2)).astype(kind) for _ in range(2)]
    norms = [random.normal(size=head_dim).astype(kind) if qk_norm else None for _ in range(2)]
    shape = (kv_heads, capacity, head_dim)
    caches = [random.normal(size=shape).astype(kind) for _ in range(2)]
    placed = partial(place, device)
    at = [placed(table) for table in tables]
    made = Attention(device, a, dtype, capacity, 160, (at[0], at[1]))
    norm_places = [placed(norm) if norm is not None else 0 for norm in norms]
    for first, rows in ((0, 160), (150, 1), (400, 8), (512, 17), (695, 5)):
        qkv = random.normal(size=(rows, (heads + 2 * kv_heads) * head_dim)).astype(kind)
        keys, values = placed(caches[0]), placed(caches[1])
        out = device.zeros([(rows * heads * head_dim * qkv.itemsize, 1)])[0].address
        position = placed(np.array([first], np.int64))
        operands = replace(
            Operands(placed(qkv), out, keys, values, position), q_norm=norm_places[0], k_norm=norm_places[1]
        )
        run = made.enqueued(rows, operands)
        for _ in range(2):  # the second time with the counters that the first left
            run()
        found = [fetched(device, address, array) for address, array in ((keys, caches[0]), (values, caches[1]))]
        attended = fetched(device, out, np.empty((rows, heads * head_dim), kind))
        for ours, theirs in zip((*found, attended), wanted(a, kind, qkv, *caches, first, tables, norms), strict=True):
            np.testing.assert_allclose(
                ours.astype(np.float64), theirs, atol=8 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


def place(device, array):
    """Puts an array on a device; its address."""
    (block,) = device.zeros([(array.nbytes, 1)])
    host = device.pinned((array.nbytes,), np.uint8)
    host[:] = np.frombuffer(array.tobytes(), np.uint8)
    device.copier(block.address, host.ctypes.data, array.nbytes)()
    device.stream.sync()
    return block.address


def fetched(device, address, like):
    """An array from a device."""
    host = device.pinned((like.nbytes,), np.uint8)
    device.copier(host.ctypes.data, address, like.nbytes)()
    device.stream.sync()
    return np.frombuffer(bytes((ctypes.c_uint8 * like.nbytes).from_address(host.ctypes.data)), like.dtype).reshape(
        like.shape
    )
