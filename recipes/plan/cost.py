"""What decoding costs: times of calls from what they read, and of rounds from their calls.

    ms(call) = call + layers x layer + bytes / rate                                      one row
             + [rows > 1] x layers x several + (rows - 1) x (layers x row + bytes x row_byte)   several

A product of few rows takes as long as reading its weights; the small kernels between products take the same time
whatever the model's width. A head is all product and a decoder layer is both, so one model's measured calls tell the
two apart, and what was measured on a 1B predicts an 8B on the same device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce
from itertools import combinations
from math import inf
from operator import add
from statistics import fmean

import numpy as np

from edgeskip.runtime.bench.measure import BenchReport
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, DType
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.graphs import (
    DRAFT_HEAD,
    HEAD,
    Graph,
    GraphName,
    HeadRecord,
    Split,
    graph_table,
    heads_of,
    split_at,
)
from edgeskip.runtime.bundle.tensors import TABLES, bundle_tensors, graph_tensors
from edgeskip.runtime.decoding.rounds import Round, given_round, speculative_round


@dataclass(frozen=True)
class Sample:
    """A measured call of a graph: its decoder layers (a head has none), rows, bytes it has to read, and its time."""

    layers: int
    rows: int
    bytes: int
    ms: float


@dataclass(frozen=True)
class Cost:
    """The times of this module's formula in ms, its rate in bytes per ms; `flops_per_ms` bounds calls of many rows."""

    call_ms: float
    layer_ms: float
    several_ms: float
    row_ms: float
    row_byte_ms: float
    bytes_per_ms: float
    flops_per_ms: float = inf

    def time_ms(self, layers: int, rows: int, num_bytes: int, flops: float = 0.0) -> float:
        """Time of one call."""
        ms = self.call_ms + layers * self.layer_ms
        if rows > 1:
            ms += layers * self.several_ms + (rows - 1) * (layers * self.row_ms + num_bytes * self.row_byte_ms)
        return ms + max(num_bytes / self.bytes_per_ms, flops / self.flops_per_ms)


