"""The tensors of a bundle by name, from the architecture alone: what the weights file holds and what graphs read.

checkpoint                                     bundle
q_proj, k_proj, v_proj  [rows, H] each   ->    self_attn.qkv_proj     [q rows | k rows | v rows, H]
gate_proj, up_proj      [F, H] each      ->    mlp.gate_up_proj       [2F, H]
everything else                          ->    the same name, once
(computed)                               ->    rope.cos, rope.sin     [C, D/2]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.formats import is_quantized

EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"
TABLES = (EMBEDDINGS, LM_HEAD)
ROPE_TABLES = ("rope.cos", "rope.sin")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the bundle: its shape, its format, and the checkpoint's tensors that make up its rows, each with its
    number of rows. A tensor without sources is computed.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    sources: tuple[tuple[str, int], ...]

    @property
    def is_matrix(self) -> bool:
        """Whether this is a matrix of weights, which can be quantized."""
        return bool(self.sources) and len(self.shape) == 2

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to, if it belongs to one."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None


def bundle_tensors(
    architecture: Architecture, capacity: int, format_: str, formats: Mapping[str, str] | None = None
) -> dict[str, TensorRecord]:
    """Every tensor of a bundle, in the order of the file.

    Args:
        architecture: the model's.
        capacity: cache rows C, which the RoPE tables have too.
        format_: the format of all tensors,
        formats: except for these, by name.
    """
    formats = formats or {}
    return {
        name: TensorRecord(name, shape, formats.get(name, format_), sources)
        for name, shape, sources in _shapes(architecture, capacity)
    }


def kind_of(name: str) -> str:
    """The name of a layer's tensor within its layer, without what it is of: `mlp.down_proj`."""
    return ".".join(name.split(".")[3:5])


def has_quantized_layers(tensors: Iterable[TensorRecord]) -> bool:
    """Whether matrices of layers are quantized, not only the tables."""
    return is_quantized(one.format for one in tensors if one.layer is not None)


def num_weights(architecture: Architecture) -> int:
    """Numbers in all tensors of a checkpoint."""
    return sum(math.prod(record.shape) for record in bundle_tensors(architecture, 0, "").values())


def graph_tensors(architecture: Architecture, layers: range) -> list[str]:
    """Tensors that a graph of these layers reads whole at each call; no layers stand for a head.

    Only a tied head reads more than a row of the embedding table, and a call reads only a few rows of the RoPE tables.
    """
    a = architecture
    if not layers:
        return [EMBEDDINGS if a.tie_word_embeddings else LM_HEAD, NORM]
    return [name for i in layers for name, _, _ in _layer(a, i)]


def _shapes(a: Architecture, capacity: int) -> Iterable[tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]]]:
    yield _same(EMBEDDINGS, a.vocab_size, a.hidden_size)
    for i in range(a.num_layers):
        yield from _layer(a, i)
    yield _same(NORM, a.hidden_size)
    if not a.tie_word_embeddings:
        yield _same(LM_HEAD, a.vocab_size, a.hidden_size)
    for name in ROPE_TABLES:
        yield name, (capacity, a.head_dim // 2), ()


def _layer(a: Architecture, i: int) -> Iterable[tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]]]:
    hidden, ffn = a.hidden_size, a.intermediate_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    layer = f"model.layers.{i}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    yield _same(f"{layer}.input_layernorm.weight", hidden)
    qkv = ((f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv))
    yield _packed(f"{attention}.qkv_proj.weight", qkv, hidden)
    if a.qkv_bias:
        yield _packed(f"{attention}.qkv_proj.bias", qkv)
    if a.qk_norm:
        yield _same(f"{attention}.q_norm.weight", a.head_dim)
        yield _same(f"{attention}.k_norm.weight", a.head_dim)
    yield _same(f"{attention}.o_proj.weight", hidden, q)
    if a.output_bias:
        yield _same(f"{attention}.o_proj.bias", hidden)
    yield _same(f"{layer}.post_attention_layernorm.weight", hidden)
    pair = ((f"{mlp}.gate_proj", ffn), (f"{mlp}.up_proj", ffn))
    yield _packed(f"{mlp}.gate_up_proj.weight", pair, hidden)
    if a.mlp_bias:
        yield _packed(f"{mlp}.gate_up_proj.bias", pair)
    yield _same(f"{mlp}.down_proj.weight", hidden, ffn)
    if a.mlp_bias:
        yield _same(f"{mlp}.down_proj.bias", hidden)


def _same(name: str, *shape: int) -> tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]]:
    return name, shape, ((name, shape[0]),)


def _packed(
    name: str, parts: tuple[tuple[str, int], ...], *columns: int
) -> tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]]:
    """The rows of several tensors of the checkpoint, one after the other."""
    kind = name.rpartition(".")[2]
    return name, (sum(rows for _, rows in parts), *columns), tuple((f"{part}.{kind}", rows) for part, rows in parts)
