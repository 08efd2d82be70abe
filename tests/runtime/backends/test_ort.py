"""ONNX Runtime's graphs: what they share with us."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import onnxruntime
import pytest
import torch
from tests.conftest import make_model, save_checkpoint

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.backends.ort import OrtGraphs, cpu_options, value_at
from edgeskip.runtime.bundle.tensors import EMBEDDINGS
from edgeskip.runtime.bundle.weights import embedding_table
from edgeskip.runtime.host import anonymous_bytes


def test_a_graph_reads_a_table_where_it_lies(bundles):
    bundle = bundles("llama-tied")
    table = -embedding_table(bundle)[:]
    value, options = value_at(onnxruntime, table.ctypes.data, table.shape, "fp32", "cpu"), cpu_options(onnxruntime, 0)
    options.add_initializer(EMBEDDINGS, value)
    states = {"hidden_states": np.random.default_rng(0).normal(size=(1, 1, table.shape[1])).astype("f")}
    path, names = bundle.graph_path("head", "cpu"), ["token_ids", "inputs_embeds", "logits"]
    ((own,),), _, own_logits = onnxruntime.InferenceSession(path, cpu_options(onnxruntime, 0)).run(names, states)
    head = onnxruntime.InferenceSession(path, options)
    ((token,),), embeddings, logits = head.run(names, states)
    assert token != own
    np.testing.assert_allclose(logits, -own_logits, rtol=1e-5)
    np.testing.assert_array_equal(embeddings[0, 0], table[token])
    table[token] = 7  # products may have a copy on a CPU; rows are gathered from here
    assert (head.run(names, states)[1] == 7).all()


def test_values_are_in_every_dtype():
    numbers = np.arange(64, dtype="f")
    for dtype, kind in (("fp32", "float"), ("fp16", "float16"), ("bf16", "bfloat16")):
        value = value_at(onnxruntime, numbers.ctypes.data, (4, 8), dtype, "cpu")
        assert (value.shape(), value.data_type(), value.data_ptr()) == ([4, 8], f"tensor({kind})", numbers.ctypes.data)


@pytest.mark.skipif(not anonymous_bytes(), reason="the system does not tell")
def test_loading_takes_hardly_more_memory_than_it_keeps(tmp_path):
    """Copies that are made of 150 MB of quantized weights, by graphs that are loaded side by side or one by one."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = make_model("llama-gqa", **sizes, vocab_size=32_000, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(save_checkpoint(model.to(torch.bfloat16), tmp_path / "checkpoint")))
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(2, weights="int8", head="int8"))
    code = (
        "import json, sys, threading, onnxruntime, edgeskip\n"
        "from edgeskip.runtime.host import anonymous_bytes\n"
        "before, ended = anonymous_bytes(), threading.Event()\n"
        "peak = before\n"
        "def watch():\n"
        "    global peak\n"
        "    while not ended.wait(0.001): peak = max(peak, anonymous_bytes())\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "model = edgeskip.load(sys.argv[1], backend='onnxruntime', device='cpu', threads=int(sys.argv[2]))\n"
        "ended.set()\n"
        "print(json.dumps([model.bundle.manifest.weights_bytes, peak - before, anonymous_bytes() - before]))\n"
    )
    for threads in ("0", "1"):
        command = [sys.executable, "-c", code, str(tmp_path / "bundle"), threads]
        copies = []
        for _ in range(3):  # a busy machine may be late to notice
            weights, peak, kept = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            assert kept > weights > 140e6
            copies.append(peak - kept)
        assert min(copies) < weights / 8


def test_freed_memory_is_watched_only_while_a_cpu_session_loads(bundles):
    """Graphs by themselves, as a session on CUDA loads them, start no thread."""
    threads = []

    def options(graph):
        threads.append(threading.active_count())
        return cpu_options(onnxruntime, 0)

    before = threading.active_count()
    OrtGraphs(onnxruntime, bundles("llama-gqa"), "cpu", options, [("CPUExecutionProvider", {})]).close()
    assert threads == [before] * 3
