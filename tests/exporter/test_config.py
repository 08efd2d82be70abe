"""Every config.json is read rightly or refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.conftest import BASE, LLAMA3_ROPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgeskip.exporter.config import architecture_from_config, sliding_window
from edgeskip.exporter.weights import rope_tables
from edgeskip.recipes.shape import load_shape, shape_names
from edgeskip.runtime.bundle.architecture import Rope
from edgeskip.runtime.bundle.tensors import bundle_tensors
from edgeskip.runtime.errors import CheckpointError

LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LAYERSKIP = {  # facebook/layerskip-*: parameters in 1e9
    "llama2-7b": 6.74,
    "llama2-13b": 13.02,
    "llama2-70b": 68.98,
    "codellama-7b": 6.74,
    "codellama-34b": 33.74,
    "llama3-8b": 8.03,
    "llama3.2-1b": 1.24,
}


@pytest.mark.parametrize("name", LAYERSKIP)
def test_the_published_layerskip_configs_are_read(name):
    shape = load_shape(name)
    config, a = shape.config, shape.architecture
    assert (a.num_layers, a.hidden_size, a.num_kv_heads) == (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_key_value_heads"],
    )
    assert a.rope.theta == config["rope_theta"]
    parameters = sum(
        np.prod(shape, dtype=np.int64) for shape in (t.shape for t in bundle_tensors(a, 0, "fp16").values())
    )
    assert parameters / 1e9 == pytest.approx(LAYERSKIP[name], abs=0.01)


def test_the_published_shapes_are_these():
    assert set(shape_names()) == set(LAYERSKIP)


def test_both_spellings_of_rope_are_the_same():
    old = BASE | {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    }
    new = BASE | {"model_type": "llama", "rope_parameters": LLAMA3_ROPE}
    legacy = BASE | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert architecture_from_config(old, "old") == architecture_from_config(new, "new")
    assert architecture_from_config(legacy, "legacy").rope == Rope(10000.0, "linear", 4.0)


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (Rope(10000.0), {"rope_type": "default", "rope_theta": 10000.0}),
        (Rope(1e6, "linear", 8.0), {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
        (Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192), LLAMA3_SCALING | {"rope_theta": 500000.0}),
    ],
)
def test_rope_tables_equal_transformers(rope, parameters):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
    )
    positions = torch.arange(0, 20000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours_cos, ours_sin = rope_tables(rope, 128, 20000)
    # an angle of 2e4 in fp32 is known to 1e-3
    np.testing.assert_allclose(ours_cos, cos[0, :, :64].numpy(), atol=3e-3)
    np.testing.assert_allclose(ours_sin, sin[0, :, :64].numpy(), atol=3e-3)
    np.testing.assert_allclose(ours_cos[:200], cos[0, :200, :64].numpy(), atol=3e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'; wanted one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'; wanted default, linear or llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "RoPE type 'llama3' without low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}}, "RoPE parameter 'beta'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; wanted 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; wanted 'silu'"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0, which may change the mathematics"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 KV heads"),
        ({"head_dim": 15}, "head_dim 15; wanted an even number"),
        ({"hidden_size": None}, "hidden_size is None; wanted a whole number from 1"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types is .*; wanted a list for 4 layers"),
        ({"layer_types": 4}, "layer_types is 4; wanted a list"),
        ({"hidden_size": 66, "head_dim": 16}, "hidden_size 66 over 4 attention heads; wanted a whole ratio"),
        ({"rope_theta": None}, "rope_theta is None"),
        (
            {"model_type": "qwen2", "num_key_value_heads": None, "num_attention_heads": 3, "hidden_size": 63},
            "head_dim 21",
        ),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim is None"),
        ({"model_type": "qwen2", "max_window_layers": None, "use_sliding_window": True}, "max_window_layers is None"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
            "layer_types has 'sliding_attention', but there is no sliding_window",
        ),
        ({"is_causal": False}, "is_causal is False; wanted True"),
        ({"use_mrope": True}, "use_mrope is True, which may change the mathematics"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; wanted a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; wanted a number above 0"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; wanted a table"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "RoPE type"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; wanted true or false"),
        ({"model_type": "mistral", "sliding_window": "abc"}, "sliding_window is 'abc'"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000; wanted a whole number from 1 to 1000"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        architecture_from_config({"model_type": "llama"} | BASE | change, "config.json")


ABSENT = object()
WINDOW = {"use_sliding_window": True, "sliding_window": 32}
NO_THETA = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
SPELLINGS = [
    *({"num_key_value_heads": value, "num_attention_heads": 32, "hidden_size": 512} for value in (ABSENT, None, 1, 32)),
    *({"head_dim": value} for value in (ABSENT, 8, 48)),
    *({"max_position_embeddings": value} for value in (ABSENT, 50)),
    {"rms_norm_eps": ABSENT},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    *({"sliding_window": value} for value in (ABSENT, None, 32, 200)),
    *(WINDOW | {"max_window_layers": value} for value in (ABSENT, 0, 3, 4, 28)),
    *(WINDOW | {"layer_types": ["full_attention"] * 3 + [last]} for last in ("full_attention", "sliding_attention")),
    {"sliding_window": 32, "use_sliding_window": False, "layer_types": ["full_attention"] * 4},
    *({"rope_theta": value, "rope_scaling": None} for value in (ABSENT, 5e5, 1000000)),
    *({"rope_theta": 7e4, key: {"type": "linear", "factor": 4.0}} for key in ("rope_scaling", "rope_parameters")),
    {"rope_theta": 7e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 7e4, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {}, "rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    *({"rope_theta": 7e4, "rope_scaling": table} for table in (LLAMA3_ROPE, NO_THETA)),
    {"hidden_act": "swish", "pretraining_tp": 4, "pad_token_id": -1, "quantization_config": None},
    {"is_llama_config": True, "rope_interleaved": False, "use_mrope": False, "max_sequence_length": 96},
]
"""Keys as published checkpoints have them, and as they lack them; absent is not always null."""


def as_transformers_reads(config):
    """Shapes of the tensors by name, heads, KV heads, epsilon, context, window and RoPE's frequencies."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if made.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    slides = made.model_type == "mistral" or "sliding_attention" in (getattr(made, "layer_types", None) or ())
    window = made.sliding_window if slides and made.model_type != "llama" else None
    context = min(made.max_position_embeddings, window or made.max_position_embeddings)
    frequencies = type(model.model.rotary_emb)(made).inv_freq.tolist()
    figures = (made.num_attention_heads, made.num_key_value_heads, model.model.norm.variance_epsilon, context, window)
    return shapes, figures, frequencies


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_config_means_what_transformers_makes_of_it(model_type):
    for change in SPELLINGS:
        config = {"model_type": model_type, "head_dim": 16} | BASE | change
        config = {key: value for key, value in config.items() if value is not ABSENT}
        if model_type == "mistral" and ("layer_types" in config or config.get("num_key_value_heads", 0) is None):
            continue  # which transformers 5 reads as another family, or not at all
        a = architecture_from_config(config, "config.json")
        shapes, figures, frequencies = as_transformers_reads(config)
        records = bundle_tensors(a, 0, "fp32").values()
        read = {source: (rows, *record.shape[1:]) for record in records for source, rows in record.sources}
        assert read == shapes, change
        window = sliding_window(config, "config.json")
        assert (a.num_heads, a.num_kv_heads, a.rms_norm_eps, a.max_position_embeddings, window) == figures, change
        sines = rope_tables(a.rope, a.head_dim, 2)[1][1]
        np.testing.assert_allclose(sines, np.sin(frequencies), rtol=1e-5, err_msg=str(change))


def test_a_sliding_window_counts_only_where_it_is_in_use():
    assert sliding_window({"model_type": "mistral", "sliding_window": 4096}, "x") == 4096
    assert sliding_window({"model_type": "mistral", "sliding_window": None}, "x") is None
    assert sliding_window({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, "x") is None
    switched_on = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "num_hidden_layers": 36}
    assert sliding_window(switched_on, "x") == 4096
    assert sliding_window(switched_on | {"num_hidden_layers": 28}, "x") is None  # it begins at layer 28
    assert sliding_window(switched_on | {"model_type": "llama"}, "x") is None
