"""GPTQ for one matrix (arXiv 2210.17323): numbers that serve what the matrix gives for real inputs.

The error of rounding a column is made up for by the columns that are rounded after it, as far as their inputs go
together. For inputs X [T,K], the error of a row e = w - q of the matrix is e H e^T with H = X^T X. With H = L D L^T, L
unit lower triangular and D diagonal, it is a sum over columns,

    sum over k of  D_k (e_k + sum over j > k of e_j L_jk)^2

so each column, from the last to the first, is rounded to what is nearest to w_k + sum over j > k of e_j L_jk, and what
remains is weighted by D_k. (arXiv 2307.13304 shows that this is GPTQ.)

A block's scale is the one of several with the least of that sum, apart from what columns of the same block make up for.
Blocks are rounded in the falling order of their inputs' squares, and so are single columns where a row has one scale:
the first have the most others to make up for them. The order changes nothing in how numbers are stored.

What is rounded is not quite the matrix. Its inputs X come through what has been quantized before; in the model as it
is, they are X + G. So the matrix W is first fitted to give, for X, what W gives for X + G / 2: W G^T X H^-1 / 2 is
added to it. (As in arXiv 2504.02692; with all of G, the shipped checkpoint follows its calibration texts too closely.)

Sums of many numbers are those of torch: the same input gives the same bytes on the same machine with as many threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeskip.exporter.quantization.search import EXTREMES, LARGEST, SMALLEST_SCALES, packed
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.errors import CheckpointError

Array = npt.NDArray[Any]

DAMPING = 0.01
"""What is added to the diagonal of H, as a part of its mean."""

TOWARDS = 0.5
"""How much of the way to the inputs of the model as it is a matrix is fitted to."""

_SHORTEST = 1e-12  # rows count as if they had a length
_COLUMNS = 128  # at a time, where a row has one scale
_AT_A_TIME = 512  # rows or columns that are put in order
_CHUNK = 1 << 23  # numbers of a matrix at a time


@dataclass(frozen=True)
class Inputs:
    """What is known of a matrix's inputs: the order [K] of its columns, the first to be rounded last, and in that order
    L [K,K], of which the part below the diagonal is meant alone, and D [K].
    """

    order: Tensor
    lower: Tensor
    weights: Tensor


def second_moments(inputs: Iterable[Tensor], before: Tensor | None = None) -> Tensor:
    """H [K,K], the sum of x x^T over all rows x of inputs [T,K], added to that of others before.

    Rows count by their direction alone. In many models a text's first token has numbers so large that nothing else
    would count; and what a norm reads next is made as long as all others anyway.
    """
    moments = before
    for rows in inputs:
        rows = F.normalize(rows, dim=1, eps=_SHORTEST)
        moments = rows.new_zeros(rows.shape[1], rows.shape[1]) if moments is None else moments
        moments.addmm_(rows.T, rows)
    assert moments is not None
    return moments


def moments_and_shifts(rows: Tensor, inputs: Iterable[Tensor], wanted: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """For a matrix W with these rows [n,K]: H [K,K], as `second_moments` gives it, and W G^T X [n,K], where X + G are
    the wanted inputs. Both are given as [T,K].
    """
    moments, shifts = rows.new_zeros(rows.shape[1], rows.shape[1]), torch.zeros_like(rows)
    for x, y in zip(inputs, wanted, strict=True):
        lengths = x.norm(dim=1, keepdim=True).clamp_(min=_SHORTEST)
        gap, x = (y - x).div_(lengths), x / lengths
        moments.addmm_(x.T, x)
        shifts.addmm_(rows @ gap.T, x)
        del x, y, gap  # before the next are computed
    return moments, shifts


def known_inputs(moments: Tensor, block_size: int | None) -> Inputs:
    """What follows from the inputs' second moments [K,K], which it changes; columns of a block stay together.

    Raises:
        CheckpointError: they are not finite.
    """
    size = block_size or 1
    squares = moments.diagonal().view(-1, size).sum(dim=1)
    if not squares.isfinite().all():
        raise CheckpointError("calibration texts", "give numbers that are not finite", fix="quantize by search")
    blocks = squares.argsort(stable=True)
    order = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).view(-1)
    for few in torch.split(moments, _AT_A_TIME, dim=1):  # in place, as large matrices have large moments
        few.copy_(few[order])
    for few in torch.split(moments, _AT_A_TIME):
        few.copy_(few[:, order])
    diagonal = moments.diagonal()
    squares = diagonal.clone()
    damping = DAMPING * squares.mean().clamp(min=torch.finfo(moments.dtype).tiny)
    diagonal += damping
    while not _factorize(moments):  # with few inputs, rounding may leave H without a factor
        _mirror(moments)
        damping = 10 * damping
        diagonal.copy_(squares + damping)
    roots = diagonal.clone()
    return Inputs(order, moments.div_(roots), roots.square())


def _factorize(moments: Tensor) -> bool:
    """Puts the Cholesky factor of H [K,K] in the place of its lower half, the diagonal included.

    What is above the diagonal stays, so a large matrix is held once, and can be had back where there is no factor.

    Returns:
        whether there is one.
    """
    for start in range(0, len(moments), _AT_A_TIME):
        end = start + _AT_A_TIME
        before = moments[start:, :start]
        columns = moments[start:, start:end] - before @ before[:_AT_A_TIME].T
        square = moments[start:end, start:end]
        factor, info = torch.linalg.cholesky_ex(columns[: len(square)])
        if info:
            return False
        square.copy_(factor + square.triu(1))
        moments[end:, start:end] = torch.linalg.solve_triangular(
            factor.T, columns[len(square) :], upper=True, left=False
        )
    return True


def _mirror(moments: Tensor) -> None:
    """Puts what is above the diagonal of [K,K] below it."""
    for start in range(0, len(moments), _AT_A_TIME):
        end = start + _AT_A_TIME
        square = moments[start:end, start:end]
        square.copy_(square.triu(1) + square.triu(1).T)
        moments[end:, start:end] = moments[start:end, end:].T


def fitted_rows(rows: Tensor, shifts: Tensor, inputs: Inputs) -> Tensor:
    """Rows [n,K] of a matrix W, fitted to the inputs that are wanted: W + W G^T X H^-1 / 2. Shifts are W G^T X."""
    products = shifts.T[inputs.order].mul_(TOWARDS)
    products = torch.linalg.solve_triangular(inputs.lower, products, upper=False, unitriangular=True)
    products /= inputs.weights[:, None]
    products = torch.linalg.solve_triangular(inputs.lower.T, products, upper=True, unitriangular=True)
    fitted = rows.clone()
    fitted[:, inputs.order] += products.T
    return fitted


def quantized_rows(
    format_: str, rows: Tensor, inputs: Inputs, dtype: DType, shifts: Tensor | None = None
) -> Sequence[Array]:
    """Rows [n,K] of a matrix in a quantized format: their numbers, as they are stored, and scales [n,K/B] in the dtype.

    Args:
        format_: its name in FORMATS.
        rows: in fp32.
        inputs: the matrix's, with the format's block size.
        dtype: the bundle's.
        shifts: what the rows are fitted with before, [n,K].
    """
    bits = FORMATS[format_].bits or 8
    count = max(1, _CHUNK // rows.shape[1])
    parts = []
    for start in range(0, len(rows), count):
        few = rows[start : start + count]
        if shifts is not None:
            few = fitted_rows(few, shifts[start : start + count], inputs)
        parts.append(_rounded(few, inputs, bits, FORMATS[format_].block_size, dtype))
    numbers = torch.cat([one for one, _ in parts]).cpu().numpy()
    scales = torch.cat([one for _, one in parts]).cpu()
    stored = scales.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == "bf16" else scales.numpy()
    return (packed(numbers) if bits == 4 else numbers), stored


def _rounded(rows: Tensor, inputs: Inputs, bits: int, block_size: int | None, dtype: DType) -> tuple[Tensor, Tensor]:
    """Numbers [n,K] int8 and scales [n,K/B] for rows [n,K]."""
    columns = rows.T[inputs.order].contiguous()  # [K,n]
    width = len(columns)
    errors, numbers = torch.zeros_like(columns), torch.empty_like(columns, dtype=torch.int8)
    by_row = None if block_size else best_scales(columns, inputs.weights, bits, dtype)
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    scales = []
    size = block_size or _COLUMNS
    for start in reversed(range(0, width, size)):
        end = min(start + size, width)
        wanted = columns[start:end] + inputs.lower[end:, start:end].T @ errors[end:]
        scale = best_scales(wanted, inputs.weights[start:end], bits, dtype) if by_row is None else by_row
        scales.append(scale)
        for k in reversed(range(start, end)):
            nearest = wanted[k - start] + inputs.lower[k + 1 : end, k] @ errors[k + 1 : end]
            number = nearest.div_(scale).round_().clamp_(low, high)
            numbers[k] = number
            errors[k] = columns[k] - number * scale
    stored = torch.empty_like(numbers)
    stored[inputs.order] = numbers
    if by_row is not None:
        return stored.T.contiguous(), _in_dtype(by_row, dtype)[:, None]
    placed = torch.empty(width // size, len(rows), device=rows.device)
    placed[inputs.order[::size] // size] = torch.stack(scales[::-1])
    return stored.T.contiguous(), _in_dtype(placed.T.contiguous(), dtype)


def best_scales(columns: Tensor, weights: Tensor, bits: int, dtype: DType) -> Tensor:
    """The scales [n] with the least squared error, weighted by [B], for blocks [B,n] of numbers, one a column.

    They are rounded to the dtype, and those that the search without inputs tries, too.
    """
    high, low = columns.amax(dim=0), columns.amin(dim=0)
    extremes = torch.where(high > -low, high, low)
    weights = weights[:, None]

    def numbers_for(scales: Tensor) -> Tensor:
        return (columns / scales).round_().clamp_(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)

    def error(scales: Tensor) -> Tensor:
        return numbers_for(scales).mul_(scales).sub_(columns).square_().mul_(weights).sum(dim=0)

    best = _as_stored(extremes / EXTREMES[bits][0], bits, dtype)
    least = error(best)
    for value in (*EXTREMES[bits][1:], None):
        if value is None:  # fitted to the numbers of the best so far
            numbers = numbers_for(best)
            products = (numbers * columns).mul_(weights).sum(dim=0)
            squares = numbers.square_().mul_(weights).sum(dim=0)
            scales = _as_stored(torch.where(squares > 0, products / squares, best), bits, dtype)
        else:
            scales = _as_stored(extremes / value, bits, dtype)
        errors = error(scales)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def _as_stored(scales: Tensor, bits: int, dtype: DType) -> Tensor:
    """The scales in the dtype, never zero, and with every number times its scale finite."""
    sizes = scales.abs().clamp(SMALLEST_SCALES[dtype], LARGEST[dtype] / 2 ** (bits - 1))
    return _in_dtype(torch.copysign(sizes, scales), dtype).float()


def _in_dtype(scales: Tensor, dtype: DType) -> Tensor:
    return scales.to(getattr(torch, NUMBER_TYPES[dtype].torch))
