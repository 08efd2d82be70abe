"""Checkpoints that come quantized are taken over number by number."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import edit_json
from tests.dequantizer import dequantized_model, stored_weights
from tests.exporter.quantization import stored
from tests.exporter.quantization.stored import quantized_checkpoint

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.check.golden import Golden
from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.reference import reference_model
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.errors import CheckpointError, RequestError

CASES = [
    ("compressed-tensors", 4, 32),
    ("compressed-tensors", 8, -1),
    ("gptq", 4, 32),
    ("gptq", 8, -1),
    ("gptq_v2", 4, 32),
    ("awq", 4, 32),
]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(checkpoints, tmp_path_factory):
    """A quantized copy of a variant's checkpoint, and what its matrices stand for; made once."""
    made = {}
    folder = tmp_path_factory.mktemp("quantized")

    def get(method, bits, group, variant="llama-gqa"):
        key = (method, bits, group, variant)
        if key not in made:
            path = folder / "-".join(map(str, key))
            made[key] = path, quantized_checkpoint(checkpoints(variant), path, method, bits, group)
        return made[key]

    return get


@pytest.fixture
def copied(quantized, tmp_path):
    """A copy of one of them, to be spoiled."""

    def copy(method="gptq", bits=4, group=32):
        return shutil.copytree(quantized(method, bits, group)[0], tmp_path / "copy")

    return copy


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def exported(folder, path, **settings):
    return export_bundle(open_checkpoint(str(folder)), path, ExportSettings(2, **settings))


def packed_values(values, i):
    """What the bundle's matrices of a layer stand for."""

    def part(*names):
        return np.concatenate([values[f"model.layers.{i}.{name}_proj.weight"] for name in names])

    made = {
        "self_attn.qkv_proj": part("self_attn.q", "self_attn.k", "self_attn.v"),
        "self_attn.o_proj": part("self_attn.o"),
        "mlp.gate_up_proj": part("mlp.gate", "mlp.up"),
        "mlp.down_proj": part("mlp.down"),
    }
    return {f"model.layers.{i}.{name}.weight": value for name, value in made.items()}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("method", "bits", "group"), CASES)
def test_numbers_and_scales_are_the_checkpoint_s(method, bits, group, dtype, quantized, tmp_path):
    folder, values = quantized(method, bits, group)
    bundle = exported(folder, tmp_path / "b", dtype=dtype)
    assert set(bundle.manifest.formats.values()) == {"int8" if bits == 8 else f"int4-{group}"}
    assert len(bundle.manifest.formats) == 16
    assert bundle.manifest.quantization.method == method.removesuffix("_v2")
    assert bundle.manifest.quantization.calibration_sha256 is None
    found = stored_weights(bundle)
    for i in range(4):
        for name, wanted in packed_values(values, i).items():
            exact = wanted.astype({"fp32": np.float32, "fp16": np.float16}[dtype])
            np.testing.assert_array_equal(found[name].numpy(), exact)


@pytest.mark.parametrize("variant", ["llama-attention-bias", "llama-tied", "qwen3"])
def test_other_families_and_tensors_beside_the_quantized_ones(variant, quantized, tmp_path):
    folder, values = quantized("gptq", 4, 32, variant)
    found = stored_weights(exported(folder, tmp_path / "b"))
    plain = load_file(folder / "model.safetensors")
    for name, wanted in packed_values(values, 3).items():
        np.testing.assert_array_equal(found[name].numpy(), wanted.astype(np.float32))
    same = [name for name in found if name in plain]
    assert len(same) > 8
    assert all(torch.equal(found[name], plain[name]) for name in same)


def test_scales_are_rounded_to_bf16_where_the_bundle_is(quantized, tmp_path):
    folder, _ = quantized("compressed-tensors", 4, 32)
    bundle = exported(folder, tmp_path / "b", dtype="bf16")
    scales = load_file(bundle.path("weights.safetensors"))[f"{DOWN}.weight.scales"]
    wanted = load_file(folder / "model.safetensors")[f"{DOWN}.weight_scale"]
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales, wanted.bfloat16())


