"""Export: a checkpoint becomes a bundle, whole or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import edgeskip
from edgeskip.exporter.checkpoint import Checkpoint
from edgeskip.exporter.config import SYNTHETIC, read_json
from edgeskip.exporter.split import split_graph
from edgeskip.exporter.weights import plan_weights, write_weights
from edgeskip.runtime.bundle.architecture import DType
from edgeskip.runtime.bundle.graphs import (
    CHAINS,
    DEFAULT_SPECULATIONS,
    DIALECTS,
    GRAPHS,
    check_exit_layer,
    check_num_speculations,
    graph_table,
)
from edgeskip.runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Bundle,
    FileRecord,
    Manifest,
    Progress,
)
from edgeskip.runtime.errors import CheckpointError, RequestError, reason
from edgeskip.runtime.files import whole_folder, write_hashed

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Args:
        exit_layer: E; layers[:E] draft, the rest verify.
        dtype: of weights, activations and caches.
        max_length: cache capacity in tokens, prompt included; by default the model's context, at most 2048.
        num_speculations: drafts a round, unless the user asks for another number.
        prefill_chunk: prompt tokens of one call.
    """

    exit_layer: int
    dtype: DType = "fp32"
    max_length: int | None = None
    num_speculations: int = DEFAULT_SPECULATIONS
    prefill_chunk: int = 128


def export_bundle(
    checkpoint: Checkpoint, destination: Path, settings: ExportSettings, progress: Progress = lambda *_: None
) -> Bundle:
    """Splits a checkpoint and writes the bundle.

    Raises:
        RequestError: an exit layer, length or speculation length that the model cannot have.
        CheckpointError: tensors that do not fit the config or the dtype.
        BundleError: the destination exists or cannot be written.
    """
    capacity = _check_settings(checkpoint, settings)
    architecture = checkpoint.architecture
    layout = plan_weights(checkpoint, settings.dtype, capacity)
    tokenizer_config = _tokenizer_config(checkpoint.folder)
    texts = _text_files(checkpoint, tokenizer_config)
    with whole_folder(destination, layout.bytes) as folder:
        files = {WEIGHTS: write_weights(checkpoint, layout, folder / WEIGHTS, progress)}
        table = graph_table(architecture.num_layers, settings.exit_layer)
        for dialect, pattern in DIALECTS.items():
            for name in GRAPHS:
                model = split_graph(name, table[name], architecture, layout, dialect)
                data = ir.to_proto(model).SerializeToString(deterministic=True)
                files[pattern.format(name)] = _write(folder / pattern.format(name), data)
        files |= {name: _write(folder / name, data) for name, data in texts.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            edgeskip_version=edgeskip.__version__,
            source=checkpoint.source,
            architecture=architecture,
            exit_layer=settings.exit_layer,
            dtype=settings.dtype,
            max_length=capacity,
            num_speculations=settings.num_speculations,
            prefill_chunk=min(settings.prefill_chunk, capacity),
            eos_token_ids=checkpoint.eos_token_ids,
            bos_token=_special_token(tokenizer_config, "bos_token"),
            eos_token=_special_token(tokenizer_config, "eos_token"),
            graphs={str(name): graph for name, graph in table.items()},
            chains={name: tuple(chain) for name, chain in CHAINS.items()},
            files=files,
            synthetic=bool(checkpoint.config.get(SYNTHETIC)),
        )
        _write(folder / MANIFEST, manifest.to_json().encode())
    return Bundle(destination, manifest)


def _check_settings(checkpoint: Checkpoint, settings: ExportSettings) -> int:
    """Returns the cache capacity."""
    layers, context = checkpoint.architecture.num_layers, checkpoint.architecture.max_position_embeddings
    check_exit_layer(settings.exit_layer, layers)
    capacity = min(context, DEFAULT_MAX_LENGTH) if settings.max_length is None else settings.max_length
    if not 2 <= capacity <= context:
        window = checkpoint.sliding_window
        reason = f"its attention window is {window}" if window == context else "the model's context"
        raise RequestError("max length", f"{capacity}", wanted=f"2 to {context}: {reason}")
    check_num_speculations(settings.num_speculations)
    if settings.prefill_chunk < 1:
        raise RequestError("prefill chunk", f"{settings.prefill_chunk}", wanted="at least 1")
    return capacity


def _write(path: Path, data: bytes) -> FileRecord:
    return FileRecord(*write_hashed(path, [data]))


def _text_files(checkpoint: Checkpoint, tokenizer_config: dict[str, Any]) -> dict[str, bytes]:
    """Tokenizer, config, chat template and licences, under their own names."""
    paths = [checkpoint.folder / name for name in ("tokenizer.json", "config.json")]
    template = checkpoint.folder / "chat_template.jinja"
    paths += [*([template] if template.is_file() else []), *checkpoint.licences()]
    try:
        files = {re.sub(r"[^A-Za-z0-9._-]", "_", path.name): path.read_bytes() for path in paths}
    except OSError as error:
        raise CheckpointError(error.filename, f"cannot be read ({reason(error)})") from None
    inline = tokenizer_config.get("chat_template")
    if isinstance(inline, list):  # several, by name
        named = [item for item in inline if isinstance(item, dict) and item.get("name") == "default"]
        inline = named[0].get("template") if named else None
    if isinstance(inline, str):
        files.setdefault("chat_template.jinja", inline.encode())
    return files


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _special_token(tokenizer_config: dict[str, Any], name: str) -> str:
    """The text of a special token, which may be spelled out as a table; empty where there is none."""
    token = tokenizer_config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
