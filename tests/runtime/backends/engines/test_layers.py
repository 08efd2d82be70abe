"""Engines of parts of layers, with our kernels between them: on stand-ins here, and on a GPU as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conftest import VARIANTS
from tests.dequantizer import dequantized_model
from tests.standin import HostDevice, StandInTensorRT, put_engines, standin_model, with_engines

import edgeskip
from edgeskip.runtime.backends import device as devices
from edgeskip.runtime.backends.engines import library
from edgeskip.runtime.backends.engines.layers import LayersSession
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.layers import PARTS
from edgeskip.runtime.bundle.profiles import engine_profiles
from edgeskip.runtime.bundle.store import EngineKind, read_engines
from edgeskip.runtime.errors import BackendError, RequestError

PROMPTS = [
    list(map(int, np.random.default_rng(seed).integers(2, 300, length))) for seed, length in enumerate((5, 40, 61))
]


@pytest.mark.parametrize("dialect", ["layers", "primitive"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_decodes_as_on_a_cpu(variant, dialect, bundles, tmp_path):
    bundle = bundles(variant)
    with (
        edgeskip.load(bundle.folder, device="cpu") as plain,
        standin_model(bundle, tmp_path / "b", HostDevice(), dialect) as model,
    ):
        for prompt in PROMPTS:
            wanted = plain.complete(prompt, confidence_threshold=0, max_new_tokens=25).token_ids
            for k in (1, 3, 8):
                assert model.complete(prompt, num_speculations=k, max_new_tokens=25).token_ids == wanted
            assert model.complete(prompt, mode="autoregressive", max_new_tokens=25).token_ids == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_for_few_rows_give_the_logits_of_the_graphs(variant, bundles, tmp_path):
    bundle = bundles(variant, dtype="fp16")
    with (
        edgeskip.load(bundle.folder, device="cpu") as plain,
        standin_model(bundle, tmp_path / "b", HostDevice(), "layers") as model,
    ):
        assert model.session._has_products == bundle.manifest.has_products(87)
        for prompt in PROMPTS:
            logits = []
            for one in (plain, model):
                one.complete(prompt, max_new_tokens=1)  # prompts in chunks of 8 rows
                logits.append(one.session.read_logits(1))
            np.testing.assert_allclose(*logits, atol=0.15)


def test_a_model_exits_after_any_layer(bundles, tmp_path, monkeypatch):
    cut_at_3, cut_at_1 = bundles("llama-gqa", exit_layer=3), bundles("llama-gqa", exit_layer=1)
    copied = with_engines(cut_at_3, tmp_path / "b", dialect="layers")
    put_engines(copied, EngineKind("tensorrt", "10.99.1", 87, "standard"))
    monkeypatch.setattr(devices, "open_gpu", lambda *_: HostDevice())
    monkeypatch.setattr(library, "import_tensorrt", lambda _: StandInTensorRT())
    with edgeskip.load(copied.folder, exit_layer=1) as model, edgeskip.load(cut_at_1.folder, device="cpu") as wanted:
        for prompt in PROMPTS:
            ours = model.complete(prompt, num_speculations=3, confidence_threshold=0, max_new_tokens=25)
            theirs = wanted.complete(prompt, num_speculations=3, confidence_threshold=0, max_new_tokens=25)
            assert ours.token_ids == theirs.token_ids
            assert ours.statistics.accepted == theirs.statistics.accepted
            for threshold in (0, 0.05):
                how = {"mode": "early-exit", "confidence_threshold": threshold, "max_new_tokens": 12}
                early, theirs = model.complete(prompt, **how), wanted.complete(prompt, **how)
                assert early.token_ids == theirs.token_ids
                assert early.statistics.trusted == theirs.statistics.trusted
    for layer in (9, 0, 1.5, "1"):
        with pytest.raises(RequestError, match=f"exit layer: {layer!r}"):
            edgeskip.load(copied.folder, exit_layer=layer)
    with pytest.raises(RequestError, match="exit layer: 1; wanted 3: the bundle is cut there"):
        edgeskip.load(copied.folder, exit_layer=1, device="cpu")
    with pytest.raises(RequestError, match="exit layer: 1; wanted 3: the bundle is cut there"):
        edgeskip.load(copied.folder, exit_layer=1, backend="onnxruntime")


FORMATS = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "head": "int4"},
    "mixed": {"weights": "int4", "head": "dtype", "layers": ("0-1=int8", "3=dtype")},
}


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2"])
def test_quantized_weights_stay_as_they_are_stored(variant, formats, bundles, reference, tmp_path):
    """Chunks of 20 rows of a prompt go through engines, fewer rows through kernels alone."""
    bundle = bundles(variant, dtype="fp16", prefill_chunk=20, **FORMATS[formats])
    judge = dequantized_model(bundle, reference(variant))
    with standin_model(bundle, tmp_path / "b", HostDevice(), "layers") as model:
        assert model.session.memory().weights == bundle.manifest.weights_bytes
        for prompt in [*PROMPTS, list(range(2, 42))]:
            model.complete(prompt, max_new_tokens=1)
            with torch.no_grad():
                wanted = judge(torch.tensor([prompt])).logits[0, -1].numpy()
            np.testing.assert_allclose(model.session.read_logits(1)[0], wanted, atol=0.15)
        for prompt, temperature in ((PROMPTS[0], 0), (PROMPTS[1], 0), (PROMPTS[1], 0.4)):
            settings = {"max_new_tokens": 20, "temperature": temperature, "seed": 5}
            texts = {
                k: model.complete(prompt, num_speculations=k, confidence_threshold=0, **settings).token_ids
                for k in (1, 4)
            }
            assert texts[1] == texts[4]


def test_quantized_layers_need_no_engines(bundles):
    profiles = {
        len(engine_profiles(bundles("llama-tied", dtype="fp16", **one).manifest, ENGINE_DIALECTS["layers"], 87))
        for one in FORMATS.values()
    }
    assert profiles == {0}
    of_head = engine_profiles(bundles("llama-tied", dtype="fp16", head="int8").manifest, ENGINE_DIALECTS["layers"], 87)
    assert set(of_head) == {*PARTS}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_rounds_may_be_longer_than_chunks_of_a_prompt(dtype, bundles, tmp_path):
    bundle = bundles("llama-gqa", dtype=dtype, prefill_chunk=2)
    with standin_model(bundle, tmp_path / "b", HostDevice(), "layers") as model:
        plain = model.complete(PROMPTS[0], mode="autoregressive", max_new_tokens=20)
        assert plain.statistics.captured_rounds > 10
        for k in (4, 16):
            assert len(model.complete(PROMPTS[0], num_speculations=k, max_new_tokens=20).token_ids) > 0


def test_weights_that_cannot_be_freed_do_not_hide_why(bundles, tmp_path, monkeypatch):
    device = HostDevice()

    def broken(*_):
        raise RuntimeError("an error that sticks")

    monkeypatch.setattr(device, "free", broken)
    copied = with_engines(bundles("llama-gqa"), tmp_path / "b", dialect="layers")
    (engines,) = read_engines(copied)
    with pytest.raises(BackendError, match="no kernel image"):
        LayersSession(copied, engines, device, StandInTensorRT(faults=["refuses"]))
