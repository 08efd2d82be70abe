"""How formats of stored tensors are written and how graphs read them; runtime/bundle/formats.py says what they hold.

A new format is one entry there and one here. The quantized formats have the same bytes for every dialect:

    standard   int4: declared INT4 [N,K];  int8: INT8 [N,K]       -> DequantizeLinear -> Gemm
    ort        declared UINT8 [N, K/B, bytes of a block]          -> BitwiseXor -> MatMulNBits

The XOR turns two's complement into numbers counted from the lowest one, as MatMulNBits takes them where there are no
zero points; ONNX Runtime folds it while loading. Rows of a table are gathered from its parts: no table is dequantized
for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.quantization.search import encoded_rows
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType
from edgeskip.runtime.bundle.formats import BLOCK_SIZES, FORMATS, SCALES

Array = npt.NDArray[Any]
Value = ir.Value

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bf16" else number.numpy) for name, number in NUMBER_TYPES.items()
}
"""The types of numbers in NumPy, bf16 as a number where the runtime has raw words."""

ONNX_DTYPES = {name: ir.DataType(number.onnx) for name, number in NUMBER_TYPES.items()}


Spelling = tuple[ir.DataType, tuple[int, ...]]
"""The type and the shape that a graph gives to the bytes of a part."""


@dataclass(frozen=True)
class StoredValue:
    """A stored tensor within a graph: its format, its shape, and the dtype that is computed in.

    `declare` gives a part by its suffix, as it is stored or spelled in another way, from a row on.
    """

    format: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    declare: Callable[[str, Spelling | None, int], Value]

    def part(self, suffix: str = "", spelled: Spelling | None = None, start: int = 0) -> Value:
        """A part, as it is stored, or from a row on as it is spelled here."""
        return self.declare(suffix, spelled, start)

    def whole(self, op: OpBuilder) -> Value:
        """The tensor in the dtype."""
        return WRITERS[self.format].whole(op, self)


def _gather_of_whole(op: OpBuilder, table: StoredValue, rows: Value) -> Value:
    out: Value = op.Gather(table.whole(op), rows)
    return out


@dataclass(frozen=True)
class FormatWriter:
    """A format on the exporter's side.

    `encode` turns rows of the checkpoint [n, ...] into the same rows of each part, in the types that the format's parts
    have in a bundle of this dtype; of a matrix it may be told how large the inputs are that each column multiplies [K].
    `whole` gives the tensor in the bundle's dtype within a graph, and `gather` its rows
    by number, [...] -> [..., K], with ONNX operators. `products` (x [..., K] -> x W^T [..., N]) and `gathers` have, by
    the dialect's name, what stands in for these where a dialect has operators that read the parts themselves; a product
    may be None for a shape that it does not serve.
    """

    encode: Callable[[Array, DType, Array | None], Sequence[Array]]
    whole: Callable[[OpBuilder, StoredValue], Value]
    gather: Callable[[OpBuilder, StoredValue, Value], Value] = _gather_of_whole
    products: Mapping[str, Callable[[OpBuilder, Value, StoredValue], Value | None]] = field(default_factory=dict)
    gathers: Mapping[str, Callable[[OpBuilder, StoredValue, Value], Value]] = field(default_factory=dict)


def own_product(dialect: str, op: OpBuilder, x: Value, weight: StoredValue) -> Value | None:
    """X W^T by the operators that a dialect has for the weight's format, [..., K] -> [..., N]; None if it has none."""
    product = WRITERS[weight.format].products.get(dialect)
    return product(op, x, weight) if product else None


def gathered(dialect: str, op: OpBuilder, table: StoredValue, rows: Value) -> Value:
    """Rows of a table [N,K] by number, [...] -> [..., K]."""
    writer = WRITERS[table.format]
    return writer.gathers.get(dialect, writer.gather)(op, table, rows)


# Plain formats


