"""A draft head over some rows of the vocabulary changes which drafts are made, and never a token of the text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from tests.conftest import VOCAB
from tests.runtime.decoding.test_decode import assert_same_but_for_ties, prompts
from tests.standin import HostDevice, standin_model

import edgeskip
from edgeskip.exporter.engines.build import BuildSettings, build_engines
from edgeskip.runtime.bundle.manifest import WEIGHTS, read_bundle

ROWS = 200
FORMATS = {"dtype": {}, "int8": {"weights": "int8"}, "int4": {"weights": "int4", "head": "int4"}}


def split_of(bundles, variant, dtype, **settings):
    """A bundle with a draft head, whose weights file has not one byte more than without."""
    settings = {"exit_layer": 3, "dtype": dtype, **settings}
    bundle = bundles(variant, draft_vocabulary=ROWS, **settings)
    assert bundle.manifest.draft_vocabulary == ROWS
    assert bundle.manifest.files[WEIGHTS].bytes == bundles(variant, **settings).manifest.files[WEIGHTS].bytes
    return bundle


def assert_drafts_change_no_token(model, lengths):
    """Greedy and drawn texts with drafts are those without; drafts are among the rows that their head knows."""
    accepted = 0
    for number, prompt in enumerate(prompts(2, seed=5)):
        for picking in ({}, {"temperature": 0.7, "seed": number}):
            plain = model.complete(prompt, mode="autoregressive", max_new_tokens=20, **picking)
            for k in lengths:
                ours = model.complete(prompt, num_speculations=k, confidence_threshold=0, max_new_tokens=20, **picking)
                if picking:
                    assert ours.token_ids == plain.token_ids or not model.session.exact
                else:
                    assert_same_but_for_ties(model, prompt, ours.token_ids, plain.token_ids)
                accepted += ours.statistics.accepted
    assert accepted


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_texts_are_those_of_plain_decoding(variant, backend, bundles):
    with backend.load(split_of(bundles, variant, backend.dtype)) as model:
        assert_drafts_change_no_token(model, range(1, 9))


@pytest.mark.parametrize(
    ("variant", "formats"), [("llama-tied", "dtype"), ("llama-gqa", "int8"), ("llama-tied", "int4")]
)
def test_texts_are_those_of_plain_decoding_in_any_format(variant, formats, bundles, tmp_path):
    """On a CPU, where rows are exact, and with kernels for engines of parts of layers."""
    bundle = split_of(bundles, variant, "fp16", **FORMATS[formats])
    with edgeskip.load(bundle.folder, device="cpu") as model:
        assert_drafts_change_no_token(model, (4,))
    with standin_model(bundle, tmp_path / "b", HostDevice(), "layers") as model:
        assert model.session.memory().weights == bundle.manifest.weights_bytes  # nothing twice
        assert_drafts_change_no_token(model, (3,))


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("backend_name", ["onnxruntime", "tensorrt"])
def test_texts_on_a_gpu_are_those_of_plain_decoding_in_any_format(backend_name, formats, bundles, tmp_path):
    source = split_of(bundles, "llama-tied", "fp16", **FORMATS[formats])
    shutil.copytree(source.folder, tmp_path / "b")
    if backend_name == "tensorrt":
        pytest.importorskip("tensorrt")
        build_engines(read_bundle(tmp_path / "b"), BuildSettings("tensorrt", dialect="layers"))
    with edgeskip.load(tmp_path / "b", backend=backend_name, device="auto") as model:
        assert_drafts_change_no_token(model, range(1, 9))


def test_drafts_are_tokens_that_their_head_knows(bundles):
    """Where the model's own token is none of them, the draft before it is wrong, and the text is right."""
    bundle = bundles("llama-gqa", exit_layer=3, draft_vocabulary=ROWS)
    drafted, beyond = [], 0
    with edgeskip.load(bundle.folder, device="cpu") as model:
        for prompt in prompts(6, seed=1):
            generation = model.complete(prompt, num_speculations=4, confidence_threshold=0, max_new_tokens=30)
            beyond += sum(token >= ROWS for token in generation.token_ids)
            drafted += model.session._buffers["draft_token_ids"][:4].tolist()
        confidence = model.session.draft_confidence(0, ROWS)
    assert beyond
    assert max(drafted) < ROWS < VOCAB
    assert 0 < confidence <= 1
    assert np.isfinite(confidence)
