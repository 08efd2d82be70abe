"""GPTQ for a whole model (arXiv 2210.17323): the calibration's states go from layer to layer, through what has been
quantized so far, and each matrix is rounded for the inputs that it gets there. Beside them go the states of the model
as it is, so that later matrices can make up for what earlier ones lost.

The head is rounded for the states of the last layer and of the exit layers, as drafts come from there. A table of
tokens that is tied to it comes first in a bundle's file, so its inputs are those of the layers as the checkpoint has
them. A table of its own is never multiplied with, and is quantized by search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgeskip.exporter.checkpoint import TensorReader
from edgeskip.exporter.quantization.calibrated.calibration import Calibration
from edgeskip.exporter.quantization.calibrated.decoder import (
    ATTENTION,
    DOWN,
    GATE_UP,
    MATRICES,
    MLP,
    QKV,
    Decoder,
    DecoderLayer,
    O,
    States,
    stored_values,
)
from edgeskip.exporter.quantization.calibrated.rounding import (
    known_inputs,
    moments_and_shifts,
    quantized_rows,
    second_moments,
)
from edgeskip.exporter.quantization.choice import Method
from edgeskip.exporter.quantization.quantizer import Encode, Parts, encoded_by_search, searcher
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS, is_quantized
from edgeskip.runtime.bundle.manifest import Progress
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM, TensorRecord
from edgeskip.runtime.host import release_freed_memory

Array = npt.NDArray[Any]
Computed = Callable[[DecoderLayer, Tensor], Tensor]
"""What a layer computes of states [T,H]."""

_ROWS = 128  # of states, for an MLP


@dataclass(frozen=True)
class Gptq:
    """A quantizer.

    Args:
        calibration: what the model reads.
        exit_layers: those that drafts come from.
        progress: told of the calibration's way through the layers.
    """

    calibration: Calibration
    exit_layers: Sequence[int]
    progress: Progress = lambda *_: None
    method: ClassVar[Method] = "gptq"

    def encoded(
        self, tensors: Mapping[str, TensorRecord], reader: TensorReader, dtype: DType
    ) -> Iterator[tuple[TensorRecord, Iterator[Parts]]]:
        """See `Quantizer`.

        Raises:
            CheckpointError: a number is not finite in the dtype, or what the model computes is not.
        """
        decoder = Decoder(reader, tensors, dtype, self.calibration, self.exit_layers)
        table, head = tensors[EMBEDDINGS], tensors.get(LM_HEAD)
        encode = searcher(table, reader, dtype)
        if head is None and is_quantized([table.format]):
            encode = _rounder(decoder, table, self._moments_of_head(decoder))
        yield table, map(encode, reader.rows(table, dtype))
        states = decoder.embedded(stored_values(table.format, encode(decoder.token_rows()), dtype, decoder.device))
        wanted, moments = decoder.embedded(decoder.checkpoint_rows()), None
        for i in range(decoder.num_layers):
            quantized = _quantized_layer(decoder, i, states, wanted, self.progress)
            for tensor in decoder.tensors_of(i):
                parts = quantized.pop(tensor.name, None)
                yield tensor, encoded_by_search(tensor, reader, dtype) if parts is None else iter([parts])
            if decoder.feeds_head(i) and head is not None:
                moments = second_moments(decoder.head_inputs(states), moments)
        yield tensors[NORM], encoded_by_search(tensors[NORM], reader, dtype)
        if head is not None and moments is not None:
            rounded = is_quantized([head.format])
            encode = _rounder(decoder, head, moments) if rounded else searcher(head, reader, dtype)
            yield head, map(encode, reader.rows(head, dtype))

    def _moments_of_head(self, decoder: Decoder) -> Tensor:
        """The second moments [H,H] of the head's inputs, in the model as the checkpoint has it."""
        states, moments = decoder.embedded(decoder.checkpoint_rows()), None
        for i in range(decoder.num_layers):
            layer = decoder.layer(i)
            states = [layer.output(x) for x in states]
            if decoder.feeds_head(i):
                moments = second_moments(decoder.head_inputs(states), moments)
            self.progress("reading texts", i + 1, decoder.num_layers)
        assert moments is not None
        return moments


def _rounder(decoder: Decoder, tensor: TensorRecord, moments: Tensor) -> Encode:
    """What rounds rows of a matrix whose inputs have these second moments."""
    inputs = known_inputs(moments, FORMATS[tensor.format].block_size)

    def encode(rows: Array) -> Parts:
        numbers = torch.from_numpy(np.asarray(rows, np.float32)).to(decoder.device)
        return quantized_rows(tensor.format, numbers, inputs, decoder.dtype)

    return encode


def _quantized_layer(
    decoder: Decoder, index: int, states: States, wanted: States, progress: Progress
) -> dict[str, Parts]:
    """The parts of a layer's matrices that are quantized, by name.

    The states [T,H] go on to the next layer, and so do those that are wanted, which the model as it is has.

    Half of a layer is read anew each time, so that nothing else of it is held while a matrix is rounded.
    """
    parts: dict[str, Parts] = {}

    def read(half: tuple[str, ...]) -> tuple[DecoderLayer, DecoderLayer]:
        """Half of the layer with what is stored so far, and as the checkpoint has it."""
        layer = original = decoder.layer(index, half)
        for matrix in MATRICES:
            if (name := layer.prefix + matrix) in parts and name in layer.tensors:
                stored = stored_values(decoder.tensors[name].format, parts[name], decoder.dtype, decoder.device)
                layer = layer.with_matrix(matrix, stored)
        release_freed_memory()
        return layer, original

    def measured(name: str, half: tuple[str, ...], inputs_of: Computed) -> tuple[Tensor, Tensor, Tensor]:
        """A matrix [n,K], and what `moments_and_shifts` gives for it."""
        layer, original = read(half)
        inputs = (inputs_of(layer, x) for x in _pieces(states, half))
        others = (inputs_of(original, x) for x in _pieces(wanted, half))
        return layer.tensors[name], *moments_and_shifts(layer.tensors[name], inputs, others)

    def quantize(matrix: str, half: tuple[str, ...], inputs_of: Computed) -> None:
        progress("quantizing", len(MATRICES) * index + MATRICES.index(matrix), len(MATRICES) * decoder.num_layers)
        name = f"model.layers.{index}.{matrix}"
        format_ = decoder.tensors[name].format
        if is_quantized([format_]):
            rows, moments, shifts = measured(name, half, inputs_of)
            release_freed_memory()
            known = known_inputs(moments, FORMATS[format_].block_size)
            parts[name] = quantized_rows(format_, rows, known, decoder.dtype, shifts)

    def go_on(half: tuple[str, ...], output: Computed) -> None:
        """Adds what half of the layer gives to the states."""
        for layer, all_states in zip(read(half), (states, wanted), strict=True):
            for x in _pieces(all_states, half):
                x += output(layer, x)

    quantize(QKV, ATTENTION, DecoderLayer.qkv_inputs)
    quantize(O, ATTENTION, DecoderLayer.o_inputs)
    go_on(ATTENTION, DecoderLayer.attention)
    quantize(GATE_UP, MLP, DecoderLayer.gate_up_inputs)
    quantize(DOWN, MLP, DecoderLayer.down_inputs)
    go_on(MLP, DecoderLayer.mlp)
    return parts


def _pieces(states: States, half: tuple[str, ...]) -> Iterator[Tensor]:
    """The states [T,H] that half of a layer reads at a time: attention those of a whole text, an MLP few rows, so that
    what it computes of them is small.
    """
    return (few for x in states for few in (torch.split(x, _ROWS) if half == MLP else [x]))
