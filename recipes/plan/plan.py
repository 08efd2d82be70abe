"""Whether a model fits a device and how fast it is there, from its config.json and the device's table alone.

Memory is counted, except for what libraries take. Times are what must be read over the rate at which the device reads
it, plus what its kernels cost (see `cost`). Reports of `edgeskip bench` from that device take the table's place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from edgeskip.recipes.deployment import Device
from edgeskip.recipes.plan.cost import (
    Cost,
    Cut,
    GraphSize,
    best_speculation,
    break_even,
    call_ms,
    cut_model,
    fit_cost,
    ms_per_token,
    ngram_round_ms,
    round_ms,
    samples_of_report,
    tokens_per_round,
)
from edgeskip.runtime.backends.choice import Backend
from edgeskip.runtime.backends.engines.attention import tiling
from edgeskip.runtime.backends.engines.targets import (
    RTX_REFUSED,
    RTX_SERVES,
    VERSIONS,
    dialect_for,
    dialect_text,
    dtype_problem,
    heads_problem,
    versions_text,
)
from edgeskip.runtime.backends.memory import buffer_sizes, cache_sizes
from edgeskip.runtime.bench.measure import BenchReport
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS, engine_dialects_of
from edgeskip.runtime.bundle.dtypes import ITEMSIZE, DType
from edgeskip.runtime.bundle.formats import FORMATS, is_quantized
from edgeskip.runtime.bundle.graphs import (
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_SPECULATIONS,
    DRAFT_HEAD,
    HEAD,
    HEAD_ROWS,
    MAX_SPECULATIONS,
    GraphName,
    check_draft_vocabulary,
    check_exit_layer,
    check_exit_layers,
    check_max_length,
    check_num_speculations,
    graph_table,
    heads_of,
)
from edgeskip.runtime.bundle.layers import LEAST_SM, has_products
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, TABLES, bundle_tensors, has_quantized_layers
from edgeskip.runtime.bundle.weights import bytes_by_format
from edgeskip.runtime.decoding.rounds import distinct_calls, prefill_round
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.packages import version_numbers

if TYPE_CHECKING:
    from edgeskip.recipes.plan.recommend import Recommendation

GRID = tuple(range(1, 9))
"""Speculation lengths that are considered."""

MATCH_RATES = (0.5, 0.6, 0.7, 0.8, 0.9)
DRAFT_ROWS = 32768
"""Rows of a larger vocabulary that drafts could come from."""

CONTEXT_BYTES = 500_000_000
"""A CUDA context: an H100 with 0.5 GB free refuses one, and with 0.6 GB has room for it."""

LIBRARIES_BYTES = 300_000_000
"""What ONNX Runtime and its libraries take of a device: 0.25 to 0.36 GB on an H100 (docs/benchmarks)."""

HOST_BYTES = 200_000_000
"""Python with the runtime and a tokenizer, where the host's memory is the device's."""

TEXT_BYTES = 20_000_000
"""Graphs, manifest and tokenizer on disk, at most."""

ENGINE_BYTES, ENGINE_LAYER_BYTES, PARTS_BYTES = 6_000_000, 720_000, 12_100_000
"""Kernels that engines hold: in all, and for each layer of a graph. TensorRT-RTX 1.7.1: 16.7 MB for the 16 layers of a
1B, 28.1 MB for the 32 of an 8B; the parts of layers, which serve every layer, 12.1 MB."""

LAYER_LAUNCHES = 5
"""Kernels of a layer of few rows in the `layers` dialect: one for attention, four for linear layers and all else."""

BUILD_BYTES, BUILD_LAYER_BYTES = 230_000_000, 8_000_000
"""Host memory at the peak of a build: in all, and for each layer of the longest graph. TensorRT-RTX 1.7.1 took 258, 319
and 444 MB for graphs of 4, 12 and 28 layers, whatever the width, and 222 MB for the parts of layers."""


@dataclass(frozen=True)
class PlanSettings:
    """What to plan; what is None comes from the device.

    Attributes:
        exit_layer: E.
        num_speculations: K; None takes the best where the match rate is known, else the default; `auto` plans for a K
            that is chosen for each round.
        match_rates: exit layer -> match rate, where it is known; of several kinds of text, which have as many tokens
            each, that of each kind. One is that of all kinds.
        backend: one of the device's.
        dtype: that of activations and caches, and of the weights that `formats` leave out.
        formats: formats of other tensors by name.
        max_length: cache capacity in tokens.
        jetpack: JetPack's version or the first numbers of it, on a Jetson; None takes the TensorRT that the device's
            table names.
        draft_vocabulary: rows of the vocabulary that drafts come from; None takes all.
        other_exits: further exit layers that the model is cut after.
        position: tokens in the prompt, and in the caches when a round is timed; half the capacity, 512 at most.
        ngrams: the share of rounds for which a text has n-gram drafts, and their match rate, where these are known.
    """

    exit_layer: int
    num_speculations: int | Literal["auto"] | None = None
    match_rates: Mapping[int, Sequence[float]] = field(default_factory=dict)
    backend: Backend | None = None
    dtype: DType | None = None
    max_length: int | None = None
    jetpack: str | None = None
    position: int | None = None
    formats: Mapping[str, str] = field(default_factory=dict)
    draft_vocabulary: int | None = None
    other_exits: tuple[int, ...] = ()
    ngrams: tuple[float, float] | None = None

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """All exit layers, in order."""
        return tuple(sorted((self.exit_layer, *self.other_exits)))


@dataclass(frozen=True)
class Problem:
    """Why building engines, or running, will not work, and what to change."""

    at: Literal["build", "run"]
    found: str
    fix: str


@dataclass(frozen=True)
class StagePlan:
    """One call of a graph: the bytes of weights and caches that it reads, and its time."""

    graph: GraphName
    rows: int
    bytes: int
    ms: float


@dataclass(frozen=True)
class SpeedPlan:
    """Rounds of K drafts, or plain steps if K is 0; what depends on the match rate is null where that is not known."""

    num_speculations: int
    round_ms: float
    tokens_per_round: float | None
    ms_per_token: float | None


@dataclass(frozen=True)
class RatePlan:
    """The best K at a match rate; null where plain steps are faster."""

    match_rate: float
    num_speculations: int | None
    ms_per_token: float


@dataclass(frozen=True)
class ExitPlan:
    """An exit layer.

    `break_even` is the match rate below which it loses to plain steps, null where it always does; `match_rate` is its
    own, where that is known, and the mean over kinds of text, with the best K and ms per token at it.
    """

    exit_layer: int
    break_even: float | None
    match_rate: float | None
    num_speculations: int | None
    ms_per_token: float | None


@dataclass(frozen=True)
class PairPlan:
    """An exit layer and a K, null for plain steps, and the time per token with them."""

    exit_layer: int | None
    num_speculations: int | None
    ms_per_token: float


@dataclass(frozen=True)
class ChoicePlan:
    """What choosing exit and K by the text (`-e auto`) could bring, where texts are of several kinds, each with match
    rates of its own and with as many tokens.

    `fixed` is the best pair for all of them, `by_kind` that for each, and `ms_per_token` the time of who changes
    between these at once. That is a bound: who chooses has to find out, and that takes time.
    """

    fixed: PairPlan
    by_kind: tuple[PairPlan, ...]
    ms_per_token: float


@dataclass(frozen=True)
class NgramPlan:
    """Drafts that the text has (`--draft ngram`), which take no time to make: a round of K takes `rounds_ms[K]`.

    `break_even` is the match rate below which such rounds lose to plain steps, null where they always do; where a text
    has no drafts, there is a plain step. If `share` of the rounds have drafts that are right at `match_rate`, this is
    the best K, and its ms per token over all rounds; null where that is not known.
    """

    rounds_ms: dict[int, float]
    break_even: float | None
    share: float | None
    match_rate: float | None
    num_speculations: int | None
    ms_per_token: float | None


@dataclass(frozen=True)
class DraftHeadPlan:
    """Drafts from so many `rows` of a larger vocabulary (`--draft-vocabulary`): the time of a round of K then, and with
    all rows.
    """

    rows: int
    num_speculations: int
    round_ms: float
    all_rows_ms: float


@dataclass(frozen=True)
class Plan:
    """The whole plan.

    Sizes are in bytes, by kind. `dialect` is what engines are built from, and `build` the host's memory while they are;
    null where none are.
    `available` is what the device leaves, `largest_max_length` the most tokens that fit, 0 where none do. Times are
    those of the device's work with `position` tokens in the caches; `efficiency` says where they come from. `best` is
    the fastest of the exits whose match rate is known; `ngrams` need no exit. `speeds` are those of rounds from
    `exit_layer`, `other_speeds` those from `other_exits`, which the model is cut after too; `choice` is what choosing
    among them could bring, where their match rates are known. Others of `exits` are those of a model with that exit
    alone. `draft_head` is what drafts from part of the vocabulary would bring, where that is not planned anyway and the
    vocabulary is large. `formats` counts the bytes of weights on disk by their format; `recommended` says why, where no
    format was asked for. Where it is `adaptive`, K is chosen for each round (`-k auto`), and `stages` has the calls of
    rounds with `num_speculations`.
    """

    model: str
    device: str
    backend: Backend
    dialect: str | None
    dtype: DType
    formats: dict[str, int]
    exit_layer: int
    num_layers: int
    num_speculations: int
    max_length: int
    works: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    disk: dict[str, int]
    build: int | None
    memory: dict[str, int]
    available: int
    largest_max_length: int
    efficiency: str
    cost: Cost
    position: int
    stages: tuple[StagePlan, ...]
    first_token_ms: float
    ideal_ms_per_token: float
    plain_ms_per_token: float
    speeds: tuple[SpeedPlan, ...]
    rates: tuple[RatePlan, ...]
    exits: tuple[ExitPlan, ...]
    best: ExitPlan | None
    ngrams: NgramPlan
    recommended: Recommendation | None = None
    other_exits: tuple[int, ...] = ()
    other_speeds: dict[int, tuple[SpeedPlan, ...]] = field(default_factory=dict)
    choice: ChoicePlan | None = None
    adaptive: bool = False
    draft_head: DraftHeadPlan | None = None


def make_plan(
    model: str,
    architecture: Architecture,
    device: Device,
    settings: PlanSettings,
    reports: Sequence[BenchReport] = (),
) -> Plan:
    """Plans a model on a device.

    Args:
        model: its name, for people.
        architecture: its architecture.
        device: where it is to run.
        settings: how it is to run.
        reports: bench reports from that device, which replace the efficiency of its table.

    Raises:
        RequestError: an exit layer, a length, a backend or a JetPack that does not exist, or reports without times.
    """
    basis = make_basis(architecture, device, settings, reports)
    a, settings, cost, cut, position = architecture, basis.settings, basis.cost, basis.cut, basis.position
    backend, dtype, formats, capacity = basis.backend, basis.dtype, settings.formats, basis.capacity
    plain = basis.plain_ms_per_token
    own = (settings.exit_layer, *settings.other_exits)
    cuts = {e: cut if e in own else basis.cut_after((e,)) for e in range(1, a.num_layers)}
    rounds = {e: {k: round_ms(cost, cuts[e], e, k, position) for k in GRID} for e in cuts}
    match_rates = settings.match_rates.get(settings.exit_layer)
    k = settings.num_speculations
    adaptive = k == "auto"
    if k is None or k == "auto":
        own_rounds = rounds[settings.exit_layer]
        k = DEFAULT_SPECULATIONS if match_rates is None else best_speculation(own_rounds, match_rates)[0]
    exits = tuple(
        _exit(e, rounds[e], plain if e in own else round_ms(cost, cuts[e], e, 0, position), settings.match_rates.get(e))
        for e in cuts
    )
    return Plan(
        model=model,
        device=device.name,
        backend=backend,
        dialect=basis.dialect,
        dtype=dtype,
        formats=bytes_by_format(bundle_tensors(a, capacity, dtype, formats).values(), dtype),
        exit_layer=settings.exit_layer,
        num_layers=a.num_layers,
        num_speculations=k,
        max_length=capacity,
        works=not basis.problems,
        problems=basis.problems,
        notes=tuple(_notes(device, settings, reports, basis.dialect, built=basis.build is not None)),
        disk=_disk(a, dtype, formats, capacity, basis.dialect if basis.build else None),
        build=basis.build,
        memory=basis.memory,
        available=basis.available,
        largest_max_length=basis.largest_max_length,
        efficiency=_efficiency(device, reports),
        cost=cost,
        position=position,
        stages=tuple(_stages(cost, cut, k, position)),
        first_token_ms=_first_token_ms(cost, cut, position),
        ideal_ms_per_token=sum(size.weight_bytes for name, size in cut.sizes.items() if name != DRAFT_HEAD)
        / _copy_bytes_per_ms(device, reports),
        plain_ms_per_token=plain,
        speeds=_speeds(rounds[settings.exit_layer], plain, match_rates),
        rates=tuple(_rate(rounds[settings.exit_layer], rate, plain) for rate in MATCH_RATES),
        exits=exits,
        best=min((e for e in exits if e.ms_per_token is not None), key=lambda e: e.ms_per_token or 0.0, default=None),
        ngrams=_ngrams(
            {n: ngram_round_ms(cost, cut, n, position) for n in range(1, MAX_SPECULATIONS + 1)},
            plain,
            settings.ngrams,
        ),
        other_exits=settings.other_exits,
        other_speeds={e: _speeds(rounds[e], plain, settings.match_rates.get(e)) for e in settings.other_exits},
        choice=_choice({e: rounds[e] for e in own}, plain, settings.match_rates, adaptive=adaptive),
        adaptive=adaptive,
        draft_head=_draft_head(a, basis, rounds[settings.exit_layer], min(k, GRID[-1])),
    )


@dataclass(frozen=True)
class Basis:
    """What a plan rests on: `settings` with nothing left to the device but K, what fits, what stands in the way, and
    what calls cost. The rest is as in `Plan`.
    """

    settings: PlanSettings
    backend: Backend
    dialect: str | None
    dtype: DType
    capacity: int
    problems: tuple[Problem, ...]
    build: int | None
    memory: dict[str, int]
    available: int
    largest_max_length: int
    cost: Cost
    cut: Cut
    cut_after: Callable[[Sequence[int]], Cut]
    position: int
    plain_ms_per_token: float


def make_basis(
    architecture: Architecture, device: Device, settings: PlanSettings, reports: Sequence[BenchReport] = ()
) -> Basis:
    """What a plan rests on; arguments and errors are those of `make_plan`."""
    a, context = architecture, architecture.max_position_embeddings
    backend, dtype = settings.backend or device.backends[0], settings.dtype or device.dtype
    capacity = min(device.max_length, context) if settings.max_length is None else settings.max_length
    settings = replace(settings, backend=backend, dtype=dtype, max_length=capacity)
    _check(a, device, settings)
    _check_reports(device, reports)
    formats = settings.formats
    dialect = None if backend == "onnxruntime" else _dialect(device, settings)
    libraries = max((report.memory_bytes.other or 0 for report in reports), default=LIBRARIES_BYTES)
    available = int((device.memory_gb - device.reserved_gb) * 1e9)
    cut_after = cut_model(a, dtype, formats, settings.draft_vocabulary)
    cut = cut_after((settings.exit_layer, *settings.other_exits))
    held = held_bytes(a, cut.sizes, dtype, formats, settings.draft_vocabulary, graphs_hold=dialect is None)
    ours = has_quantized_layers(bundle_tensors(a, 1, dtype, formats).values())

    def memory_of(tokens: int) -> dict[str, int]:
        memory = _memory(a, settings.exit_layers, held, dtype, tokens, libraries, shared=device.shared_memory)
        return memory if dialect is None else memory | _engine_memory(a, dtype, tokens, dialect, ours=ours)

    longest = max(last - first for first, last in pairwise((0, *settings.exit_layers, a.num_layers)))
    build = None if dialect is None or ours else BUILD_BYTES + BUILD_LAYER_BYTES * _layers_of_a_graph(dialect, longest)
    memory, largest = memory_of(capacity), _largest(context, lambda n: sum(memory_of(n).values()) <= available)
    problems = (
        *_software_problems(a, device, settings, dialect),
        *_memory_problems(device, settings, memory, build, available, largest),
    )
    ours = (
        dialect is not None
        and ENGINE_DIALECTS[dialect].in_parts
        and has_products(a, dtype, formats.values(), device.compute_capability)
    )
    cost = _cost(device, reports, ours=ours)
    position = min(capacity // 2, 512) if settings.position is None else settings.position
    return Basis(
        settings=settings,
        backend=backend,
        dialect=dialect,
        dtype=dtype,
        capacity=capacity,
        problems=problems,
        build=build,
        memory=memory,
        available=available,
        largest_max_length=largest,
        cost=cost,
        cut=cut,
        cut_after=cut_after,
        position=position,
        plain_ms_per_token=round_ms(cost, cut, settings.exit_layer, 0, position),
    )


def fit(architecture: Architecture, device: Device, settings: PlanSettings) -> tuple[PlanSettings, tuple[Problem, ...]]:
    """Settings that run on a device: its dtype, and, where no capacity was asked for, its own, cut to what fits.

    Also returns what stands in the way of building engines, which can be mended on the device.

    Raises:
        RequestError: as for `make_plan`, or the model does not fit.
    """
    made = make_plan("", architecture, device, settings)
    if settings.max_length is None and 0 < made.largest_max_length < made.max_length:
        made = make_plan("", architecture, device, replace(settings, max_length=made.largest_max_length))
    for problem in made.problems:
        if problem.at == "run":
            raise RequestError(device.name, problem.found, fix=problem.fix)
    return replace(settings, dtype=made.dtype, max_length=made.max_length), made.problems


def parse_match_rates(texts: Sequence[str], exit_layer: int) -> dict[int, tuple[float, ...]]:
    """Match rates as the command line gives them: `0.8` is that of `exit_layer`, `8=0.9` of exit layer 8, `8=0.9,0.3`
    those of exit layer 8 in two kinds of text.

    Raises:
        RequestError: something else.
    """
    found: dict[int, tuple[float, ...]] = {}
    for text in texts:
        layer, equals, rates = text.rpartition("=")
        try:
            own, at = tuple(map(float, rates.split(","))), int(layer) if equals else exit_layer
            if not all(0 <= rate <= 1 for rate in own):
                raise ValueError
        except ValueError:
            wanted = "a share from 0 to 1, or E=share, or several shares, as 0.9,0.3"
            raise RequestError("match rate", f"{text!r:.60}", wanted=wanted) from None
        if at in found:
            fix = "give those of several kinds of text in one list, as 0.9,0.3"
            raise RequestError("match rate", f"that of exit layer {at} twice", fix=fix)
        found[at] = own
    return found


def parse_ngrams(text: str) -> tuple[float, float]:
    """What is known of n-gram drafts, as the command line gives it: `0.6=0.8` is a match rate of 0.8 in a share of 0.6
    of the rounds, `0.8` the same in all.

    Raises:
        RequestError: something else.
    """
    share, equals, rate = text.rpartition("=")
    try:
        found = float(share) if equals else 1.0, float(rate)
        if all(0 <= one <= 1 for one in found):
            return found
    except ValueError:
        pass
    raise RequestError("n-grams", f"{text!r:.60}", wanted="a match rate from 0 to 1, or share=rate")


def held_bytes(
    architecture: Architecture,
    sizes: Mapping[GraphName, GraphSize],
    dtype: DType,
    formats: Mapping[str, str],
    draft_vocabulary: int | None,
    *,
    graphs_hold: bool,
) -> dict[GraphName, int]:
    """Weights that are held for each graph; both tables of an untied model are the head's.

    Where graphs hold their own, a head that drafts has its own copy of the rows of a quantized table, and one that both
    multiplies and gathers from it has it in two layouts.
    """
    a = architecture
    table = bundle_tensors(a, 1, dtype, formats)[EMBEDDINGS]
    own = graphs_hold and is_quantized([table.format])
    held = {graph: size.weight_bytes for graph, size in sizes.items() if own or graph != DRAFT_HEAD}
    twice = not a.tie_word_embeddings or own
    for head, rows in ((HEAD, a.vocab_size), (DRAFT_HEAD, draft_vocabulary or 0)):
        if head in held and twice:
            held[head] += FORMATS[table.format].bytes((rows, *table.shape[1:]), dtype)
    return held


def _check(architecture: Architecture, device: Device, settings: PlanSettings) -> None:
    context = architecture.max_position_embeddings
    check_exit_layers((settings.exit_layer, *settings.other_exits), architecture.num_layers)
    kinds = max(map(len, settings.match_rates.values()), default=1)
    for exit_layer, rates in settings.match_rates.items():
        check_exit_layer(exit_layer, architecture.num_layers)
        if len(rates) not in (1, kinds):
            wanted = f"{kinds}, one for each kind of text, or one for all"
            raise RequestError("match rate", f"{len(rates)} of exit layer {exit_layer}", wanted=wanted)
    check_draft_vocabulary(settings.draft_vocabulary, architecture.vocab_size)
    k = settings.num_speculations
    if k is not None and k != "auto":
        check_num_speculations(k, " or 'auto'")
    assert settings.max_length is not None
    check_max_length(settings.max_length, context)
    if settings.position is not None and not 0 <= settings.position < settings.max_length:
        wanted = f"0 to {settings.max_length - 1}, within the capacity"
        raise RequestError("position", f"{settings.position}", wanted=wanted)
    if settings.backend not in device.backends:
        found = f"{settings.backend} does not serve {device.name}"
        raise RequestError("backend", found, wanted=" or ".join(device.backends))
    if settings.jetpack is not None and _jetpack(device, settings.jetpack) is None:
        wanted = " or ".join(device.jetpacks) or "none, as it is not a Jetson"
        raise RequestError("JetPack", f"{settings.jetpack}, which is not in the table of {device.name}", wanted=wanted)


def _jetpack(device: Device, version: str) -> str | None:
    """The JetPack of the device's table that a version names: itself, the newest of those that it begins (6), or the
    one that begins it (6.2.1).
    """
    later = [known for known in device.jetpacks if f"{known}.".startswith(f"{version}.")]
    earlier = [known for known in device.jetpacks if f"{version}.".startswith(f"{known}.")]
    return max(later or earlier, key=version_numbers, default=None)


def _version(device: Device, settings: PlanSettings) -> str | None:
    """The version of TensorRT that is planned with, where it is known."""
    if settings.backend != "tensorrt":
        return None
    jetpack = settings.jetpack and _jetpack(device, settings.jetpack)
    return device.jetpacks[jetpack] if jetpack else device.tensorrt


def _dialect(device: Device, settings: PlanSettings) -> str:
    """What engines are built from: the best of those that the formats have which this version reads, the best of all
    where it is not known or reads none.
    """
    assert settings.backend is not None
    assert settings.backend != "onnxruntime"
    version, has = _version(device, settings), engine_dialects_of(settings.formats.values())
    least = {name: first for name, first in VERSIONS[settings.backend].items() if name in has}
    reads = (name for name, first in least.items() if version is None or version_numbers(version) >= first)
    return next(reads, next(iter(least)))


def _check_reports(device: Device, reports: Sequence[BenchReport]) -> None:
    """Refuses what was measured on a CPU or a GPU of another kind."""
    for report in reports:
        sm = report.hardware.compute_capability
        on_cpu = ", CPU, " in report.backend
        if on_cpu or sm not in (None, device.compute_capability):
            found = f"a report from {report.hardware.device}" + (", a CPU" if on_cpu else f", SM {sm}")
            raise RequestError("--calibrate", found, wanted=f"one from {device.name}, SM {device.compute_capability}")


def _memory(
    architecture: Architecture,
    exit_layers: Sequence[int],
    held: Mapping[GraphName, int],
    dtype: DType,
    capacity: int,
    libraries: int,
    *,
    shared: bool,
) -> dict[str, int]:
    """Device memory at run time by kind; the caches are the same wherever the model is split."""
    a, chunk = architecture, min(DEFAULT_PREFILL_CHUNK, capacity)
    graphs = graph_table(a.num_layers, exit_layers, heads_of(a.vocab_size))
    memory = {f"{graph} weights": size for graph, size in held.items()}
    memory["caches"] = sum(cache_sizes(a, graphs, dtype, capacity).values())
    memory["workspace"] = sum(size * rows for size, rows in buffer_sizes(a, graphs, dtype, chunk).values())
    memory["libraries"] = libraries
    memory["CUDA context"] = CONTEXT_BYTES
    if shared:
        memory["host"] = HOST_BYTES
    return memory


def _engine_memory(
    architecture: Architecture, dtype: DType, capacity: int, dialect: str, *, ours: bool
) -> dict[str, int]:
    """What engines take besides: they hold no weights, and the RoPE tables are weights like others. `ours` says whether
    layers are quantized, so that kernels of ours do what engines would.
    """
    a, chunk = architecture, min(DEFAULT_PREFILL_CHUNK, capacity)
    hidden, ffn, qkv, attended = a.hidden_size, a.intermediate_size, a.qkv_rows, a.num_heads * a.head_dim
    # of a row within a layer, less attention
    values, sums = ffn + hidden if ours else 3 * ffn + 4 * hidden, 0
    # in parts: what lies between these and between products, and the attention's partial sums
    if ENGINE_DIALECTS[dialect].in_parts:
        values += qkv + 2 * attended + 2 * hidden
        tiles = tiling(a, capacity, HEAD_ROWS, 1)
        sums = math.prod(tiles.grid) * tiles.tile_rows * (a.head_dim + 2) * 4
        sums += 0 if ours else HEAD_ROWS * ffn * ITEMSIZE[dtype]
    else:
        values, sums = values + 2 * qkv, chunk * capacity  # with a mask
    scratch = chunk * values * ITEMSIZE[dtype] + sums
    kernels = 0 if ours else _kernel_bytes(dialect, a.num_layers)
    return {"tables and kernels": capacity * a.head_dim * ITEMSIZE[dtype] + kernels, "scratch": scratch}


def _kernel_bytes(dialect: str, layers: int) -> int:
    """What the engines of a model with so many layers hold."""
    return PARTS_BYTES if ENGINE_DIALECTS[dialect].in_parts else ENGINE_BYTES + ENGINE_LAYER_BYTES * layers


def _layers_of_a_graph(dialect: str, layers: int) -> int:
    """How many layers an engine has for so many of the model: parts of layers serve them all."""
    return 0 if ENGINE_DIALECTS[dialect].in_parts else layers


def _largest(context: int, fits: Callable[[int], bool]) -> int:
    """The largest capacity that fits, by bisection; 0 where not even two tokens do."""
    low, high = 0, context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 2 else 0


def _disk(
    architecture: Architecture, dtype: DType, formats: Mapping[str, str], capacity: int, dialect: str | None
) -> dict[str, int]:
    """Bytes on disk by kind; `dialect` is that of the engines, if it takes any."""
    a, tensors = architecture, bundle_tensors(architecture, capacity, dtype, formats).values()
    disk = {"weights": sum(bytes_by_format(tensors, dtype).values()), "graphs and texts": TEXT_BYTES}
    if dialect is not None:
        disk["engines"] = _kernel_bytes(dialect, a.num_layers)
    return disk


def _software_problems(
    architecture: Architecture, device: Device, settings: PlanSettings, dialect: str | None
) -> Iterator[Problem]:
    """What the device's TensorRT refuses."""
    backend, sm, version = settings.backend, device.compute_capability, _version(device, settings)
    if version is not None and dialect_for("tensorrt", version) is None:
        newer = _jetpacks(device)
        place = f"JetPack {settings.jetpack}" if settings.jetpack else device.name
        fix = f"install JetPack {newer[-1]}" if newer else "install a newer TensorRT"
        yield Problem("build", f"{place} has TensorRT {version}; wanted {versions_text('tensorrt')}", fix)
    if backend == "tensorrt-rtx" and sm not in RTX_SERVES:
        yield Problem("build", f"TensorRT-RTX does not serve SM {sm}", RTX_REFUSED)
    assert settings.dtype is not None
    formats = settings.formats.values()
    if dialect is not None and is_quantized(formats) and not has_products(architecture, settings.dtype, formats, sm):
        found = f"quantized weights in {settings.dtype} on SM {sm}, which kernels of ours do not read"
        wanted = f"SM {LEAST_SM} or later, fp16 or bf16, and sizes in steps of 16"
        other = "--dtype fp16" if has_products(architecture, "fp16", formats, sm) else "--weights dtype"
        yield Problem("build", f"{found}; wanted {wanted}", f"give {other}")
    if dialect is not None and (wanted := dtype_problem(settings.dtype, sm, dialect)):
        yield Problem("build", f"{settings.dtype} on SM {sm}; wanted {wanted}", "give --dtype fp16")
    if dialect is not None and (wanted := heads_problem(architecture, dialect)):
        found = f"TensorRT does not compute its attention heads ({architecture.num_heads} of {architecture.head_dim})"
        yield Problem("build", f"{found}; wanted {wanted}", "build its engines with --dialect primitive")


