"""How large the numbers that a model computes get, estimated from its weights: whether fp16, up to 65504, holds them.

The estimate assumes independent weights and inputs: what leaves a norm is as large as the norm's gains, a product with
a row of weights adds up in squares, and attention hands on what its values have. It finds a layer that is out of scale;
what only some texts cause shows while decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM

LARGEST_FP16 = 65504.0
_TAIL = 4.0
"""The largest of some thousand numbers, over their root mean square."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Magnitude:
    """About the largest numbers that a tensor of weights gives."""

    tensor: str
    value: float


def beyond_fp16(checkpoint: Checkpoint) -> Magnitude | None:
    """The first tensor of weights that gives numbers beyond fp16, if any."""
    with TensorReader(checkpoint) as reader, np.errstate(over="ignore", invalid="ignore"):
        return next((made for made in magnitudes(checkpoint, reader) if not made.value < LARGEST_FP16), None)


def magnitudes(checkpoint: Checkpoint, reader: TensorReader) -> Iterator[Magnitude]:
    """The magnitudes of scores, of what attention and MLP compute and add, of the residual stream, and of logits."""
    a = checkpoint.architecture

    def made(tensor: str, root_mean_square: Any) -> Magnitude:
        return Magnitude(tensor, _TAIL * float(root_mean_square))

    def rows(name: str, gains: Array | float, *, bias: bool) -> Array:
        """The root mean squares of what some rows of a tensor give for inputs with these gains."""
        squares = np.square(reader.sample(f"{name}.weight") * gains).sum(axis=1)
        roots: Array = np.sqrt(squares + (np.square(reader.sample(f"{name}.bias")) if bias else 0))
        return roots

    stream = _rms(reader.sample(EMBEDDINGS))
    for i in range(a.num_layers):
        layer = f"model.layers.{i}"
        gains = reader.sample(f"{layer}.input_layernorm.weight")
        query, key, value = (rows(f"{layer}.self_attn.{part}_proj", gains, bias=a.qkv_bias) for part in "qkv")
        if a.qk_norm:
            query, key = (reader.sample(f"{layer}.self_attn.{part}_norm.weight") for part in "qk")
        yield made(f"{layer}.self_attn.q_proj", _rms(query) * _rms(key))  # the scores
        attended = rows(f"{layer}.self_attn.o_proj", _rms(value), bias=a.output_bias)
        yield made(f"{layer}.self_attn.o_proj", attended.max())
        gains = reader.sample(f"{layer}.post_attention_layernorm.weight")
        gate, up = (rows(f"{layer}.mlp.{part}_proj", gains, bias=a.mlp_bias) for part in ("gate", "up"))
        yield made(f"{layer}.mlp.up_proj", up.max() * _rms(gate) / 2)  # SiLU halves, as half are negative
        out = rows(f"{layer}.mlp.down_proj", _rms(up) * _rms(gate) / 2, bias=a.mlp_bias)
        yield made(f"{layer}.mlp.down_proj", out.max())
        stream = float(np.sqrt(stream**2 + _rms(attended) ** 2 + _rms(out) ** 2))
        yield made(f"{layer}.mlp.down_proj", stream)  # the sum so far
    table = EMBEDDINGS if a.tie_word_embeddings else LM_HEAD
    logits = rows(table.removesuffix(".weight"), reader.sample(NORM), bias=False)
    yield made(table, logits.max())


def _rms(numbers: Array) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))
