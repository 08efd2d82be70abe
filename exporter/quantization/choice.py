"""Which tensors of a bundle are stored in which format: what was asked for, as the formats of tensors by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import BLOCK_SIZES, BlockSize
from edgeskip.runtime.bundle.tensors import TABLES, bundle_tensors
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.structure import Pattern

Bits = Literal["int4", "int8"]
WeightsChoice = Literal["int4", "int8", "dtype", "auto"]
FormatChoice = Literal["int4", "int8", "dtype"]

_LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?=(int4|int8|dtype)")
LAYERS_TEXT = "a layer or a range of layers and int4, int8 or dtype, such as 0-3=int8"
LayersChoice = Annotated[str, Pattern(_LAYERS.pattern, LAYERS_TEXT)]


Method = Literal["search", "gptq"]
"""How numbers and scales are found."""

DEFAULT_BITS: Mapping[DType, float] = {"fp32": 5.5, "fp16": 5.0, "bf16": 5.0}
"""Of a weight on average, for `auto`: half a bit more than 4 bits take with a scale in the dtype for each 32."""

BITS_TEXT = f"{DEFAULT_BITS['fp16']:g}, in fp32 {DEFAULT_BITS['fp32']:g}"


@dataclass(frozen=True, kw_only=True)
class QuantizationChoice:
    """What is to be quantized, and how.

    Args:
        weights: the format of the layers' matrices; by default the dtype, or what the checkpoint has. `auto` is int4 or
            int8 for each by itself.
        head: that of the tables of tokens; by default int8 where `weights` are quantized, and else the dtype.
        layers: formats of single layers or ranges, such as `0-3=int8`.
        block_size: numbers that share a scale, in 4 bits.
        bits: of a weight with its share of the scales, at most, on average over the layers; for `auto`. By default
            5, and 5.5 in fp32, where scales take twice as much.
        quantizer: how numbers and scales are found.
        calibration: a file or folder of texts, for `auto` and `gptq`; by default those that ship with edgeskip.
        formats: formats of single tensors by name, before all of these.
    """

    weights: WeightsChoice | None = None
    head: FormatChoice | None = None
    layers: tuple[str, ...] = ()
    block_size: BlockSize = 32
    bits: float | None = None
    quantizer: Method = "search"
    calibration: Path | None = None
    formats: Mapping[str, str] = field(default_factory=dict)


def chosen_formats(
    architecture: Architecture,
    dtype: DType,
    weights: WeightsChoice | None,
    head: FormatChoice | None,
    layers: Sequence[str],
    block_size: BlockSize,
) -> dict[str, str]:
    """Formats of the matrices that are not stored in the dtype, by name.

    Args:
        architecture: the model's.
        dtype: the bundle's.
        weights: the format of all layers; by default the dtype. For `auto`, int4, before some get more.
        head: that of the tables of tokens, tied or not; by default int8 where `weights` are quantized, and else the
            dtype.
        layers: formats of single layers or ranges, which include their ends, as `3=int8` or `0-3=dtype`; the last one
            that names a layer counts.
        block_size: numbers along a row that share a scale, in 4 bits.

    Raises:
        RequestError: layers that the model lacks, or a matrix whose rows are not whole blocks.
    """
    by_layer = _by_layer(layers, architecture.num_layers)
    bits: FormatChoice | None = "int4" if weights == "auto" else weights
    formats: dict[str, str] = {}
    for record in bundle_tensors(architecture, 0, dtype).values():
        chosen: FormatChoice
        if record.name in TABLES:
            chosen = head or ("int8" if bits in get_args(Bits) else "dtype")
        elif record.layer is not None and record.is_matrix:
            chosen = by_layer.get(record.layer, bits or "dtype")
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