def test_a_bundle_of_one_runs_and_transformers_with_its_values_agrees(quantized, reference, tmp_path):
    folder, _ = quantized("gptq", 8, -1)
    exported(folder, tmp_path / "b")
    bundle = read_bundle(tmp_path / "b")
    made = dequantized_model(bundle, reference("llama-gqa"))
    with edgeskip.load(bundle.folder, dialect="standard") as model:
        found = model.complete("some text", max_new_tokens=8)
    ids = torch.tensor([found.prompt_token_ids])
    out = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found.token_ids == tuple(out[0, ids.shape[1] :].tolist())
    with torch.no_grad():  # what `check` compares with is made of the bundle's config.json, which says how it came
        assert torch.allclose(reference_model(bundle)(ids).logits, made(ids).logits, atol=1e-4)


@pytest.mark.parametrize(("method", "bits", "group"), CASES)
def test_rows_are_read_in_any_blocks(method, bits, group, quantized):
    """Whole, by few rows, and as samples: AWQ's words have rows of 8."""
    folder, values = quantized(method, bits, group)
    name = f"{DOWN}.weight"
    with TensorReader(open_checkpoint(str(folder))) as reader:
        for size in (1, 96 * 4 * 24, 1 << 24):
            blocks = list(reader.blocks(name, size))
            np.testing.assert_array_equal(np.concatenate(blocks), values[name].astype(np.float32))
        assert len(list(reader.blocks(name, 1))) == 8
        sample = reader.sample(name, runs=3, rows=5)
        starts = np.linspace(0, 64 - 5, 3).astype(int)
        wanted = np.concatenate([values[name][start : start + 5] for start in starts])
        np.testing.assert_array_equal(sample, wanted.astype(np.float32))


def test_the_head_can_be_quantized_beside_it_by_search(quantized, tmp_path):
    folder, _ = quantized("gptq", 4, 32)
    bundle = exported(folder, tmp_path / "b", weights="int4", head="int8")
    assert bundle.manifest.formats["lm_head.weight"] == "int8"
    assert bundle.manifest.quantization.method == "gptq and search"


def test_a_head_that_comes_quantized(copied, tmp_path):
    folder = copied()
    numbers, scales = stored.rounded(torch.randn(304, 64, generator=torch.Generator().manual_seed(0)), 4, 32)

    def edit(tensors):
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{ending}": part for ending, part in stored.gptq(numbers, scales, 4).items()}
        rows = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:4]])

    change(folder, edit)
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=304))
    found = stored_weights(exported(folder, tmp_path / "b"))["lm_head.weight"].numpy()
    wanted = (numbers - 8) * np.repeat(scales.astype(np.float64), 32, axis=1)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_what_says_it_may_be_beside_config_json(copied, tmp_path):
    folder = copied()
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    del settings["quant_method"]
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert set(exported(folder, tmp_path / "b").manifest.formats.values()) == {"int4-32"}


def test_biases_of_zeros_are_passed_over_and_others_refused(copied, tmp_path):
    folder = copied()
    change(folder, lambda tensors: tensors.update({f"{DOWN}.bias": torch.zeros(64, dtype=torch.float16)}))
    exported(folder, tmp_path / "b")
    change(folder, lambda tensors: tensors.update({f"{DOWN}.bias": torch.ones(64, dtype=torch.float16)}))
    with pytest.raises(CheckpointError, match=r"has model.layers.1.mlp.down_proj.bias, for which config.json has no"):
        exported(folder, tmp_path / "c")


def drop(ending):
    return lambda tensors: tensors.pop(f"{DOWN}.{ending}")


def put(ending, make):
    def edit(tensors):
        tensors[f"{DOWN}.{ending}"] = make(tensors[f"{DOWN}.{ending}"])

    return edit


def other_zero(zeros):
    zeros = zeros.clone()
    zeros[1, 3] += 16
    return zeros


