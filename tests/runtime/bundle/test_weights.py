"""A weights file is read only as what the manifest calls for: safetensors' own library judges what is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file
from tests.conftest import edit_json

import edgeskip
from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.backends.ort import cpu_options
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD
from edgeskip.runtime.bundle.weights import embedding_table, held_bytes, stored_arrays
from edgeskip.runtime.errors import BundleError

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(bundles, tmp_path):
    """A copy of a bundle to spoil."""
    return Path(shutil.copytree(bundles("llama-gqa").folder, tmp_path / "bundle"))


def rewrite(folder, data):
    """Other weights, with the size and the hash that the manifest has for them."""
    (folder / WEIGHTS).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder / MANIFEST, lambda m: m["files"].update({WEIGHTS: record}))


def with_header(folder, change):
    """The weights with their header changed, by itself or in place."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def assert_refused(folder, message):
    with pytest.raises(BundleError, match=message) as caught:
        edgeskip.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_tensors_are_where_safetensors_finds_them(bundles):
    for variant, settings in (("llama-tied", {}), ("qwen3", {"dtype": "fp16"}), ("llama-odd-head-dim", {})):
        bundle = bundles(variant, **settings)
        whole = bundle.path(WEIGHTS).read_bytes()
        library = {name: array for name, array in load_file(bundle.path(WEIGHTS)).items() if "padding" not in name}
        stored = stored_arrays(bundle)
        assert stored.keys() == library.keys()
        for name, tensor in stored.items():
            assert tensor.shape == library[name].shape
            assert whole[tensor.offset : tensor.offset + tensor.bytes] == library[name].tobytes()
        np.testing.assert_array_equal(embedding_table(bundle)[:], library[EMBEDDINGS])


def shifted(entry, by):
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def exchanged(header, one, other):
    header[one], header[other] = header[other], header[one]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[NORM].update(dtype="F16"), f'{NORM} is .*"F16".*; wanted .*"F32"'),
        (lambda h: h[NORM].update(dtype="F16", shape=[128]), f"{NORM} is"),
        (lambda h: h[NORM].update(dtype=7), f"{NORM} is"),
        (lambda h: h[NORM].pop("dtype"), f"{NORM} is"),
        (lambda h: h[NORM].update(shape=[63]), f"{NORM} is"),
        (lambda h: h[NORM].update(shape=[8, 8]), f"{NORM} is"),
        (lambda h: h[NORM].update(shape=[64.0]), f"{NORM} is"),
        (lambda h: h[NORM].update(shape=[-64]), f"{NORM} is"),
        (lambda h: h[NORM].update(shape=[10**30]), f"{NORM} is"),
        (lambda h: h[NORM].update(shape="64"), f"{NORM} is"),
        (lambda h: shifted(h[NORM], 64), f"{NORM} is"),
        (lambda h: shifted(h[NORM], -64), f"{NORM} is"),
        (lambda h: h[NORM].update(data_offsets=[0]), f"{NORM} is"),
        (lambda h: h[NORM].update(data_offsets=None), f"{NORM} is"),
        (lambda h: h[EMBEDDINGS].update(shape=[299, 64]), f"{EMBEDDINGS} is"),
        (lambda h: exchanged(h, NORM, NORM.replace("0", "1")), f"{NORM} is"),
        (lambda h: h.update({NORM: None}), f"{NORM} is missing"),
        (lambda h: h.update({NORM: [1]}), f"{NORM} is"),
        (lambda h: h.pop(NORM), f"{NORM} is missing"),
        (lambda h: h.update(more=h[NORM]), "has 'more', which the manifest does not call for"),
        (lambda h: h.update({"x" * 1_000_000: 1}), "weights.safetensors: has 'xxx"),
        (lambda h: h.update(__metadata__=3), "__metadata__ is 3; wanted a table of texts"),
        (lambda h: h.update(__metadata__={"format": 3}), "__metadata__ is"),
        (lambda h: h.update(__metadata__={"format": "x" * 64}), "a header of [0-9]+ bytes; wanted [0-9]+;"),
        (lambda h: json.dumps(h, indent=8).encode(), "a header of [0-9]+ bytes; wanted [0-9]+;"),
        (lambda h: b"[]", "its header is \\[\\]; wanted a table of tensors"),
        (lambda h: b"null", "its header is None"),
        (lambda h: b"{", "not valid JSON"),
        (lambda h: b"\xff", "not valid JSON"),
        (lambda h: b"[" * 100_000, "not valid JSON"),
        (lambda h: b'{"a":' * 90 + b"1" + b"}" * 90, "not valid JSON .nested more than 64 deep"),
        (lambda h: b"", "a header of 0 bytes"),
    ],
)
def test_a_header_that_does_not_fit_the_manifest(change, message, folder):
    rewrite(folder, with_header(folder, change))
    assert_refused(folder, message)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_that_does_not_fit_the_file(size, folder):
    rewrite(folder, size.to_bytes(8, "little") + (folder / WEIGHTS).read_bytes()[8:])
    assert_refused(folder, f"a header of {size} bytes in a file of|not valid JSON")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -64, -1])
def test_a_file_cut_short(length, folder):
    rewrite(folder, (folder / WEIGHTS).read_bytes()[:length])
    assert_refused(folder, "bytes in a file of|by its manifest")


def test_a_file_with_more_at_its_end(folder):
    size = (folder / WEIGHTS).stat().st_size
    rewrite(folder, (folder / WEIGHTS).read_bytes() + bytes(64))
    assert_refused(folder, f"{size + 64} bytes; wanted {size}, by its manifest")


def test_another_dtype_in_the_manifest(folder):
    edit_json(folder / MANIFEST, lambda m: m.update(dtype="fp16"))
    assert_refused(folder, "by its manifest")


def test_a_header_is_looked_at_before_a_session_is_made(folder, monkeypatch):
    monkeypatch.setattr(cpu_session, "OrtCpuSession", lambda *_, **__: pytest.fail("made"))
    rewrite(folder, with_header(folder, lambda h: h.pop(NORM)))
    assert_refused(folder, f"{NORM} is missing")
    assert read_bundle(folder).manifest.exit_layer == 2


@pytest.mark.parametrize("head", ["int4", "int8"])
@pytest.mark.parametrize("variant", ["llama-tied", "llama-gqa"])
def test_what_a_head_holds_is_what_onnx_runtime_leaves_of_it(variant, head, bundles, tmp_path):
    """By the initializers of the graph that ONNX Runtime computes with: of a quantized table that is tied, both the one
    that is multiplied and the one that rows are gathered from; the file has it once.
    """
    bundle = bundles(variant, head=head, dtype="fp16")
    options = cpu_options(onnxruntime, 0)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(bundle.graph_path("head", "ort"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.INT64: 64}
    left = sum(np.prod(one.dims, dtype=int) * bits.get(one.data_type, 8) // 8 for one in graph.initializer)
    read = sum(one.bytes for name, one in stored_arrays(bundle).items() if name.startswith((EMBEDDINGS, LM_HEAD)))
    assert held_bytes(bundle) - bundle.manifest.weights_bytes + read == pytest.approx(left, rel=0.07)
