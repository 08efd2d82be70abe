"""What all sessions on a CUDA device share: workspace and caches in device memory, rounds that run without the host.

A round is enqueued as a whole on one stream:

    positions (pinned) -> device | the round's calls, in order | draft and target ids -> pinned

and the host waits once, for the ids. The first run of a round enqueues its calls one by one, which lets the backend
settle its memory; the second captures the same sequence into one CUDA graph, and all later ones replay that.

A round that ends early is captured in stages, of which each runs if the draft before it was probable enough:

    .. first row, head, judgement, second row | head, judgement, third row | ... | head, last row | verification ..

What a stage that does not run would have written is as stale as the rows of a draft that was wrong.

Where picks depend on the history, rounds are short ones, up to a head: the host then reads back a row of logits at a
time, picks, and writes the token in place of the head's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.backends.device import ALIGNMENT, CudaDevice, DeviceArray, Step, in_order, out_of_memory
from edgeskip.runtime.backends.engines import confidence
from edgeskip.runtime.backends.engines.heads import Picked
from edgeskip.runtime.backends.engines.products import Matrix
from edgeskip.runtime.backends.engines.sampler import (
    SETTINGS,
    Draw,
    Filters,
    Scratch,
    filters_of,
    room,
    sampler,
    settings_of,
)
from edgeskip.runtime.backends.memory import buffer_sizes, cache_sizes
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, NUMBER_TYPES
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName, Tensor, dimensions
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.profiles import PROMPT_STEP
from edgeskip.runtime.bundle.weights import Rows, TokenRows, embedding_table, read_rows
from edgeskip.runtime.decoding.rounds import GIVEN, Call, Round, View, prefill_round
from edgeskip.runtime.decoding.sampling import HostSampler, picks_of
from edgeskip.runtime.decoding.session import (
    NOTHING,
    BoundRound,
    MeasuredSession,
    Memory,
    RoundResult,
    RowInputs,
    softmax_of,
)
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.grammar.masks import TokenMask
from edgeskip.runtime.sampling import GREEDY, Sampling

_MADE = "drafts_made"
_COUNTS = ("draft_token_ids", "target_token_ids", _MADE)
_READ_BACK = (*_COUNTS, "target_token_logits")


def is_frequent(rows: int) -> bool:
    """Whether calls of so many rows will come again: those of rounds, and those of prompts that are rounded up."""
    return rows <= HEAD_ROWS or rows % PROMPT_STEP == 0


class CudaSession(MeasuredSession):
    """A session whose memory is on a CUDA device; a backend adds how a call is enqueued.

    Args:
        bundle: what is loaded.
        device: where it is loaded to; the session closes it.
        weights_bytes: what the backend takes for weights.
        exit_layer: the exit that drafts; by default the bundle's own.
        loaded: whether the weights are on the device already.

    Raises:
        BackendError: not enough device memory for weights, caches and workspace.
    """

    device = "cuda"
    is_asynchronous = True

    def __init__(
        self,
        bundle: Bundle,
        device: CudaDevice,
        weights_bytes: int,
        exit_layer: int | None = None,
        *,
        loaded: bool = False,
    ) -> None:
        manifest = bundle.manifest
        self._device, self._dtype = device, manifest.dtype
        self._bound: dict[Round, BoundRound] = {}
        self._carry: list[Callable[[], None]] = []
        self._device_ns = self._captured_rounds = 0
        self._host_table, self._sampler = embedding_table(bundle), HostSampler(GREEDY, (), 0)
        self._draw: Draw | None = None
        self._embed: Callable[[int, int, int], None] | None = None
        self._token_ids = 0
        self._filters: Filters = ()
        self.hardware, self.compute_capability = device.name, device.compute_capability
        self._dims = dimensions(manifest.architecture, manifest.max_length)
        self._graph_table, self._split = manifest.graphs, manifest.split(exit_layer)
        self._weights_bytes = weights_bytes
        buffers = buffer_sizes(manifest.architecture, self._graph_table, manifest.dtype, manifest.prefill_chunk)
        caches = cache_sizes(manifest.architecture, self._graph_table, manifest.dtype, manifest.max_length)
        self._caches_bytes = sum(caches.values())
        buffers[_MADE] = (ITEMSIZE["int64"], 1)
        self._workspace_bytes = sum(row_bytes * rows for row_bytes, rows in buffers.values())
        self._used_before = device.used_bytes() if loaded else 0
        self.planned_bytes = self._caches_bytes + self._workspace_bytes + (0 if loaded else weights_bytes)
        free = device.free_bytes()
        if self.planned_bytes > free:
            raise out_of_memory(bundle.folder, self.planned_bytes, free)
        self._caches = dict(zip(caches, device.zeros([(size, 1) for size in caches.values()]), strict=True))
        self._buffers = dict(zip(buffers, device.zeros(buffers.values()), strict=True))
        # what is read back after each round is side by side on the device, so that one copy reads it all
        self._buffers |= self._adjacent({name: buffers[name] for name in _READ_BACK})
        self._results = device.pinned((sum(self._buffers[name].bytes for name in _READ_BACK),), np.uint8)
        told = {tensor.name for graph in self._graph_table.values() if graph.head for tensor in graph.inputs[1:]}
        self._row_inputs = {
            name: device.pinned((buffers[name][1],), np.int64) for name in ("position_ids", GIVEN, *told)
        }
        self._staging = device.pinned((max(size * rows for size, rows in buffers.values()),), np.uint8)
        self._threshold, self._numbers = 0.0, device.pinned((HEAD_ROWS,), np.int64)
        self._numbers[:] = np.arange(HEAD_ROWS)
        first, size = self._buffers["inputs_embeds"].address, buffers["inputs_embeds"][0]
        self._carry = [
            device.copier(first, self._address(View("target_embeds", row, 1)), size) for row in range(HEAD_ROWS)
        ]

    @abstractmethod
    def _enqueued(self, call: Call) -> Callable[[], None]:
        """Binds a call's shapes and memory; calling the result enqueues it on the device's stream."""

    def _is_capturable(self, round_: Round) -> bool:
        """Whether a round that has run before can be captured now."""
        return True

    @abstractmethod
    def _release(self) -> None:
        """Frees what the backend holds."""

    def _warm_up(self, chunk: int) -> None:
        """Runs the largest calls once, so that a lack of memory shows now."""
        self._try(prefill_round(self._split, chunk, last=True, early_exit=False))

    def _try(self, round_: Round) -> None:
        """Runs a round on whatever the buffers hold."""
        bound = self.bind(round_)
        bound.start(0, dict.fromkeys(round_.row_inputs, np.zeros(round_.rows, np.int64)))
        bound.wait()

    def _bind(self, round_: Round) -> BoundRound:
        heads = [call for call in round_.calls if self._graph_table[call.graph].head]
        if round_.picks == "heads":
            return self._whole_round(round_)
        if not heads:
            return self.bind(replace(round_, picks="heads"))
        if round_.picks == "draws":
            return _DrawnRound(self, round_)
        assert heads == [round_.calls[-1]], "a host must see each draft before the next row"
        return _HostPickedRound(self, self.bind(replace(round_, picks="heads")), heads[0])

    def _whole_round(self, round_: Round) -> _CudaRound:
        """A round that runs without the host; draws in it have the filters that were last asked for."""
        calls: list[list[Step]] = []
        for call in round_.calls:
            calls.append([self._enqueued(call)])
            if round_.picks == "draws" and self._graph_table[call.graph].head:
                calls[-1].append(self._drawn(call))
        device, written, writes = self._device, {}, list[Step]()
        for name in ("position_ids", *round_.row_inputs):
            written[name] = host = self._row_inputs[name][: round_.rows]
            writes.append(device.copier(self._buffers[name].address, host.ctypes.data, host.nbytes))
        first = self._buffers[_READ_BACK[0]].address
        read = device.copier(self._results.ctypes.data, first, self._results.nbytes)
        if round_.ends_early:
            all_made = self._numbers[round_.num_drafts :]
            counted = device.copier(self._buffers[_MADE].address, all_made.ctypes.data, ITEMSIZE["int64"])
            whole = partial(in_order, [*writes, counted, *chain(*calls), read])
            ends = partial(in_order, writes), read
            return _EndingRound(self, round_, whole, written, partial(self._captured_in_stages, round_, calls, ends))
        whole = partial(in_order, [*writes, *chain(*calls), read])
        replayed = is_frequent(round_.rows) and all(is_frequent(call.rows) for call in round_.calls)
        return _CudaRound(self, round_, whole, written, replayed=replayed)

    def _captured_in_stages(self, round_: Round, calls: Sequence[Sequence[Step]], ends: tuple[Step, Step]) -> Step:
        """A round that ends early as one CUDA graph: the steps of each of its calls, and what begins and ends it."""
        assert self._judge is not None
        # drafts of a later exit go through layers whose rows are those of a verification too, one at a time
        verified = next(at for at, call in enumerate(round_.calls) if call.verifies and call.rows > 1)
        heads = [at for at in range(verified) if self._graph_table[round_.calls[at].graph].head]
        begin, end = ends
        stages, before = [], [begin]
        for number, (at, (start, stop)) in enumerate(zip(heads, pairwise([0, *heads[1:], verified]), strict=True), 1):
            head, outputs = self._graph_table[round_.calls[at].graph].head, dict(round_.calls[at].outputs)
            assert head is not None
            picked = self._address(outputs["logits"]), self._address(outputs["token_logits"])
            judge = self._judge(picked, head.vocabulary, number)
            drafting, next_row = [*before, *chain(*calls[start : at + 1])], [*chain(*calls[at + 1 : stop])]
            stages.append(partial(_stage, drafting, judge, next_row))
            before = []
        return self._device.captured_while(stages, partial(in_order, [*chain(*calls[verified:]), end]))

    @cached_property
    def _judge(self) -> confidence.Bind | None:
        """What judges drafts, made when it is first asked for; None where the host has to."""
        if not self._device.has_conditions:
            return None
        sizes = confidence.room()
        self._scales = confidence.Scales(*(block.address for block in self._device.zeros([(n, 1) for n in sizes])))
        self._workspace_bytes += sum(sizes)
        self.planned_bytes += sum(sizes)
        try:
            return confidence.judge(self._device, self._dtype, self._scales, self._buffers[_MADE].address)
        except BackendError:
            return None

    def ends_below(self, probability: float) -> bool:
        """Whether drafts are judged here; if so, from now on by this probability, without anything captured anew."""
        if self._judge is None:
            return False
        if probability != self._threshold:
            self._device.stream.sync()  # a round that nobody waited for may still be reading
            host = self._staging[: ITEMSIZE["fp32"]]
            host.view(np.float32)[:] = self._threshold = probability
            self._device.copier(self._scales.threshold, host.ctypes.data, host.nbytes)()
            self._device.stream.sync()
        return True

    def _results_of(self, round_: Round) -> dict[str, npt.NDArray[Any]]:
        """Where a round's results go in pinned memory, by buffer."""
        rows = round_.num_drafts, round_.num_targets, 1, round_.num_targets
        return {name: self._result(View(name, 0, count)) for name, count in zip(_READ_BACK, rows, strict=True)}

    def _result(self, view: View) -> npt.NDArray[Any]:
        """Where these rows of what is read back after each round go."""
        start = self._address(view) - self._buffers[_READ_BACK[0]].address
        raw = self._results[start : start + view.rows * self._buffers[view.buffer].row_bytes]
        return raw.view("int64" if view.buffer in _COUNTS else NUMBER_TYPES[self._dtype].numpy)

    @property
    def captured_rounds(self) -> int:
        """Rounds so far that ran as one CUDA graph."""
        return self._captured_rounds

    @property
    def stage_ns(self) -> Mapping[str, int]:
        """Device time of all rounds so far: the host cannot see what runs within one."""
        return {"device": self._device_ns}

    def sample(self, sampling: Sampling, prompt_ids: Sequence[int], mask: TokenMask | None = None) -> None:
        """Picks tokens like this from now on, where heads do not. Draws read it on the device, so a round is bound anew
        only where it first has other filters.
        """
        if picks_of(sampling, mask) == "history":
            self._sampler = HostSampler(sampling, prompt_ids, self._dims["C"], mask)
            return
        self._drawing()
        self._filters = filters_of(sampling)
        self._device.stream.sync()  # a round that nobody waited for may still be reading
        host = self._staging[: SETTINGS.itemsize]
        host.view(SETTINGS)[:] = settings_of(sampling)
        self._device.copier(self._scratch_of_draws.settings, host.ctypes.data, host.nbytes)()
        self._device.stream.sync()

    def _drawing(self) -> Draw:
        """The kernels that draw, and their memory, taken when it is first asked for."""
        if self._draw is None:
            sizes = room(self._dims["V"])
            self._scratch_of_draws = Scratch(*(block.address for block in self._device.zeros([(n, 1) for n in sizes])))
            self._workspace_bytes += sum(sizes)
            self.planned_bytes += sum(sizes)
            table = self._token_table()
            self._draw = sampler(self._device, table, self._dims["H"], self._dtype, self._scratch_of_draws)
        return self._draw

    @abstractmethod
    def _token_table(self) -> Matrix:
        """The embedding table on the device."""

    def _drawn(self, call: Call) -> Callable[[], None]:
        """Draws from the logits that a head's call leaves, and puts tokens in place of those that it picked."""
        head, outputs = self._graph_table[call.graph].head, dict(call.outputs)
        assert head is not None
        names = ("logits", "token_ids", "token_logits", "inputs_embeds")
        at = Picked(*(self._address(outputs[name]) for name in names))
        positions = self._address(View("position_ids", call.first_row, call.rows))
        return self._drawing()(at, positions, (call.rows, head.vocabulary), self._filters)

    def _put_token(self, outputs: Mapping[str, View], row: int, token: int) -> None:
        """Puts a token in place of the one that a head picked in a row of its outputs, right after something was read:
        what is copied from pinned memory then waits for nothing.
        """
        ids, logits, picked, embeds = (
            self._address(replace(view, start=view.start + row))
            for view in (outputs[name] for name in ("token_ids", "logits", "token_logits", "inputs_embeds"))
        )
        number = ITEMSIZE[self._dtype]
        id_, embedding = self._staging[: ITEMSIZE["int64"]], self._staging[ALIGNMENT:][: self._dims["H"] * number]
        id_.view(np.int64)[:] = token
        embedding.view(NUMBER_TYPES[self._dtype].numpy)[:] = self._host_table[token]
        self._device.copier(ids, id_.ctypes.data, id_.nbytes)()
        self._device.copier(embeds, embedding.ctypes.data, embedding.nbytes)()
        self._device.copier(picked, logits + token * number, number)()

    def prompt_rows(self, rows: int, position: int) -> int:
        """The rows, rounded up where there is room, so that the call is replayed as one captured graph."""
        rounded = rows if is_frequent(rows) else -(-rows // PROMPT_STEP) * PROMPT_STEP
        return rounded if position + rounded <= self._dims["C"] else rows

    def make_current(self) -> None:
        """Lets the calling thread use the session."""
        self._device.make_current()

    def write(self, buffer: str, rows: Rows) -> None:
        """Puts rows in the bundle's dtype into the first rows of a buffer. If the backend has told how the device reads
        those of tokens from a table of its own, by ids at an address, it does.
        """
        self._device.stream.sync()  # a round that nobody waited for may still be reading
        target = self._buffers[buffer]
        if self._embed is not None and isinstance(rows, TokenRows):
            ids = self._staging[: len(rows) * ITEMSIZE["int64"]]
            ids.view(np.int64)[:] = rows.token_ids
            self._device.copier(self._token_ids, ids.ctypes.data, ids.nbytes)()
            self._embed(self._token_ids, target.address, len(rows))
            return
        part = self._staging[: target.row_bytes * len(rows)]
        read_rows(rows, part.view(NUMBER_TYPES[self._dtype].numpy).reshape(len(rows), -1))
        self._device.copier(target.address, part.ctypes.data, part.nbytes)()

    def read(self, view: View) -> npt.NDArray[Any]:
        """Rows of a workspace buffer: ids as they are, all else in fp32."""
        size = self._buffers[view.buffer].row_bytes * view.rows
        raw = self._fetched(self._address(view), size)
        return raw.view(np.int64).copy() if self._is_integer(view.buffer) else self._widened(raw).reshape(view.rows, -1)

    def read_cache(self, name: str) -> npt.NDArray[Any]:
        """A whole cache, [N,C,D] in fp32."""
        cache, step = self._caches[name], self._staging.nbytes
        parts = [
            self._widened(self._fetched(cache.address + start, min(step, cache.bytes - start)))
            for start in range(0, cache.bytes, step)
        ]
        return np.concatenate(parts).reshape([self._dims[dim] for dim in "NCD"])

    def read_caches(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """A copy in host memory of the first rows of every cache, as raw bytes."""
        size, found = rows * self._row_bytes, {}
        with self._device.borrowed(self._dims["N"] * size) as host:
            for name in self._caches:
                for place, head in zip(self._heads(name), host.reshape(-1, size), strict=True):
                    self._device.copier(head.ctypes.data, place, size)()
                self._device.stream.sync()
                found[name] = host.reshape(-1, size).copy()
        return found

    def write_caches(self, caches: Mapping[str, npt.NDArray[Any]]) -> None:
        """Puts back what `read_caches` returned."""
        size = next(iter(caches.values())).shape[1]
        with self._device.borrowed(self._dims["N"] * size) as host:
            for name, raw in caches.items():
                host[:] = raw.reshape(-1)
                for place, head in zip(self._heads(name), host.reshape(-1, size), strict=True):
                    self._device.copier(place, head.ctypes.data, size)()
                self._device.stream.sync()

    def clear(self) -> None:
        """Zeroes caches and workspace."""
        for array in (*self._buffers.values(), *self._caches.values()):
            self._device.zero(array)

    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""
        self._carry[row]()

    def draft_confidence(self, row: int, vocabulary: int) -> float:
        """The probability that the exit gave to the token it drafted in this row, from a head with this many logits."""
        logits = self.read(View("draft_logits", row, 1))[0, :vocabulary]
        return softmax_of(logits, float(self.read(View("draft_token_logits", row, 1))[0, 0]))

    def time_call_ms(self, call: Call, position: int, repeats: int) -> float:
        """Median device time of one call by itself, as a graph of its own, its first row at `position`."""
        self._device.stream.sync()
        positions = self._row_inputs["position_ids"]
        positions[:] = np.minimum(position + np.arange(len(positions)), self._dims["C"] - 1)
        target = self._buffers["position_ids"]
        self._device.copier(target.address, positions.ctypes.data, target.bytes)()
        enqueue, watch, times = self._enqueued(call), self._device.stopwatch(), []
        enqueue()
        alone = Round((call,), rows=0, num_drafts=0, num_targets=0)
        capturable = self._is_capturable(alone)
        with self._device.captured_for_now(enqueue) if capturable else nullcontext(enqueue) as launch:
            for _ in range(repeats + 2):
                watch.start()
                launch()
                watch.stop()
                times.append(watch.elapsed_ns() / 1e6)
        return float(np.median(times[2:]))

    def copy_bytes_per_second(self) -> float:
        """Rate of copies within the device's memory, bytes read plus bytes written."""
        return self._device.copy_bytes_per_second()

    def memory(self) -> Memory:
        """Device memory by kind; what we did not take ourselves is the backend's: scratch, kernels, libraries."""
        other = max(self._device.used_bytes() - self._used_before - self.planned_bytes, 0)
        return Memory(self._weights_bytes, self._caches_bytes, self._workspace_bytes, other)

    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""
        with suppress(Exception):  # a device that failed cannot be waited for
            self._device.stream.sync()
        self._bound.clear()
        self._carry.clear()
        try:
            self._release()
        finally:
            self._device.close()

    @property
    def _row_bytes(self) -> int:
        """Bytes of a cache's row of one head."""
        return self._dims["D"] * ITEMSIZE[self._dtype]

    def _heads(self, cache: str) -> range:
        """Where each head's rows of a cache begin."""
        start, step = self._caches[cache].address, self._dims["C"] * self._row_bytes
        return range(start, start + self._dims["N"] * step, step)

    def _adjacent(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, DeviceArray]:
        (block,) = self._device.zeros([(sum(row_bytes * rows for row_bytes, rows in shapes.values()), 1)])
        address, arrays = block.address, {}
        for name, shape in shapes.items():
            arrays[name] = DeviceArray(address, *shape)
            address += arrays[name].bytes
        return arrays

    def _is_integer(self, buffer: str) -> bool:
        return buffer in _COUNTS or buffer in self._row_inputs

    def _fetched(self, address: int, size: int) -> npt.NDArray[Any]:
        """Bytes of device memory, once all that was started is done; valid until the next copy."""
        part = self._staging[:size]
        self._device.copier(part.ctypes.data, address, size)()
        self._device.stream.sync()
        return part

    def _widened(self, raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bytes of the bundle's dtype, in fp32."""
        if self._dtype == "bf16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return raw.view(NUMBER_TYPES[self._dtype].numpy).astype(np.float32)

    def _address(self, view: View) -> int:
        buffer = self._buffers[view.buffer]
        return buffer.address + view.start * buffer.row_bytes

    def _shape(self, graph: GraphName, tensor: Tensor, rows: int) -> tuple[int, ...]:
        sizes = self._graph_table[graph].dimensions(self._dims) | {"T": rows}
        return tuple(sizes[dim] for dim in tensor.shape)


def _stage(drafting: Sequence[Step], judge: confidence.Judge, next_row: Sequence[Step], following: int) -> None:
    """A stage of a round that ends early, with the handle of the one that may follow, 0 for none."""
    in_order(drafting)
    if following:
        judge(following)
    in_order(next_row)


class _CudaRound:
    """A round bound to device memory, which runs without the host between its start and its end."""

    def __init__(
        self,
        session: CudaSession,
        round_: Round,
        enqueue: Callable[[], None],
        written: Mapping[str, npt.NDArray[Any]],
        *,
        replayed: bool,
    ) -> None:
        self._session, self._round, self._enqueue, self._replayed = session, round_, enqueue, replayed
        self._rows, self._written = np.arange(round_.rows), written
        self._drafts, self._targets, self._made, self._target_logits = session._results_of(round_).values()
        self._watch = session._device.stopwatch()
        self._runs = 0
        self._launch: Callable[[], None] | None = None

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Enqueues the round or, from its second run on, launches it as one graph."""
        session = self._session
        if self._runs and self._replayed and self._launch is None and session._is_capturable(self._round):
            self._launch = session._device.captured(self._enqueue)
        self._write(position, row_inputs)
        self._watch.start()
        (self._launch or self._enqueue)()
        self._watch.stop()
        self._runs += 1

    def _write(self, position: int, row_inputs: RowInputs) -> None:
        np.add(self._rows, position, out=self._written["position_ids"])
        for name in self._round.row_inputs:
            self._written[name][:] = row_inputs[name]

    def wait(self) -> RoundResult:
        """Waits for the device, and keeps the time that it took."""
        session = self._session
        session._device_ns += self._watch.elapsed_ns()
        session._captured_rounds += self._launch is not None and self._round.num_targets > 0
        logits = self._target_logits if session._dtype != "bf16" else session._widened(self._target_logits)
        return RoundResult(self._drafts.tolist(), self._targets.tolist(), logits.tolist())


class _EndingRound(_CudaRound):
    """A round that ends early. It runs as a whole once, so that it can be captured for its first result already."""

    def __init__(
        self,
        session: CudaSession,
        round_: Round,
        whole: Step,
        written: Mapping[str, npt.NDArray[Any]],
        capture: Callable[[], Step],
    ) -> None:
        super().__init__(session, round_, whole, written, replayed=False)
        self._capture = capture

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Launches the round as one graph, or enqueues all of it where that cannot be had."""
        if self._launch is None and self._session._is_capturable(self._round):
            self._write(position, row_inputs)
            self._enqueue()  # its inputs stay what they are
            self._launch = self._captured()
        super().start(position, row_inputs)

    def _captured(self) -> Step:
        try:
            return self._capture()
        except BackendError:  # the driver refuses it: all drafts now, and in texts to come the host looks at each
            self._session._judge = None
            return self._session._device.captured(self._enqueue)

    def wait(self) -> RoundResult:
        """Waits for the device; what was not drafted is no result."""
        result, made = super().wait(), int(self._made[0])
        drafts, targets, logits = result.draft_ids, result.target_ids, result.target_logits
        return RoundResult(drafts[:made], targets[: made + 1], logits[: made + 1])


class _DrawnRound:
    """A round with draws, bound and captured once for each set of filters: those that are off launch nothing."""

    def __init__(self, session: CudaSession, round_: Round) -> None:
        self._session, self._round = session, round_
        self._by_filters: dict[Filters, _CudaRound] = {}
        self._filters: Filters = ()

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Starts the round with the filters that were last asked for."""
        self._filters = self._session._filters
        if self._filters not in self._by_filters:
            self._by_filters[self._filters] = self._session._whole_round(self._round)
        self._by_filters[self._filters].start(position, row_inputs)

    def wait(self) -> RoundResult:
        """Waits for the device."""
        return self._by_filters[self._filters].wait()


class _HostPickedRound:
    """A round up to a head, whose tokens the host then picks one after another, as far as they are the drafts."""

    def __init__(self, session: CudaSession, bound: BoundRound, call: Call) -> None:
        head = session._graph_table[call.graph].head
        assert head is not None
        self._session, self._bound, self._call, self._head = session, bound, call, head
        self._outputs = dict(call.outputs)
        self._own = session._result(self._outputs["token_ids"])
        self._latest = np.empty(0, np.float32)
        self._position = 0

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Starts what the device does."""
        self._position = position
        self._bound.start(position, row_inputs)

    def wait(self) -> RoundResult:
        """Waits for the device, and picks."""
        result, session = self._bound.wait(), self._session
        first, drafts = self._position + self._call.first_row + 1, result.draft_ids[self._call.first_row :]
        for row, token in session._sampler.pick_rows(self._logits, self._own, first, drafts):
            if token == self._own[row]:
                continue
            session._put_token(self._outputs, row, token)
            if result.target_ids:
                result.target_ids[row], result.target_logits[row] = token, float(self._latest[token])
        return result

    def _logits(self, row: int) -> npt.NDArray[Any]:
        """The logits [V] of a row in fp32, read back."""
        view = self._outputs["logits"]
        self._latest = self._session.read(View(view.buffer, view.start + row, 1))[0, : self._head.vocabulary]
        return self._latest
