"""GPTQ for whole models: what comes out of an export, against transformers with the dequantized weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.conftest import make_model, make_tokenizer, save_checkpoint
from tests.dequantizer import dequantized_model

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.quantization.calibrated.calibration import read_calibration
from edgeskip.exporter.quantization.calibrated.decoder import Decoder
from edgeskip.exporter.quantization.calibrated.rounding import (
    fitted_rows,
    known_inputs,
    moments_and_shifts,
    quantized_rows,
)
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.errors import CheckpointError, RequestError

EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAST = "model.layers.3.mlp.down_proj.weight"
BIASED = ["llama-gqa", "llama-tied", "llama-attention-bias", "llama-mlp-bias", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """More text than all sequences of these models' context."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"{i}: the quick brown fox has jumped {i * i} times\n" for i in range(3000)))
    return path


@pytest.fixture(scope="module")
def calibration(texts):
    return read_calibration(texts, make_tokenizer(), 96)


def stored(bundle, name):
    return load_file(bundle.path(WEIGHTS))[name]


def head_inputs(model, ids, exit_layer=2):
    """What the head reads of a text: the normed states after the exit and after the last layer, [2,T,H]."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.stack([model.model.norm(states[exit_layer])[0], states[-1][0]])


def off(model, other, calibration):
    """The squared error of what the head reads, over its squares."""
    pairs = [(head_inputs(model, ids), head_inputs(other, ids)) for ids in calibration.sequences[::4]]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


@pytest.mark.parametrize("variant", BIASED)
def test_states_of_the_calibration_s_texts_are_nearer_than_by_search(variant, bundles, reference, calibration, texts):
    model = reference(variant)
    errors = {}
    for quantizer in ("search", "gptq"):
        given = {"calibration": texts} if quantizer == "gptq" else {}
        bundle = bundles(variant, weights="int4", quantizer=quantizer, **given)
        errors[quantizer] = off(model, dequantized_model(bundle, model), calibration)
        assert bundle.manifest.quantization.method == quantizer
    assert errors["gptq"] < 0.8 * errors["search"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_same_input_gives_the_same_bytes(dtype, checkpoints, texts, tmp_path):
    settings = ExportSettings(2, dtype, weights="int4", quantizer="gptq", calibration=texts)
    made = [export_bundle(open_checkpoint(str(checkpoints("llama-tied"))), tmp_path / name, settings) for name in "ab"]
    one, other = (bundle.path(WEIGHTS).read_bytes() for bundle in made)
    assert one == other
    quantization = made[0].manifest.quantization
    assert quantization.calibration_sha256 == hashlib.sha256(texts.read_bytes()).hexdigest()
    assert quantization.seed is None


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_the_head_is_rounded_for_what_it_reads(variant, bundles, reference, calibration, texts):
    """A head of its own, and one that is the table of tokens: logits of the exit and of the last layer are nearer."""
    model = reference(variant)
    errors = []
    for quantizer in ("search", "gptq"):
        given = {"calibration": texts} if quantizer == "gptq" else {}
        other = dequantized_model(bundles(variant, head="int4", quantizer=quantizer, **given), model)
        inputs = [head_inputs(model, ids) for ids in calibration.sequences[::4]]
        with torch.no_grad():
            errors.append(sum(float((model.lm_head(x) - other.lm_head(x)).square().sum()) for x in inputs))
    assert errors[1] < 0.8 * errors[0]


def test_a_table_that_is_only_looked_up_is_searched(bundles, texts):
    made = [bundles("llama-gqa", head="int4", quantizer="gptq", calibration=texts), bundles("llama-gqa", head="int4")]
    assert np.array_equal(*(stored(bundle, EMBEDDINGS) for bundle in made))
    assert not np.array_equal(*(stored(bundle, LM_HEAD) for bundle in made))


def test_layers_that_are_not_quantized_stay_and_others_are_rounded_behind_them(bundles, reference, texts):
    bundle = bundles("llama-gqa", layers=("2=int4", "3=int8"), quantizer="gptq", calibration=texts)
    assert set(bundle.manifest.formats.values()) == {"int4-32", "int8"}
    model = reference("llama-gqa")
    other = dequantized_model(bundle, model)
    for i in range(4):
        same = torch.equal(model.model.layers[i].mlp.down_proj.weight, other.model.layers[i].mlp.down_proj.weight)
        assert same == (i < 2)


def test_each_matrix_is_rounded_for_states_that_came_through_what_is_stored(bundles, reference, calibration, texts):
    """The last one, by the inputs that it has in transformers with the stored weights before it, and without them."""
    bundle = bundles("llama-gqa", weights="int4", quantizer="gptq", calibration=texts)
    model = reference("llama-gqa")
    inputs, wanted = (down_inputs(one, calibration) for one in (dequantized_model(bundle, model), model))
    with torch.no_grad():
        weight = model.model.layers[3].mlp.down_proj.weight
        moments, shifts = moments_and_shifts(weight, inputs, wanted)
        known = known_inputs(moments, 32)
        numbers, scales = quantized_rows("int4-32", fitted_rows(weight, shifts, known), known, "fp32")
    assert (numbers == stored(bundle, LAST)).mean() > 0.97  # but for what rounding to fp32 decides
    assert np.isclose(scales, stored(bundle, f"{LAST}.scales")).mean() > 0.9


def down_inputs(model, calibration):
    """What the last layer's DOWN reads of each text, [T,F]."""
    inputs = []
    down = model.model.layers[3].mlp.down_proj
    hook = down.register_forward_hook(lambda _, given, __: inputs.append(given[0][0]))
    with torch.no_grad():
        for ids in calibration.sequences:
            model(torch.tensor([list(ids)]))
    hook.remove()
    return inputs


def test_progress_counts_every_matrix(checkpoints, texts, tmp_path):
    told = []
    settings = ExportSettings(2, weights="int4", quantizer="gptq", calibration=texts)
    checkpoint = open_checkpoint(str(checkpoints("llama-tied")))
    export_bundle(checkpoint, tmp_path / "b", settings, lambda *given: told.append(given))
    assert [done for what, done, total in told if what == "quantizing"] == list(range(16))
    assert [(done, total) for what, done, total in told if what == "reading texts"] == [(i, 4) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "gptq: nothing is quantized; choose a format of weights or head"),
        (
            {"weights": "int4", "quantizer": "search", "calibration": "here"},
            "here: texts for a search, .*; leave",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message, checkpoints, tmp_path):
    settings = {"quantizer": "gptq"} | settings
    with pytest.raises(RequestError, match=message):
        export_bundle(open_checkpoint(str(checkpoints("llama-tied"))), tmp_path / "b", ExportSettings(2, **settings))
    assert not (tmp_path / "b").exists()


def test_a_model_that_gives_no_numbers_is_refused(texts, tmp_path):
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e38)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e10)
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    settings = ExportSettings(2, weights="int4", quantizer="gptq", calibration=texts)
    with pytest.raises(CheckpointError, match="calibration texts: give numbers that are not finite"):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "b", settings)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("free", "device"), [(1 << 36, "cuda"), (1 << 20, "cpu")])
def test_a_gpu_is_taken_where_there_is_room_for_the_work(free, device, checkpoints, calibration, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    with TensorReader(open_checkpoint(str(checkpoints("llama-gqa")))) as reader:
        assert Decoder(reader, {}, "fp32", calibration, (2,)).device.type == device
