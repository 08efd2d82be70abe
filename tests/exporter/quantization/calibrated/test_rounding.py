"""GPTQ's numbers for one matrix, judged by the errors of products and by the paper's own procedure."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.dequantizer import dequantized

from edgeskip.exporter.quantization.calibrated.rounding import (
    DAMPING,
    TOWARDS,
    best_scales,
    fitted_rows,
    known_inputs,
    moments_and_shifts,
    quantized_rows,
    second_moments,
)
from edgeskip.exporter.quantization.search import encoded_rows
from edgeskip.runtime.errors import CheckpointError

FORMATS = {"int8": None, "int4-32": 32, "int4-64": 64, "int4-128": 128}
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
LOWEST = {"int8": -128, "int4-32": -8, "int4-64": -8, "int4-128": -8}


def correlated_inputs(tokens, columns, seed=0):
    """Inputs [T,K] whose columns go together, some of them large and one always zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    inputs = (mixed + 0.3 * rng.standard_normal((tokens, columns))) * rng.gamma(1, 1, columns)
    inputs[:, 5] = 0
    return torch.from_numpy(inputs.astype(np.float32))


def matrix(rows, columns, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02)


def product_error(weights, values, inputs):
    """The squared error of products over their squares, in float64, for inputs of one length."""
    unit = torch.nn.functional.normalize(inputs, dim=1).double().numpy()
    wanted = unit @ weights.double().numpy().T
    return np.square(unit @ values.T - wanted).sum() / np.square(wanted).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_are_nearer_than_with_numbers_that_serve_the_matrix_alone(rows, format_, dtype):
    inputs, weights = correlated_inputs(900, 256), matrix(rows, 256)
    known = known_inputs(second_moments([inputs[:400], inputs[400:]]), FORMATS[format_])
    found = quantized_rows(format_, weights, known, dtype)
    assert found[1].dtype == DTYPES[dtype]
    assert found[1].shape == (rows, 256 // (FORMATS[format_] or 256))
    plain = encoded_rows(format_, weights.numpy(), dtype)
    ours, theirs = (product_error(weights, dequantized(format_, *parts), inputs) for parts in (found, plain))
    assert ours < 0.6 * theirs


@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_are_those_of_the_paper(format_):
    """Its procedure, with the scales that were found and in the order that was chosen: by the Cholesky factor of the
    inverse, each column's error is passed on to all columns that are left.
    """
    inputs, weights = correlated_inputs(600, 128), matrix(12, 128)
    moments = second_moments([inputs])
    known = known_inputs(moments.clone(), FORMATS[format_])
    numbers, scales = quantized_rows(format_, weights, known, "fp32")
    spread = np.repeat(scales.astype(np.float64), 128 // scales.shape[1], axis=1)
    order = known.order.numpy()[::-1]
    hessian = moments.double().numpy()[np.ix_(order, order)]
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(128)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, wanted = weights.double().numpy()[:, order], np.empty((12, 128))
    for k, column in enumerate(order):
        low = LOWEST[format_]
        wanted[:, column] = np.clip(np.rint(left[:, k] / spread[:, column]), low, -low - 1)
        error = (left[:, k] - wanted[:, column] * spread[:, column]) / factor[k, k]
        left[:, k:] -= np.outer(error, factor[k, k:])
    found = dequantized(format_, numbers, np.ones_like(scales))
    assert (found == wanted).mean() > 0.995  # but for what rounding to fp32 decides
    assert np.abs(found - wanted).max() <= 2


@pytest.mark.parametrize("size", [32, 64, 128])
def test_blocks_are_rounded_from_the_largest_inputs_to_the_smallest_and_stay_whole(size):
    inputs = correlated_inputs(300, 256)
    known = known_inputs(second_moments([inputs]), size)
    order = known.order.numpy()[::-1].reshape(-1, size)[:, ::-1]
    assert (order == order[:, :1] + np.arange(size)).all()
    unit = torch.nn.functional.normalize(inputs, dim=1).double().numpy()
    squares = np.square(unit).sum(axis=0).reshape(-1, size).sum(axis=1)
    assert (np.diff(squares[order[:, 0] // size]) <= 1e-6).all()


@pytest.mark.parametrize("less", [0, 0.5])
def test_the_factor_is_that_of_the_moments_with_the_least_damping_that_lets_them_have_one(less):
    """By NumPy's in float64, over several blocks of columns; with less on the diagonal there is no factor at first."""
    moments = second_moments([correlated_inputs(1500, 600)])
    mean = float(moments.diagonal().mean())
    moments.diagonal().sub_(less * mean)
    known = known_inputs(moments.clone(), None)
    order, damping = known.order.numpy(), DAMPING * (1 - less) * mean
    wanted = moments.double().numpy()[np.ix_(order, order)]
    while np.linalg.eigvalsh(wanted)[0] + damping < 0:
        damping *= 10
    factor = np.linalg.cholesky(wanted + damping * np.eye(600))
    np.testing.assert_allclose(known.weights, factor.diagonal() ** 2, rtol=1e-3)
    lower = np.tril(known.lower.double().numpy(), -1) + np.eye(600)
    np.testing.assert_allclose(lower * factor.diagonal(), factor, atol=1e-3 * np.abs(factor).max())


def test_inputs_count_by_their_direction_alone():
    inputs = correlated_inputs(300, 64)
    longer = inputs.clone()
    longer[7] *= 1e4
    torch.testing.assert_close(second_moments([longer]), second_moments([inputs]))
    torch.testing.assert_close(second_moments([torch.zeros(3, 64), inputs]), second_moments([inputs]))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_fewer_inputs_than_columns(format_, tokens):
    inputs, weights = correlated_inputs(tokens, 128), matrix(5, 128)
    known = known_inputs(second_moments([inputs]), FORMATS[format_])
    values = dequantized(format_, *quantized_rows(format_, weights, known, "fp16"))
    assert np.isfinite(values).all()
    if tokens > 1:
        plain = dequantized(format_, *encoded_rows(format_, weights.numpy(), "fp16"))
        assert product_error(weights, values, inputs) < product_error(weights, plain, inputs)


def test_rows_of_zeros_and_rows_among_the_smallest_and_largest_numbers():
    inputs = correlated_inputs(300, 64)
    weights = matrix(8, 64)
    weights[1] = 0
    weights[2] *= 3e-5  # scales among fp16's subnormal numbers
    weights[3] *= 1e-9  # and below them
    weights[4] *= 1e5
    known = known_inputs(second_moments([inputs]), 32)
    values = dequantized("int4-32", *quantized_rows("int4-32", weights, known, "fp16"))
    assert np.isfinite(values.astype(np.float16)).all()
    assert not values[1].any()
    assert np.abs(values[3]).max() <= 2.0**-24
    errors = [product_error(weights[[i]], values[[i]], inputs) for i in (0, 2, 4)]
    assert errors[0] < 0.01
    assert errors[1] < 0.3
    assert errors[2] < 0.01


@pytest.mark.parametrize("format_", ["int8", "int4-32"])
def test_rows_do_not_depend_on_each_other(format_, monkeypatch):
    inputs, weights = correlated_inputs(300, 96), matrix(50, 96)
    known = known_inputs(second_moments([inputs]), FORMATS[format_])
    whole = quantized_rows(format_, weights, known, "fp16")
    monkeypatch.setattr("edgeskip.exporter.quantization.calibrated.rounding._CHUNK", 96 * 7)
    for one, other in zip(quantized_rows(format_, weights, known, "fp16"), whole, strict=True):
        assert (one == other).mean() > 0.99  # sums of other shapes may round otherwise


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_have_the_least_weighted_error_of_those_tried(dtype):
    rng = np.random.default_rng(3)
    blocks, weights = rng.standard_normal((32, 200)), rng.gamma(0.5, 1, 32)
    found = best_scales(torch.from_numpy(blocks).float(), torch.from_numpy(weights).float(), 4, dtype).double().numpy()

    def errors(scales):
        numbers = np.clip(np.rint(blocks / scales), -8, 7)
        return (np.square(numbers * scales - blocks) * weights[:, None]).sum(axis=0)

    assert (found.astype(DTYPES[dtype]).astype(np.float64) == found).all()
    tried = [errors(np.abs(blocks).max(axis=0) / size) for size in np.linspace(5, 9, 9)]
    assert errors(found).sum() < 1.02 * np.min(tried, axis=0).sum()


def test_inputs_that_are_not_finite_are_refused_in_one_line():
    inputs = correlated_inputs(10, 64)
    inputs[3, 3] = np.nan
    with pytest.raises(CheckpointError, match="calibration texts: give numbers that are not finite; quantize"):
        known_inputs(second_moments([inputs]), 32)


@pytest.mark.parametrize("size", [None, 32])
def test_rows_are_fitted_to_what_they_give_for_inputs_half_way_to_those_that_are_wanted(size):
    """By least squares in float64, with H's damping as rows of their own, that want the matrix as it is."""
    inputs, weights = correlated_inputs(500, 96), matrix(7, 96)
    wanted = inputs + 0.1 * correlated_inputs(500, 96, seed=5)
    pairs = [(inputs[:200], wanted[:200]), (inputs[200:], wanted[200:])]
    moments, shifts = moments_and_shifts(weights, *zip(*pairs, strict=True))
    torch.testing.assert_close(moments, second_moments([inputs]))
    found = fitted_rows(weights, shifts, known_inputs(moments, size))
    lengths = inputs.norm(dim=1, keepdim=True)
    x, y = ((one / lengths).double().numpy() for one in (inputs, (1 - TOWARDS) * inputs + TOWARDS * wanted))
    damped = np.sqrt(DAMPING * np.square(x).sum(axis=0).mean()) * np.eye(96)
    w = weights.double().numpy()
    solved = np.linalg.lstsq(np.vstack([x, damped]), np.vstack([y, damped]) @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), solved, atol=1e-4)
    assert np.abs(solved - w).max() > 1e-3
