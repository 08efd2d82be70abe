"""The kernels of sample.cu: compiled for every SM that it serves, and on a GPU bit for bit against the host."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.runtime.backends.engines.matrices import stored
from tests.runtime.backends.engines.test_attention import KINDS, device, fetched, place  # noqa: F401
from tests.runtime.backends.engines.test_products import on_device
from tests.standin import HostDevice

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import products
from edgeskip.runtime.backends.engines.heads import Picked
from edgeskip.runtime.backends.engines.products import Matrix
from edgeskip.runtime.backends.engines.sampler import Scratch, filters_of, room, sampler, settings_of, sources
from edgeskip.runtime.decoding.sampling import HostSampler
from edgeskip.runtime.sampling import Sampling

SAMPLINGS = [
    Sampling(1.0, seed=1),
    Sampling(0.7, top_k=1, seed=2),
    Sampling(1.3, top_k=40, seed=3),
    Sampling(0.8, top_p=0.95, seed=4),
    Sampling(1.0, top_p=0.0, seed=5),
    Sampling(0.9, min_p=0.05, seed=(1 << 64) - 1),
    Sampling(1.1, top_k=500, top_p=0.8, min_p=0.01, seed=7),
]


PLAIN, INT8, INT4 = Matrix(1), Matrix(1, 1, 8), Matrix(1, 1, 4, 32)


@pytest.mark.parametrize(
    ("arch", "store", "matrix"),
    [
        ("sm_75", "16", PLAIN),
        ("sm_87", "32", PLAIN),
        ("sm_87", "16", INT8),
        ("sm_90", "17", PLAIN),
        ("sm_90", "16", INT4),
        ("sm_120", "17", INT8),
    ],
)
def test_the_kernels_compile(arch, store, matrix):
    macros = [("STORE", store), *matrix.macros.items(), ("IN", "2048")]
    source = products.source(*sources(matrix))
    assert Program(source, "c++", ProgramOptions(arch=arch, define_macro=macros)).compile("cubin").code


@pytest.mark.parametrize(
    ("dtype", "format_"),
    [
        ("fp16", "plain"),
        ("fp32", "plain"),
        pytest.param("bf16", "plain", marks=pytest.mark.gpu),
        ("fp16", "int8"),
        pytest.param("bf16", "int4-32", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [(300, 5), pytest.param(32003, 1, marks=pytest.mark.gpu), pytest.param(128256, 4, marks=pytest.mark.gpu)],
)
def test_draws_are_those_of_the_host(device, dtype, format_, vocabulary, rows):  # noqa: F811
    if isinstance(device, HostDevice) and (dtype == "bf16" or vocabulary > 300):
        pytest.skip("the stand-in has no bf16, and draws as the host does")
    random, size, kind = np.random.default_rng(vocabulary), 64, KINDS[dtype]
    array, scales, table = stored(random.normal(size=(vocabulary, size)).astype(np.float32), format_, kind)
    scratch = Scratch(*(block.address for block in device.zeros([(n, 1) for n in room(vocabulary, rows)])))
    draw = sampler(device, on_device(device, format_, array, scales), size, dtype, scratch)
    for sampling in SAMPLINGS * 2:
        logits = (random.normal(size=(rows, vocabulary)) * random.choice([0.5, 3, 12])).astype(kind)
        positions, tops = random.integers(0, 4000, rows), np.ascontiguousarray(logits.max(1))
        amounts = [(rows * 8, 1), (rows * size * tops.itemsize, 1)]
        ids, embeddings = (block.address for block in device.zeros(amounts))
        at = Picked(place(device, logits), ids, place(device, tops), embeddings)
        device.copier(scratch.settings, place(device, settings_of(sampling).view(np.uint8)), 32)()
        draw(at, place(device, positions), (rows, vocabulary), filters_of(sampling))()
        host = HostSampler(sampling, (), 4001)
        wanted = [host.pick(row.astype(np.float32), int(at) + 1) for row, at in zip(logits, positions, strict=True)]
        assert fetched(device, ids, np.empty(rows, np.int64)).tolist() == wanted, sampling
        told = fetched(device, at.token_logits, np.empty(rows, kind)).astype(np.float32)
        np.testing.assert_array_equal(told, logits[np.arange(rows), wanted].astype(np.float32))
        embedded = fetched(device, embeddings, np.empty((rows, size), kind)).astype(np.float32)
        np.testing.assert_array_equal(embedded, table[wanted].astype(kind).astype(np.float32))


@pytest.mark.gpu
def test_a_heads_pick_stays_where_nothing_can_be_drawn():
    with CudaDevice() as gpu:
        logits, size = np.full((1, 300), np.nan, np.float16), 64
        scratch = Scratch(*(block.address for block in gpu.zeros([(n, 1) for n in room(300, 1)])))
        draw = sampler(gpu, Matrix(place(gpu, np.ones((300, size), np.float16))), size, "fp16", scratch)
        gpu.copier(scratch.settings, place(gpu, settings_of(SAMPLINGS[-1]).view(np.uint8)), 32)()
        ids, rows = place(gpu, np.array([7])), gpu.zeros([(size * 2, 1)])[0].address
        at = Picked(place(gpu, logits), ids, place(gpu, logits[:, 0].copy()), rows)
        draw(at, place(gpu, np.array([3])), (1, 300), (0, 1))()
        assert fetched(gpu, ids, np.empty(1, np.int64)).tolist() == [7]
