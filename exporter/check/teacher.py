"""Teacher-forced calls: a text split as sessions split it, and every call of it run on golden inputs.

    golden   embeddings -> layers[:E] -> exit states -> layers[E:] -> last states -> norm, LM head
                 |             :             |              :              |              :
    session      +--> draft  compared        +--> verify  compared         +--> head    compared

The caches are filled by such calls too, so an error is that of the graph that shows it. The calls are those of real
rounds, bound by the session as for generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.check.golden import Golden, Trace
from edgeskip.exporter.weights import NUMPY_DTYPES
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.rounds import Call, Round, View, prefill_round, speculative_round
from edgeskip.runtime.decoding.session import Session

Array = npt.NDArray[Any]
Kind = Literal["prefill", "step", "verification", "cache"]
"""Of calls: a chunk of a prompt, one row, K+1 rows; `cache` stands for what all of them left in the caches."""

STEPS = 3
"""Plain steps behind a prompt, before the rounds."""


@dataclass(frozen=True)
class Segment:
    """Calls on rows start .. start+rows; the first `kept` are of the text, the rest stand for rejected drafts."""

    kind: Kind
    start: int
    rows: int
    kept: int

    @property
    def text(self) -> slice:
        """Positions of the kept rows."""
        return slice(self.start, self.start + self.kept)


def split_text(length: int, end: int, chunk: int, num_speculations: int) -> Iterator[Segment]:
    """A prompt of `length` tokens and what is decoded behind it, up to `end`.

    Chunks, the last one overlapping; steps; a round whose drafts are rejected, overwritten by the next; rounds of
    K+1 rows.
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
    """Rows behind a prompt that have every kind of segment, with two whole rounds."""
    return STEPS + 1 + 2 * (num_speculations + 1)


class SessionRunner:
    """Runs segments on a session, whatever its backend."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self._session, self._dtype = session, bundle.manifest.dtype
        self._caches = {
            name: [t.name for t in graph.inputs if t.is_cache]
            for name, graph in bundle.manifest.table.items()
            if graph.layers
        }

    def run(self, segment: Segment, trace: Trace) -> tuple[dict[GraphName, dict[str, Array]], Array]:
        """Each graph's outputs [kept, values], the head's of a prompt for its last row alone, and the ids it picked."""
        prefill = segment.kind == "prefill"
        round_ = (
            prefill_round(segment.rows, last=True, early_exit=False) if prefill else speculative_round(segment.rows - 1)
        )
        drafts = [call for call in round_.calls if call.graph == "draft"]
        verify, head = round_.calls[-2:]
        self._call(drafts, segment, "inputs_embeds", trace.embeddings)
        exit_states = self._session.read(View("exit_hidden_states", 0, segment.kept))
        self._call([verify], segment, "exit_hidden_states", trace.exit_states)
        states = self._session.read(View("hidden_states", 0, segment.kept))
        self._call([head], segment, "hidden_states", trace.last_states)
        kept = 1 if prefill else segment.kept
        logits, embeds, picked = (
            self._session.read(View(buffer, 0, kept)) for buffer in ("logits", "target_embeds", "target_token_ids")
        )
        return {
            "draft": {"exit_hidden_states": exit_states},
            "verify": {"hidden_states": states},
            "head": {"logits": logits, "inputs_embeds": embeds},
        }, picked

    def caches(self, rows: int) -> Iterator[tuple[GraphName, dict[str, Array]]]:
        """The first rows of every cache, [rows, N*D], by graph."""
        for graph, names in self._caches.items():
            found = {name: self._session.read_cache(name)[:, :rows] for name in names}
            yield graph, {name: cache.transpose(1, 0, 2).reshape(rows, -1) for name, cache in found.items()}

    def _call(self, calls: list[Call], segment: Segment, buffer: str, states: Array) -> None:
        """Runs calls of one graph on golden states; rows of rejected drafts get those of the text's beginning."""
        rows = np.concatenate([states[segment.text], states[: segment.rows - segment.kept]])
        with np.errstate(over="ignore"):  # what a dtype cannot hold shows as Inf
            stored = rows.astype(NUMPY_DTYPES[self._dtype])
        self._session.write(buffer, stored.view(np.uint16) if self._dtype == "bf16" else stored)
        for call in calls:
            self._session.bind(Round((call,), rows=segment.rows, num_drafts=0, num_targets=0))(segment.start)()


def golden_outputs(
    golden: Golden, trace: Trace, segment: Segment, picked: Array
) -> Mapping[GraphName, Mapping[str, Array]]:
    """What `SessionRunner.run` should have given, with the embeddings of the ids that it picked."""
    last = slice(segment.text.stop - len(picked), segment.text.stop)
    return {
        "draft": {"exit_hidden_states": trace.exit_states[segment.text]},
        "verify": {"hidden_states": trace.last_states[segment.text]},
        "head": {"logits": golden.logits(trace.last_states[last]), "inputs_embeds": golden.embeddings(picked)},
    }
