"""The shape of a Llama-family model: everything that its mathematics depends on, except the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from edgeskip.runtime.structure import Positive, Range

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""The families, as config.json names them."""

MOST_LAYERS, MOST_SIZE, MOST_CONTEXT, MOST_WEIGHTS = 1000, 1 << 24, 1 << 31, 10**13
"""Bounds on what a file may claim: decoder layers, any one dimension, positions that a model was made for, numbers in
all its tensors.
"""

Layers = Annotated[int, Range(1, MOST_LAYERS)]
Size = Annotated[int, Range(1, MOST_SIZE)]
Context = Annotated[int, Range(1, MOST_CONTEXT)]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) and its scaling.

    `linear` divides positions by `factor`; `llama3` divides low frequencies by it, as in Llama 3.1.
    """

    theta: Positive = 10000.0
    type: Literal["default", "linear", "llama3"] = "default"
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Context = 8192


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family.

    `qkv_bias`, `output_bias` and `mlp_bias` say which linear layers add a bias; `qk_norm`, that the queries and keys of
    each head pass RMS norms of their own, as in Qwen 3.
    """

    model_type: str
    num_layers: Layers
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_position_embeddings: Context
    rms_norm_eps: Positive
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def qkv_rows(self) -> int:
        """Rows of the packed query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
