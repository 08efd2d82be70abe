"""Rounds as data: which graph runs on which rows of the workspace, in order.

The workspace is a set of buffers, each with a number of rows. A round of K drafts, one column per call:

              draft head  draft head  ...  draft | verify   head
    row j       0    0      1    1           K   |  0..K    0..K
    reads     embeds exit  embeds exit    embeds | exit     hidden
    writes    exit  id 0   exit  id 1     exit   | hidden   target ids 0..K, target embeds 0..K
                    embeds 1     embeds 2

Row 0 of `inputs_embeds` is the last token, whose place in the caches is still empty. The exit states of all rows are
kept from drafting, so verify never runs the early layers again. Plain decoding is the round with K = 0. Where the host
knows the drafts beforehand, all layers run on all rows at once. A session binds a round once and runs it many times.

If a bundle has several exits, `draft` and `verify` each stand for a chain of graphs: see `Split`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from edgeskip.runtime.bundle.graphs import HEAD_ROWS, Graph, GraphName, Head, Link, Split

Mode = Literal["self-speculative", "autoregressive", "early-exit"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Ways of decoding: rounds with drafts, rounds without, and the draft subgraph alone."""

Picks = Literal["heads", "draws", "history"]
"""What picks the tokens of a round: its heads; draws, which depend on a row's logits and position; or what depends on
the tokens before each row too, as penalties and grammars do.
"""

GIVEN = "draft_token_ids"
"""The row inputs of rounds whose drafts the host knows: the drafts, and after them a row that does not matter."""

SPARE_ROWS = 7
"""Rows of every buffer after those of the longest round: a session may compute a row as one of eight."""


@dataclass(frozen=True)
class View:
    """Rows start .. start+rows of a workspace buffer."""

    buffer: str
    start: int
    rows: int


@dataclass(frozen=True)
class Call:
    """One run of a graph: its workspace inputs and outputs by tensor name.

    The caches are the session's. Where one graph serves several runs of layers, `layer_shift` binds the caches of
    layers that many further on than those that the graph was made for. `verifies` says that the rows are those of a
    verification: they should be the same however many they are, so that drafts change no token. `drafts` says that they
    should be those of calls with a single row each, as when the exit drafts.
    """

    graph: GraphName
    inputs: tuple[tuple[str, View], ...]
    outputs: tuple[tuple[str, View], ...]
    layer_shift: int = 0
    verifies: bool = False
    drafts: bool = False

    @property
    def rows(self) -> int:
        """Rows T that the call computes."""
        return self.inputs[0][1].rows

    @property
    def first_row(self) -> int:
        """The first of them in a round."""
        return self.inputs[0][1].start

    def widened(self, rows: int) -> Call:
        """The same call with at least so many rows; those that are added lie behind in the workspace."""

        def wide(views: tuple[tuple[str, View], ...]) -> tuple[tuple[str, View], ...]:
            return tuple((name, replace(view, rows=max(view.rows, rows))) for name, view in views)

        return replace(self, inputs=wide(self.inputs), outputs=wide(self.outputs))

    def row(self, index: int) -> Call:
        """The same call with one of its rows alone."""

        def one(views: tuple[tuple[str, View], ...]) -> tuple[tuple[str, View], ...]:
            return tuple((name, View(view.buffer, view.start + index, 1)) for name, view in views)

        return replace(self, inputs=one(self.inputs), outputs=one(self.outputs))

    def cache(self, name: str) -> str:
        """The cache that is bound to this input or output of the graph."""
        if not self.layer_shift:
            return name
        prefix, layer, part = name.split(".")
        return f"{prefix}.{int(layer) + self.layer_shift}.{part}"

    @property
    def key(self) -> tuple[GraphName, int]:
        """Graph and rows: calls that have both in common do the same work."""
        return self.graph, self.rows