def _memory_problems(
    device: Device,
    settings: PlanSettings,
    memory: Mapping[str, int],
    build: int | None,
    available: int,
    largest: int,
) -> Iterator[Problem]:
    """What does not fit at run time, and, on a device that builds its own engines, at build time."""
    needed, free = sum(memory.values()) / 1e9, f"{available / 1e9:.1f} GB are free of {device.memory_gb:g}"
    if needed * 1e9 > available:
        weights = sum(size for kind, size in memory.items() if kind.endswith("weights")) / 1e9
        names = " and ".join(dict.fromkeys([*settings.formats.values(), str(settings.dtype)]))
        found = f"{needed:.1f} GB are needed to run ({weights:.1f} of weights in {names}), {free}"
        if largest:
            fix = f"give --max-length {largest} or less"
        else:
            smaller = "a dtype of two bytes, " if settings.dtype == "fp32" else ""
            if not is_quantized(settings.formats.values()):
                smaller += "--weights int8 or int4, "
            elif any(format_ == "int8" for name, format_ in settings.formats.items() if name not in TABLES):
                smaller += "--weights int4, "
            fix = f"no length fits: choose {smaller}a smaller model or a larger device"
        yield Problem("run", found, fix)
    if build and settings.backend == "tensorrt" and device.shared_memory and build > available:
        fix = f"add {math.ceil((build - available) / 1e9)} GB of swap for the build"
        yield Problem("build", f"about {build / 1e9:.1f} GB are needed to build engines, {free}", fix)


