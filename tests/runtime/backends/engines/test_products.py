"""The kernel of product.cu: compiled for every SM that it serves, and on a GPU against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.runtime.backends.engines.test_attention import KINDS, architecture, fetched, place
from tests.standin import HostDevice

from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import products
from edgeskip.runtime.backends.engines.products import Product, enqueued, serves

KIND_OF = {"plain": {}, "bias": {"bias": 1}, "norm": {"norm": 1}, "residual": {"residual": 1}, "gated": {"gated": True}}
KIND_OF["all"] = {"bias": 1, "norm": 1, "gated": True}


@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("product", "rows"),
    [
        (Product(1, 2048, 16384, norm=1, gated=True), 17),
        (Product(1, 8192, 2048, residual=1), 8),
        (Product(1, 72, 40), 1),
    ],
)
def test_the_kernel_compiles(arch, product, rows):
    for dtype in ("fp16", "bf16"):
        macros = [*products.macros(product, dtype, rows).items()]
        options = ProgramOptions(arch=arch, define_macro=macros)
        assert Program(products.source("product.cu"), "c++", options).compile("cubin").code


def test_models_and_gpus_that_the_kernel_does_not_serve_are_known():
    assert serves(architecture(8, 2, 64), "fp16", 87)
    assert not serves(architecture(8, 2, 64), "fp32", 87)
    assert not serves(architecture(8, 2, 64), "fp16", 75)
    assert not serves(architecture(2, 2, 18), "fp16", 87), "rows of 36 numbers are not whole packs of 8"


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    made = CudaDevice() if request.param == "cuda" else HostDevice()
    yield made
    made.close()


@pytest.mark.parametrize("what", KIND_OF)
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 512), (72, 36), (4096, 100), (8192, 48), (576, 1536)])
def test_products_are_those_of_numpy_and_rows_do_not_depend_on_each_other(device, what, inputs, outputs):
    dtypes = ("fp16",) if isinstance(device, HostDevice) else ("fp16", "bf16")
    for dtype in dtypes:
        kind, given, random = KINDS[dtype], KIND_OF[what], np.random.default_rng(inputs)
        lines = outputs * (2 if given.get("gated") else 1)
        weight = (random.normal(size=(lines, inputs)) * inputs**-0.5).astype(kind)
        arrays = {
            "bias": random.normal(size=lines).astype(kind),
            "norm": random.normal(size=inputs).astype(kind),
            "residual": random.normal(size=(17, outputs)).astype(kind),
        }
        x = random.normal(size=(17, inputs)).astype(kind)
        at = {name: place(device, array) for name, array in arrays.items() if given.get(name)}
        product = Product(place(device, weight), inputs, outputs, gated=bool(given.get("gated")), **at)
        found = {}
        for rows in (1, 3, 8, 17):
            out = device.zeros([(rows * outputs * x.itemsize, 1)])[0].address
            enqueued(device, product, place(device, x[:rows]), out, rows=rows, dtype=dtype, eps=1e-6)()
            found[rows] = fetched(device, out, np.empty((rows, outputs), kind)).astype(np.float64)
        wanted = reference(weight, x, given, arrays, kind)
        tolerance = 4e-3 if dtype == "fp16" else 3e-2
        np.testing.assert_allclose(found[17], wanted, atol=2 * tolerance, rtol=tolerance)
        if not isinstance(device, HostDevice):
            for rows in (1, 3, 8):
                np.testing.assert_array_equal(found[rows], found[17][:rows])


def reference(weight, x, given, arrays, kind):
    """The same in fp64, rounded where a model rounds."""
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
