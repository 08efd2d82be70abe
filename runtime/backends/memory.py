"""What a session takes for caches and workspace, from the contract alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, DType
from edgeskip.runtime.bundle.graphs import Graph, GraphName, dimensions
from edgeskip.runtime.decoding.rounds import workspace


def cache_sizes(
    architecture: Architecture, table: Mapping[GraphName, Graph], dtype: DType, capacity: int
) -> dict[str, int]:
    """Bytes of every cache, by its input's name."""
    sizes = dimensions(architecture, capacity)
    return {
        tensor.name: ITEMSIZE[dtype] * math.prod(sizes[dim] for dim in tensor.shape)
        for graph in table.values()
        for tensor in graph.inputs
        if tensor.is_cache
    }


def buffer_sizes(
    architecture: Architecture, table: Mapping[GraphName, Graph], dtype: DType, chunk: int
) -> dict[str, tuple[int, int]]:
    """Bytes of a row, and rows, of every buffer of the workspace, for prefill chunks of `chunk` tokens."""
    sizes = dimensions(architecture, 1)
    itemsize = {"float": ITEMSIZE[dtype], "int64": ITEMSIZE["int64"]}
    return {
        name: (itemsize[kind] * (1 if dim is None else sizes[dim]), rows)
        for name, (dim, kind, rows) in workspace(table.values(), chunk).items()
    }