def _notes(
    device: Device, settings: PlanSettings, reports: Sequence[BenchReport], dialect: str | None, *, built: bool
) -> Iterator[str]:
    """What to know besides the figures; `built` says whether engines are, of which dialect."""
    if not reports:
        yield "Not measured on this device: calibrate with --calibrate and a report of `edgeskip bench` from it."
    for name in dict.fromkeys(report.hardware.device for report in reports):
        if not _words(name) - {"nvidia"} <= _words(device.name):
            yield f"Calibrated by a report from {name}: see that it is this device."
    backend, version = settings.backend, _version(device, settings)
    if version is not None:
        jetpack = settings.jetpack and f"JetPack {_jetpack(device, settings.jetpack)} has "
        best = dialect_for("tensorrt", version)
        if best is None or (built and best == dialect):
            engines = f"engines of {dialect_text('tensorrt', version)}"
        elif built:
            engines = f"engines of the {dialect} dialect, as weights are quantized"
        else:
            engines = "no engines are needed, as layers are quantized"
        yield f"{jetpack or ''}TensorRT {version}: {engines}."
    if backend == "tensorrt" and device.jetpacks and settings.jetpack is None:
        yield f"JetPack {' or '.join(_jetpacks(device))} will do; --jetpack plans with one."
    if backend == "tensorrt" and built:
        yield (
            "TensorRT 10.6 has run engines of layers and primitive on an H100; those of standard have been built by "
            "TensorRT-RTX alone, and not run."
        )
        yield (
            "Memory to build was measured with TensorRT-RTX. TensorRT 10.6 for x86-64, which brings kernels for every "
            "GPU, takes 6.4 GB and 0.2 to 0.45 GB for the engines; what a Jetson's takes is not known."
        )
    if settings.draft_vocabulary and settings.match_rates:
        yield (
            f"Match rates are taken as they are given. Drafts from {settings.draft_vocabulary} rows of the vocabulary "
            "are right less often than those from all; `edgeskip tune` of such a bundle says how often."
        )
    if is_quantized(settings.formats.values()) and not reports:
        yield "Times count the bytes that are read: products with quantized weights can take longer than that."
    if dialect is not None and not built:
        yield "Models with quantized layers have run on an H100 with TensorRT 10.6, and on no other GPU with TensorRT."
    if backend == "tensorrt-rtx" and built:
        yield "Engines of TensorRT-RTX have been built for all its GPUs and have not run on any."


