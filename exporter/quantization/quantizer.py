"""Whoever finds the numbers and scales of quantized tensors, one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy.typing as npt

from edgeskip.exporter.checkpoint import Checkpoint
from edgeskip.exporter.formats import WRITERS
from edgeskip.exporter.quantization.inputs import input_sizes
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.manifest import Quantization
from edgeskip.runtime.bundle.tensors import TensorRecord

Array = npt.NDArray[Any]


class Quantizer(Protocol):
    """A way to quantize; `record` is what the manifest says of it."""

    @property
    def record(self) -> Quantization:
        """What the manifest says of it."""
        ...

    def encoded(self, tensor: TensorRecord, rows: Iterator[Array], dtype: DType) -> Iterator[Sequence[Array]]:
        """A tensor in its format, in blocks of rows: the same rows of every part, which make up the whole together.

        Args:
            tensor: its name, shape and format.
            rows: the checkpoint's numbers in order, in blocks of rows that are read when they are asked for.
            dtype: the bundle's.
        """
        ...


@dataclass(frozen=True)
class Search:
    """Scales of the least squared error, which need no more than the rows at hand and the sizes of their inputs."""

    checkpoint: Checkpoint
    record: ClassVar[Quantization] = Quantization("search")

    def encoded(self, tensor: TensorRecord, rows: Iterator[Array], dtype: DType) -> Iterator[Sequence[Array]]:
        """Each block of rows by itself, as its format encodes it."""
        sizes = input_sizes(self.checkpoint, tensor)
        return (WRITERS[tensor.format].encode(block, dtype, sizes) for block in rows)
