"""The bundle's weights file: laid out first, then streamed.

    checkpoint                                     bundle
    q_proj, k_proj, v_proj  [rows, H] each   ->    self_attn.qkv_proj     [q rows | k rows | v rows, H]
    gate_proj, up_proj      [F, H] each      ->    mlp.gate_up_proj       [2F, H]
    everything else                          ->    the same name, once
    (computed)                               ->    rope.cos, rope.sin     [C, D/2]

The safetensors library writes from memory in an order of its own; a 70B model does not fit there, so the header
is written here, before the data, and the data follows by blocks of rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.runtime.bundle.architecture import ITEMSIZE, DType, Rope
from edgeskip.runtime.bundle.manifest import FileRecord, Progress
from edgeskip.runtime.bundle.tensors import bundle_tensors
from edgeskip.runtime.errors import CheckpointError

NUMPY_DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_SAFETENSORS_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the bundle: its shape, the checkpoint's tensors that make up its rows, and its place.

    `offset` and `bytes` are within the file, header included, as ONNX external data wants them.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class WeightsLayout:
    """The whole file before it is written."""

    dtype: DType
    header: bytes
    tensors: dict[str, PlacedTensor]
    bytes: int


def plan_weights(checkpoint: Checkpoint, dtype: DType, capacity: int) -> WeightsLayout:
    """Lays out the weights file.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype is not what the config calls for.
    """
    architecture = checkpoint.architecture
    wanted = bundle_tensors(architecture)
    for shape, sources in wanted.values():
        for source, rows in sources:
            _check_stored(checkpoint, source, (rows, *shape[1:]))
    _refuse_unused(checkpoint, {source for _, sources in wanted.values() for source, _ in sources})
    shapes = {name: (shape, tuple(s for s, _ in sources)) for name, (shape, sources) in wanted.items()}
    for table in ("rope.cos", "rope.sin"):
        shapes[table] = ((capacity, architecture.head_dim // 2), ())
    entries: dict[str, object] = {"__metadata__": {"format": "edgeskip"}}
    position = 0
    for name, (shape, _) in shapes.items():
        size = math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = _entry(_SAFETENSORS_NAMES[dtype], shape, position, size)
        position += size
        if gap := -position % _ALIGNMENT:  # the format allows no holes: a gap is a tensor too
            entries[f"padding.{position}"] = _entry("U8", (gap,), position, gap)
            position += gap
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = {}
    for name, (shape, sources_) in shapes.items():
        start, end = entries[name]["data_offsets"]  # type: ignore[index]
        tensors[name] = PlacedTensor(name, shape, sources_, len(header) + start, end - start)
    return WeightsLayout(dtype, header, tensors, len(header) + position)


def write_weights(
    checkpoint: Checkpoint, layout: WeightsLayout, path: Path, progress: Progress = lambda *_: None
) -> FileRecord:
    """Streams the weights into `path`, converted to the layout's dtype, and hashes them on the way.

    Raises:
        CheckpointError: a value is not finite in the wanted dtype.
    """
    digest = hashlib.sha256()
    written = 0
    under_way: list[Future[Any]] = []
    with TensorReader(checkpoint) as reader, path.open("wb") as file, ThreadPoolExecutor(2) as pool:

        def write(block: bytes | memoryview) -> None:
            """Writes and hashes a block while the next one is read and converted."""
            nonlocal written
            wait()
            under_way.extend((pool.submit(file.write, block), pool.submit(digest.update, block)))
            written += len(block)
            progress("writing weights", written, layout.bytes)

        def wait() -> None:
            while under_way:
                under_way.pop().result()

        write(layout.header)
        for tensor in layout.tensors.values():
            write(b"\0" * (tensor.offset - written))
            for block in _converted(checkpoint, reader, tensor, layout.dtype):
                write(_bytes(block))
        write(b"\0" * (layout.bytes - written))
        wait()
    return FileRecord(written, digest.hexdigest())


def rope_tables(rope: Rope, head_dim: int, capacity: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Cosines and sines [C, D/2] in fp32 of RoPE (arXiv 2104.09864) at positions 0..C-1.

    `llama3` scales as Llama 3.1 does: wavelengths beyond the original context over `low_freq_factor` are stretched
    by `factor`, those under it over `high_freq_factor` are kept, and between the two it blends.
    """
    inv_freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    inv_freq = inv_freq.astype(np.float32)
    if rope.type == "linear":
        inv_freq /= np.float32(rope.factor)
    elif rope.type == "llama3":
        context = rope.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        blend = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        inv_freq = ((1 - blend) * inv_freq / rope.factor + blend * inv_freq).astype(np.float32)
    angles = np.outer(np.arange(capacity, dtype=np.float32), inv_freq)
    return np.cos(angles), np.sin(angles)


def _entry(dtype: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}


def _check_stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise CheckpointError(checkpoint.folder, f"no tensor {name}", fix="is config.json of another model?")
    if stored.shape != shape:
        raise CheckpointError(
            stored.file, f"{name} has shape {list(stored.shape)}", wanted=f"{list(shape)}, by config.json"
        )
    if stored.dtype not in NUMPY_DTYPES:
        raise CheckpointError(
            stored.file,
            f"{name} has dtype {stored.dtype}",
            wanted="F32, F16 or BF16",
            fix="export an unquantized model",
        )


def _refuse_unused(checkpoint: Checkpoint, used: set[str]) -> None:
    """A tensor that nothing reads means a model that config.json does not describe."""
    for name in checkpoint.tensors:
        tied = checkpoint.architecture.tie_word_embeddings and name == "lm_head.weight"
        if name not in used and not tied and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                checkpoint.tensors[name].file,
                f"has {name}, for which config.json has no place",
                fix="is config.json of another model?",
            )


def _converted(
    checkpoint: Checkpoint, reader: TensorReader, tensor: PlacedTensor, dtype: DType
) -> Iterator[npt.NDArray[Any]]:
    """A bundle tensor's rows, in its dtype."""
    target = NUMPY_DTYPES[dtype]
    if not tensor.sources:
        a = checkpoint.architecture
        cos, sin = rope_tables(a.rope, a.head_dim, tensor.shape[0])
        yield (cos if tensor.name == "rope.cos" else sin).astype(target)
        return
    for source in tensor.sources:
        for block in reader.blocks(source):
            with np.errstate(over="ignore", invalid="ignore"):
                converted = block.astype(target, copy=False)
            if not _is_finite(converted):
                raise CheckpointError(
                    checkpoint.tensors[source].file,
                    f"{source} has values that are not finite in {dtype}",
                    fix="export in another dtype" if np.isfinite(block).all() else "the checkpoint is damaged",
                )
            yield converted


def _is_finite(block: npt.NDArray[Any]) -> bool:
    """Whether there is no infinity and no NaN; by their bits where numbers have 16, which is faster."""
    if block.dtype.itemsize != 2:
        return bool(np.isfinite(block).all())
    infinity = 0x7C00 if block.dtype == np.float16 else 0x7F80
    return bool((block.view(np.uint16) & 0x7FFF).max(initial=0) < infinity)


def _bytes(block: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
