"""The probe: every layer of a model as an exit, in one graph over the bundle's own weights.

    embeddings of a text --> layer 1 --> layer 2 --> ... --> layer L
                                |           |                   |
                              head        head                head      of the rows that predict new tokens

It is fed a whole text. Attention is causal, so what a layer gives for a row is what it would have drafted there if
every draft before it was right, and only then is a draft tested: one run tells the match rate of every exit layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import OpBuilder

from edgeskip.exporter.formats import NUMPY_DTYPES, ONNX_DTYPES
from edgeskip.exporter.graphs.pickers import greedy
from edgeskip.exporter.graphs.split import Model, begin
from edgeskip.runtime.backends.ort import CUDA_PROVIDER, cpu_options, has_cuda_provider, onnxruntime, ort_errors
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.weights import embedding_table, stored_arrays
from edgeskip.runtime.errors import BackendError

Value = ir.Value


@dataclass(frozen=True)
class Exits:
    """What the exits of layers 1 .. L draft for the n new tokens of a text; row L-1 is the model itself.

    `token_ids` [L,n] int64, and the probability that each was given, `confidences` [L,n] fp32.
    """

    token_ids: npt.NDArray[Any]
    confidences: npt.NDArray[Any]


class Probe:
    """The probe of a bundle in ONNX Runtime; a context manager.

    On a CPU, it maps weights in fp32, and holds weights in fp16 widened to fp32. A text of T tokens takes memory for
    T x T numbers in each attention head of one layer, or for the logits of one layer's new tokens.

    Args:
        bundle: the bundle with the weights.
        device: `cuda` if ONNX Runtime should use its CUDA provider; if it has none, the CPU is used.
        draft_vocabulary: rows of the vocabulary that exits draft from; by default all.
        dialect: by default `ort`, or `standard` for fp32 on CUDA, where the fused attention has no fp32.

    Raises:
        BundleError: the weights file is not as its manifest says.
        BackendError: ONNX Runtime is missing or refuses the graph, or has to compute bf16 on a CPU.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Literal["cpu", "cuda"] = "cpu",
        draft_vocabulary: int | None = None,
        *,
        dialect: str | None = None,
    ) -> None:
        check_probed(bundle, device)
        ort, dtype, on_gpu = onnxruntime(), bundle.manifest.dtype, _on_gpu(device)
        options = cpu_options(ort, 0)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
        options.add_session_config_entry("session.disable_prepacking", "1")  # else the vocabulary is copied L times
        dialect = dialect or ("standard" if on_gpu and dtype == "fp32" else "ort")
        data = ir.to_proto(probe_graph(bundle, dialect, draft_vocabulary)).SerializeToString()
        providers = [*([CUDA_PROVIDER] if on_gpu else []), "CPUExecutionProvider"]
        with ort_errors("probe"):
            self._session = ort.InferenceSession(data, options, providers=providers)
        self._embeddings, self._dtype = embedding_table(bundle), NUMPY_DTYPES[dtype]

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._session

    def exits(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Exits:
        """Runs a prompt and the tokens [n] that followed it, at least one of each."""
        rows = self._embeddings[[*prompt_ids, *token_ids[:-1]]]
        feeds = {
            "inputs_embeds": rows.view(self._dtype).astype(np.float32)[None],
            "first": np.array([len(prompt_ids) - 1]),
        }
        with ort_errors("probe"):
            return Exits(*self._session.run(["token_ids", "confidences"], feeds))


def check_probed(bundle: Bundle, device: Literal["cpu", "cuda"]) -> None:
    """Refuses a bundle that cannot be probed.

    Raises:
        BackendError: ONNX Runtime is missing, or would have to compute bf16 on a CPU.
    """
    if not _on_gpu(device) and bundle.manifest.dtype == "bf16":
        found = "in bf16, which ONNX Runtime does not compute on a CPU"
        raise BackendError(bundle.folder, found, fix="export with --dtype fp16")


def _on_gpu(device: Literal["cpu", "cuda"]) -> bool:
    return device == "cuda" and has_cuda_provider(onnxruntime())


def probe_graph(bundle: Bundle, dialect: str, draft_vocabulary: int | None = None) -> ir.Model:
    """Writes the probe: `inputs_embeds` [1,T,H] fp32 and `first` [1], the first row that predicts, -> `Exits`.

    Args:
        bundle: the bundle with the layers, and with the weights file that the graph points into.
        dialect: `standard` or `ort`.
        draft_vocabulary: rows of the vocabulary that all layers but the last pick among; by default all.
    """
    manifest = bundle.manifest
    a, number = manifest.architecture, ONNX_DTYPES[manifest.dtype]
    model = Model(a, manifest.dtype, manifest.max_length, manifest.tensors, stored_arrays(bundle))
    writing = begin("probe", model, dialect)
    decoder, builder = writing.decoder, writing.decoder.builder
    op = builder.op
    hidden = op.Cast(builder.input("inputs_embeds", ir.DataType.FLOAT, [1, "T", a.hidden_size]), to=number)
    first = builder.input("first", ir.DataType.INT64, [1])
    length = op.Shape(hidden, start=1, end=2)
    rows = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
    # caches as long as the text, which the call itself fills
    places = writing.places(op.Unsqueeze(rows, [0]), op.Squeeze(length))
    past = op.Cast(op.ConstantOfShape(op.Concat([1], [a.num_kv_heads], length, [a.head_dim], axis=0)), to=number)
    exits = []
    for i in range(a.num_layers):
        known = draft_vocabulary if i + 1 < a.num_layers else None
        hidden, _ = decoder.layers(hidden, range(i, i + 1), {i: (past, past)}, places)
        logits = decoder.logits(op.Slice(hidden, first, length, [1]), known)
        exits.append((greedy(op, logits, {}), _top_probability(op, logits)))
    names = {"token_ids": ir.DataType.INT64, "confidences": ir.DataType.FLOAT}
    for (name, element), parts in zip(names.items(), zip(*exits, strict=True), strict=True):
        output = op.Concat(*parts, axis=0)
        output.type, output.shape = ir.TensorType(element), ir.Shape([a.num_layers, "n"])
        builder.add_output(output, name)
    return writing.finished()


def _top_probability(op: OpBuilder, logits: Value) -> Value:
    """The softmax's largest value, [1,n] of logits [1,n,V], in fp32."""
    wide = op.Cast(logits, to=ir.DataType.FLOAT)
    rest = op.Exp(op.Sub(wide, op.ReduceMax(wide, [-1], keepdims=1)))
    out: Value = op.Reciprocal(op.ReduceSum(rest, [-1], keepdims=0))
    return out
