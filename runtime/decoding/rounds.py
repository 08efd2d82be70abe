"""Rounds as data: which graph runs on which rows of the workspace, in order.

The workspace is a set of buffers, each a number of rows. A round of K drafts, one column a call:

              draft head  draft head  ...  draft | verify   head
    row j       0    0      1    1           K   |  0..K    0..K
    reads     embeds exit  embeds exit    embeds | exit     hidden
    writes    exit  id 0   exit  id 1     exit   | hidden   target ids 0..K, target embeds 0..K
                    embeds 1     embeds 2

Row 0 of `inputs_embeds` is the last token whose place in the caches is still empty. The exit state of every row is
kept from drafting, so verify never runs the early layers again. Plain decoding is the round with K = 0. A session
binds a round once and runs it many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName

Mode = Literal["self-speculative", "autoregressive", "early-exit"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Ways of decoding: rounds with drafts, rounds without, and the draft subgraph alone."""


@dataclass(frozen=True)
class View:
    """Rows start .. start+rows of a workspace buffer."""

    buffer: str
    start: int
    rows: int


@dataclass(frozen=True)
class Call:
    """One run of a graph: its workspace inputs and outputs by tensor name. Caches are the session's."""

    graph: GraphName
    inputs: tuple[tuple[str, View], ...]
    outputs: tuple[tuple[str, View], ...]

    @property
    def rows(self) -> int:
        """Rows T that the call computes."""
        return self.inputs[0][1].rows

    @property
    def key(self) -> tuple[GraphName, int]:
        """Graph and rows: calls that share them do the same work."""
        return self.graph, self.rows


@dataclass(frozen=True)
class Round:
    """Calls in order; `rows` positions are written before them, ids are read back after them."""

    calls: tuple[Call, ...]
    rows: int
    num_drafts: int
    num_targets: int


def workspace(chunk: int) -> dict[str, tuple[str | None, str, int]]:
    """Buffers: the dimension of a row (None for a single number), dtype and rows, for prefill chunks of `chunk`."""
    rows = max(chunk, HEAD_ROWS)
    return {
        "inputs_embeds": ("H", "float", rows),
        "position_ids": (None, "int64", rows),
        "exit_hidden_states": ("H", "float", rows),
        "hidden_states": ("H", "float", rows),
        "logits": ("V", "float", HEAD_ROWS),
        "draft_token_ids": (None, "int64", HEAD_ROWS),
        "target_token_ids": (None, "int64", HEAD_ROWS),
        "target_embeds": ("H", "float", HEAD_ROWS),
    }


@cache
def speculative_round(num_speculations: int) -> Round:
    """K drafts and their verification; K = 0 is one step of plain decoding."""
    k = num_speculations
    drafting = tuple(call for row in range(k) for call in draft_round(row).calls)
    return Round(drafting + verification_round(k).calls, rows=k + 1, num_drafts=k, num_targets=k + 1)


@cache
def draft_round(row: int) -> Round:
    """The part of a speculative round that drafts one token, for a host that looks at each before the next."""
    return Round((_draft(row, 1), _draft_head(row)), rows=row + 1, num_drafts=0, num_targets=0)


@cache
def verification_round(num_speculations: int) -> Round:
    """The part of a speculative round behind its K drafts."""
    k = num_speculations
    calls = (_draft(k, 1), _verify(0, k + 1), _target_head("hidden_states", 0, k + 1))
    return Round(calls, rows=k + 1, num_drafts=k, num_targets=k + 1)


@cache
def early_exit_round() -> Round:
    """One step of the draft subgraph alone."""
    return Round((_draft(0, 1), _target_head("exit_hidden_states", 0, 1)), rows=1, num_drafts=0, num_targets=1)


@cache
def prefill_round(rows: int, *, last: bool, early_exit: bool) -> Round:
    """A chunk of the prompt; the last one also picks the first new token from its last row."""
    calls = [_draft(0, rows)]
    if not early_exit:
        calls.append(_verify(0, rows))
    if last:
        states = "exit_hidden_states" if early_exit else "hidden_states"
        calls.append(_target_head(states, rows - 1, 1))
    return Round(tuple(calls), rows=rows, num_drafts=0, num_targets=int(last))


def _draft(row: int, rows: int) -> Call:
    return Call(
        "draft",
        (
            ("inputs_embeds", View("inputs_embeds", row, rows)),
            ("position_ids", View("position_ids", row, rows)),
        ),
        (("exit_hidden_states", View("exit_hidden_states", row, rows)),),
    )


def _verify(row: int, rows: int) -> Call:
    states = View("exit_hidden_states", row, rows)
    return Call(
        "verify",
        (("exit_hidden_states", states), ("position_ids", View("position_ids", row, rows))),
        (("hidden_states", View("hidden_states", row, rows)),),
    )


def _draft_head(row: int) -> Call:
    return Call(
        "head",
        (("hidden_states", View("exit_hidden_states", row, 1)),),
        (
            ("logits", View("logits", row, 1)),
            ("token_ids", View("draft_token_ids", row, 1)),
            ("inputs_embeds", View("inputs_embeds", row + 1, 1)),
        ),
    )


def _target_head(states: str, row: int, rows: int) -> Call:
    return Call(
        "head",
        (("hidden_states", View(states, row, rows)),),
        (
            ("logits", View("logits", 0, rows)),
            ("token_ids", View("target_token_ids", 0, rows)),
            ("inputs_embeds", View("target_embeds", 0, rows)),
        ),
    )
