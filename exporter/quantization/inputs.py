"""How large the inputs are that each column of a matrix multiplies, estimated from weights alone.

A column with large inputs adds more to the error of a product. As in exporter/magnitude.py, weights and inputs are
taken as independent: what leaves a norm is as large as the norm's gains, a product with a row of weights adds up in
squares, and attention hands on what its values have.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM, TensorRecord

Sizes = npt.NDArray[np.float64]


def input_sizes(checkpoint: Checkpoint, tensor: TensorRecord) -> Sizes:
    """The root mean squares of the inputs of a matrix [N,K], up to a factor: [K], finite and not all zero."""
    with TensorReader(checkpoint) as reader, np.errstate(over="ignore", invalid="ignore"):
        sizes = np.abs(_input_sizes(checkpoint, reader, tensor))
    sizes[~np.isfinite(sizes)] = 1  # of a checkpoint that will be refused
    return sizes if sizes.any() else np.ones_like(sizes)


def _input_sizes(checkpoint: Checkpoint, reader: TensorReader, tensor: TensorRecord) -> Sizes:
    a = checkpoint.architecture
    if tensor.name == LM_HEAD or (tensor.name == EMBEDDINGS and a.tie_word_embeddings):
        return _vector(reader, NORM)
    if tensor.layer is None:  # a table that rows are only picked from
        return np.ones(tensor.shape[1])
    layer = f"model.layers.{tensor.layer}"
    kind = tensor.name.removeprefix(f"{layer}.").removesuffix(".weight")
    if kind in ("self_attn.qkv_proj", "self_attn.o_proj"):
        gains = _vector(reader, f"{layer}.input_layernorm.weight")
        if kind == "self_attn.qkv_proj":
            return gains
        values = _output_sizes(reader, f"{layer}.self_attn.v_proj", gains, bias=a.qkv_bias).reshape(-1, a.head_dim)
        return np.repeat(values, a.num_heads // a.num_kv_heads, axis=0).reshape(-1)
    gains = _vector(reader, f"{layer}.post_attention_layernorm.weight")
    if kind == "mlp.gate_up_proj":
        return gains
    gate, up = (_output_sizes(reader, f"{layer}.mlp.{part}_proj", gains, bias=a.mlp_bias) for part in ("gate", "up"))
    return gate * up  # SiLU halves about all numbers alike


def _output_sizes(reader: TensorReader, name: str, gains: Sizes, *, bias: bool) -> Sizes:
    """The root mean squares of a product's numbers [N] for inputs of these sizes [K]."""
    sums = []
    for block in reader.blocks(f"{name}.weight"):
        columns = np.array(block.T, np.float32, order="C")  # so that the order of the summands is fixed
        columns *= gains[:, None].astype(np.float32)
        sums.append(np.add.reduce(np.square(columns, out=columns), axis=0))
    squares = np.concatenate(sums).astype(np.float64)
    return np.sqrt(squares + np.square(_vector(reader, f"{name}.bias")) if bias else squares)


def _vector(reader: TensorReader, name: str) -> Sizes:
    return np.concatenate([np.asarray(block, np.float64) for block in reader.blocks(name)])