@dataclass(frozen=True)
class Round:
    """Calls in order; `rows` positions are written before them, ids are read back after them.

    `row_inputs` are the buffers, besides the positions, that must be filled for each row. Unless heads pick the tokens,
    the session does, from their logits, as `Session.sample` told it. Where picks depend on the history, a host has to
    see each draft before the next row: such a round has one head at most, as its last call. A round that `ends_early`
    drafts no more after the first draft less probable than a threshold: its later rows are then whatever the workspace
    held.
    """

    calls: tuple[Call, ...]
    rows: int
    num_drafts: int
    num_targets: int
    row_inputs: tuple[str, ...] = ()
    picks: Picks = "heads"
    ends_early: bool = False


def workspace(graphs: Iterable[Graph], chunk: int) -> dict[str, tuple[str | None, str, int]]:
    """Buffers: the dimension of a row (None for a single number), dtype and rows, for prefill chunks of `chunk`."""
    rows = max(chunk, HEAD_ROWS) + SPARE_ROWS
    buffers: dict[str, tuple[str | None, str, int]] = {"position_ids": (None, "int64", rows)}
    for graph in graphs:
        if graph.head:
            buffers |= {tensor.name: (None, tensor.dtype, rows) for tensor in graph.inputs[1:]}
        else:
            buffers |= dict.fromkeys((graph.reads, graph.writes), ("H", "float", rows))
    picked = HEAD_ROWS + SPARE_ROWS
    return buffers | {
        "draft_logits": ("V", "float", picked),
        "target_logits": ("V", "float", picked),
        "draft_token_ids": (None, "int64", picked),
        "target_token_ids": (None, "int64", picked),
        "draft_token_logits": (None, "float", picked),
        "target_token_logits": (None, "float", picked),
        "target_embeds": ("H", "float", picked),
    }


@cache
def speculative_round(split: Split, num_speculations: int) -> Round:
    """K drafts and their verification; K = 0 is one step of plain decoding."""
    k = num_speculations
    drafting = tuple(call for row in range(k) for call in draft_round(split, row).calls)
    return _round(split, drafting + verification_round(split, k).calls, k)


@cache
def ending_round(split: Split, num_speculations: int) -> Round:
    """The same, with as many of K drafts as the exit is sure of, for a session that looks at each by itself."""
    return replace(speculative_round(split, num_speculations), ends_early=num_speculations > 1)


@cache
def draft_round(split: Split, row: int) -> Round:
    """The part of a speculative round that drafts one token, for a host that looks at each draft before the next."""
    calls = (*_drafting(split, row, 1), _draft_head(split, row, 1, View("inputs_embeds", row + 1, 1)))
    return Round(calls, rows=row + 1, num_drafts=0, num_targets=0, row_inputs=split.draft_head.row_inputs)


@cache
def verification_round(split: Split, num_speculations: int) -> Round:
    """The part of a speculative round that follows its K drafts."""
    k = num_speculations
    calls = (*_chain(split.verify, 0, k + 1), _target_head(split.head, "hidden_states", 0, k + 1))
    return _round(split, (*_drafting(split, k, 1), *(replace(call, verifies=True) for call in calls)), k)


@cache
def trusting_round(split: Split, num_drafts: int) -> Round:
    """As a verification, which fills the caches of the layers after the exit; but of its drafts, only the last one is
    compared with the whole model's token, and there is one target more.
    """
    round_ = verification_round(split, num_drafts)
    first = max(num_drafts - 1, 0)
    head = _target_head(split.head, "hidden_states", first, num_drafts + 1 - first)
    calls = (*round_.calls[:-1], replace(head, verifies=True))
    return replace(round_, calls=calls, num_targets=head.rows)


@cache
def given_round(split: Split, num_drafts: int) -> Round:
    """The verification of drafts that the host knows.

    It writes their ids, and before the round their embeddings, to row 1 and on of `inputs_embeds`.
    """
    rows = num_drafts + 1
    early = (call if call.verifies else replace(call, drafts=True) for call in _drafting(split, 0, rows))
    late = (*_chain(split.verify, 0, rows), _target_head(split.head, "hidden_states", 0, rows))
    round_ = _round(split, (*early, *(replace(call, verifies=True) for call in late)), num_drafts)
    return replace(round_, row_inputs=(*round_.row_inputs, GIVEN))