def _words(name: str) -> set[str]:
    return set(re.findall(r"\w+", name.lower()))


def _jetpacks(device: Device) -> list[str]:
    """Those whose TensorRT is new enough."""
    return [jetpack for jetpack, version in device.jetpacks.items() if dialect_for("tensorrt", version)]


def _copy_bytes_per_ms(device: Device, reports: Sequence[BenchReport]) -> float:
    if reports:
        return sum(report.copy_gb_per_s for report in reports) / len(reports) * 1e6
    return device.bandwidth_gb_per_s * device.copy_share * 1e6


def _cost(device: Device, reports: Sequence[BenchReport], *, ours: bool) -> Cost:
    """What calls cost: as measured, else according to the device's table, where the kernels are ours or not."""
    kernels = device.kernels
    flops_per_ms = device.fp16_tflops * 1e9 * kernels.flops_share
    if reports:
        try:
            fitted = fit_cost([sample for report in reports for sample in samples_of_report(report)])
        except ValueError as error:
            raise RequestError("--calibrate", str(error), wanted="reports with times of each graph") from None
        return replace(fitted, flops_per_ms=flops_per_ms)
    return Cost(
        call_ms=kernels.call_us / 1e3,
        layer_ms=(LAYER_LAUNCHES * kernels.launch_us if ours else kernels.layer_us) / 1e3,
        several_ms=kernels.several_us / 1e3,
        row_ms=kernels.row_us / 1e3,
        row_byte_ms=0.0,
        bytes_per_ms=_copy_bytes_per_ms(device, reports) * kernels.copy_share,
        flops_per_ms=flops_per_ms,
    )


