"""Which matrices get 8 bits: the choice against all others, and sizes before anything is measured."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgeskip.exporter.quantization.budget import check_bits, planned_formats, wider_matrices
from edgeskip.exporter.quantization.choice import QuantizationChoice
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.bundle.tensors import TensorRecord, bundle_tensors
from edgeskip.runtime.errors import RequestError


def records(*shapes):
    """Matrices in 4 bits."""
    return {f"{i}": TensorRecord(f"{i}", shape, "int4-32", ()) for i, shape in enumerate(shapes)}


def average_bits(tensors, wider):
    """On average, from the layout: 4 bits and a scale of 16 for 32 of them, or 8 bits and one for a row."""
    sizes = [
        math.prod(tensor.shape) * (8 if name in wider else 4.5) + (16 * tensor.shape[0] if name in wider else 0)
        for name, tensor in tensors.items()
    ]
    return sum(sizes) / sum(math.prod(tensor.shape) for tensor in tensors.values())


@pytest.mark.parametrize("bits", [4.5, 5.0, 5.5, 6.5, 7.9])
def test_the_bits_are_kept_and_the_effects_are_nearly_the_least(bits):
    rng = np.random.default_rng(int(bits * 10))
    tensors = records(*[(int(rng.integers(1, 9)) * 32, int(rng.integers(2, 9)) * 32) for _ in range(10)])
    effects = dict(zip(tensors, rng.gamma(0.5, 1, 10), strict=True))
    wider = wider_matrices(tensors, effects, bits, "fp16")
    assert set(wider.values()) <= {"int8"}
    assert average_bits(tensors, wider) <= bits
    subsets = itertools.chain.from_iterable(itertools.combinations(tensors, n) for n in range(11))
    best = max(sum(effects[name] for name in subset) for subset in subsets if average_bits(tensors, subset) <= bits)
    assert sum(effects[name] for name in wider) >= 0.85 * best


def test_the_bits_that_can_be_had():
    tensors = records((64, 64), (64, 64))
    check_bits(tensors, tensors, 4.5, "fp16")
    check_bits(tensors, tensors, 8.25, "fp16")
    for bits in (4.49, 8.26, math.nan):
        with pytest.raises(RequestError, match=rf"bits: {bits:g}; wanted 4.5 to 8.25, with the scales"):
            check_bits(tensors, tensors, bits, "fp16")
    with pytest.raises(RequestError, match=r"wanted 4.5 to 6.375"):
        check_bits(tensors, list(tensors)[:1], 7, "fp16")


def test_a_plan_takes_the_bits_whatever_an_export_will_choose():
    architecture = load_shape("llama3.2-1b").architecture
    choice = QuantizationChoice(weights="auto", bits=5.25, layers=("0=int8",))
    formats = planned_formats(architecture, "fp16", choice)
    tensors = {
        name: tensor
        for name, tensor in bundle_tensors(architecture, 0, "fp16").items()
        if tensor.layer is not None and tensor.is_matrix
    }
    wider = [name for name in tensors if formats[name] == "int8"]
    assert {name for name in tensors if tensors[name].layer == 0} < set(wider)
    assert 5.2 < average_bits(tensors, wider) <= 5.25
    plain = planned_formats(architecture, "fp16", QuantizationChoice(weights="int4"))
    assert {formats[name] for name in tensors if name not in wider} == {plain[name] for name in tensors}
    with pytest.raises(RequestError, match="bits: 5, for weights that are not `auto`; leave it out"):
        planned_formats(architecture, "fp16", QuantizationChoice(weights="int4", bits=5))
