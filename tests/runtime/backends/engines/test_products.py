"""The kernels of products: compiled for every SM that they serve, and on a GPU against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.runtime.backends.engines.matrices import BLOCK_OF, stored
from tests.runtime.backends.engines.test_attention import KINDS, architecture, fetched, place
from tests.standin import HostDevice

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import products
from edgeskip.runtime.backends.engines.products import Matrix, Product, enqueued, long_enqueued
from edgeskip.runtime.bundle.layers import has_products

KIND_OF = {"plain": {}, "bias": {"bias": 1}, "norm": {"norm": 1}, "residual": {"residual": 1}, "gated": {"gated": True}}
KIND_OF["all"] = {"bias": 1, "norm": 1, "gated": True}


@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("product", "rows"),
    [
        (Product(Matrix(1), 2048, 16384, norm=1, gated=True), 17),
        (Product(Matrix(1, 1, 8), 8192, 2048, residual=1), 8),
        (Product(Matrix(1, 1, 4, 32), 8192, 2048, norm=1, gated=True), 4),
        (Product(Matrix(1), 72, 40), 1),
    ],
)
def test_the_kernels_compile(arch, product, rows):
    for dtype in ("fp16", "bf16"):
        defined = {
            "product.cu": products.macros(product, dtype, rows, 16),
            "long_product.cu": products.long_macros(product, dtype, 16),
            "normalize.cu": {"STORE": products.STORES[dtype], "IN": str(product.inputs)},
        }
        for file, macros in defined.items():
            options = ProgramOptions(arch=arch, define_macro=[*macros.items()])
            source = products.source("mma.cuh", "packs.cuh", "copies.cuh", file)
            assert Program(source, "c++", options).compile("cubin").code


def test_models_and_gpus_that_the_kernel_does_not_serve_are_known():
    assert has_products(architecture(8, 2, 64), "fp16", ["int8", "int4-32"], 87)
    assert not has_products(architecture(8, 2, 64), "fp32", [], 87)
    assert not has_products(architecture(8, 2, 64), "fp16", [], 75)
    assert not has_products(architecture(2, 2, 18), "fp16", [], 87), "rows of 36 numbers are not whole packs of 8"
    assert has_products(architecture(3, 1, 24), "fp16", [], 87)
    assert not has_products(architecture(3, 1, 24), "fp16", ["int8"], 87), "nor rows of 72 of 16"


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    made = CudaDevice() if request.param == "cuda" else HostDevice()
    yield made
    made.close()


def on_device(device, format_, array, scales):
    """A stored matrix on a device."""
    if scales is None:
        return Matrix(place(device, array))
    return Matrix(place(device, array), place(device, scales), 8 if format_ == "int8" else 4, BLOCK_OF[format_])


CASES = [
    ("plain", what, *sizes)
    for what in KIND_OF
    for sizes in [(2048, 512), (72, 36), (4096, 100), (8192, 48), (576, 1536)]
]
CASES += [
    (format_, what, *sizes)
    for format_ in ("int8", "int4-32", "int4-64", "int4-128")
    for what, sizes in [("all", (2048, 512)), ("residual", (8192, 48)), ("norm", (4096, 100)), ("plain", (14336, 40))]
]
CASES += [("int8", "all", 48, 36), ("int4-32", "all", 96, 36), ("int4-64", "gated", 576, 1536)]
CASES += [(format_, "all", 2048, 2500) for format_ in ("int8", "int4-32")]  # lines for every multiprocessor of any GPU


@pytest.mark.parametrize(("format_", "what", "inputs", "outputs"), CASES)
def test_products_are_those_of_numpy_and_rows_do_not_depend_on_each_other(device, format_, what, inputs, outputs):
    compare(enqueued, (1, 3, 8, 17), np.geomspace(1e-2, 300, 17), device, format_, what, inputs, outputs)


LONG_CASES = [(format_, what, 576, 96) for format_ in BLOCK_OF if format_ != "int4-128" for what in KIND_OF]
LONG_CASES += [(format_, "all", 2048, 2500) for format_ in BLOCK_OF]
LONG_CASES += [
    ("plain", "all", 72, 36),
    ("int8", "norm", 48, 36),
    ("int4-32", "gated", 96, 20),
    ("int4-128", "residual", 8192, 48),
]
LONG_CASES += [(format_, "gated", 256, 9000) for format_ in BLOCK_OF]  # where a block has many lines


@pytest.mark.parametrize(("format_", "what", "inputs", "outputs"), LONG_CASES)
def test_products_of_many_rows_are_those_of_numpy_and_rows_do_not_depend_on_each_other(
    device, format_, what, inputs, outputs
):
    compare(long_enqueued, (18, 64, 130, 200), np.ones(200), device, format_, what, inputs, outputs)


def compare(bind, counts, sizes, device, format_, what, inputs, outputs):
    """Products of so many rows, the last of which is the most, with NumPy's and with each other; rows that are
    normalized have these sizes.
    """
    for dtype in ("fp16",) if isinstance(device, HostDevice) else ("fp16", "bf16"):
        kind, given, random = KINDS[dtype], KIND_OF[what], np.random.default_rng(inputs)
        gated, most = bool(given.get("gated")), counts[-1]
        lines = outputs * (1 + gated)
        array, scales, weight = stored(random.normal(size=(lines, inputs)) * inputs**-0.5, format_, kind)
        arrays = {
            "bias": random.normal(size=lines).astype(kind),
            "norm": random.normal(size=inputs).astype(kind),
            "residual": random.normal(size=(most, outputs)).astype(kind),
        }
        x = (random.normal(size=(most, inputs)) * sizes[:, None]).astype(kind)
        if not given.get("norm"):
            x = (x.astype(np.float64) / sizes[:, None]).astype(kind)
        at = {name: place(device, array) for name, array in arrays.items() if given.get(name)}
        at["normalized"] = device.zeros([(x.nbytes, 1)])[0].address
        product = Product(on_device(device, format_, array, scales), inputs, outputs, gated=gated, **at)
        found = {}
        for rows in counts:
            out = device.zeros([(rows * outputs * x.itemsize, 1)])[0].address
            bind(device, product, place(device, x[:rows]), out, rows=rows, dtype=dtype, eps=1e-6)()
            found[rows] = fetched(device, out, np.empty((rows, outputs), kind)).astype(np.float64)
        wanted = reference(weight, x, given, arrays, kind)
        tolerance = 4e-3 if dtype == "fp16" else 3e-2
        np.testing.assert_allclose(found[most], wanted, atol=2 * tolerance, rtol=tolerance)
        if not isinstance(device, HostDevice):
            for rows in counts[:-1]:
                np.testing.assert_array_equal(found[rows], found[most][:rows])


def reference(weight, x, given, arrays, kind):
    """A product in fp64, rounded where a model rounds."""
    states = x.astype(np.float64)
    if given.get("norm"):
        states = (states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-6)).astype(kind).astype(np.float64)
        states = (states * arrays["norm"].astype(np.float64)).astype(kind).astype(np.float64)
    y = states @ weight.astype(np.float64).T
    if given.get("bias"):
        y = y + arrays["bias"].astype(np.float64)
    if given.get("gated"):
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    if given.get("residual"):
        y = y + arrays["residual"].astype(np.float64)
    return y