def _efficiency(device: Device, reports: Sequence[BenchReport]) -> str:
    if reports:
        return f"measured on {', '.join(dict.fromkeys(report.hardware.device for report in reports))}"
    return (
        f"{device.bandwidth_gb_per_s:g} GB/s by its data sheet, {device.copy_share:.0%} of it in a copy, "
        f"{device.kernels.copy_share:.0%} of that in products"
    )


def _stages(cost: Cost, cut: Cut, k: int, position: int) -> Iterator[StagePlan]:
    """Each kind of call in a plain step and in rounds of K drafts of each exit, once."""
    for call in distinct_calls(cut.splits.values(), (0, k), cut.sizes):
        graph, rows = call.key
        size = cut.sizes[graph]
        yield StagePlan(graph, rows, size.read_bytes(position + rows), call_ms(cost, size, rows, position + rows))


def _first_token_ms(cost: Cost, cut: Cut, tokens: int) -> float:
    """Time of a prompt of this many tokens, in chunks, and of its first new token."""
    starts, split = range(0, max(tokens, 1), DEFAULT_PREFILL_CHUNK), next(iter(cut.splits.values()))
    rows = min(max(tokens, 1), DEFAULT_PREFILL_CHUNK)
    return sum(
        call_ms(cost, cut.sizes[call.graph], call.rows, start + rows)
        for start in starts
        for call in prefill_round(split, rows, last=start == starts[-1], early_exit=False).calls
    )


