"""How much a matrix loses by 4 bits, against transformers, and what an export makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conftest import VOCAB
from tests.dequantizer import dequantized_model
from tests.exporter.quantization.test_budget import average_bits

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.quantization.calibrated.allocation import matrix_effects
from edgeskip.exporter.quantization.calibrated.calibration import Calibration
from edgeskip.exporter.quantization.calibrated.decoder import Decoder
from edgeskip.runtime.bundle.tensors import bundle_tensors
from edgeskip.runtime.errors import RequestError

KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
MATRICES = [f"model.layers.{i}.{kind}.weight" for i in range(4) for kind in KINDS]
SEQUENCES = tuple(tuple(np.random.default_rng(i).integers(0, VOCAB, 40 + i).tolist()) for i in range(3))


def head_inputs(model, exit_layer):
    """The normed states after the exit and the last layer, each of all texts, [2,T,H]."""
    kept = []
    with torch.no_grad():
        for ids in SEQUENCES:
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            kept.append(torch.stack([model.model.norm(states[exit_layer])[0], states[-1][0]]))
    return torch.cat(kept, dim=1)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "qwen3"])
def test_an_effect_is_what_the_matrix_alone_does_to_the_head_s_inputs(variant, bundles, checkpoints, reference):
    checkpoint = open_checkpoint(str(checkpoints(variant)))
    names = [*MATRICES[:5], MATRICES[-1]]
    tensors = bundle_tensors(checkpoint.architecture, 0, "fp32", dict.fromkeys(MATRICES, "int4-32"))
    told = []
    with TensorReader(checkpoint) as reader:
        decoder = Decoder(reader, tensors, "fp32", Calibration(SEQUENCES, ""), (1,))
        found = matrix_effects(decoder, names, lambda *given: told.append(given[1:]))
    assert told == [(i, 4) for i in (1, 2, 3, 4)]
    wanted = head_inputs(reference(variant), 1)
    for name in names:
        other = dequantized_model(bundles(variant, formats={name: "int4-32"}), reference(variant))
        errors = (head_inputs(other, 1) - wanted).square().sum(dim=(1, 2)) / wanted.square().sum(dim=(1, 2))
        assert found[name] == pytest.approx(float(errors.sum()), rel=0.01)


@pytest.mark.parametrize("quantizer", ["search", "gptq"])
def test_an_export_keeps_the_bits_and_leaves_chosen_layers_alone(quantizer, bundles):
    bundle = bundles("llama-gqa", weights="auto", bits=5.75, layers=("1=int8",), dtype="fp16", quantizer=quantizer)
    formats, tensors = bundle.manifest.formats, bundle.manifest.tensors
    matrices = {name: tensors[name] for name in MATRICES}
    wider = [name for name in MATRICES if formats[name] == "int8"]
    assert {name for name in wider if ".1." in name} == {name for name in MATRICES if ".1." in name}
    assert {formats[name] for name in MATRICES} == {"int8", "int4-32"}
    assert len(wider) > 4
    assert average_bits(matrices, wider) <= 5.75
    assert bundle.manifest.quantization.method == quantizer
    assert len(bundle.manifest.quantization.calibration_sha256) == 64


def test_without_bits_the_same_matrices_get_8_in_each_dtype(bundles):
    """A scale of 32 bits for 32 numbers leaves 5 bits no room, so fp32 takes half a bit more."""
    of_dtype = {dtype: bundles("llama-gqa", weights="auto", dtype=dtype).manifest.formats for dtype in ("fp32", "fp16")}
    wider = [{name for name in MATRICES if formats[name] == "int8"} for formats in of_dtype.values()]
    assert wider[0] == wider[1]
    assert wider[0]


def test_bits_that_leave_nothing_to_choose_are_warned_of(checkpoints, tmp_path):
    settings, told = ExportSettings(2, "fp32", weights="auto", bits=5.0), []
    export_bundle(open_checkpoint(str(checkpoints("llama-gqa"))), tmp_path / "b", settings, warn=told.append)
    assert len(told) == 1
    assert "5 bits have room for no matrix in 8 bits: with its scales in fp32, one in 4 takes as much; give" in told[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "auto", "bits": 4.0}, "bits: 4; wanted 4.5 to 8"),
        ({"weights": "int4", "bits": 5.0}, "bits: 5, for weights that are not `auto`; leave it out"),
        ({"weights": "auto", "layers": ("0-3=int8",)}, "bits: 5; wanted 8"),
    ],
)
def test_bits_that_cannot_be_are_refused(settings, message, checkpoints, tmp_path):
    settings = ExportSettings(2, "fp16", **settings)
    with pytest.raises(RequestError, match=message):
        export_bundle(open_checkpoint(str(checkpoints("llama-gqa"))), tmp_path / "b", settings)
    assert not (tmp_path / "b").exists()
