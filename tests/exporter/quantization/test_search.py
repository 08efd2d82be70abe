"""The search for scales, judged by the errors of what is stored."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tests.dequantizer import dequantized

from edgeskip.exporter.quantization import search
from edgeskip.exporter.quantization.search import encoded_rows

FORMATS = ("int8", "int4-32", "int4-64", "int4-128")
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
RNG = np.random.default_rng(7)


def squared_error(format_, rows, dtype):
    """By row, in float64; the numbers are finite however they are rounded."""
    numbers, scales = encoded_rows(format_, rows, dtype)
    assert scales.dtype == DTYPES[dtype]
    values = dequantized(format_, numbers, scales)
    assert np.isfinite(values.astype(DTYPES[dtype]).astype(np.float64)).all()
    return np.square(values - rows.astype(np.float64)).sum(axis=1)


def rounded_to_nearest(format_, rows, dtype):
    """The same for the plain way: the largest magnitude becomes the largest number, 7 or 127."""
    largest, size = (127, rows.shape[1]) if format_ == "int8" else (7, int(format_.removeprefix("int4-")))
    blocks = rows.astype(np.float64).reshape(len(rows), -1, size)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / largest
    scales = scales.astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)
    numbers = np.clip(np.rint(blocks / np.where(scales == 0, 1, scales)), -largest - 1, largest)
    return np.square(numbers * scales - blocks).sum(axis=(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_errors_are_less_than_those_of_the_largest_magnitude(rows, format_, dtype):
    numbers = (RNG.standard_normal((rows, 384)) * RNG.gamma(1, 0.05, (rows, 1))).astype(np.float32)
    found, plain = squared_error(format_, numbers, dtype), rounded_to_nearest(format_, numbers, dtype)
    assert found.sum() <= plain.sum() * (1 + 1e-6)
    if format_ != "int8":
        assert found.sum() < 0.9 * plain.sum()
        assert (found < plain).mean() > 0.9


@pytest.mark.parametrize("format_", FORMATS)
def test_columns_with_large_inputs_count_more(format_):
    rows = RNG.standard_normal((200, 256)).astype(np.float32)
    sizes = RNG.gamma(0.5, 1, 256)
    lost = []
    for told in (sizes, None):
        values = dequantized(format_, *encoded_rows(format_, rows, "fp16", told))
        lost.append(np.square((values - rows) * sizes).sum())
    assert lost[0] < 0.99 * lost[1]
    for told, same in ((sizes, 1e-9 * sizes), (np.zeros(256) + 3, None)):
        for one, other in zip(*(encoded_rows(format_, rows, "fp16", t) for t in (told, same)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_rows_of_any_floating_type_in_any_order_of_memory(source):
    rows = RNG.standard_normal((64, 6)).astype(source).T
    wanted = encoded_rows("int4-32", np.ascontiguousarray(rows).astype(np.float32), "fp32")
    for found, part in zip(encoded_rows("int4-32", rows, "fp32"), wanted, strict=True):
        np.testing.assert_array_equal(found, part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_scale_of_either_sign_makes_the_most_of_the_range(format_, dtype):
    """With the numbers of the range themselves, for which there is a scale without an error, upright or mirrored."""
    low = -128 if format_ == "int8" else -8
    whole = np.resize(np.arange(low, -low), (2, 256)).astype(np.float32) * 0.5
    whole[1] *= -1
    assert (squared_error(format_, whole, dtype) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_zeros_stay_zeros(format_, dtype):
    rows = np.zeros((3, 128), np.float32)
    rows[1] = RNG.standard_normal(128)
    assert (squared_error(format_, rows, dtype)[[0, 2]] == 0).all()
    if format_ == "int4-32":  # a block of zeros beside others
        rows[1, 32:64] = 0
        numbers, scales = encoded_rows(format_, rows, dtype)
        assert not dequantized(format_, numbers, scales)[1, 32:64].any()


@pytest.mark.parametrize("format_", FORMATS)
def test_scales_among_the_subnormal_numbers_of_fp16(format_):
    """Between 2^-24 and 2^-14 a scale has few digits; what it gives is measured with them."""
    spacing = 2.0**-24
    for size in (2e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        rows = (RNG.standard_normal((16, 256)) * size).astype(np.float32)
        found, plain = squared_error(format_, rows, "fp16"), rounded_to_nearest(format_, rows, "fp16")
        assert (found <= np.square(rows.astype(np.float64)).sum(axis=1)).all()
        assert (found <= 256 * np.maximum(spacing, size) ** 2).all()
        assert found.sum() <= plain.sum() * (1 + 1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("fp32", 3e38), ("fp32", 1e-38), ("fp32", 1e-44), ("bf16", 3e38), ("bf16", 1e-38), ("fp16", 65504)],
)
@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_at_the_ends_of_the_dtype(format_, dtype, size):
    rows = RNG.uniform(-1, 1, (8, 256)) * size
    rows[0, 0], rows[1, 0] = size, -size
    rows = rows.astype(DTYPES[dtype]).astype(np.float32)
    found, smallest = squared_error(format_, rows, dtype), 2.0**-126
    step = size / (100 if format_ == "int8" else 6) + smallest
    assert (found <= 256 * step**2).all()


def test_it_does_not_depend_on_how_rows_are_dealt_out(monkeypatch):
    rows = RNG.standard_normal((1500, 256)).astype(np.float32)
    both = []
    for cores in (1, 3):
        monkeypatch.setattr(search, "usable_cores", lambda cores=cores: cores)
        both.append(encoded_rows("int4-64", rows, "fp16"))
    for one, other in zip(*both, strict=True):
        assert one.tobytes() == other.tobytes()
    for start, stop in ((0, 1), (1, 700), (700, 1500)):
        for whole, part in zip(both[0], encoded_rows("int4-64", rows[start:stop], "fp16"), strict=True):
            np.testing.assert_array_equal(whole[start:stop], part)
