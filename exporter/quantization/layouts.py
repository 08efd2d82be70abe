"""How checkpoints that come quantized store a matrix [N,K], in words of 32 bits, the lowest bits first.

                        words                          scales      zero points                  groups
    compressed-tensors  weight_packed [N, K*bits/32]   [N, K/G]                                 weight_g_idx [K]
    GPTQ                qweight [K*bits/32, N]         [K/G, N]    qzeros [K/G, N*bits/32]      g_idx [K]
    AWQ                 qweight [K, N*bits/32]         [K/G, N]    qzeros [K/G, N*bits/32]

A word has neighbours along the axis that is divided, in order; AWQ's has 8 rows of a column in the order of
`_AWQ_ROWS`. Numbers are counted from the lowest one, and in a symmetric quantization the middle, 8 or 128, stands for
zero; GPTQ's first version stores zero points less one. (As in compressed-tensors' pack_quantized, and in what AutoGPTQ
and AutoAWQ pack.)

In two's complement they are the bundle's int4-G, or int8 where a row is one group. So nothing is rounded again, but for
the scales of a bundle in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.index import READABLE, SourceTensor
from edgeskip.runtime.bundle.formats import BLOCK_SIZES, FORMATS
from edgeskip.runtime.errors import CheckpointError

Array = npt.NDArray[Any]
Open = Callable[[SourceTensor], Any]
"""Opens a stored tensor, to be read by slices."""

ORIGINAL = "give the checkpoint that this one was made from"
"""What to do about one that cannot be taken over."""

_AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


def _by_row(stored: Any, start: int, stop: int) -> Array:
    rows: Array = stored[start:stop]
    return rows


def _by_column(stored: Any, start: int, stop: int) -> Array:
    columns: Array = stored[:, start:stop]
    return columns.T


def _by_8_rows(stored: Any, start: int, stop: int) -> Array:
    """AWQ's words [K, N/8] -> words of columns [n, K/8]."""
    first = start // 8
    words = np.ascontiguousarray(stored[:, first : -(-stop // 8)]).view(np.uint8)  # [K, 4 n/8]
    numbers = np.stack((words & 15, words >> 4), axis=-1).reshape(len(words), -1, 8)
    rows = numbers[..., np.argsort(_AWQ_ROWS)].reshape(len(words), -1).T[start - 8 * first : stop - 8 * first]
    return np.ascontiguousarray(rows[:, ::2] | rows[:, 1::2] << 4).view(np.int32)


@dataclass(frozen=True)
class Layout:
    """The endings of a matrix's tensors, and how words [n, K*bits/32] and scales [n, K/G] of its rows are read.

    `shape` gives N and K from the shape of the words and the numbers in a word. `below` is what is subtracted from zero
    points before they are stored.
    """

    words: str
    words_of: Callable[[Any, int, int], Array]
    shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    scales: str
    scales_of: Callable[[Any, int, int], Array]
    zeros: str = ""
    groups: str = ""
    others: tuple[str, ...] = ()
    below: int = 0


def _gptq(below: int) -> Layout:
    return Layout(
        words="qweight",
        words_of=_by_column,
        shape=lambda shape, in_word: (shape[1], shape[0] * in_word),
        scales="scales",
        scales_of=_by_column,
        zeros="qzeros",
        groups="g_idx",
        below=below,
    )


COMPRESSED_TENSORS = Layout(
    words="weight_packed",
    words_of=_by_row,
    shape=lambda shape, in_word: (shape[0], shape[1] * in_word),
    scales="weight_scale",
    scales_of=_by_row,
    groups="weight_g_idx",
    others=("weight_shape",),
)
GPTQ, GPTQ_V2 = _gptq(below=1), _gptq(below=0)
AWQ = Layout(
    words="qweight",
    words_of=_by_8_rows,
    shape=lambda shape, in_word: (shape[1] * in_word, shape[0]),
    scales="scales",
    scales_of=_by_column,
    zeros="qzeros",
)


@dataclass(frozen=True)
class QuantizedTensor(SourceTensor):
    """A matrix [N,K] that is stored quantized; its dtype is the bundle's format. `parts` has its tensors by ending."""

    layout: Layout
    parts: Mapping[str, SourceTensor]

    def check(self, opened: Open) -> None:
        """Looks at what words and scales do not say.

        Raises:
            CheckpointError: a zero point that is not the middle, or columns in an order of their own.
        """
        bits, columns = FORMATS[self.dtype].bits or 8, self.shape[1]
        if zeros := self.parts.get(self.layout.zeros):
            middle = (1 << bits - 1) - self.layout.below
            if (opened(zeros)[:].view(np.uint8) != (middle * 17 if bits == 4 else middle)).any():
                found = f"zero points other than the middle, {middle}"
                raise CheckpointError(zeros.file, f"{zeros.name}: {found}", wanted="a symmetric one", fix=ORIGINAL)
        if groups := self.parts.get(self.layout.groups):
            in_order = np.arange(columns) // (FORMATS[self.dtype].block_size or columns)
            if not np.array_equal(opened(groups)[:], in_order):
                found = "columns in groups of an order of their own"
                raise CheckpointError(groups.file, f"{groups.name}: {found}", wanted="desc_act false", fix=ORIGINAL)

    def rows(self, opened: Open, start: int, stop: int) -> tuple[Array, Array]:
        """Numbers of some rows as the bundle's format stores them, and their scales [n,K/G] as the checkpoint does."""
        words = self.layout.words_of(opened(self.parts[self.layout.words]), start, stop)
        scales = self.layout.scales_of(opened(self.parts[self.layout.scales]), start, stop)
        counted = np.ascontiguousarray(words).view(np.uint8)
        if FORMATS[self.dtype].bits == 4:
            return counted ^ np.uint8(0x88), scales
        return (counted ^ np.uint8(0x80)).view(np.int8), scales


def with_quantized(tensors: Mapping[str, SourceTensor], layout: Layout, bits: int) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint by the model's names, those of each quantized matrix as one.

    Raises:
        CheckpointError: a matrix that lacks one of its tensors, or has them in shapes or groups that no format has.
    """
    found = dict(tensors)
    endings = (layout.words, layout.scales, layout.zeros, layout.groups, *layout.others)
    for name in tensors:
        module, _, ending = name.rpartition(".")
        if ending == layout.words:
            parts = {end: found.pop(f"{module}.{end}") for end in endings if f"{module}.{end}" in found}
            found[f"{module}.weight"] = _joined(f"{module}.weight", parts, layout, bits)
    return found


def _joined(name: str, parts: Mapping[str, SourceTensor], layout: Layout, bits: int) -> QuantizedTensor:
    words, scales = parts[layout.words], parts.get(layout.scales)
    if scales is None:
        raise CheckpointError(words.file, f"{words.name} without {layout.scales}", fix="download the checkpoint again")
    if words.dtype != "I32" or scales.dtype not in READABLE.values() or not len(words.shape) == len(scales.shape) == 2:
        found = f"{words.name} {words.dtype} {list(words.shape)} with scales {scales.dtype} {list(scales.shape)}"
        raise CheckpointError(words.file, found, wanted="words I32 and scales in floating point, of two axes")
    for other in (parts.get(layout.zeros), parts.get(layout.groups)):
        if other is not None and other.dtype != "I32":
            raise CheckpointError(other.file, f"{other.name} {other.dtype}", wanted="I32", fix=ORIGINAL)
    rows, columns = layout.shape(words.shape, 32 // bits)
    scale_rows, groups = scales.shape if layout.scales_of is _by_row else scales.shape[::-1]
    if scale_rows != rows or not groups or columns % groups:
        found = f"{scales.name} {list(scales.shape)} for {rows} rows of {columns} numbers"
        raise CheckpointError(scales.file, found, wanted="scales of whole groups", fix="download the checkpoint again")
    format_ = "int8" if bits == 8 and groups == 1 else f"int{bits}-{columns // groups}"
    if format_ not in FORMATS:
        found = f"{words.name} has {bits} bits in groups of {columns // groups}"
        wanted = f"4 bits in groups of {', '.join(map(str, BLOCK_SIZES))}, or 8 with a scale for each row"
        raise CheckpointError(words.file, found, wanted=wanted, fix=ORIGINAL)
    return QuantizedTensor(words.file, name, (rows, columns), format_, layout, parts)
