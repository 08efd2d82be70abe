"""Export: a checkpoint becomes a bundle, whole or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

import edgeskip
from edgeskip.exporter.checkpoint import Checkpoint
from edgeskip.exporter.config import SYNTHETIC
from edgeskip.exporter.graphs.split import Model, split_graph
from edgeskip.exporter.index import Warn
from edgeskip.exporter.magnitude import LARGEST_FP16, beyond_fp16
from edgeskip.exporter.quantization.choice import QuantizationChoice
from edgeskip.exporter.quantization.plan import asks_for_texts, plan_quantization
from edgeskip.exporter.vocabulary.renumbering import by_frequency
from edgeskip.exporter.weights import check_tensors, plan_weights, write_weights
from edgeskip.runtime.bundle.dialects import dialects_of
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import (
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_SPECULATIONS,
    PICKERS,
    check_draft_vocabulary,
    check_exit_layers,
    check_max_length,
    check_num_speculations,
    graph_table,
    heads_of,
)
from edgeskip.runtime.bundle.layers import files_of
from edgeskip.runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Bundle,
    FileRecord,
    Manifest,
    Progress,
    chains_of,
)
from edgeskip.runtime.errors import CheckpointError, RequestError
from edgeskip.runtime.files import whole_folder, write_hashed
from edgeskip.runtime.reading import read_bytes

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class ExportSettings(QuantizationChoice):
    """How to export; what is quantized is among it.

    Args:
        exit_layer: E; layers[:E] draft, the rest verify.
        dtype: that of weights, activations and caches.
        max_length: cache capacity in tokens, prompt included; by default the model's context, at most 2048.
        num_speculations: drafts per round, unless the user asks for another number.
        prefill_chunk: prompt tokens of one call.
        other_exits: exit layers besides E from which the bundle can draft.
        draft_vocabulary: how many rows of the vocabulary, from the first on, a separate head drafts from. Ids are
            numbered anew, so that the tokens come first that are frequent in the texts for calibration; without
            texts, in those that were counted for the tokenizer, if it is one of those.
        keep_token_ids: whether drafts come from the first ids of the checkpoint instead.
        picker: how the heads pick tokens.
    """

    exit_layer: int
    dtype: DType = "fp32"
    max_length: int | None = None
    num_speculations: int = DEFAULT_SPECULATIONS
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    other_exits: tuple[int, ...] = ()
    draft_vocabulary: int | None = None
    keep_token_ids: bool = False
    picker: str = "greedy"


def export_bundle(
    checkpoint: Checkpoint,
    destination: Path,
    settings: ExportSettings,
    progress: Progress = lambda *_: None,
    warn: Warn = lambda _: None,
) -> Bundle:
    """Splits a checkpoint and writes the bundle; `warn` gets a line where the dtype may not hold the numbers, and
    where `auto` has no bits to give.

    Raises:
        RequestError: an exit layer, length, speculation length or format that the model cannot have.
        CheckpointError: tensors that do not fit the config or the dtype.
        BundleError: the destination exists or cannot be written.
    """
    capacity = _check_settings(checkpoint, settings)
    check_tensors(checkpoint)
    architecture = checkpoint.architecture
    if settings.draft_vocabulary is not None and not settings.keep_token_ids:
        checkpoint = by_frequency(checkpoint, settings.calibration)
        if not asks_for_texts(settings):
            settings = replace(settings, calibration=None)
    exits = tuple(sorted((settings.exit_layer, *settings.other_exits)))
    heads = heads_of(architecture.vocab_size, settings.draft_vocabulary, settings.picker)
    quantization = plan_quantization(checkpoint, settings, settings.dtype, exits, progress, warn)
    formats = quantization.formats
    layout = plan_weights(checkpoint, settings.dtype, capacity, formats)
    graphs = graph_table(architecture.num_layers, exits, heads)
    texts = _text_files(checkpoint)
    if settings.dtype == "fp16" and (found := beyond_fp16(checkpoint)):
        warn(
            f"{found.tensor} gives numbers of about {found.value:.0e}, and fp16 ends at {LARGEST_FP16:.0f}; "
            "export in bf16 or fp32, or compare the bundle with `edgeskip check`"
        )
    with whole_folder(destination, layout.bytes) as folder:
        files = {WEIGHTS: write_weights(checkpoint, layout, folder / WEIGHTS, quantization.quantizer, progress)}
        model = Model(architecture, settings.dtype, capacity, layout.tensors, layout.arrays)
        for dialect in dialects_of(formats.values()).values():
            for name, graph in files_of(graphs, dialect).items():
                proto = ir.to_proto(split_graph(name, graph, model, dialect.name))
                file = dialect.file.format(name)
                files[file] = _write(folder / file, proto.SerializeToString(deterministic=True))
        files |= {name: _write(folder / name, data) for name, data in texts.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            edgeskip_version=edgeskip.__version__,
            source=checkpoint.source,
            architecture=architecture,
            exit_layer=settings.exit_layer,
            exit_layers=exits,
            dtype=settings.dtype,
            formats=formats,
            max_length=capacity,
            num_speculations=settings.num_speculations,
            prefill_chunk=min(settings.prefill_chunk, capacity),
            eos_token_ids=checkpoint.eos_token_ids,
            special_tokens=checkpoint.tokenizer.special_tokens,
            heads=heads,
            graphs=graphs,
            chains=chains_of(graphs, exits),
            files=files,
            renumbered=checkpoint.order is not None,
            synthetic=bool(checkpoint.config.get(SYNTHETIC)),
            split_special_tokens=checkpoint.tokenizer.split_special_tokens,
            quantization=quantization.record,
            sampling=checkpoint.sampling,
        )
        _write(folder / MANIFEST, manifest.to_json().encode())
    return Bundle(destination, manifest)


def _check_settings(checkpoint: Checkpoint, settings: ExportSettings) -> int:
    """Returns the cache capacity."""
    layers, context = checkpoint.architecture.num_layers, checkpoint.architecture.max_position_embeddings
    check_exit_layers((settings.exit_layer, *settings.other_exits), layers)
    capacity = min(context, DEFAULT_MAX_LENGTH) if settings.max_length is None else settings.max_length
    window = checkpoint.sliding_window
    check_max_length(capacity, context, *([f"its attention window is {window}"] if window == context else []))
    check_num_speculations(settings.num_speculations)
    if settings.picker not in PICKERS:
        raise RequestError("picker", settings.picker, wanted=" or ".join(PICKERS))
    check_draft_vocabulary(settings.draft_vocabulary, checkpoint.architecture.vocab_size)
    if settings.prefill_chunk < 1:
        raise RequestError("prefill chunk", f"{settings.prefill_chunk}", wanted="at least 1")
    return capacity


def _write(path: Path, data: bytes) -> FileRecord:
    return FileRecord(*write_hashed(path, [data]))


def _text_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Tokenizer, config, chat template, and the licences under their own names."""
    paths = [checkpoint.folder / "config.json", *checkpoint.licences]
    files = {re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:200]: read_bytes(path, CheckpointError) for path in paths}
    files["tokenizer.json"] = checkpoint.tokenizer.json.encode()
    if checkpoint.tokenizer.chat_template is not None:
        files["chat_template.jinja"] = checkpoint.tokenizer.chat_template.encode()
    return files
