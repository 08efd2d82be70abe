"""The contract between the graphs, the sessions and the loop: every tensor of every graph, in one table.

A model is cut after its exit layers into runs of layers, each of them a graph, and has one or more heads:

    inputs_embeds -> [ draft: layers[:E] ] -> exit_hidden_states -> [ verify: layers[E:] ] -> hidden_states -> [ head ]

With several exits, there are graphs between them (`middle_4_6` for layers[4:6]) and a state for each exit
(`exit_hidden_states.4`). A head over only the first rows of the vocabulary is one more graph on the same table.

Dimensions: B batch, T new tokens in this call, C cache capacity, H hidden size, N KV heads, D head size, V vocabulary
(each head has its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.errors import RequestError

GraphName = str

MAX_SPECULATIONS = 16
"""The longest speculation that workspaces and engine profiles are made for."""

HEAD_ROWS = MAX_SPECULATIONS + 1
"""The most rows that a head sees."""

DEFAULT_SPECULATIONS = 4
"""K of a bundle for which no other was asked."""


DEFAULT_PREFILL_CHUNK = 512
"""Prompt tokens of one call. On an H100, a 1B shape and a prompt of 384 tokens, ONNX Runtime gives the first token
after 4.4 ms in one chunk, and after 7.4 ms in chunks of 128.
"""


@dataclass(frozen=True)
class Tensor:
    """An input or an output; dtype `float` is the bundle's own."""

    name: str
    dtype: Literal["float", "int64"]
    shape: tuple[str, ...]

    @property
    def is_cache(self) -> bool:
        """Whether this is a KV cache, before or after the call."""
        return self.name.startswith(("past_key_values.", "present."))

    def number_type(self, dtype: DType) -> str:
        """The type of its numbers in a bundle with this dtype."""
        return dtype if self.dtype == "float" else self.dtype


NEW_ROWS = ("B", "N", "T", "D")
"""Shape of a cache output that holds only the rows of this call."""

HEAD, DRAFT_HEAD = "head", "draft_head"
"""The head over the whole vocabulary, and that over its first rows, which drafts where a bundle has one."""

LEAST_DRAFT_VOCABULARY = 128
"""Rows: with fewer, hardly any draft would be right."""

PICKERS: dict[str, tuple[str, ...]] = {"greedy": ()}
"""Ways in which a head picks a token from its logits, and what it is told about each row: int64 inputs [B,T]."""


@dataclass(frozen=True)
class HeadRecord:
    """A head: how many rows of the vocabulary it knows, from the first on, and how it picks among them."""

    vocabulary: int
    picker: str


