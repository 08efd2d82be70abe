"""ONNX Runtime's graphs: what they share with us."""

from __future__ import annotations

import numpy as np
import onnxruntime

from edgeskip.runtime.backends.ort import cpu_options, value_at
from edgeskip.runtime.bundle.tensors import EMBEDDINGS
from edgeskip.runtime.bundle.weights import embedding_table


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
