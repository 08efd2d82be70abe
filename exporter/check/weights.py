"""Whether a quantized bundle's weights file stands for its checkpoint: every tensor against the numbers of that one.

Quantization loses little in any block of numbers that share a scale. A wrong scale, numbers in another order or a block
in another's place are off by far more, so each block is compared by itself. What is not quantized must be exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.check.comparison import Comparison, Errors, Threshold
from edgeskip.exporter.check.golden import Golden
from edgeskip.exporter.formats import NUMPY_DTYPES
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.tensors import TensorRecord
from edgeskip.runtime.bundle.weights import StoredTensor, stored_arrays

Array = npt.NDArray[Any]

EXACT = Threshold(1e-9, 1e-6, 1e-9, 1e-6)
"""For tensors in the dtype: only these figures themselves are rounded."""

BOUNDS: dict[int, Threshold] = {8: Threshold(3e-3, 2e-3, 1e-2, 0.25), 4: Threshold(0.05, 0.03, 0.25, 0.75)}
"""For blocks, by bits of a number; docs/DESIGN.md has what was measured. One block may well be shorter: its largest
number is cut off where it stands in a column whose inputs are small, so that the other numbers lose less.
"""

FITTED = Threshold(0.1, 0.1, 0.25, 0.75)
"""For blocks of GPTQ, which fits matrices to inputs that others before them have changed."""

_SMALLEST_SCALE = 2.0**-20
"""Blocks below it are as good as zero: in fp16, their scales keep few digits or none."""

_CHUNK = 4_000_000
"""Numbers that are compared at a time, about."""


@dataclass(frozen=True)
class StoredReport:
    """A tensor of the weights file against the checkpoint's.

    A row of `errors` is a block of numbers that share a scale, counted along the rows of the tensor; of a tensor in the
    dtype, it is a row, or the whole tensor where that has one axis.
    """

    tensor: str
    format: str
    errors: Errors
    passed: bool


def compare_weights(bundle: Bundle, original: Golden) -> Iterator[StoredReport]:
    """Compares every tensor that comes from the checkpoint, whose model is `original`."""
    arrays, quantization = stored_arrays(bundle), bundle.manifest.quantization
    fitted = quantization is not None and quantization.method == "gptq"
    for record in bundle.manifest.tensors.values():
        if record.sources:
            bits = FORMATS[record.format].bits
            bound = EXACT if not bits else FITTED if fitted else BOUNDS[bits]
            errors = _errors(StoredTensor(bundle, record, arrays), record, original, bundle.manifest.dtype)
            yield StoredReport(record.name, record.format, errors, errors.within(bound))


def _errors(stored: StoredTensor, record: TensorRecord, original: Golden, dtype: str) -> Errors:
    """The errors of one tensor, piece by piece."""
    comparison, key, seen = Comparison(), (record.name,), 0
    format_, number = FORMATS[record.format], NUMPY_DTYPES[dtype]
    for first, golden in _pieces(record, original):
        ours = np.asarray(stored[first : first + len(golden)]).view(number).astype(np.float32)
        with np.errstate(over="ignore"):
            golden = golden.astype(number).astype(np.float32)
        size = format_.block_size or (golden.shape[1] if golden.ndim == 2 else golden.size)
        ours, golden = ours.reshape(-1, size), golden.reshape(-1, size)
        if format_.bits:
            held = np.abs(golden).max(axis=1, keepdims=True) >= _SMALLEST_SCALE * 2 ** (format_.bits - 1)
            ours, golden = np.where(held, ours, 0), np.where(held, golden, 0)
        comparison.add(key, ours, golden, seen)
        comparison.finish_text()
        seen += len(golden)
    return comparison.errors[key]


def _pieces(record: TensorRecord, original: Golden) -> Iterator[tuple[int, Array]]:
    """The checkpoint's numbers in pieces of some rows, each with the first row of the bundle's tensor that it is."""
    step = record.shape[0] if len(record.shape) == 1 else max(_CHUNK // record.shape[1], 1)
    first = 0
    for source, count in record.sources:
        whole = original.parameter(source)
        for start in range(0, count, step):
            yield first + start, whole[start : min(start + step, count)]
        first += count
