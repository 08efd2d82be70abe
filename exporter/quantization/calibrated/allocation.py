"""How much each matrix loses by 4 bits: Layer-Wise Quantization (arXiv 2406.17415), by measuring.

The calibration's states go through the model as it is, and beside them, for each matrix, those of the model with this
one matrix in 4 bits. How far these are off where the head reads them, after the last layer and after the exits, is the
matrix's effect (budget.py has what follows from them).
"""

from __future__ import annotations

from collections.abc import Collection

from edgeskip.exporter.quantization.calibrated.decoder import MATRICES, Decoder, DecoderLayer, States, stored_values
from edgeskip.exporter.quantization.quantizer import searcher
from edgeskip.runtime.bundle.manifest import Progress

MOST_SEQUENCES, MOST_TOKENS = 4, 256
"""What is measured with of a calibration, as there are states for each matrix."""


def matrix_effects(decoder: Decoder, names: Collection[str], progress: Progress = lambda *_: None) -> dict[str, float]:
    """How much worse each of these matrices makes the head's inputs when it alone is in its format: their squared
    error over their squares, added up over the last layer and the exit layers.

    Args:
        decoder: its tensors have the formats.
        names: of matrices of layers.
        progress: told of the layers.
    """
    effects = dict.fromkeys(names, 0.0)
    states = decoder.embedded(decoder.checkpoint_rows())
    changed: dict[str, States] = {}
    for i in range(decoder.num_layers):
        layer = decoder.layer(i)
        changed = {name: [layer.output(x) for x in others] for name, others in changed.items()}
        for matrix in MATRICES:
            if (name := layer.prefix + matrix) in effects:
                other = _quantized(decoder, layer, matrix)
                changed[name] = [other.output(x) for x in states]
        states = [layer.output(x) for x in states]
        if decoder.feeds_head(i):
            wanted = list(decoder.head_inputs(states))
            squares = sum(float(x.square().sum()) for x in wanted)
            for name, others in changed.items():
                found = decoder.head_inputs(others)
                errors = sum(float((x - y).square().sum()) for x, y in zip(found, wanted, strict=True))
                effects[name] += errors / max(squares, 1e-30)
        progress("measuring layers", i + 1, decoder.num_layers)
    return effects


def _quantized(decoder: Decoder, layer: DecoderLayer, matrix: str) -> DecoderLayer:
    """The layer with one matrix quantized, by search."""
    tensor = decoder.tensors[layer.prefix + matrix]
    parts = searcher(tensor, decoder.reader, decoder.dtype)(layer.tensors[tensor.name].cpu().numpy())
    return layer.with_matrix(matrix, stored_values(tensor.format, parts, decoder.dtype, decoder.device))
