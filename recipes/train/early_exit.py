"""One forward pass of a Llama-family model that shows the hidden state at every exit.

B batch, T tokens, H hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# A transformers model for causal language modelling: .model (.embed_tokens, .layers, .norm, .rotary_emb), .lm_head.
CausalLM = Any


def load_model(folder: Path) -> CausalLM:
    """The model in a checkpoint folder, fp32, with the attention that `exit_hidden_states` needs.

    Raises:
        ValueError: tensors are missing, which transformers would fill with random numbers.
        Exception: transformers fails in any way that a folder leads it to.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
    )
    model: CausalLM = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return model


def run_layer(layer: nn.Module, hidden: Tensor, kept: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder layer that samples may skip, x + M f(x); causal over T, with no other mask.

    Args:
        layer: the decoder layer, x + f(x).
        hidden: x [B, T, H].
        kept: M [B] bool, the samples that do not skip the layer; None keeps them all.
        cos: rotary embedding [1, T, D].
        sin: the same.
    """
    output: Tensor = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
    return output if kept is None else torch.where(kept[:, None, None], output, hidden)


def kept_samples(dropout: Tensor, batch: int) -> Tensor:
    """M [L, B] bool: False with the probability `dropout` [L], for each layer and sample on its own."""
    return torch.rand(len(dropout), batch, device=dropout.device) >= dropout[:, None]


def exit_hidden_states(
    model: CausalLM, token_ids: Tensor, kept: Tensor | None = None, run_layer: Any = run_layer
) -> list[Tensor]:
    """The hidden state after each layer, before the norm: L times [B, T, H].

    Args:
        model: the model; its attention must be "sdpa", which is causal without a mask.
        token_ids: [B, T] int64, at positions 0 .. T-1.
        kept: [L, B] bool, the samples that do not skip a layer; None for no layer dropout.
        run_layer: `run_layer`, or the same function compiled.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(token_ids)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    cos, sin = decoder.rotary_emb(hidden, positions)
    states = []
    for index, layer in enumerate(decoder.layers):
        hidden = run_layer(layer, hidden, None if kept is None else kept[index], cos, sin)
        states.append(hidden)
    return states


def exit_logits(hidden: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """What an exit predicts, fp32 [B, T, V]: the shared norm and head on its hidden state [B, T, H]."""
    logits: Tensor = head(norm(hidden))
    return logits.float()


def exit_loss(hidden: Tensor, labels: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """Mean cross entropy of an exit's prediction with the text, `labels` [B, T]."""
    return F.cross_entropy(exit_logits(hidden, norm, head).flatten(0, 1), labels.flatten())


def distillation_loss(hidden: Tensor, teacher: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """Mean cross entropy of an exit's prediction with that of the last layer, whose hidden state is `teacher`."""
    with torch.no_grad():
        target = exit_logits(teacher, norm, head).softmax(-1)
    return F.cross_entropy(exit_logits(hidden, norm, head).flatten(0, 1), target.flatten(0, 1))