@dataclass(frozen=True)
class GraphSize:
    """What one call of a graph reads: its weights, and one row of its layers' caches for each token."""

    layers: int
    parameters: int
    weight_bytes: int
    cache_row_bytes: int

    def __add__(self, other: GraphSize) -> GraphSize:
        """Of the layers of both."""
        return GraphSize(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def read_bytes(self, tokens: int) -> int:
        """Bytes that a call reads whose last row follows this many tokens."""
        return self.weight_bytes + self.cache_row_bytes * tokens


@dataclass(frozen=True)
class Cut:
    """A model cut after one layer or more: what a call of each graph reads, and how the graphs are chained to draft
    from each exit, in the order in which these were given.
    """

    sizes: Mapping[GraphName, GraphSize]
    splits: Mapping[int, Split]


def cut_model(
    architecture: Architecture,
    dtype: DType,
    formats: Mapping[str, str] | None = None,
    draft_vocabulary: int | None = None,
) -> Callable[[Sequence[int]], Cut]:
    """The cut of a model after any of its layers: they are counted once. Its tensors have the dtype or these formats,
    by name, and its drafts come from so many rows of the vocabulary, or all.
    """
    a, itemsize = architecture, ITEMSIZE[dtype]
    tensors = bundle_tensors(a, 1, dtype, formats)
    row = 2 * a.num_kv_heads * a.head_dim * itemsize

    def size(layers: range, head: HeadRecord | None = None) -> GraphSize:
        records = [tensors[tensor] for tensor in graph_tensors(a, layers)]
        if head:
            records = [
                replace(one, shape=(head.vocabulary, *one.shape[1:])) if one.name in TABLES else one for one in records
            ]
        parameters = sum(math.prod(one.shape) for one in records)
        read = sum(FORMATS[one.format].bytes(one.shape, dtype) for one in records)
        return GraphSize(len(layers), parameters, read, len(layers) * row)

    each = [size(range(i, i + 1)) for i in range(a.num_layers)]

    def of(graph: Graph) -> GraphSize:
        return size(range(0), graph.head) if graph.head else reduce(add, (each[i] for i in graph.layers))

    def cut(exit_layers: Sequence[int]) -> Cut:
        graphs = graph_table(a.num_layers, sorted(exit_layers), heads_of(a.vocab_size, draft_vocabulary))
        return Cut({name: of(graph) for name, graph in graphs.items()}, {e: split_at(graphs, e) for e in exit_layers})

    return cut


def fit_cost(samples: Sequence[Sample]) -> Cost:
    """The cost with the least relative error, and with no part negative.

    There are six unknowns, so every choice of those that are not zero is tried.

    Raises:
        ValueError: no samples, or one without a time.
    """
    if not samples or min(sample.ms for sample in samples) <= 0:
        raise ValueError("no times of its graphs")
    rows = [
        [1, s.layers, s.layers * (s.rows > 1), (s.rows - 1) * s.layers, (s.rows - 1) * s.bytes, s.bytes]
        for s in samples
    ]
    relative = np.array(rows, dtype=float) / np.array([s.ms for s in samples])[:, None]
    scale = np.maximum(relative.max(axis=0), np.finfo(float).tiny)
    *others, reading = range(len(scale))
    best, least = np.zeros(len(scale)), inf
    for choice in (c for count in range(len(scale)) for c in combinations(others, count)):
        chosen = [*choice, reading]  # which always takes time
        found = np.linalg.lstsq(relative[:, chosen] / scale[chosen], np.ones(len(samples)), rcond=None)[0]
        error = float(np.square(relative[:, chosen] / scale[chosen] @ found - 1).sum())
        if (found >= 0).all() and found[-1] > 0 and error < least * (1 - 1e-9):
            best, least = np.zeros(len(scale)), error
            best[chosen] = found / scale[chosen]
    call, layer, several, row, row_byte, byte = best.tolist()
    return Cost(call, layer, several, row, row_byte, bytes_per_ms=1 / byte)


def round_ms(cost: Cost, cut: Cut, exit_layer: int, num_speculations: int, position: int) -> float:
    """Device time of a round of K drafts of an exit, with its first row at `position`; K = 0 is a plain step."""
    return _calls_ms(cost, cut, speculative_round(cut.splits[exit_layer], num_speculations), position)


def ngram_round_ms(cost: Cost, cut: Cut, num_speculations: int, position: int) -> float:
    """The same where the text has the drafts: all layers run once."""
    return _calls_ms(cost, cut, given_round(next(iter(cut.splits.values())), num_speculations), position)


def _calls_ms(cost: Cost, cut: Cut, round_: Round, position: int) -> float:
    views = [(call.graph, call.inputs[0][1]) for call in round_.calls]
    return sum(call_ms(cost, cut.sizes[graph], view.rows, position + view.start + view.rows) for graph, view in views)


def call_ms(cost: Cost, size: GraphSize, rows: int, tokens: int) -> float:
    """Device time of one call whose last row follows this many tokens."""
    flops = 2.0 * size.parameters * rows
    return cost.time_ms(size.layers, rows, size.read_bytes(tokens), flops)


def tokens_per_round(match_rate: float, num_speculations: int) -> float:
    """Expected tokens of a round if every draft is right with the same probability: 1 + m + ... + m^K.

    The usual first estimate (arXiv 2211.17192, equation 1).
    """
    return sum(match_rate**j for j in range(num_speculations + 1))


def break_even(plain_ms: float, rounds_ms: Mapping[int, float]) -> float | None:
    """The match rate from which the best K of `rounds_ms` (K -> ms) beats plain steps; None where none does."""
    low, high = 0.0, 1.0
    if best_speculation(rounds_ms, (high,))[1] > plain_ms:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if best_speculation(rounds_ms, (middle,))[1] > plain_ms:
            low = middle
        else:
            high = middle
    return high


def ms_per_token(round_ms: float, num_speculations: int, match_rates: Sequence[float]) -> float:
    """The time of rounds of K over their tokens: its mean over kinds of text of these match rates, which have as many
    tokens each.
    """
    return fmean(round_ms / tokens_per_round(rate, num_speculations) for rate in match_rates)


def best_speculation(rounds_ms: Mapping[int, float], match_rates: Sequence[float]) -> tuple[int, float]:
    """The best K for texts of all these match rates together, and its ms per token."""
    return min(((k, ms_per_token(ms, k, match_rates)) for k, ms in rounds_ms.items()), key=lambda pair: pair[1])


def samples_of_report(report: BenchReport) -> Iterator[Sample]:
    """The calls that `edgeskip bench` timed, each by itself.

    Raises:
        ValueError: they are not those of a model's graphs.
    """
    early, all_layers = report.exit_layer, report.num_layers
    if early >= all_layers:
        raise ValueError(f"exit layer {early} of {all_layers} layers")
    names = {stage.graph: re.fullmatch(r"middle_(\d{1,4})_(\d{1,4})", stage.graph) for stage in report.stages}
    between = {name: (int(found[1]), int(found[2])) for name, found in names.items() if found}
    cuts = {early}.union(*between.values())
    layers: dict[GraphName, int] = {"draft": min(cuts), "verify": all_layers - max(cuts), HEAD: 0, DRAFT_HEAD: 0}
    layers |= {name: last - first for name, (first, last) in between.items()}
    for stage in report.stages:
        if layers.get(stage.graph, -1) < (stage.graph not in (HEAD, DRAFT_HEAD)):
            raise ValueError(f"times of a graph {stage.graph!r:.60}, none of {', '.join(layers)}")
        yield Sample(layers[stage.graph], stage.rows, stage.bytes, stage.ms)
