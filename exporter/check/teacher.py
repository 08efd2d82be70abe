"""Teacher-forced calls: a text is split as sessions split it, and each of its calls is run on golden inputs.

    golden   embeddings -> layers[:E] -> exit states -> layers[E:] -> last states -> norm, LM head
                 |             :             |              :              |              :
    session      +--> draft  compared        +--> verify  compared         +--> head    compared

The caches are filled by such calls too, so an error belongs to the graph that shows it. The calls are those of real
rounds, bound by the session as in generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.check.golden import Golden, Trace
from edgeskip.exporter.formats import NUMPY_DTYPES
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.decoding.rounds import Call, Round, View, prefill_round, speculative_round

Array = npt.NDArray[Any]
Kind = Literal["prefill", "step", "verification", "cache"]
"""Kinds of calls: a chunk of a prompt, one row, K+1 rows; `cache` is what all of them left in the caches."""

STEPS = 3
"""Plain steps after a prompt, before the rounds."""


@dataclass(frozen=True)
class Segment:
    """Calls on rows start .. start+rows; the first `kept` belong to the text, the rest stand for rejected drafts."""

    kind: Kind
    start: int
    rows: int
    kept: int

    @property
    def text(self) -> slice:
        """Positions of the kept rows."""
        return slice(self.start, self.start + self.kept)


def split_text(length: int, end: int, chunk: int, num_speculations: int) -> Iterator[Segment]:
    """A prompt of `length` tokens and what is decoded after it, up to `end`.

    Chunks, the last one overlapping; steps; a round whose drafts are rejected, which the next one overwrites; rounds
    of K+1 rows.
    """
    rows, width = min(chunk, length), num_speculations + 1
    for start in (*range(0, length - rows, rows), length - rows):
        yield Segment("prefill", start, rows, rows)
    position = length
    while position < end:
        behind = position - length
        if behind < STEPS or position + width > end:
            yield Segment("step", position, 1, 1)
            position += 1
        else:
            kept = 1 if behind == STEPS else width
            yield Segment("verification", position, width, kept)
            position += kept


def tail(num_speculations: int) -> int:
    """Rows after a prompt that are enough for every kind of segment, with two whole rounds."""
    return STEPS + 1 + 2 * (num_speculations + 1)


class SessionRunner:
    """Runs segments on a session of any backend."""

    def __init__(self, model: Model) -> None:
        manifest = model.bundle.manifest
        self.graphs, self.split = manifest.graphs, model.split
        self._session, self._dtype = model.session, manifest.dtype
        self._caches = {
            name: [t.name for t in graph.inputs if t.is_cache] for name, graph in self.graphs.items() if graph.layers
        }

    def run(self, segment: Segment, trace: Trace) -> tuple[dict[GraphName, dict[str, Array]], Array]:
        """Each graph's outputs [kept, values] (a prompt's head has its last row alone), and the ids it picked."""
        if segment.kind == "prefill":
            round_ = prefill_round(self.split, segment.rows, last=True, early_exit=False)
        else:
            round_ = speculative_round(self.split, segment.rows - 1)
        outputs: dict[GraphName, dict[str, Array]] = {}
        for name in self._caches:
            graph = self.graphs[name]
            calls = [call for call in round_.calls if call.graph == name]
            self._call(calls, segment, graph.reads, trace.states[graph.first_layer])
            outputs[name] = {graph.writes: self._session.read(View(graph.writes, 0, segment.kept))}
        head, draft_head = round_.calls[-1], self.split.draft_head
        drafts = [call for call in round_.calls[:-1] if call.graph == draft_head.graph]
        if self.drafted(segment):
            self._call(drafts, segment, self.split.exit_states, trace.states[self.split.exit_layer])
            found = self._session.read(View("draft_logits", 0, self.drafted(segment)))
            outputs[draft_head.graph] = {"logits": found[:, : draft_head.vocabulary]}
        self._call([head], segment, "hidden_states", trace.states[self.graphs[head.graph].first_layer])
        kept = 1 if segment.kind == "prefill" else segment.kept
        names = ("target_logits", "target_embeds", "target_token_ids")
        logits, embeds, picked = (self._session.read(View(name, 0, kept)) for name in names)
        outputs[head.graph] = {"logits": logits, "inputs_embeds": embeds}
        return outputs, picked

    def drafted(self, segment: Segment) -> int:
        """Rows of a segment's text that a head of its own drafts from; none where drafts have no such head."""
        if segment.kind == "prefill" or self.split.draft_head == self.split.head:
            return 0
        return min(segment.rows - 1, segment.kept)

    def caches(self, rows: int) -> Iterator[tuple[GraphName, dict[str, Array]]]:
        """The first rows of every cache, [rows, N*D], by graph."""
        for graph, names in self._caches.items():
            found = {name: self._session.read_cache(name)[:, :rows] for name in names}
            yield graph, {name: cache.transpose(1, 0, 2).reshape(rows, -1) for name, cache in found.items()}

    def _call(self, calls: list[Call], segment: Segment, buffer: str, states: Array) -> None:
        """Runs calls of one graph on golden states; rows of rejected drafts get states from the text's beginning."""
        rows = np.concatenate([states[segment.text], states[: segment.rows - segment.kept]])
        with np.errstate(over="ignore"):  # what a dtype cannot hold shows as Inf
            stored = rows.astype(NUMPY_DTYPES[self._dtype])
        self._session.write(buffer, stored.view(np.uint16) if self._dtype == "bf16" else stored)
        for call in calls:
            bound = self._session.bind(Round((call,), rows=segment.rows, num_drafts=0, num_targets=0))
            bound.start(segment.start)
            bound.wait()


def golden_outputs(
    golden: Golden, trace: Trace, segment: Segment, picked: Array, runner: SessionRunner
) -> Mapping[GraphName, Mapping[str, Array]]:
    """What `SessionRunner.run` should have given, with the embeddings of the ids that it picked."""
    split, last = runner.split, slice(segment.text.stop - len(picked), segment.text.stop)
    wanted: dict[GraphName, dict[str, Array]] = {
        name: {graph.writes: trace.states[graph.last_layer][segment.text]}
        for name, graph in runner.graphs.items()
        if not graph.head
    }
    if drafted := runner.drafted(segment):
        logits = golden.logits(trace.states[split.exit_layer][segment.start : segment.start + drafted])
        wanted[split.draft_head.graph] = {"logits": logits[:, : split.draft_head.vocabulary]}
    logits = golden.logits(trace.states[max(trace.states)][last])
    return wanted | {split.head.graph: {"logits": logits, "inputs_embeds": golden.embeddings(picked)}}
