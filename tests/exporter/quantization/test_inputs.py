"""Sizes of inputs as estimated from weights, against those that transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conftest import make_model, save_checkpoint

from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.quantization.inputs import input_sizes
from edgeskip.runtime.bundle.tensors import bundle_tensors

PARTS = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""Ours, and the checkpoint's that has the same inputs."""


def sizes_of(folder, name):
    checkpoint = open_checkpoint(str(folder))
    return input_sizes(checkpoint, bundle_tensors(checkpoint.architecture, 0, "fp32")[f"{name}.weight"])


def measured(model, names):
    """Root mean squares of the inputs of modules, over every token as a text of its own: each attends to itself."""
    squares = {}

    def note(name):
        return lambda _, inputs: squares.update({name: inputs[0].flatten(0, 1).double().square().mean(0)})

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        model(torch.arange(model.config.vocab_size)[:, None])
    for hook in hooks:
        hook.remove()
    return {name: square.sqrt().numpy() for name, square in squares.items()}


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa", "llama-tied", "llama-mlp-bias", "qwen2", "qwen3"])
def test_they_are_about_those_that_the_first_layer_and_the_head_see(variant, tmp_path):
    """Of a model whose norms and rows differ widely, as a trained one's do."""
    model = make_model(variant)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                parameter *= torch.exp(torch.randn_like(parameter))
            elif name.endswith(("v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter *= torch.exp(torch.randn(len(parameter), 1))
    folder = save_checkpoint(model, tmp_path / "c")
    modules = {f"model.layers.0.{ours}": f"model.layers.0.{theirs}" for ours, theirs in PARTS.items()}
    head = "model.embed_tokens" if variant == "llama-tied" else "lm_head"
    found = measured(model, {*modules.values(), "lm_head"})
    for ours, module in (*modules.items(), (head, "lm_head")):
        logarithms = np.log(sizes_of(folder, ours)), np.log(found[module])
        assert np.corrcoef(*logarithms)[0, 1] > 0.9, ours
        assert (logarithms[0] - logarithms[1]).std() < 0.5 * logarithms[1].std(), ours


def test_a_table_that_is_multiplied_counts_by_the_last_norm_and_one_that_rows_are_picked_from_evenly(
    checkpoints, reference
):
    norm = reference("llama-tied").model.norm.weight.detach().numpy()
    np.testing.assert_allclose(sizes_of(checkpoints("llama-tied"), "model.embed_tokens"), norm)
    assert set(sizes_of(checkpoints("llama-gqa"), "model.embed_tokens")) == {1.0}
