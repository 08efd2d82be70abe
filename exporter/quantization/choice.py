"""Which tensors of a bundle are stored in which format: what was asked for, as the formats of tensors by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast, get_args

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import BLOCK_SIZES, BlockSize
from edgeskip.runtime.bundle.tensors import TABLES, bundle_tensors
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.structure import Pattern

Bits = Literal["int4", "int8"]
FormatChoice = Literal["int4", "int8", "dtype"]

_LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?=(int4|int8|dtype)")
LAYERS_TEXT = "a layer or a range of layers and int4, int8 or dtype, such as 0-3=int8"
LayersChoice = Annotated[str, Pattern(_LAYERS.pattern, LAYERS_TEXT)]


@dataclass(frozen=True, kw_only=True)
class QuantizationChoice:
    """What is to be quantized.

    Args:
        weights: the format of the layers' matrices; by default the dtype, or what the checkpoint has.
        head: that of the tables of tokens; by default int8 where `weights` are quantized, and else the dtype.
        layers: formats of single layers or ranges, such as `0-3=int8`.
        block_size: numbers that share a scale, in 4 bits.
        formats: formats of single tensors by name, before all of these.
    """

    weights: FormatChoice | None = None
    head: FormatChoice | None = None
    layers: tuple[str, ...] = ()
    block_size: BlockSize = 32
    formats: Mapping[str, str] = field(default_factory=dict)


def chosen_formats(
    architecture: Architecture,
    dtype: DType,
    weights: FormatChoice | None,
    head: FormatChoice | None,
    layers: Sequence[str],
    block_size: BlockSize,
) -> dict[str, str]:
    """Formats of the matrices that are not stored in the dtype, by name.

    Args:
        architecture: the model's.
        dtype: the bundle's.
        weights: the format of all layers; by default the dtype.
        head: that of the tables of tokens, tied or not; by default int8 where `weights` are quantized, and else the
            dtype.
        layers: formats of single layers or ranges, which include their ends, as `3=int8` or `0-3=dtype`; the last one
            that names a layer counts.
        block_size: numbers along a row that share a scale, in 4 bits.

    Raises:
        RequestError: layers that the model lacks, or a matrix whose rows are not whole blocks.
    """
    by_layer = _by_layer(layers, architecture.num_layers)
    formats: dict[str, str] = {}
    for record in bundle_tensors(architecture, 0, dtype).values():
        chosen: FormatChoice
        if record.name in TABLES:
            chosen = head or ("int8" if weights in get_args(Bits) else "dtype")
        elif record.layer is not None and record.is_matrix:
            chosen = by_layer.get(record.layer, weights or "dtype")
        else:
            continue
        if chosen != "dtype":
            formats[record.name] = chosen if chosen == "int8" else f"int4-{block_size}"
    _check_blocks(architecture, dtype, formats, block_size)
    return formats


def free_layers(architecture: Architecture, layers: Sequence[str]) -> set[int]:
    """The layers that none of these choices names.

    Raises:
        RequestError: layers that the model lacks.
    """
    return set(range(architecture.num_layers)) - _by_layer(layers, architecture.num_layers).keys()


def _check_blocks(architecture: Architecture, dtype: DType, formats: Mapping[str, str], block_size: BlockSize) -> None:
    """Refuses blocks that do not divide the rows of a matrix, and says which do."""
    tensors = bundle_tensors(architecture, 0, dtype)
    columns = {name: tensors[name].shape[1] for name, format_ in formats.items() if format_ != "int8"}
    for name, width in columns.items():
        if width % block_size:
            fits = [f"--block-size {size}" for size in BLOCK_SIZES if not any(k % size for k in columns.values())]
            raise RequestError(
                name,
                f"{width} columns, which blocks of {block_size} do not divide",
                fix=f"give {' or '.join([*fits, 'int8'])}",
            )


def _by_layer(texts: Sequence[str], num_layers: int) -> dict[int, FormatChoice]:
    """The format of each layer that is named."""
    chosen: dict[int, FormatChoice] = {}
    for text in texts:
        match = _LAYERS.fullmatch(text)
        if match is None:
            raise RequestError("layers", f"{text!r}", wanted=LAYERS_TEXT)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise RequestError("layers", f"{text!r}", wanted=f"layers in order, of 0 to {num_layers - 1}")
        chosen |= dict.fromkeys(range(first, last + 1), cast("FormatChoice", match[3]))
    return chosen
