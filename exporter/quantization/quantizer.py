"""Ways to find the numbers and scales of quantized tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy.typing as npt

from edgeskip.exporter.checkpoint import TensorReader
from edgeskip.exporter.formats import WRITERS
from edgeskip.exporter.quantization.choice import Method
from edgeskip.exporter.quantization.inputs import input_sizes
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import is_quantized
from edgeskip.runtime.bundle.tensors import TensorRecord

Array = npt.NDArray[Any]
Parts = Sequence[Array]
"""Rows of a tensor in its format: the same rows of every part."""

Encode = Callable[[Array], Parts]
"""Turns rows of the checkpoint [n, ...] into the same rows of every part."""


class Quantizer(Protocol):
    """A way to quantize; `method` is what the manifest calls it."""

    @property
    def method(self) -> Method:
        """Its name."""
        ...

    def encoded(
        self, tensors: Mapping[str, TensorRecord], reader: TensorReader, dtype: DType
    ) -> Iterator[tuple[TensorRecord, Iterator[Parts]]]:
        """Each tensor in its format, in the order of the bundle's file, by blocks of rows, which make it up together.

        The blocks of a tensor are to be taken before the next tensor.

        Args:
            tensors: those of the bundle that come from the checkpoint, by name.
            reader: of the checkpoint.
            dtype: the bundle's.

        Raises:
            CheckpointError: a number is not finite in the dtype.
        """
        ...


@dataclass(frozen=True)
class Search:
    """Scales of the least squared error, which need no more than the rows at hand and the sizes of their inputs."""

    method: ClassVar[Method] = "search"

    def encoded(
        self, tensors: Mapping[str, TensorRecord], reader: TensorReader, dtype: DType
    ) -> Iterator[tuple[TensorRecord, Iterator[Parts]]]:
        """Each tensor by itself."""
        return ((tensor, encoded_by_search(tensor, reader, dtype)) for tensor in tensors.values())


def searcher(tensor: TensorRecord, reader: TensorReader, dtype: DType) -> Encode:
    """What puts rows of a tensor in its format, each block of them by itself."""
    sizes = input_sizes(reader.checkpoint, tensor) if is_quantized([tensor.format]) else None
    return lambda rows: WRITERS[tensor.format].encode(rows, dtype, sizes)


def encoded_by_search(tensor: TensorRecord, reader: TensorReader, dtype: DType) -> Iterator[Parts]:
    """A tensor in its format, by blocks of rows; as it is where the checkpoint has it so."""
    if is_quantized(reader.checkpoint.tensors[source].dtype for source, _ in tensor.sources):
        return reader.stored_parts(tensor, dtype)
    return map(searcher(tensor, reader, dtype), reader.rows(tensor, dtype))
