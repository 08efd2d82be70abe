"""Bits by matrix for `auto`: which matrices get 8 and which 4, so that all take so many on average, scales counted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from edgeskip.exporter.quantization.choice import DEFAULT_BITS, QuantizationChoice, chosen_formats, free_layers
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.tensors import TensorRecord, bundle_tensors
from edgeskip.runtime.errors import RequestError

WIDER = "int8"
"""The format of the matrices that matter most."""


def planned_formats(architecture: Architecture, dtype: DType, choice: QuantizationChoice) -> dict[str, str]:
    """The formats of the tensors that are not stored in the dtype, by name. For `auto`, which matrices get 8 bits is
    measured at export; here it is the first ones, which takes as many bytes.

    Raises:
        RequestError: layers that the model lacks, blocks that do not divide a matrix, or bits that it cannot have.
    """
    formats = chosen_formats(architecture, dtype, choice.weights, choice.head, choice.layers, choice.block_size)
    check_is_auto(choice)
    if choice.weights == "auto":
        matrices, names = matrices_to_choose(architecture, dtype, choice, formats)
        formats |= wider_matrices(matrices, _added(matrices, names, dtype), bits_of(choice, dtype), dtype)
    return formats


def check_is_auto(choice: QuantizationChoice) -> None:
    """Refuses bits for weights that are not `auto`."""
    if choice.bits is not None and choice.weights != "auto":
        raise RequestError("bits", f"{choice.bits:g}, for weights that are not `auto`", fix="leave it out")


def bits_of(choice: QuantizationChoice, dtype: DType) -> float:
    """Those that are asked for."""
    return DEFAULT_BITS[dtype] if choice.bits is None else choice.bits


def matrices_to_choose(
    architecture: Architecture, dtype: DType, choice: QuantizationChoice, formats: Mapping[str, str]
) -> tuple[dict[str, TensorRecord], list[str]]:
    """All matrices of layers in these formats, and the names of those that may get 8 bits: of the layers for which
    nothing else was asked.

    Raises:
        RequestError: bits that they cannot have.
    """
    tensors = bundle_tensors(architecture, 0, dtype, formats)
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.layer is not None and tensor.is_matrix}
    free = free_layers(architecture, choice.layers)
    names = [name for name, tensor in matrices.items() if tensor.layer in free and name not in choice.formats]
    check_bits(matrices, names, bits_of(choice, dtype), dtype)
    return matrices, names


def wider_matrices(
    tensors: Mapping[str, TensorRecord], effects: Mapping[str, float], bits: float, dtype: DType
) -> dict[str, str]:
    """The formats of the matrices that get 8 bits, by name.

    Args:
        tensors: all matrices of layers, in the formats that they have otherwise.
        effects: of those that may get 8 bits.
        bits: the most on average over all of them, with their scales.
        dtype: the bundle's.
    """
    room, added = _room(tensors, bits, dtype), _added(tensors, effects, dtype)
    chosen: dict[str, str] = {}
    for name in sorted(effects, key=lambda name: -effects[name] / added[name]):
        if added[name] <= room:
            room -= added[name]
            chosen[name] = WIDER
    return chosen


def check_bits(tensors: Mapping[str, TensorRecord], names: Collection[str], bits: float, dtype: DType) -> None:
    """Refuses fewer bits than the matrices of layers take at least, and more than with 8 in each of `names`.

    Raises:
        RequestError: such bits.
    """
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    least = -8 * _room(tensors, 0, dtype) / numbers
    most = least + 8 * sum(_added(tensors, names, dtype).values()) / numbers
    if not least <= bits <= most:
        wanted = f"{math.ceil(1000 * least) / 1000:g} to {math.floor(1000 * most) / 1000:g}, with the scales"
        raise RequestError("bits", f"{bits:g}", wanted=wanted)


def _room(tensors: Mapping[str, TensorRecord], bits: float, dtype: DType) -> float:
    """Bytes that so many bits on average leave beside the tensors as they are."""
    size = sum(FORMATS[tensor.format].bytes(tensor.shape, dtype) for tensor in tensors.values())
    return bits / 8 * sum(math.prod(tensor.shape) for tensor in tensors.values()) - size


def _added(tensors: Mapping[str, TensorRecord], names: Iterable[str], dtype: DType) -> dict[str, int]:
    """Bytes that 8 bits add to a matrix, by its name."""
    return {
        name: FORMATS[WIDER].bytes(tensors[name].shape, dtype)
        - FORMATS[tensors[name].format].bytes(tensors[name].shape, dtype)
        for name in names
    }
