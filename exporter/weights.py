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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.exporter.formats import WRITERS
from edgeskip.exporter.index import READABLE
from edgeskip.exporter.quantization.layouts import QuantizedTensor
from edgeskip.exporter.quantization.quantizer import Quantizer
from edgeskip.runtime.bundle.architecture import Rope
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS
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


def check_tensors(checkpoint: Checkpoint) -> None:
    """Finds that a checkpoint has the tensors that its config calls for, and no others.

    Raises:
        CheckpointError: a tensor is missing or not known, or its shape or dtype is not what the config calls for.
    """
    tensors = bundle_tensors(checkpoint.architecture, 0, "")
    for record in tensors.values():
        for source, rows in record.sources:
            _check_stored(checkpoint, source, (rows, *record.shape[1:]))
    _refuse_unused(checkpoint, {source for record in tensors.values() for source, _ in record.sources})


def plan_weights(
    checkpoint: Checkpoint, dtype: DType, capacity: int, formats: Mapping[str, str] | None = None
) -> WeightsLayout:
    """Lays out the weights file, with tensors in the format of the dtype, except for `formats`, by name."""
    tensors = bundle_tensors(checkpoint.architecture, capacity, dtype, formats)
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
        stored = {name: record for name, record in layout.tensors.items() if record.sources}
        for record, encoded in chain(quantizer.encoded(stored, reader, layout.dtype), _computed(checkpoint, layout)):
            for suffix, block in _parts(record, encoded):
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
    if stored.dtype not in READABLE.values() and not isinstance(stored, QuantizedTensor):
        raise CheckpointError(
            stored.file,
            f"{name} has dtype {stored.dtype}",
            wanted=", ".join(READABLE),
            fix="export an unquantized model",
        )


def _refuse_unused(checkpoint: Checkpoint, used: set[str]) -> None:
    """Refuses a tensor that nothing reads: config.json does not describe such a model."""
    for name in checkpoint.tensors:
        if name not in used and not name.endswith("rotary_emb.inv_freq") and not _is_zero_bias(checkpoint, name):
            raise CheckpointError(
                checkpoint.tensors[name].file,
                f"has {name}, for which config.json has no place",
                fix="is config.json of another model?",
            )


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether this is a bias of zeros, which some quantizers give to matrices that have none."""
    matrix = checkpoint.tensors.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or not isinstance(matrix, QuantizedTensor):
        return False
    with TensorReader(checkpoint) as reader:
        return not any(block.any() for block in reader.blocks(name))


def _computed(
    checkpoint: Checkpoint, layout: WeightsLayout
) -> Iterator[tuple[TensorRecord, Iterator[Sequence[npt.NDArray[Any]]]]]:
    """The tables of RoPE, which come last."""
    a = checkpoint.architecture
    records = [layout.tensors[name] for name in ROPE_TABLES]
    tables = rope_tables(a.rope, a.head_dim, records[0].shape[0])
    for record, table in zip(records, tables, strict=True):
        yield record, iter([WRITERS[record.format].encode(table, layout.dtype, None)])


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


def _bytes(block: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