@cache
def hindsight_round(split: Split, rows: int) -> Round:
    """What the exit would have drafted in place of the first tokens of the round before, which left its states."""
    steps = ((0, rows),) if split.draft_head == split.head else ((row, 1) for row in range(rows))
    calls = tuple(_draft_head(split, *step, View("target_embeds", *step)) for step in steps)
    return Round(calls, rows=rows, num_drafts=rows, num_targets=0, row_inputs=split.draft_head.row_inputs)


@cache
def early_exit_round(split: Split) -> Round:
    """One step of the draft subgraph alone."""
    return _round(split, (*_chain(split.draft, 0, 1), _target_head(split.head, split.exit_states, 0, 1)), 0)


@cache
def prefill_round(split: Split, rows: int, *, last: bool, early_exit: bool) -> Round:
    """A chunk of the prompt; the last one also picks the first new token from its last row."""
    links = split.draft if early_exit else split.draft + split.verify
    calls = [replace(call, verifies=True) for call in _chain(links, 0, rows)]
    if last:
        calls.append(_target_head(split.head, split.exit_states if early_exit else "hidden_states", rows - 1, 1))
    row_inputs = split.head.row_inputs if last else ()
    return Round(tuple(calls), rows=rows, num_drafts=0, num_targets=int(last), row_inputs=row_inputs)


@cache
def head_round(split: Split, row: int, rows: int, *, early_exit: bool) -> Round:
    """The head over so many rows of a chunk of the prompt."""
    call = _target_head(split.head, split.exit_states if early_exit else "hidden_states", row, rows)
    return Round((call,), rows=row + rows, num_drafts=0, num_targets=rows, row_inputs=split.head.row_inputs)


def distinct_calls(splits: Iterable[Split], lengths: Sequence[int], graphs: Iterable[GraphName]) -> list[Call]:
    """The different calls in rounds of these splits and lengths, each once, by graph and then by rows."""
    calls = {call.key: call for split in splits for k in lengths for call in speculative_round(split, k).calls}
    order = list(graphs)
    return sorted(calls.values(), key=lambda call: (order.index(call.graph), call.rows))


def _round(split: Split, calls: tuple[Call, ...], k: int) -> Round:
    return Round(calls, rows=k + 1, num_drafts=k, num_targets=k + 1, row_inputs=split.head.row_inputs)


def _drafting(split: Split, row: int, rows: int) -> Iterable[Call]:
    """The layers up to the exit. Those after the first exit compute their rows as a verification would: whichever exit
    drafts, each layer's rows are then the same.
    """
    for call in _chain(split.draft, row, rows):
        yield call if call.graph == split.draft[0].graph else replace(call, verifies=True)


def _chain(links: Iterable[Link], row: int, rows: int) -> Iterable[Call]:
    for link in links:
        states, positions = View(link.reads, row, rows), View("position_ids", row, rows)
        inputs = ((link.reads, states), ("position_ids", positions))
        yield Call(link.graph, inputs, ((link.writes, View(link.writes, row, rows)),))


def _draft_head(split: Split, row: int, rows: int, embeds: View) -> Call:
    """One row at a time, so that a head with a smaller vocabulary lays out its logits like any other."""
    return Call(
        split.draft_head.graph,
        _head_inputs(split.draft_head, split.exit_states, row, rows),
        (
            ("logits", View("draft_logits", row, rows)),
            ("token_ids", View("draft_token_ids", row, rows)),
            ("token_logits", View("draft_token_logits", row, rows)),
            ("inputs_embeds", embeds),
        ),
    )


def _target_head(head: Head, states: str, row: int, rows: int) -> Call:
    return Call(
        head.graph,
        _head_inputs(head, states, row, rows),
        (
            ("logits", View("target_logits", 0, rows)),
            ("token_ids", View("target_token_ids", 0, rows)),
            ("token_logits", View("target_token_logits", 0, rows)),
            ("inputs_embeds", View("target_embeds", 0, rows)),
        ),
    )


def _head_inputs(head: Head, states: str, row: int, rows: int) -> tuple[tuple[str, View], ...]:
    return (("hidden_states", View(states, row, rows)), *((name, View(name, row, rows)) for name in head.row_inputs))
