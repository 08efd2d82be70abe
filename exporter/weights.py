"""The bundle's weights file: laid out first, then streamed.

The safetensors library writes from memory in an order of its own; a 70B model does not fit there, so the header
is written here, before the data, and the data follows by blocks of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.exporter.formats import NUMPY_DTYPES, WRITERS
from edgeskip.exporter.index import READABLE
from edgeskip.exporter.quantization.quantizer import Quantizer
from edgeskip.runtime.bundle.architecture import Rope
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS, is_quantized
from edgeskip.runtime.bundle.manifest import FileRecord, Progress
from edgeskip.runtime.bundle.tensors import ROPE_TABLES, TensorRecord, bundle_tensors
from edgeskip.runtime.bundle.weights import StoredArray, header_of, lay_out
from edgeskip.runtime.errors import CheckpointError


@dataclass(frozen=True)
class WeightsLayout:
    """The whole file before it is written: its tensors, and where each of their parts will be.

    Offsets count from the beginning of the file, header included, as ONNX external data wants them.
    """

    dtype: DType
    header: bytes
    tensors: dict[str, TensorRecord]
    arrays: dict[str, StoredArray]
    bytes: int


def plan_weights(
    checkpoint: Checkpoint, dtype: DType, capacity: int, formats: Mapping[str, str] | None = None
) -> WeightsLayout:
    """Lays out the weights file, with tensors in the format of the dtype, except for `formats`, by name.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype is not what the config calls for.
    """
    tensors = bundle_tensors(checkpoint.architecture, capacity, dtype, formats)
    for record in tensors.values():
        for source, rows in record.sources:
            _check_stored(checkpoint, source, (rows, *record.shape[1:]))
    _refuse_unused(checkpoint, {source for record in tensors.values() for source, _ in record.sources})
    arrays = lay_out(tensors.values(), dtype)
    header = header_of(arrays)
    placed = {name: replace(array, offset=len(header) + array.offset) for name, array in arrays.items()}
    return WeightsLayout(dtype, header, tensors, placed, len(header) + sum(array.bytes for array in arrays.values()))


def write_weights(
    checkpoint: Checkpoint,
    layout: WeightsLayout,
    path: Path,
    quantizer: Quantizer,
    progress: Progress = lambda *_: None,
) -> FileRecord:
    """Streams the weights into `path`, each tensor in its format, and hashes them on the way.

    The quantizer finds the numbers and scales of those that are quantized.

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
        for record in layout.tensors.values():
            for suffix, block in _parts(record, _encoded(checkpoint, reader, record, layout.dtype, quantizer)):
                if suffix is not None:
                    write(b"\0" * (layout.arrays[record.name + suffix].offset - written))
                write(_bytes(block))
        write(b"\0" * (layout.bytes - written))
        wait()
    return FileRecord(written, digest.hexdigest())


def rope_tables(rope: Rope, head_dim: int, capacity: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Cosines and sines [C, D/2] in fp32 of RoPE (arXiv 2104.09864) at positions 0..C-1.

    `llama3` scales as Llama 3.1 does: wavelengths above the original context over `low_freq_factor` are stretched by
    `factor`, those below the original context over `high_freq_factor` are kept, and those in between are blended.
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


def _check_stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise CheckpointError(checkpoint.folder, f"no tensor {name}", fix="is config.json of another model?")
    if stored.shape != shape:
        raise CheckpointError(
            stored.file, f"{name} has shape {list(stored.shape)}", wanted=f"{list(shape)}, by config.json"
        )
    if stored.dtype not in READABLE.values():
        raise CheckpointError(
            stored.file,
            f"{name} has dtype {stored.dtype}",
            wanted=", ".join(READABLE),
            fix="export an unquantized model",
        )


def _refuse_unused(checkpoint: Checkpoint, used: set[str]) -> None:
    """Refuses a tensor that nothing reads: config.json does not describe such a model."""
    for name in checkpoint.tensors:
        if name not in used and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                checkpoint.tensors[name].file,
                f"has {name}, for which config.json has no place",
                fix="is config.json of another model?",
            )


def _encoded(
    checkpoint: Checkpoint, reader: TensorReader, record: TensorRecord, dtype: DType, quantizer: Quantizer
) -> Iterator[Sequence[npt.NDArray[Any]]]:
    """Blocks of a tensor's rows, each as the same rows of every part."""
    rows = _rows(checkpoint, reader, record, dtype)
    if is_quantized([record.format]):
        return quantizer.encoded(record, rows, dtype)
    return (WRITERS[record.format].encode(block, dtype, None) for block in rows)


def _parts(
    record: TensorRecord, encoded: Iterable[Sequence[npt.NDArray[Any]]]
) -> Iterator[tuple[str | None, npt.NDArray[Any]]]:
    """The parts in order, in blocks of rows, with each part's suffix on its first block.

    The first part is the large one and is streamed; the others wait until it ends.
    """
    first, *others = FORMATS[record.format].parts
    waiting: list[list[npt.NDArray[Any]]] = [[] for _ in others]
    begun = False
    for block, *rest in encoded:
        yield (None if begun else first.suffix), block
        begun = True
        for kept, one in zip(waiting, rest, strict=True):
            kept.append(one)
    for part, blocks in zip(others, waiting, strict=True):
        for i, block in enumerate(blocks):
            yield (None if i else part.suffix), block


def _rows(
    checkpoint: Checkpoint, reader: TensorReader, record: TensorRecord, dtype: DType
) -> Iterator[npt.NDArray[Any]]:
    """A tensor's rows, as the checkpoint has them or computed, checked to be finite in the bundle's dtype."""
    if not record.sources:
        a = checkpoint.architecture
        yield rope_tables(a.rope, a.head_dim, record.shape[0])[ROPE_TABLES.index(record.name)]
        return
    for source, _ in record.sources:
        for block in reader.blocks(source):
            with np.errstate(over="ignore", invalid="ignore"):
                converted = block.astype(NUMPY_DTYPES[dtype], copy=False)
            if not _is_finite(converted):
                raise CheckpointError(
                    checkpoint.tensors[source].file,
                    f"{source} has values that are not finite in {dtype}",
                    fix="export in another dtype" if np.isfinite(block).all() else "the checkpoint is damaged",
                )
            yield converted if record.format == dtype else block


def _is_finite(block: npt.NDArray[Any]) -> bool:
    """Whether there is no infinity and no NaN; told from the bits of 16-bit numbers, which is faster."""
    if block.dtype.itemsize != 2:
        return bool(np.isfinite(block).all())
    infinity = 0x7C00 if block.dtype == np.float16 else 0x7F80
    return bool((block.view(np.uint16) & 0x7FFF).max(initial=0) < infinity)


def _bytes(block: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
