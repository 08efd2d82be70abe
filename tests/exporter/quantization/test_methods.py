"""Which quantized checkpoints are taken over, by what their settings say."""

from __future__ import annotations

import json

import pytest
from tests.exporter.quantization.stored import settings_of

from edgeskip.exporter.quantization.layouts import AWQ, COMPRESSED_TENSORS, GPTQ, GPTQ_V2
from edgeskip.exporter.quantization.methods import Method, method_of
from edgeskip.runtime.errors import CheckpointError

CT, GPTQ_4, AWQ_4 = (settings_of(method, 4, 128) for method in ("compressed-tensors", "gptq", "awq"))
CT_4 = Method("compressed-tensors", COMPRESSED_TENSORS, 4)


def with_group(**changes):
    """compressed-tensors with other settings of its group."""
    made = json.loads(json.dumps(CT))
    made["config_groups"]["group_0"] |= changes
    return made


def with_weights(**changes):
    """The same of the group's weights."""
    return with_group(weights=CT["config_groups"]["group_0"]["weights"] | changes)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (CT, CT_4),
        (settings_of("compressed-tensors", 8, -1), Method("compressed-tensors", COMPRESSED_TENSORS, 8)),
        (with_weights(actorder="weight"), CT_4),
        (CT | {"quantization_status": "frozen", "global_compression_ratio": 1.89}, CT_4),
        (CT | {"sparsity_config": {"format": "dense"}}, CT_4),
        (CT | {"sparsity_config": {}, "transform_config": {}}, CT_4),
        (GPTQ_4, Method("gptq", GPTQ, 4)),
        ({"quant_method": "gptq", "bits": 8}, Method("gptq", GPTQ, 8)),
        ({"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}, Method("gptq", GPTQ_V2, 4)),
        (GPTQ_4 | {"dynamic": None, "meta": {"quantizer": "x"}}, Method("gptq", GPTQ, 4)),
        (AWQ_4, Method("awq", AWQ, 4)),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_is_taken_over(key, settings, method, tmp_path):
    assert method_of(tmp_path, {key: settings}) == method


def test_a_model_that_is_not_quantized(tmp_path):
    assert method_of(tmp_path, {}) is None
    assert method_of(tmp_path, {"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "is by 'bitsandbytes'; wanted compressed-tensors, gptq or awq, or a model"),
        ({"quant_method": "fp8"}, "is by 'fp8'"),
        ({"quant_method": "gguf"}, "is by 'gguf'"),
        ({"bits": 4}, "is by None"),
        (4, "quantization_config is 4; wanted a table"),
        ([], r"quantization_config is \[\]; wanted a table"),
        (GPTQ_4 | {"desc_act": True}, "has desc_act True; wanted False"),
        (GPTQ_4 | {"sym": False}, "has sym False; wanted True"),
        (GPTQ_4 | {"bits": 3}, "has bits 3; wanted 4 or 8"),
        (GPTQ_4 | {"bits": 4.0}, "has bits 4.0; wanted 4 or 8"),
        (GPTQ_4 | {"bits": None}, "has bits None; wanted 4 or 8"),
        (GPTQ_4 | {"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'; wanted 'gptq' or 'gptq_v2'"),
        (GPTQ_4 | {"dynamic": {"-:lm_head": {}}}, "has dynamic .*; wanted {}"),
        (GPTQ_4 | {"pack_dtype": "int8"}, "has pack_dtype 'int8'; wanted 'int32'"),
        (AWQ_4 | {"zero_point": True}, "has zero_point True; wanted False"),
        ({"quant_method": "awq", "bits": 4}, "has zero_point None; wanted False"),
        (AWQ_4 | {"version": "gemv"}, "has version 'gemv'; wanted 'gemm'"),
        (AWQ_4 | {"bits": 8}, "has bits 8; wanted 4"),
        (CT | {"format": "int-quantized"}, "has format 'int-quantized'; wanted 'pack-quantized'"),
        (CT | {"quantization_status": "initialized"}, "has quantization_status 'initialized'"),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, "has kv_cache_scheme"),
        (CT | {"transform_config": {"config_groups": {"u": 1}}}, "has transform_config"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config has format 'sparse-24-bitmask'"),
        (CT | {"config_groups": {}}, "config_groups have no bits; wanted 4 or 8 in all of them"),
        (CT | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups.W4A16 is \['Linear'\]; wanted a table"),
        (with_group(input_activations={"num_bits": 8}), "group_0 has input_activations"),
        (with_weights(symmetric=False), "group_0.weights has symmetric False; wanted True"),
        (with_weights(type="float"), "has type 'float'; wanted 'int'"),
        (with_weights(strategy="tensor"), "has strategy 'tensor'; wanted 'group' or 'channel'"),
        (with_weights(actorder="group"), "has actorder 'group'"),
        (with_weights(num_bits=2), "has num_bits 2; wanted 4 or 8"),
        (
            CT | {"config_groups": {"a": CT["config_groups"]["group_0"], **with_weights(num_bits=8)["config_groups"]}},
            "config_groups have 4 and 8 bits; wanted 4 or 8 in all of them",
        ),
    ],
)
def test_what_is_not_is_refused_by_name_with_the_fix(settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        method_of(tmp_path, {"quantization_config": settings})
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: quantization_config")
    if "a table" not in message:
        assert str(caught.value).endswith("give the checkpoint that this one was made from")


def test_a_quantization_without_a_method_is_called_by_its_key_or_file(tmp_path):
    with pytest.raises(CheckpointError, match="quantization is by None"):
        method_of(tmp_path, {"quantization": {"group_size": 64, "bits": 4}})
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "desc_act": true}')
    with pytest.raises(CheckpointError, match=r"quantize_config.json has desc_act True"):
        method_of(tmp_path, {})
