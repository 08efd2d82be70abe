"""Numbers that fp16 does not hold are foretold from the weights alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import VARIANTS, make_model, save_checkpoint

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.magnitude import beyond_fp16, magnitudes


def computed(model):
    """The largest number that each linear layer of a transformers model gives for some text."""
    largest = {}

    def watch(name):
        return lambda _module, _inputs, output: largest.update({name: float(output.abs().max())})

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "lm_head")):
            module.register_forward_hook(watch(name.replace("lm_head", "lm_head.weight")))
    with torch.inference_mode():
        model(torch.arange(2, 66)[None])
    return largest


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mlp-bias", "mistral", "qwen2", "qwen3"])
def test_the_estimate_is_near_what_transformers_computes(variant, checkpoints):
    checkpoint, largest = open_checkpoint(str(checkpoints(variant))), computed(make_model(variant))
    with TensorReader(checkpoint) as reader:
        estimates = list(magnitudes(checkpoint, reader))
    compared = {
        made.tensor: made.value / largest[made.tensor] for made in reversed(estimates) if made.tensor in largest
    }
    assert len(compared) == 2 * checkpoint.architecture.num_layers + 1
    assert all(1 / 4 < ratio < 4 for ratio in compared.values()), compared


@pytest.mark.parametrize("variant", VARIANTS)
def test_ordinary_models_raise_no_warning(variant, checkpoints):
    assert beyond_fp16(open_checkpoint(str(checkpoints(variant)))) is None


@pytest.mark.parametrize(
    ("part", "scale", "named"),
    [
        ("layers.2.mlp.down_proj.weight", 30_000, "layers.2.mlp.down_proj"),
        ("layers.1.self_attn.v_proj.weight", 30_000, "layers.1.self_attn.o_proj"),
        ("layers.3.self_attn.k_proj.weight", 60_000, "layers.3.self_attn.q_proj"),
        ("layers.1.post_attention_layernorm.weight", 2000, "layers.1.mlp.up_proj"),
        ("lm_head.weight", 60_000, "lm_head.weight"),
    ],
)
def test_a_layer_out_of_scale_is_named_for_fp16_alone(part, scale, named, tmp_path):
    save_checkpoint(make_model("llama-gqa"), tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name in tensors:
        if name.endswith(part):
            tensors[name] *= scale
            assert tensors[name].abs().max() < 65504
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("fp16", "fp32"):
        warnings = []
        checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
        export_bundle(checkpoint, tmp_path / dtype, ExportSettings(2, dtype), warn=warnings.append)
        assert [named in warning and "fp16 ends at 65504" in warning for warning in warnings] == [True] * (
            dtype == "fp16"
        )
