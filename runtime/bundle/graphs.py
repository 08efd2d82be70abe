"""The contract between the graphs, the sessions and the loop: every tensor of every graph, in one table.

Dimensions: B batch, T new tokens in this call, C cache capacity, H hidden size, N KV heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.errors import RequestError

GraphName = Literal["draft", "verify", "head"]
GRAPHS: tuple[GraphName, ...] = ("draft", "verify", "head")

CHAINS: dict[str, tuple[GraphName, ...]] = {"draft": ("draft", "head"), "verify": ("verify", "head")}
"""The paper's subgraphs: each ends in the shared head."""

DIALECTS = {"standard": "{}.onnx", "ort": "{}.ort.onnx"}
"""File names of a graph in each dialect: ONNX operators only, or ONNX Runtime's fused ones too."""

MAX_SPECULATIONS = 16
"""The longest speculation that workspaces and engine profiles are made for."""

HEAD_ROWS = MAX_SPECULATIONS + 1
"""Rows that the head sees at most."""

DEFAULT_SPECULATIONS = 4
"""K of a bundle whose exporter was not told another."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output: dtype `float` is the bundle's own."""

    name: str
    dtype: Literal["float", "int64"]
    shape: tuple[str, ...]

    @property
    def is_cache(self) -> bool:
        """Whether this is a KV cache, before or after the call."""
        return self.name.startswith(("past_key_values.", "present."))


@dataclass(frozen=True)
class Graph:
    """One subgraph: the layers it runs and the tensors it takes and gives."""

    first_layer: int
    last_layer: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def layers(self) -> range:
        """Indices of the decoder layers in this graph."""
        return range(self.first_layer, self.last_layer)


def graph_table(num_layers: int, exit_layer: int) -> dict[GraphName, Graph]:
    """The three graphs of a model split at `exit_layer`: layers[:exit_layer] draft, the rest verify."""
    embeds = Tensor("inputs_embeds", "float", ("B", "T", "H"))
    positions = Tensor("position_ids", "int64", ("B", "T"))
    exit_states = Tensor("exit_hidden_states", "float", ("B", "T", "H"))
    states = Tensor("hidden_states", "float", ("B", "T", "H"))
    logits = Tensor("logits", "float", ("B", "T", "V"))
    ids = Tensor("token_ids", "int64", ("B", "T"))
    early, late = range(exit_layer), range(exit_layer, num_layers)
    return {
        "draft": Graph(
            0,
            exit_layer,
            (embeds, positions, *_caches("past_key_values", early)),
            (exit_states, *_caches("present", early)),
        ),
        "verify": Graph(
            exit_layer,
            num_layers,
            (exit_states, positions, *_caches("past_key_values", late)),
            (states, *_caches("present", late)),
        ),
        "head": Graph(num_layers, num_layers, (states,), (logits, ids, embeds)),
    }


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Finds that a model of so many layers can exit behind this one.

    Raises:
        RequestError: it cannot.
    """
    if not 1 <= exit_layer < num_layers:
        wanted = f"1 to {num_layers - 1}: the model has {num_layers} layers"
        raise RequestError("exit layer", f"{exit_layer}", wanted=wanted)


def check_num_speculations(num_speculations: int) -> None:
    """Finds that workspaces and engines are made for rounds of so many drafts.

    Raises:
        RequestError: they are not.
    """
    if not (type(num_speculations) is int and 1 <= num_speculations <= MAX_SPECULATIONS):
        raise RequestError("num speculations", f"{num_speculations}", wanted=f"1 to {MAX_SPECULATIONS}")


def dimensions(architecture: Architecture, capacity: int) -> dict[str, int]:
    """Sizes of the static dimensions."""
    return {
        "B": 1,
        "C": capacity,
        "H": architecture.hidden_size,
        "N": architecture.num_kv_heads,
        "D": architecture.head_dim,
        "V": architecture.vocab_size,
    }


def present_name(past: str) -> str:
    """The output that updates the given cache input."""
    return past.replace("past_key_values.", "present.")


def _caches(prefix: str, layers: range) -> tuple[Tensor, ...]:
    shape = ("B", "N", "C", "D")
    return tuple(Tensor(f"{prefix}.{i}.{part}", "float", shape) for i in layers for part in ("key", "value"))
