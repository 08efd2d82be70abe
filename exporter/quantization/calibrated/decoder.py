"""The decoder in torch and in fp32, one layer at a time: a calibration's texts go through it.

A layer computes four products with its matrices; what each of them reads is what a quantizer wants to know:

    x -> norm -> QKV -> attention -> O -> + x -> norm -> GATE_UP -> silu(gate) * up -> DOWN -> + -> x
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeskip.exporter.checkpoint import TensorReader
from edgeskip.exporter.quantization.calibrated.calibration import Calibration
from edgeskip.exporter.weights import rope_tables
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, NORM, TensorRecord, num_weights

Array = npt.NDArray[Any]
States = list[Tensor]
"""[T,H] of each sequence."""

QKV, O, GATE_UP, DOWN = MATRICES = (  # noqa: E741
    "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
)  # fmt: skip
"""A layer's matrices, by their names within the layer, in the order of their products."""

ATTENTION, MLP = ("input_layernorm.", "self_attn."), ("post_attention_layernorm.", "mlp.")
"""The halves of a layer: how the names of their tensors begin within the layer."""

_STATES_BYTES = 1 << 30  # of all sequences, and of a sequence's widest


@dataclass(frozen=True)
class DecoderLayer:
    """A layer of the decoder, or half of one; `tensors` are the bundle's, by their full names, which begin with
    `prefix`. `cos` and `sin` [C, D/2] are RoPE's.
    """

    architecture: Architecture
    prefix: str
    tensors: Mapping[str, Tensor]
    cos: Tensor
    sin: Tensor

    def with_matrix(self, name: str, matrix: Tensor) -> DecoderLayer:
        """The layer with another matrix [N,K] in the place of one of its own."""
        return replace(self, tensors={**self.tensors, self.prefix + name: matrix})

    def product(self, name: str, inputs: Tensor) -> Tensor:
        """Inputs [T,K] times a matrix [N,K], with its bias if it has one -> [T,N]."""
        name = self.prefix + name
        return F.linear(inputs, self.tensors[name], self.tensors.get(name.removesuffix("weight") + "bias"))

    def qkv_inputs(self, x: Tensor) -> Tensor:
        """What QKV reads, of the states before the layer, [T,H] -> [T,H]."""
        return self._normed(x, "input_layernorm.weight")

    def o_inputs(self, x: Tensor) -> Tensor:
        """What O reads, of the states before the layer, [T,H] -> [T, heads * D]."""
        a, tokens = self.architecture, len(x)
        packed = self.product(QKV, self.qkv_inputs(x)).view(tokens, -1, a.head_dim)
        query, key, value = torch.tensor_split(packed, (a.num_heads, a.num_heads + a.num_kv_heads), dim=1)
        if a.qk_norm:
            query = self._normed(query, "self_attn.q_norm.weight")
            key = self._normed(key, "self_attn.k_norm.weight")
        query, key, value = (heads.transpose(0, 1)[None] for heads in (self._rotated(query), self._rotated(key), value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attended[0].transpose(0, 1).reshape(tokens, -1)

    def gate_up_inputs(self, x: Tensor) -> Tensor:
        """What GATE_UP reads, of the states after attention, [T,H] -> [T,H]."""
        return self._normed(x, "post_attention_layernorm.weight")

    def down_inputs(self, x: Tensor) -> Tensor:
        """What DOWN reads, of the states after attention, [T,H] -> [T,F]."""
        gate, up = self.product(GATE_UP, self.gate_up_inputs(x)).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def attention(self, x: Tensor) -> Tensor:
        """What attention adds to the states before the layer, [T,H] -> [T,H]."""
        return self.product(O, self.o_inputs(x))

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the states after attention, [T,H] -> [T,H]."""
        return self.product(DOWN, self.down_inputs(x))

    def output(self, x: Tensor) -> Tensor:
        """The states after the layer, [T,H] -> [T,H]."""
        x = x + self.attention(x)
        return x + self.mlp(x)

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return _normed(x, self.tensors[self.prefix + name], self.architecture)

    def _rotated(self, heads: Tensor) -> Tensor:
        """RoPE for heads [T,N,D] at positions 0 .. T-1."""
        cos, sin = (table[: len(heads), None] for table in (self.cos, self.sin))
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True)
class Decoder:
    """The model of a checkpoint as it reads a calibration's sequences.

    Args:
        reader: of the checkpoint.
        tensors: the bundle's. Those that will be quantized are as the checkpoint has them, the others as in the bundle.
        dtype: the bundle's.
        calibration: what it reads.
        exit_layers: those that drafts come from.
    """

    reader: TensorReader
    tensors: Mapping[str, TensorRecord]
    dtype: DType
    calibration: Calibration
    exit_layers: Sequence[int]

    @property
    def architecture(self) -> Architecture:
        """The checkpoint's."""
        return self.reader.checkpoint.architecture

    @cached_property
    def device(self) -> torch.device:
        """A GPU where torch sees one with room for a layer, for what is known of its inputs and for the states."""
        a = self.architecture
        layer, width = num_weights(a) // a.num_layers, max(a.intermediate_size, a.hidden_size)
        room = 8 * layer + 12 * width**2 + _STATES_BYTES
        return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > room else "cpu")

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return self.architecture.num_layers

    def layer(self, index: int, half: tuple[str, ...] = ("",)) -> DecoderLayer:
        """A layer or half of it, read.

        Raises:
            CheckpointError: a number is not finite in the dtype.
        """
        prefix = f"model.layers.{index}."
        wanted = [one for one in self.tensors_of(index) if one.name.removeprefix(prefix).startswith(half)]
        return DecoderLayer(self.architecture, prefix, {one.name: self._whole(one) for one in wanted}, *self._rope)

    def tensors_of(self, layer: int) -> list[TensorRecord]:
        """The tensors of a layer, in order."""
        return [tensor for tensor in self.tensors.values() if tensor.layer == layer]

    def token_rows(self) -> Array:
        """The rows [U,H] of the table of tokens that occur in the sequences, as the checkpoint has them."""
        token_ids, start = self.calibration.token_ids, 0
        picked = []
        for block in self.reader.rows(self.tensors[EMBEDDINGS], self.dtype):
            here = token_ids[(token_ids >= start) & (token_ids < start + len(block))]
            picked.append(block[here - start])
            start += len(block)
        return np.concatenate(picked)

    def checkpoint_rows(self) -> Tensor:
        """The same in fp32."""
        return torch.from_numpy(np.asarray(self.token_rows(), np.float32)).to(self.device)

    def embedded(self, rows: Tensor) -> States:
        """The states before the first layer, from the rows [U,H] of the tokens that occur."""
        token_ids = self.calibration.token_ids
        return [rows[np.searchsorted(token_ids, sequence)] for sequence in self.calibration.sequences]

    def feeds_head(self, layer: int) -> bool:
        """Whether the head reads the states after this layer."""
        return layer + 1 in (*self.exit_layers, self.num_layers)

    def head_inputs(self, states: States) -> Iterator[Tensor]:
        """What the head reads, of the states after a layer."""
        return (_normed(x, self._norm, self.architecture) for x in states)

    @cached_property
    def _rope(self) -> tuple[Tensor, Tensor]:
        tables = rope_tables(self.architecture.rope, self.architecture.head_dim, self.calibration.longest)
        cos, sin = (torch.from_numpy(table).to(self.device) for table in tables)
        return cos, sin

    @cached_property
    def _norm(self) -> Tensor:
        return self._whole(self.tensors[NORM])

    def _whole(self, tensor: TensorRecord) -> Tensor:
        made, start = torch.empty(tensor.shape, device=self.device), 0
        for block in self.reader.rows(tensor, self.dtype):
            made[start : start + len(block)] = torch.from_numpy(np.asarray(block, np.float32))
            start += len(block)
        return made


def stored_values(format_: str, parts: Sequence[Array], dtype: DType, device: torch.device) -> Tensor:
    """What the parts of a tensor's rows stand for in a bundle of this dtype, in fp32."""
    words = [part.view(np.uint16) if part.dtype == ml_dtypes.bfloat16 else part for part in parts]
    values = torch.from_numpy(FORMATS[format_].decode(words, dtype))
    return values.view(getattr(torch, NUMBER_TYPES[dtype].torch)).to(device).float()


def _normed(x: Tensor, weight: Tensor, architecture: Architecture) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, architecture.rms_norm_eps)