def _draft_head(architecture: Architecture, basis: Basis, rounds: Mapping[int, float], k: int) -> DraftHeadPlan | None:
    settings = basis.settings
    if settings.draft_vocabulary is not None or architecture.vocab_size < 2 * DRAFT_ROWS:
        return None
    cut = cut_model(architecture, basis.dtype, settings.formats, DRAFT_ROWS)(settings.exit_layers)
    return DraftHeadPlan(DRAFT_ROWS, k, round_ms(basis.cost, cut, settings.exit_layer, k, basis.position), rounds[k])


def _speeds(rounds: Mapping[int, float], plain: float, match_rates: Sequence[float] | None) -> tuple[SpeedPlan, ...]:
    """Plain steps, then rounds of each K."""
    return (SpeedPlan(0, plain, 1.0, plain), *(_speed(k, ms, match_rates) for k, ms in rounds.items()))


def _speed(k: int, ms: float, match_rates: Sequence[float] | None) -> SpeedPlan:
    if match_rates is None:
        return SpeedPlan(k, ms, None, None)
    per_token = ms_per_token(ms, k, match_rates)
    return SpeedPlan(k, ms, ms / per_token, per_token)


def _choice(
    rounds: Mapping[int, Mapping[int, float]],
    plain: float,
    match_rates: Mapping[int, Sequence[float]],
    *,
    adaptive: bool,
) -> ChoicePlan | None:
    """What a choice of exit and K gives, by the rounds of each exit; None where there is none and none was asked for,
    or a rate is unknown.
    """
    if not rounds.keys() <= match_rates.keys():
        return None
    kinds = max(len(match_rates[e]) for e in rounds)
    if len(rounds) == kinds == 1 and not adaptive:
        return None

    def best(kind: int | None = None) -> PairPlan:
        found = [PairPlan(None, None, plain)]
        for e, rates in ((e, match_rates[e]) for e in rounds):
            of_kind = rates if kind is None else (rates[kind % len(rates)],)
            found.append(PairPlan(e, *best_speculation(rounds[e], of_kind)))
        return min(found, key=lambda one: one.ms_per_token)

    by_kind = tuple(map(best, range(kinds)))
    return ChoicePlan(best(), by_kind, fmean(one.ms_per_token for one in by_kind))


def _rate(rounds: Mapping[int, float], match_rate: float, plain: float) -> RatePlan:
    k, ms = best_speculation(rounds, (match_rate,))
    return RatePlan(match_rate, k, ms) if ms < plain else RatePlan(match_rate, None, plain)


def _ngrams(rounds: dict[int, float], plain: float, known: tuple[float, float] | None) -> NgramPlan:
    pays = break_even(plain, rounds)
    if known is None:
        return NgramPlan(rounds, pays, None, None, None, None)
    share, match_rate = known

    def of_all(k: int) -> float:
        ms, tokens = (share * one + (1 - share) * other for one, other in ((rounds[k], plain), (of[k], 1)))
        return ms / tokens

    of = {k: tokens_per_round(match_rate, k) for k in rounds}
    k = min(rounds, key=of_all)
    return NgramPlan(rounds, pays, share, match_rate, k, of_all(k))


def _exit(exit_layer: int, rounds: Mapping[int, float], plain: float, match_rates: Sequence[float] | None) -> ExitPlan:
    best = (None, None) if match_rates is None else best_speculation(rounds, match_rates)
    match_rate = None if match_rates is None else fmean(match_rates)
    return ExitPlan(exit_layer, break_even(plain, rounds), match_rate, *best)
