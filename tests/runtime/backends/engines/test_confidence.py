"""The kernel of confidence.cu: compiled for every SM that it serves, and in a captured graph against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.runtime.backends.engines.test_attention import KINDS, device, fetched, place  # noqa: F401
from tests.standin import HostDevice

from edgeskip.runtime.backends.engines import products
from edgeskip.runtime.backends.engines.confidence import FILES, Scales, judge, room


@pytest.mark.parametrize("arch", ["sm_75", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize("store", ["16", "17", "32"])
def test_the_kernel_compiles(arch, store):
    options = ProgramOptions(arch=arch, define_macro=[("STORE", store)])
    assert Program(products.source(*FILES), "c++", options).compile("cubin").code


@pytest.mark.parametrize("vocabulary", [3, 300, 4096, 128256])
def test_stages_run_as_long_as_drafts_are_probable(device, vocabulary):  # noqa: F811
    """Three stages, with a draft in each of the first two; a copy in each stage tells whether it ran."""
    random = np.random.default_rng(vocabulary)
    for dtype in ("fp16", "fp32") if isinstance(device, HostDevice) else ("fp16", "bf16", "fp32"):
        kind = KINDS[dtype]
        rows = (4 * random.normal(size=(2, vocabulary))).astype(kind)
        rows[0, 1] = rows[0].astype(np.float64).max() + 3
        rows[1, 2] = np.nan if vocabulary == 300 else rows[1, 0]
        tokens = np.array([1, vocabulary - 1])
        wide = rows.astype(np.float64)
        sums = np.exp(wide - wide[[0, 1], tokens][:, None]).sum(1)
        logits, picked = place(device, rows), place(device, rows[[0, 1], tokens])
        one, (ran, made) = place(device, np.array([1])), (block.address for block in device.zeros([(24, 1), (8, 1)]))
        threshold, *others = (block.address for block in device.zeros([(size, 1) for size in room()]))
        bind = judge(device, dtype, Scales(threshold, *others), made)
        size = rows.itemsize
        judges = [
            bind((logits + row * vocabulary * size, picked + row * size), vocabulary, row + 1) for row in range(2)
        ]
        marks = [device.copier(ran + 8 * stage, one, 8) for stage in range(3)]

        def stage(number, following, marks=marks, judges=judges):
            marks[number]()
            if following:
                judges[number](following)

        last = device.copier(made, made, 8)
        launch = device.captured_while([lambda h, n=n, stage=stage: stage(n, h) for n in range(3)], last)
        probabilities = (1 / sums).tolist()
        near = [p * factor for p in probabilities if p == p for factor in (0.999, 1.001)]
        for limit in (0.0, 0.5, 1.0, *near):
            device.copier(ran, place(device, np.zeros(3, np.int64)), 24)()
            device.copier(threshold, place(device, np.array([limit], np.float32)), 4)()
            launch()
            goes_on = [not p < limit for p in probabilities]
            drafts = 1 if not goes_on[0] else 2 if not goes_on[1] else 3
            assert fetched(device, made, np.empty(1, np.int64)) == drafts
            assert fetched(device, ran, np.empty(3, np.int64)).tolist() == [1] * drafts + [0] * (3 - drafts)