def _cast_to(number: str) -> Callable[[Array, DType, Array | None], Sequence[Array]]:
    def encode(rows: Array, _: DType, __: Array | None) -> Sequence[Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            return (rows.astype(NUMPY_DTYPES[number], copy=False),)

    return encode


def _as_stored(_: OpBuilder, stored: StoredValue) -> Value:
    return stored.part()


# Quantized formats

_COM = "com.microsoft"
_SMALL_BLOCKS = (32, 16)
"""Sizes of blocks for MatMulNBits, best first. Its faster kernels on CUDA take 32 alone for 8 bits. On a CPU, what it
multiplies is rounded in the same blocks, and with AVX-512 larger ones give other rows one by one than together.
"""
_LEAST_AFTERWARDS, _MOST_AT_ONCE = 1 << 21, 1 << 23
"""Numbers of the smallest matrix that is scaled after its product, and of the largest part of one."""


def _int4_whole(op: OpBuilder, stored: StoredValue) -> Value:
    numbers = stored.part("", (ir.DataType.INT4, stored.shape))
    out: Value = op.DequantizeLinear(numbers, stored.part(SCALES), axis=1, block_size=_block_size(stored))
    return out


def _int8_whole(op: OpBuilder, stored: StoredValue) -> Value:
    out: Value = op.DequantizeLinear(stored.part(), stored.part(SCALES, (stored.dtype, stored.shape[:1])), axis=0)
    return out


def _int4_rows(op: OpBuilder, stored: StoredValue, rows: Value) -> Value:
    """Both numbers of each byte, from 0 to 15 after the XOR, less 8, times the scales of their blocks."""
    middle, low = _word(op, 0x88), _word(op, 0x0F)
    pairs = op.BitwiseXor(op.Gather(stored.part(), rows), middle)
    halves = [op.BitwiseAnd(pairs, low), op.BitShift(pairs, _word(op, 4), direction="RIGHT")]
    numbers = op.Concat(*(op.Unsqueeze(half, [-1]) for half in halves), axis=-1)
    return _scaled_rows(op, stored, rows, op.Sub(op.Cast(numbers, to=stored.dtype), _number(op, 8, stored.dtype)))


def _int8_rows(op: OpBuilder, stored: StoredValue, rows: Value) -> Value:
    return _scaled_rows(op, stored, rows, op.Cast(op.Gather(stored.part(), rows), to=stored.dtype))


def _scaled_rows(op: OpBuilder, stored: StoredValue, rows: Value, numbers: Value) -> Value:
    """Numbers of rows [B,T,...], K to a row, times their scales -> [B,T,K]."""
    columns = stored.shape[1]
    blocks = op.Reshape(numbers, [0, 0, -1, _block_size(stored)])
    scales = op.Unsqueeze(op.Gather(stored.part(SCALES), rows), [-1])
    out: Value = op.Reshape(op.Mul(blocks, scales), [0, 0, columns])
    return out


def _in_its_blocks(op: OpBuilder, x: Value, weight: StoredValue) -> Value:
    """A product with the blocks that are stored."""
    return _n_bits_product(op, x, weight, _block_size(weight), weight.part(SCALES))


def _in_small_blocks(op: OpBuilder, x: Value, weight: StoredValue) -> Value | None:
    """A product with each block in parts of the same scale."""
    (n, k), stored, scales, size = weight.shape, _block_size(weight), weight.part(SCALES), _small_block(weight)
    if size is None:
        return None
    if size != stored:
        parts = op.Expand(op.Unsqueeze(scales, [-1]), op.Constant(value_ints=[n, k // stored, stored // size]))
        scales = op.Reshape(parts, [n, k // size])
    return _n_bits_product(op, x, weight, size, scales)


def _scaled_afterwards(op: OpBuilder, x: Value, weight: StoredValue) -> Value | None:
    """A product with rows of one scale each: in small blocks of the scale 1, and then times the scales of the rows.

    On a CPU, ONNX Runtime keeps the scales of blocks as they came, beside what it packs. So the ones are the same for
    all matrices of a shape, and for the parts of a large one. A small matrix is faster without another node, and
    numbers of 16 bits could not hold a product without its scales.
    """
    (n, k), size = weight.shape, _small_block(weight)
    if size is None or n * k < _LEAST_AFTERWARDS or weight.dtype != ir.DataType.FLOAT:
        return _in_small_blocks(op, x, weight)
    fewest = -(-n * k // _MOST_AT_ONCE)
    count = next((count for count in range(fewest, 2 * fewest) if n % count == 0), 1)
    rows = n // count
    ones = op.ConstantOfShape([rows, k // size], value=ir.tensor(np.ones(1, np.float32)))
    products = [_n_bits_product(op, x, weight, size, ones, (start, rows)) for start in range(0, n, rows)]
    product = op.Concat(*products, axis=-1) if count > 1 else products[0]
    out: Value = op.Mul(product, weight.part(SCALES, (weight.dtype, (n,))))
    return out


def _n_bits_product(
    op: OpBuilder, x: Value, weight: StoredValue, block_size: int, scales: Value, rows: tuple[int, int] | None = None
) -> Value:
    """A product with a matrix, or with the rows of it that begin at one and are so many, and their scales [N,K/B]."""
    (n, k), bits = weight.shape, FORMATS[weight.format].bits or 8
    start, count = rows or (0, n)
    numbers = weight.part("", (ir.DataType.UINT8, (count, k // block_size, block_size * bits // 8)), start)
    counted = op.BitwiseXor(numbers, _word(op, 0x88 if bits == 4 else 0x80))
    settings = {"K": k, "N": count, "bits": bits, "block_size": block_size, "accuracy_level": 4}
    out: Value = op.MatMulNBits(x, counted, scales, **settings, _domain=_COM)
    return out


def _small_block(weight: StoredValue) -> int | None:
    """The best of the small sizes that a format's blocks are multiples of."""
    return next((size for size in _SMALL_BLOCKS if _block_size(weight) % size == 0), None)


def _int4_gather(op: OpBuilder, table: StoredValue, rows: Value) -> Value:
    numbers = table.part("", (ir.DataType.INT4, table.shape))
    settings = {"bits": 4, "gather_axis": 0, "quantize_axis": 1, "block_size": _block_size(table)}
    out: Value = op.GatherBlockQuantized(numbers, rows, table.part(SCALES), **settings, _domain=_COM)
    return out


def _block_size(stored: StoredValue) -> int:
    """Numbers that have a scale in common."""
    return FORMATS[stored.format].block_size or stored.shape[1]


def _word(op: OpBuilder, number: int) -> Value:
    out: Value = op.Constant(value=ir.tensor(np.array(number, np.uint8)))
    return out


def _number(op: OpBuilder, number: int, dtype: ir.DataType) -> Value:
    out: Value = op.Constant(value=ir.tensor(np.array(number, dtype.numpy())))
    return out


def _writer(format_: str) -> FormatWriter:
    encode = partial(encoded_rows, format_)
    if format_ == "int8":
        products = {"ort": _in_small_blocks, "cpu": _scaled_afterwards}
        return FormatWriter(encode, _int8_whole, _int8_rows, products)
    both = {"ort": _in_its_blocks, "cpu": _in_small_blocks}
    return FormatWriter(encode, _int4_whole, _int4_rows, both, dict.fromkeys(both, _int4_gather))


WRITERS: dict[str, FormatWriter] = {
    **{name: FormatWriter(_cast_to(name), _as_stored) for name in ("fp32", "fp16", "bf16")},
    **{name: _writer(name) for name in ("int8", *(f"int4-{size}" for size in BLOCK_SIZES))},
}
"""By the format's name."""
