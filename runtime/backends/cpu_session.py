"""A session on ONNX Runtime's CPU provider."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.backends.alike import LARGEST_HEAD, MOST_ROWS, choose_attention, fewest_rows
from edgeskip.runtime.backends.ort import OrtGraphs, cpu_options, onnxruntime
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES
from edgeskip.runtime.bundle.graphs import NEW_ROWS, Graph, dimensions, present_name
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.weights import Rows, embedding_table, mapped_weights, read_rows
from edgeskip.runtime.decoding.rounds import Call, Round, View, given_round, workspace
from edgeskip.runtime.decoding.sampling import HostSampler
from edgeskip.runtime.decoding.session import NOTHING, BoundRound, MeasuredSession, Memory, RoundResult, RowInputs
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.grammar.masks import TokenMask
from edgeskip.runtime.host import cpu_name, releasing_freed_memory, usable_cores
from edgeskip.runtime.sampling import GREEDY, Sampling


class OrtCpuSession(MeasuredSession):
    """ONNX Runtime's CPU provider, updating caches in place.

    Args:
        bundle: what to load.
        threads: threads of the one pool that all graphs share, and so does every session of this process; 0 means
            one per core.
        dialect: `cpu`; `ort`, which computes a single row faster and not quite as one of several; or that of the graphs
            that TensorRT gets.

    Raises:
        BackendError: ONNX Runtime is missing or refuses the graphs, or the bundle is in bf16, which its CPU
            provider does not compute in.
    """

    device = "cpu"
    confidence_threshold = 0.5  # a wasted draft costs as much as a right one, and looking costs next to nothing

    def __init__(self, bundle: Bundle, *, threads: int = 0, dialect: str = "cpu") -> None:
        manifest = bundle.manifest
        if manifest.dtype == "bf16":
            raise BackendError(
                bundle.folder,
                "in bf16, which ONNX Runtime does not compute on a CPU",
                fix="export with --dtype fp32",
            )
        ort = onnxruntime()
        options = cpu_options(ort, threads)
        choose_attention()
        self._threads = threads or usable_cores()
        providers: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
        with releasing_freed_memory(manifest.weights_bytes):
            self._graphs = OrtGraphs(ort, bundle, dialect, lambda _: options, providers, at_once=self._threads)
        self._graph_table, self._dims = manifest.graphs, dimensions(manifest.architecture, manifest.max_length)
        numbers = {"float": np.dtype(NUMBER_TYPES[manifest.dtype].numpy), "int64": np.dtype(np.int64)}
        self._buffers = {
            name: _zeros((rows, *([] if dim is None else [self._dims[dim]])), numbers[dtype])
            for name, (dim, dtype, rows) in workspace(manifest.graphs.values(), manifest.prefill_chunk).items()
        }
        self._caches, self._new_rows = self._make_caches(manifest.graphs.values(), numbers["float"], dialect)
        self._weights_bytes = manifest.weights_bytes
        self._weights = mapped_weights(bundle) if DIALECTS[dialect].weights == "inputs" else {}
        self._scratch, self._ones = np.empty(self._dims["V"], np.float32), np.ones(self._dims["V"], np.float32)
        self._table, self._sampler = embedding_table(bundle), HostSampler(GREEDY, (), 0)
        self.dialect = dialect
        self._bound: dict[Round, BoundRound] = {}
        self._stage_ns: dict[str, int] = dict.fromkeys(manifest.graphs, 0)
        self.hardware = f"{cpu_name()}, {self._threads} threads"
        self.description = f"ONNX Runtime {ort.__version__}, CPU, {dialect} dialect, {manifest.dtype}"
        self._fewest_rows, self._drafts_singly = 1, False
        if dialect == "cpu":
            first, later = map(fewest_rows, self._trials(bundle)) if manifest.max_length > MOST_ROWS else (None, None)
            self._fewest_rows, self._drafts_singly = later or 1, (first, later) != (1, 1)
            self.exact = later is not None and manifest.architecture.head_dim <= LARGEST_HEAD
            self.description += (
                "" if self.exact else "; a row depends on their number here, so drafts may change a token"
            )

    def _trials(self, bundle: Bundle) -> Iterator[Callable[[int], list[npt.NDArray[Any]]]]:
        """Run so many random rows at the start of the caches: by the first graph, and by all that are after it."""
        split = bundle.manifest.split(min(bundle.manifest.exit_layers))
        states = np.random.default_rng(0).standard_normal((MOST_ROWS, self._dims["H"]))
        self._buffers["position_ids"][:MOST_ROWS] = np.arange(MOST_ROWS)

        def run(rows: int, *, verifies: bool) -> list[npt.NDArray[Any]]:
            calls = [call for call in given_round(split, rows - 1).calls if call.verifies == verifies]
            for call in calls:
                self._bound_call(call)()
            for cache in self._caches.values():
                cache[:, :, :MOST_ROWS] = 0
            return [self._rows(view) for call in calls for _, view in call.outputs]

        for buffer, verifies in (("inputs_embeds", False), (split.exit_states, True)):
            self.write(buffer, states)
            yield partial(run, verifies=verifies)

    def _make_caches(
        self, graphs: Iterable[Graph], number: np.dtype[Any], dialect: str
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
        """Caches by their input's name, and, where a dialect hands back new rows, room for those by their output's."""
        caches = [tensor for graph in graphs for tensor in graph.inputs if tensor.is_cache]
        made = {t.name: _zeros(tuple(self._dims[dim] for dim in t.shape), number) for t in caches}
        if DIALECTS[dialect].caches == "in-place":
            return made, {}
        sizes = self._dims | {"T": len(self._buffers["position_ids"])}
        size = math.prod(sizes[dim] for dim in NEW_ROWS)
        return made, {present_name(t.name): _zeros((size,), number) for t in caches}

    @property
    def stage_ns(self) -> Mapping[str, int]:
        """Time spent in each graph so far."""
        return dict(self._stage_ns)

    def _bind(self, round_: Round) -> BoundRound:
        def bound(calls: Iterable[Call]) -> Iterator[tuple[str, Callable[[], None]]]:
            for call, own in zip(calls, narrow, strict=True):
                yield call.graph, self._bound_call(call)
                if round_.picks != "heads" and self._graph_table[call.graph].head:
                    yield call.graph, self._picking(own)

        narrow = tuple(one for call in round_.calls for one in self._as_drafted(call))
        wide = tuple(map(self._widened, narrow))
        calls, last = [*bound(wide)], self._dims["C"] - max(call.first_row + call.rows for call in wide)
        both = calls, calls if wide == narrow else [*bound(narrow)]
        return _CpuRound(round_, both, last, self._buffers, self._stage_ns)

    def _as_drafted(self, call: Call) -> list[Call]:
        """Row by row, if the rows should be those of single ones and would not be."""
        return [call.row(row) for row in range(call.rows)] if call.drafts and self._drafts_singly else [call]

    def _widened(self, call: Call) -> Call:
        """A verification with as many rows as it takes."""
        return call.widened(self._fewest_rows) if call.verifies else call

    def _bound_call(self, call: Call) -> Callable[[], None]:
        def address(place: str | View) -> int:
            if isinstance(place, View):
                return int(self._buffers[place.buffer][place.start :].ctypes.data)
            return int((self._caches | self._new_rows | self._weights)[place].ctypes.data)

        run = self._graphs.bound(call, "cpu", address)
        pasts = [call.cache(tensor.name) for tensor in self._graph_table[call.graph].inputs if tensor.is_cache]
        if not self._new_rows or not pasts:
            return run
        sizes = self._dims | {"T": call.rows}
        shape = [sizes[dim] for dim in NEW_ROWS]
        written = [
            (self._caches[past], self._new_rows[present_name(past)][: math.prod(shape)].reshape(shape))
            for past in pasts
        ]
        position = self._buffers["position_ids"][dict(call.inputs)["position_ids"].start :]

        def run_and_write() -> None:
            run()
            for cache, rows in written:
                cache[:, :, position[0] : position[0] + call.rows] = rows

        return run_and_write

    def _picking(self, call: Call) -> Callable[[], None]:
        """Picks tokens from the logits that a head's call has left, and puts them where it put its own."""
        head = self._graph_table[call.graph].head
        assert head is not None
        outputs = dict(call.outputs)
        logits, token_ids, token_logits, embeddings = (
            self._rows(outputs[name]) for name in ("logits", "token_ids", "token_logits", "inputs_embeds")
        )
        positions, drafts = (self._buffers[name][call.first_row :] for name in ("position_ids", "draft_token_ids"))
        rows = logits[:, : head.vocabulary]

        def pick() -> None:
            for row, token in self._sampler.pick_rows(rows.__getitem__, token_ids, int(positions[0]) + 1, drafts):
                token_ids[row], token_logits[row], embeddings[row] = token, logits[row, token], self._table[token]

        return pick

    def _rows(self, view: View) -> npt.NDArray[Any]:
        return self._buffers[view.buffer][view.start : view.start + view.rows]

    def sample(self, sampling: Sampling, prompt_ids: Sequence[int], mask: TokenMask | None = None) -> None:
        """Picks tokens like this from now on, where heads do not, in a text that begins with these ones."""
        self._sampler = HostSampler(sampling, prompt_ids, self._dims["C"], mask)

    def write(self, buffer: str, rows: Rows) -> None:
        """Puts rows in the bundle's dtype into the first rows of a buffer."""
        read_rows(rows, self._buffers[buffer][: len(rows)])

    def read(self, view: View) -> npt.NDArray[Any]:
        """Rows of a workspace buffer: ids as they are, all else in fp32."""
        rows = self._rows(view)
        return rows.copy() if rows.dtype == np.int64 else rows.astype(np.float32)

    def read_cache(self, name: str) -> npt.NDArray[Any]:
        """A whole cache, [N,C,D] in fp32."""
        cache: npt.NDArray[Any] = self._caches[name][0].astype(np.float32)
        return cache

    def read_caches(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """A copy of the first rows of every cache, as raw bytes."""
        return {name: _raw(cache[0, :, :rows].copy()) for name, cache in self._caches.items()}

    def write_caches(self, caches: Mapping[str, npt.NDArray[Any]]) -> None:
        """Puts back what `read_caches` returned."""
        for name, raw in caches.items():
            cache = self._caches[name][0]
            rows = raw.view(cache.dtype).reshape(len(cache), -1, cache.shape[-1])
            cache[:, : rows.shape[1]] = rows

    def clear(self) -> None:
        """Leaves nothing in caches and workspace that is not finite; memory that was never used stays untouched."""
        for array in (*self._buffers.values(), *self._caches.values()):
            np.nan_to_num(array, copy=False, posinf=0, neginf=0)

    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""
        self._buffers["inputs_embeds"][0] = self._buffers["target_embeds"][row]

    def draft_confidence(self, row: int, vocabulary: int) -> float:
        """The probability that the exit gave to the token it drafted in this row, from a head with this many logits."""
        logits, scratch = self._buffers["draft_logits"][row, :vocabulary], self._scratch[:vocabulary]
        picked, top = float(self._buffers["draft_token_logits"][row]), float(logits.max())
        np.subtract(logits, top, out=scratch)
        np.exp(scratch, out=scratch)
        return math.exp(picked - top) / float(scratch.dot(self._ones[:vocabulary]))  # a sum, by one kernel

    def time_call_ms(self, call: Call, position: int, repeats: int) -> float:
        """Median time of one call by itself, its first row at `position`; overwrites cache rows from there on."""
        self._buffers["position_ids"][:] = position + np.arange(len(self._buffers["position_ids"]))
        run, times = self._bound_call(self._widened(call)), []
        for _ in range(repeats + 2):
            start = perf_counter_ns()
            run()
            times.append((perf_counter_ns() - start) / 1e6)
        return float(np.median(times[2:]))

    def copy_bytes_per_second(self) -> float:
        """Rate of copies within the memory that holds the weights, bytes read plus bytes written, by all threads."""
        size, threads = 1 << 26, min(self._threads, usable_cores())
        pairs = [(np.zeros(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]
        times = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(9):
                start = perf_counter()
                list(pool.map(lambda pair: np.copyto(*pair), pairs))
                times.append(perf_counter() - start)
        return 2 * size * threads / float(np.median(times[2:]))

    def memory(self) -> Memory:
        """Host memory by kind; what the backend takes beyond the weights cannot be told from the process's own."""
        caches = sum(cache.nbytes for cache in (*self._caches.values(), *self._new_rows.values()))
        return Memory(self._weights_bytes, caches, sum(buffer.nbytes for buffer in self._buffers.values()), None)

    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""
        self._bound.clear()
        self._graphs.close()
        self._buffers.clear()
        self._caches.clear()
        self._new_rows.clear()


_BoundCalls = Sequence[tuple[str, Callable[[], None]]]


class _CpuRound:
    """A round bound to memory: it runs when somebody waits.

    Its calls come widened and as they are: from positions after `last` on, the caches have no room for the former.
    """

    def __init__(
        self,
        round_: Round,
        calls: tuple[_BoundCalls, _BoundCalls],
        last: int,
        buffers: Mapping[str, npt.NDArray[Any]],
        stage_ns: dict[str, int],
    ) -> None:
        (self._wide, self._alone), self._last, self._stage_ns = calls, last, stage_ns
        self._calls = self._alone
        self._rows = np.arange(round_.rows + 1)  # that of a row beside a single one too
        self._positions = buffers["position_ids"][: round_.rows + 1]
        self._row_inputs = {name: buffers[name][: round_.rows] for name in round_.row_inputs}
        self._drafts = buffers["draft_token_ids"][: round_.num_drafts]
        self._targets = buffers["target_token_ids"][: round_.num_targets]
        self._target_logits = buffers["target_token_logits"][: round_.num_targets]

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Writes the positions of its rows, and what its heads are told of them."""
        self._calls = self._wide if position <= self._last else self._alone
        np.add(self._rows, position, out=self._positions)
        for name, buffer in self._row_inputs.items():
            buffer[:] = row_inputs[name]

    def wait(self) -> RoundResult:
        """Runs the calls, and times each."""
        before = perf_counter_ns()
        for graph, call in self._calls:
            call()
            after = perf_counter_ns()
            self._stage_ns[graph] += after - before
            before = after
        return RoundResult(self._drafts.tolist(), self._targets.tolist(), self._target_logits.tolist())


def _raw(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows [N,T,D] as bytes [N, T * bytes of a row]."""
    return rows.reshape(len(rows), -1).view(np.uint8)


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeroed memory of the system's own, on a page's boundary: each page is taken when it is first written.

    NumPy would take memory that was freed before and zero it, or whole pages of 2 MB.
    """
    size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    private = (
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if os.name == "posix" else mmap.mmap(-1, size)
    )
    zeros: npt.NDArray[Any] = np.frombuffer(private, dtype, math.prod(shape)).reshape(shape)
    return zeros