@dataclass(frozen=True)
class Graph:
    """A graph: the layers that it runs (none for a head), and its input and output tensors, the states first."""

    first_layer: int
    last_layer: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    head: HeadRecord | None = None

    @property
    def layers(self) -> range:
        """Indices of the decoder layers in this graph."""
        return range(self.first_layer, self.last_layer)

    @property
    def reads(self) -> str:
        """The states that come in."""
        return self.inputs[0].name

    @property
    def writes(self) -> str:
        """The states, or a head's logits, that go out."""
        return self.outputs[0].name

    def dimensions(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of a model's dimensions, as they are in this graph."""
        return {**sizes, "V": self.head.vocabulary} if self.head else dict(sizes)


@dataclass(frozen=True)
class Link:
    """A graph of layers in a chain, and the states that it reads and writes."""

    graph: GraphName
    reads: str
    writes: str


@dataclass(frozen=True)
class Head:
    """A head in a chain: its graph, the rows of its vocabulary, what it is told about each row besides its state."""

    graph: GraphName
    vocabulary: int
    row_inputs: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The model cut after one exit layer: the graphs that draft and those that verify, in order, and their heads."""

    exit_layer: int
    picker: str
    draft: tuple[Link, ...]
    verify: tuple[Link, ...]
    draft_head: Head
    head: Head

    @property
    def exit_states(self) -> str:
        """The states after the exit layer."""
        return self.draft[-1].writes


def graph_table(
    num_layers: int, exit_layers: Sequence[int], heads: Mapping[GraphName, HeadRecord]
) -> dict[GraphName, Graph]:
    """The graphs of a model cut after each of these layers, given in order, with these heads."""
    cuts = (0, *exit_layers, num_layers)
    states = {layer: _states(layer, num_layers, exit_layers) for layer in cuts}
    positions = Tensor("position_ids", "int64", ("B", "T"))
    graphs = {}
    for first, last in pairwise(cuts):
        layers = range(first, last)
        name = "draft" if first == 0 else "verify" if last == num_layers else f"middle_{first}_{last}"
        inputs = (states[first], positions, *_caches("past_key_values", layers))
        graphs[name] = Graph(first, last, inputs, (states[last], *_caches("present", layers)))
    for name, head in heads.items():
        told = tuple(Tensor(told, "int64", ("B", "T")) for told in PICKERS[head.picker])
        picked = (
            Tensor("logits", "float", ("B", "T", "V")),
            Tensor("token_ids", "int64", ("B", "T")),
            Tensor("token_logits", "float", ("B", "T")),
            states[0],
        )
        graphs[name] = Graph(num_layers, num_layers, (states[num_layers], *told), picked, head)
    return graphs


def heads_of(
    vocab_size: int, draft_vocabulary: int | None = None, picker: str = "greedy"
) -> dict[GraphName, HeadRecord]:
    """The head over the whole vocabulary and, if asked for, one over its first rows."""
    heads = {HEAD: HeadRecord(vocab_size, picker)}
    return heads if draft_vocabulary is None else heads | {DRAFT_HEAD: HeadRecord(draft_vocabulary, picker)}


def split_at(graphs: Mapping[GraphName, Graph], exit_layer: int, picker: str | None = None) -> Split:
    """How graphs are chained to draft from an exit layer, with the smallest head that picks in this way; by default the
    way of the first head.

    Raises:
        RequestError: the model is not cut there, or has no head that picks in this way.
    """
    links = [(graph, Link(name, graph.reads, graph.writes)) for name, graph in graphs.items() if not graph.head]
    exits = [graph.last_layer for graph, _ in links[:-1]]
    if type(exit_layer) is not int or exit_layer not in exits:
        wanted = f"{', '.join(map(str, exits))}: the bundle is cut there"
        layers = links[-1][0].last_layer
        fix = f"a model of {layers} layers can be cut after 1 to {layers - 1}"
        if can_exit(exit_layer, layers):
            fix = "export with this exit layer"
        raise RequestError("exit layer", f"{exit_layer!r:.60}", wanted=wanted, fix=fix)
    pickers = [graph.head.picker for graph in graphs.values() if graph.head]
    heads = [
        Head(name, graph.head.vocabulary, tuple(tensor.name for tensor in graph.inputs[1:]))
        for name, graph in graphs.items()
        if graph.head and graph.head.picker == (picker or pickers[0])
    ]
    if not heads:
        raise RequestError("picker", f"{picker}", wanted=" or ".join(sorted({*pickers})))
    return Split(
        exit_layer,
        picker or pickers[0],
        draft=tuple(link for graph, link in links if graph.last_layer <= exit_layer),
        verify=tuple(link for graph, link in links if graph.first_layer >= exit_layer),
        draft_head=min(heads, key=lambda head: head.vocabulary),
        head=max(heads, key=lambda head: head.vocabulary),
    )


def can_exit(exit_layer: int, num_layers: int) -> bool:
    """Whether a model of this many layers can exit after this one."""
    return type(exit_layer) is int and 1 <= exit_layer < num_layers


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Checks that a model of this many layers can exit after this one.

    Raises:
        RequestError: it cannot.
    """
    if not can_exit(exit_layer, num_layers):
        wanted = f"1 to {num_layers - 1}: the model has {num_layers} layers"
        raise RequestError("exit layer", f"{exit_layer!r:.60}", wanted=wanted)


def check_exit_layers(exit_layers: Sequence[int], num_layers: int) -> None:
    """Checks that a model of this many layers can be cut after these, each of them once.

    Raises:
        RequestError: it cannot.
    """
    for number, exit_layer in enumerate(exit_layers):
        check_exit_layer(exit_layer, num_layers)
        if exit_layer in exit_layers[:number]:
            raise RequestError("exit layer", f"{exit_layer} twice", wanted="each exit layer once")


def check_draft_vocabulary(draft_vocabulary: int | None, vocab_size: int) -> None:
    """Checks that a model with a vocabulary of this size can draft from so many of its rows; None drafts from all.

    Raises:
        RequestError: it cannot.
    """
    if draft_vocabulary is not None and not LEAST_DRAFT_VOCABULARY <= draft_vocabulary < vocab_size:
        wanted = f"{LEAST_DRAFT_VOCABULARY} to {vocab_size - 1} rows, or all: the vocabulary has {vocab_size}"
        if vocab_size <= LEAST_DRAFT_VOCABULARY:
            wanted = f"all: the vocabulary has only {vocab_size} rows"
        raise RequestError("draft vocabulary", f"{draft_vocabulary}", wanted=wanted)


def check_max_length(max_length: int, context: int, reason: str = "the model's context") -> None:
    """Checks that caches for so many tokens suit a model that takes so many; `reason` says why it takes no more.

    Raises:
        RequestError: they do not.
    """
    if not 2 <= max_length <= context:
        raise RequestError("max length", f"{max_length}", wanted=f"2 to {context}: {reason}")


def check_num_speculations(num_speculations: int, otherwise: str = "") -> None:
    """Checks that workspaces and engines are made for rounds of this many drafts; `otherwise` says what else would do.

    Raises:
        RequestError: they are not.
    """
    if not (type(num_speculations) is int and 1 <= num_speculations <= MAX_SPECULATIONS):
        wanted = f"1 to {MAX_SPECULATIONS}{otherwise}"
        raise RequestError("num speculations", f"{num_speculations!r:.60}", wanted=wanted)


def dimensions(architecture: Architecture, capacity: int) -> dict[str, int]:
    """Sizes of the static dimensions."""
    return {
        "B": 1,
        "C": capacity,
        "H": architecture.hidden_size,
        "N": architecture.num_kv_heads,
        "D": architecture.head_dim,
        "V": architecture.vocab_size,
        "Q": architecture.qkv_rows,
        "A": architecture.num_heads * architecture.head_dim,
    }


def present_name(past: str) -> str:
    """The output that updates the given cache input."""
    return past.replace("past_key_values.", "present.")


def past_name(present: str) -> str:
    """The cache input that the given output updates."""
    return present.replace("present.", "past_key_values.")


def _states(layer: int, num_layers: int, exit_layers: Sequence[int]) -> Tensor:
    """The states before a layer: the embeddings before the first one, and what a head reads after the last."""
    name = "exit_hidden_states" if len(exit_layers) == 1 else f"exit_hidden_states.{layer}"
    name = {0: "inputs_embeds", num_layers: "hidden_states"}.get(layer, name)
    return Tensor(name, "float", ("B", "T", "H"))


def _caches(prefix: str, layers: range) -> tuple[Tensor, ...]:
    shape = ("B", "N", "C", "D")
    return tuple(Tensor(f"{prefix}.{i}.{part}", "float", shape) for i in layers for part in ("key", "value"))
