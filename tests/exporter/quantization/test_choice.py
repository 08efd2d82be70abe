"""Which tensors are stored in which format."""

from __future__ import annotations

import pytest

from edgeskip.exporter.quantization.choice import chosen_formats
from edgeskip.runtime.bundle.manifest import formats_problem
from edgeskip.runtime.bundle.tensors import bundle_tensors
from edgeskip.runtime.errors import RequestError

MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def chosen(bundle, weights=None, head=None, layers=(), block_size=32):
    return chosen_formats(bundle.manifest.architecture, "fp32", weights, head, layers, block_size)


def of_layers(formats):
    """The formats by layer; the matrices of a layer have one."""
    found = {}
    for i in range(4):
        (found[i],) = {formats.get(f"model.layers.{i}.{name}.weight", "fp32") for name in MATRICES}
    return [found[i] for i in range(4)]


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "qwen2", "qwen3", "llama-mlp-bias"])
def test_matrices_are_quantized_and_nothing_else(variant, bundles):
    bundle = bundles(variant)
    formats = chosen(bundle, "int4", "int4")
    tables = {EMBEDDINGS} if bundle.manifest.architecture.tie_word_embeddings else {EMBEDDINGS, LM_HEAD}
    assert formats.keys() == tables | {f"model.layers.{i}.{name}.weight" for i in range(4) for name in MATRICES}
    assert set(formats.values()) == {"int4-32"}


def test_nothing_is_quantized_unless_it_is_asked_for(bundles):
    assert chosen(bundles("llama-gqa")) == {}


@pytest.mark.parametrize(
    ("settings", "layers", "tables"),
    [
        ({"weights": "int8"}, ["int8"] * 4, "int8"),
        ({"weights": "int4"}, ["int4-32"] * 4, "int8"),
        ({"weights": "int4", "head": "dtype"}, ["int4-32"] * 4, None),
        ({"head": "int8"}, ["fp32"] * 4, "int8"),
        ({"weights": "int4", "layers": ["0-1=int8"]}, ["int8", "int8", "int4-32", "int4-32"], "int8"),
        ({"weights": "int4", "layers": ["0-2=int8", "1=dtype"]}, ["int8", "fp32", "int8", "int4-32"], "int8"),
        ({"layers": ["3=int4"]}, ["fp32", "fp32", "fp32", "int4-32"], None),
    ],
)
def test_layers_and_tables_by_choice(settings, layers, tables, bundles):
    formats = chosen(bundles("llama-gqa"), **settings)
    assert of_layers(formats) == layers
    assert [formats.get(name) for name in (EMBEDDINGS, LM_HEAD)] == [tables, tables]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["4=int8"]}, "layers: '4=int8'; wanted layers in order, of 0 to 3"),
        ({"layers": ["2-1=int8"]}, "layers: '2-1=int8'; wanted layers in order"),
        ({"layers": ["0-3"]}, "layers: '0-3'; wanted a layer or a range of layers and int4, int8 or dtype"),
        ({"layers": ["0=int2"]}, "layers: '0=int2'; wanted"),
        ({"layers": ["-1=int8"]}, "layers: '-1=int8'; wanted"),
        (
            {"weights": "int4", "block_size": 64},
            "model.layers.0.mlp.down_proj.weight: 96 columns, which blocks of 64 do not divide; "
            "give --block-size 32 or int8",
        ),
        (
            {"head": "int4", "block_size": 128},
            f"{EMBEDDINGS}: 64 columns, .* of 128 .*; give --block-size 32 or .* 64 or int8",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(settings, message, bundles):
    with pytest.raises(RequestError, match=message):
        chosen(bundles("llama-gqa"), **settings)


def test_the_blocks_that_are_offered_divide_all_matrices_in_4_bits(bundles):
    """All but `down_proj`, whose 96 columns are layer 0's alone here, have 64."""
    bundle = bundles("llama-gqa")
    with pytest.raises(RequestError, match=r"qkv_proj.weight: 64 columns, .* of 128 .*; give --block-size 32 or int8"):
        chosen(bundle, "int4", block_size=128)
    with pytest.raises(
        RequestError, match=r"embed_tokens.weight: 64 .*; give --block-size 32 or --block-size 64 or int8"
    ):
        chosen(bundle, "int8", "int4", block_size=128)


@pytest.mark.parametrize(
    ("name", "format_", "message"),
    [
        ("rope.cos", "int8", "which is for matrices of whole blocks"),
        ("model.norm.weight", "int8", "which is for matrices of whole blocks"),
        ("model.layers.0.mlp.down_proj.weight", "int4-64", "which is for matrices of whole blocks"),
        (
            "model.layers.0.mlp.down_proj.weight",
            "fp16",
            "in 'fp16', where fp32 has fp32, int8, int4-32, int4-64, int4-128",
        ),
        ("model.layers.0.mlp.down_proj.weight", "int4", "in 'int4', where fp32 has"),
        ("model.layers.9.mlp.down_proj.weight", "int8", "is no tensor of the model"),
    ],
)
def test_formats_that_a_tensor_cannot_have(name, format_, message, bundles):
    tensors = bundle_tensors(bundles("llama-gqa").manifest.architecture, 0, "fp32")
    assert message in formats_problem({name: format_}, tensors, "fp32")
    assert formats_problem({"model.layers.0.mlp.down_proj.weight": "int4-32"}, tensors, "fp32") == ""
