"""The kernels of pick.cu: compiled for every SM that it serves, and on a GPU against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.core import Program, ProgramOptions
from tests.runtime.backends.engines.matrices import stored
from tests.runtime.backends.engines.test_attention import KINDS, device, fetched, place  # noqa: F401
from tests.runtime.backends.engines.test_products import on_device
from tests.standin import HostDevice

from edgeskip.runtime.backends.engines import products
from edgeskip.runtime.backends.engines.heads import Picked, embedder, picker, room
from edgeskip.runtime.backends.engines.products import Matrix


@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90", "sm_120"])
@pytest.mark.parametrize("matrix", [Matrix(1), Matrix(1, 1, 8), Matrix(1, 1, 4, 32)])
def test_the_kernel_compiles(arch, matrix):
    for store in ("16", "17"):
        macros = [("STORE", store), *matrix.macros.items(), ("IN", "2048")]
        source = products.source("mma.cuh", "packs.cuh", "best.cuh", "pick.cu")
        assert Program(source, "c++", ProgramOptions(arch=arch, define_macro=macros)).compile("cubin").code


@pytest.mark.parametrize("format_", ["plain", "int8", "int4-32", "int4-64"])
@pytest.mark.parametrize(("vocabulary", "size"), [(300, 64), (32000, 256), (4096, 192)])
def test_the_largest_logit_is_picked_and_its_row_of_the_table_handed_on(device, format_, vocabulary, size):  # noqa: F811
    for dtype in ("fp16",) if isinstance(device, HostDevice) else ("fp16", "bf16"):
        kind, random = KINDS[dtype], np.random.default_rng(vocabulary)
        rows = 2 * vocabulary // 3
        array, scales, table = stored(random.normal(size=(rows, size)).astype(np.float32), format_, kind)
        matrix = on_device(device, format_, array, scales)
        memory = [block.address for block in device.zeros([(amount, 1) for amount in room(5)])]
        pick = picker(device, matrix, size, dtype, (memory[0], memory[1]))
        for logits in (
            random.normal(size=(5, rows)),
            np.zeros((1, rows)),  # all of them equal
            np.where(np.arange(rows) >= rows - 2, 7, random.normal(size=(3, rows)) - 9),
            np.where(np.arange(rows) == rows // 2, np.nan, random.normal(size=(2, rows))),
            np.full((1, rows), -np.inf),
        ):
            logits = logits.astype(kind)
            count = len(logits)
            amounts = [(count * 8, 1), (count * 2, 1), (count * size * 2, 1)]
            at = Picked(place(device, logits), *(block.address for block in device.zeros(amounts)))
            pick(at, count, rows)()
            ids = fetched(device, at.token_ids, np.empty(count, np.int64))
            wanted = logits.astype(np.float64).argmax(1)  # NaN first, as NumPy has it
            np.testing.assert_array_equal(ids, wanted)
            found = fetched(device, at.token_logits, np.empty(count, kind))
            np.testing.assert_array_equal(found.astype(np.float64), logits[np.arange(count), wanted].astype(np.float64))
            embedded = fetched(device, at.embeddings, np.empty((count, size), kind))
            np.testing.assert_array_equal(embedded.astype(np.float64), table[wanted].astype(kind).astype(np.float64))


@pytest.mark.parametrize("format_", ["plain", "int8", "int4-32"])
def test_a_prompts_tokens_are_embedded(device, format_):  # noqa: F811
    for dtype in ("fp16",) if isinstance(device, HostDevice) else ("fp16", "bf16"):
        kind, random = KINDS[dtype], np.random.default_rng(3)
        array, scales, table = stored(random.normal(size=(500, 192)).astype(np.float32), format_, kind)
        ids = random.integers(0, 500, 37)
        rows = device.zeros([(37 * 192 * 2, 1)])[0].address
        embedder(device, on_device(device, format_, array, scales), 192, dtype)(place(device, ids), rows, 37)
        found = fetched(device, rows, np.empty((37, 192), kind)).astype(np.float64)
        np.testing.assert_array_equal(found, table[ids].astype(kind).astype(np.float64))
