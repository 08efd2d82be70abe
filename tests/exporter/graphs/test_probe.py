"""What the probe says of every layer is what transformers computes there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tests.conftest import VARIANTS

import edgeskip
from edgeskip.exporter.graphs.probe import Probe, probe_graph
from edgeskip.runtime.bundle.manifest import WEIGHTS
from edgeskip.runtime.errors import BackendError

OLD = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)
OLD_MARK = pytest.mark.skipif(OLD, reason="ONNX Runtime has opset 24 since 1.24")
DIALECTS = ["ort", pytest.param("standard", marks=OLD_MARK)]
TEXT = np.random.default_rng(0).integers(2, 300, 40).tolist()


def golden_logits(model, ids):
    """Of the exit behind each layer, [L,T,V]; transformers' last states have passed the norm already."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        exits = [model.lm_head(model.model.norm(states)) for states in out.hidden_states[1:-1]]
    return torch.cat([*exits, out.logits])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_exit_drafts_what_transformers_does(variant, dialect, bundles, reference):
    wanted = golden_logits(reference(variant), TEXT[:-1])[
        :, 24:
    ]  # the row of the prompt's last token predicts the first
    with Probe(bundles(variant), dialect=dialect) as probe:
        found = probe.exits(TEXT[:25], TEXT[25:])
    assert found.token_ids.shape == found.confidences.shape == (4, 15)
    np.testing.assert_array_equal(found.token_ids, wanted.argmax(-1).numpy())
    np.testing.assert_allclose(found.confidences, wanted.softmax(-1).amax(-1).numpy(), rtol=1e-4)


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (1, 39), (39, 1)])
def test_texts_of_any_lengths(prompt, new, bundles, reference):
    wanted = golden_logits(reference("llama-tied"), TEXT[: prompt + new - 1])[:, prompt - 1 :].argmax(-1)
    with Probe(bundles("llama-tied")) as probe:
        found = probe.exits(TEXT[:prompt], TEXT[prompt : prompt + new])
    np.testing.assert_array_equal(found.token_ids, wanted.numpy())


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_the_last_layer_gives_the_tokens_that_were_decoded(variant, bundles):
    bundle = bundles(variant)
    with edgeskip.load(bundle.folder, device="cpu") as model:
        generation = model.complete(TEXT[:9], mode="autoregressive", max_new_tokens=60)
    with Probe(bundle) as probe:
        found = probe.exits(generation.prompt_token_ids, generation.token_ids)
    assert tuple(found.token_ids[-1]) == generation.token_ids


def test_it_is_the_same_whatever_the_bundles_exit_layer(bundles):
    found = []
    for exit_layer in (1, 3):
        with Probe(bundles("llama-gqa", exit_layer=exit_layer)) as probe:
            found.append(probe.exits(TEXT[:9], TEXT[9:]))
    np.testing.assert_array_equal(found[0].token_ids, found[1].token_ids)
    np.testing.assert_array_equal(found[0].confidences, found[1].confidences)


def test_half_precision_stays_close(bundles, reference):
    wanted = golden_logits(reference("llama-gqa"), TEXT[:-1])[:, 8:].softmax(-1).amax(-1).numpy()
    with Probe(bundles("llama-gqa", dtype="fp16")) as probe:
        found = probe.exits(TEXT[:9], TEXT[9:]).confidences
    np.testing.assert_allclose(found, wanted, rtol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_on_cuda(dtype, bundles, reference):
    wanted = golden_logits(reference("llama-gqa"), TEXT[:-1])[:, 8:].softmax(-1).amax(-1).numpy()
    with Probe(bundles("llama-gqa", dtype=dtype), "cuda") as probe:
        found = probe.exits(TEXT[:9], TEXT[9:]).confidences
    np.testing.assert_allclose(found, wanted, rtol={"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}[dtype])


def test_the_graph_holds_no_weights_and_each_once(bundles):
    bundle = bundles("llama-tied")
    model = ir.to_proto(probe_graph(bundle, "ort"))
    stored = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert {entry.value for t in stored.values() for entry in t.external_data if entry.key == "location"} == {WEIGHTS}
    assert len(model.SerializeToString()) < 200_000
    tables = [t for t in stored.values() if t.dims[:1] == [300]]
    assert [t.name for t in tables] == ["model.embed_tokens.weight"]


def test_bf16_on_a_cpu_is_refused(bundles):
    with pytest.raises(BackendError, match="in bf16, which ONNX Runtime does not compute on a CPU; export with"):
        Probe(bundles("llama-gqa", dtype="bf16"))