def wider_group(tensors):
    for ending in ("scales", "qzeros"):
        tensors[f"{DOWN}.{ending}"] = tensors[f"{DOWN}.{ending}"][::3].contiguous()
    tensors[f"{DOWN}.g_idx"] *= 0


@pytest.mark.parametrize(
    ("method", "edit", "message"),
    [
        ("gptq", drop("scales"), "down_proj.qweight without scales"),
        ("gptq", drop("qweight"), "no tensor model.layers.1.mlp.down_proj.weight"),
        ("gptq", put("qzeros", other_zero), "down_proj.qzeros: zero points other than the middle, 7; wanted a symm"),
        ("gptq_v2", put("qzeros", other_zero), "zero points other than the middle, 8"),
        ("awq", put("qzeros", other_zero), "zero points other than the middle, 8"),
        (
            "gptq",
            put("g_idx", lambda groups: groups.flip(0)),
            "columns in groups of an order of their own; wanted",
        ),
        ("gptq", wider_group, "has 4 bits in groups of 96; wanted 4 bits in groups of 32, 64, 128, or 8 with a scale"),
        ("gptq", put("scales", lambda scales: scales[:, :10].contiguous()), "down_proj.scales .* for 64 rows of 96"),
        ("gptq", put("scales", lambda scales: scales.int()), "wanted words I32 and scales in floating point"),
        ("gptq", put("qweight", lambda words: words.short()), "wanted words I32"),
        ("gptq", put("qweight", lambda words: words.flatten()), "of two axes"),
        ("gptq", put("qweight", lambda words: words[:, :32].contiguous()), "for 32 rows of 96 numbers"),
        ("gptq", put("qzeros", lambda zeros: zeros.half()), "down_proj.qzeros fp16; wanted I32"),
        ("gptq", put("scales", lambda scales: scales * np.inf), "has scales that are not finite in fp16"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused_in_one_line(method, edit, message, copied, tmp_path):
    folder = copied(method)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        exported(folder, tmp_path / "b", dtype="fp16")
    assert not (tmp_path / "b").exists()


def test_matrices_that_are_packed_into_one_must_have_one_format(copied, tmp_path):
    folder = copied("compressed-tensors", 4, 32)
    name = "model.layers.0.self_attn.q_proj"

    def plain(tensors):
        for ending in ("weight_packed", "weight_scale", "weight_shape"):
            tensors.pop(f"{name}.{ending}")
        tensors[f"{name}.weight"] = torch.zeros(64, 64)

    change(folder, plain)
    with pytest.raises(CheckpointError, match=r"q_proj.weight and .* are in fp32 and int4-32; wanted one format"):
        exported(folder, tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int8"}, r"qkv_proj.weight: int8 is asked for, and the checkpoint has it in int4-32; ask for no"),
        ({"layers": ("1=dtype",)}, r"layers.1.*: the dtype is asked for, and the checkpoint has it in int4-32"),
        ({"weights": "dtype"}, r"layers.0.*: the dtype is asked for, and the checkpoint has it in int4-32"),
        ({"formats": {f"{DOWN}.weight": "int8"}}, "int8 is asked for, and the checkpoint has it in int4-32"),
        (
            {"weights": "int4", "quantizer": "gptq"},
            "gptq: for weights that come quantized by gptq; give the checkpoint",
        ),
        ({"weights": "auto"}, "auto: for weights that come quantized by gptq; give the"),
    ],
)
def test_what_comes_quantized_is_not_quantized_again(settings, message, quantized, tmp_path):
    with pytest.raises(RequestError, match=message):
        exported(quantized("gptq", 4, 32)[0], tmp_path / "b", **settings)


def test_plan_and_check_want_a_checkpoint_that_is_not_quantized(quantized, tmp_path):
    folder = quantized("gptq", 4, 32)[0]
    bundle = exported(folder, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"config.json: is of a model that comes quantized; wanted one that is"):
        load_shape(str(folder))
    with pytest.raises(CheckpointError, match="comes quantized by gptq; wanted one that is not quantized; give the"):
        Golden(bundle, str(folder))
