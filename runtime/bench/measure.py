"""Speed, measured: every way of decoding takes turns on the same prompts in one process; medians over repeats.

Besides the time per token, it measures each graph by itself, what it has to read, and the rate at which the same memory
copies. The time to beat is that of a plain decoder that does nothing but read its weights at that rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from edgeskip.runtime.bench.prompts import encoded_prompts
from edgeskip.runtime.bench.validity import Watch, doubts
from edgeskip.runtime.bundle.architecture import Size
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS, GraphName, Split, check_num_speculations
from edgeskip.runtime.bundle.manifest import Bundle, Progress
from edgeskip.runtime.bundle.weights import read_bytes
from edgeskip.runtime.decoding.decode import Decoding, count_accepted, prefill
from edgeskip.runtime.decoding.model import Generation, Model
from edgeskip.runtime.decoding.rounds import MODES, Mode, View, distinct_calls, speculative_round
from edgeskip.runtime.decoding.sampling import distribution, draw_gap
from edgeskip.runtime.decoding.session import Memory
from edgeskip.runtime.decoding.statistics import Drafting, Statistics, Stretch, courses, distinct_4grams, together
from edgeskip.runtime.drafting.drafters import Draft, Drafter, ExitChoice
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.provenance import Provenance, provenance
from edgeskip.runtime.reading import read_json
from edgeskip.runtime.sampling import GREEDY, Sampling
from edgeskip.runtime.structure import Range, structure

TIE_GAP = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.4}
"""Kernels round differently for one row and for many: a token may differ where the logits of both candidates are
within this distance of the top one."""


ADAPTIVE = "adaptive"
"""The mode, in reports, of self-speculative decoding whose rounds have as many drafts as promise most."""

_STAGE_REPEATS = 30


@dataclass(frozen=True)
class BenchSettings:
    """Speculation lengths to measure, tokens per prompt, how often, when drafting ends early, and what drafts.

    `confidence_threshold` is that of `Model.generate`: None takes the backend's where the exit drafts; `weighs` says
    that rounds whose length is chosen had none, and weighed each draft's confidence. Prompts are cut to
    `prompt_tokens`, if given. `adaptive` measures rounds too whose length is chosen as the text comes. Each length is
    measured from each of `exit_layers`, or from the model's own; with `adaptive_exit`, rounds whose exit is chosen too.
    """

    grid: tuple[int, ...]
    max_new_tokens: int
    repeats: int
    confidence_threshold: float | None = None
    prompt_tokens: int | None = None
    sampling: Sampling = GREEDY
    draft: Draft = "exit"
    adaptive: bool = False
    exit_layers: tuple[int, ...] = ()
    adaptive_exit: bool = False
    weighs: bool = False


@dataclass(frozen=True)
class Run:
    """One contestant on one prompt: `seconds` are those after the first token."""

    token_ids: tuple[int, ...]
    first_token_seconds: float
    seconds: float
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Contestant:
    """A way of decoding: from prompt ids and a number of new tokens to a run. `exit_layer` is the exit that drafts, if
    there is one.
    """

    mode: str
    num_speculations: int
    run: Callable[[list[int], int], Run]
    exit_layer: int | None = None


@dataclass(frozen=True)
class BenchRow:
    """One contestant over all prompts.

    Rates leave out the first token of each text. `rounds` (of one repeat), `acceptance_histogram`,
    `stage_ms_per_round` (mean time in each graph, or of the whole round on a device that hides them),
    `host_ms_per_round` (mean of the rest) and `host_share` (the rest over the stages) are null for other runtimes.
    `distinct_tokens` and `distinct_4grams` are shares of the texts: a model that loops flatters every rate.
    `by_drafter` and `by_exit` have the rounds with drafts of one repeat, by what drafted, and `course` all of them, in
    the order of each text. `exit_layer` is the exit, null where it was chosen or none drafts.
    """

    mode: str
    num_speculations: int
    tokens_per_second: float
    ms_per_token: float
    speedup: float
    time_to_first_token_ms: float
    acceptance_rate: float | None
    match_rate: float | None
    tokens_per_round: float | None
    distinct_tokens: float
    distinct_4grams: float
    rounds: int | None
    acceptance_histogram: tuple[int, ...] | None
    stage_ms_per_round: dict[str, float] | None
    host_ms_per_round: float | None
    host_share: float | None
    by_drafter: dict[Drafter, Drafting] | None = None
    by_exit: dict[int, Drafting] | None = None
    course: tuple[Stretch, ...] | None = None
    exit_layer: int | None = None


@dataclass(frozen=True)
class StageTime:
    """A graph by itself over `rows` tokens: its median time, and the bytes of weights and caches it has to read."""

    graph: GraphName
    rows: Size
    ms: Annotated[float, Range(1e-9, 1e9)]
    bytes: Annotated[int, Range(1)]
    gb_per_s: float
    share_of_copy: float


@dataclass(frozen=True)
class Difference:
    """A contestant's first token that is not plain decoding's.

    `gap` is how far the lower of the two tokens' logits is below the top one. Where verification is exact, none is a
    tie.
    """

    mode: str
    num_speculations: int
    prompt: int
    position: int
    gap: float
    is_tie: bool
    exit_layer: int | None = None


@dataclass(frozen=True)
class BenchReport(Provenance):
    """`faults` counts the differences that are not ties, leaving out other runtimes: there must be none. `valid` says
    whether the machine was idle enough, and `doubts` why it seems not to have been.

    `copy_gb_per_s` counts bytes read and bytes written; `weight_bytes` is what one call of each graph reads, and
    `ideal_ms_per_token` the time for those of a plain step at that rate. `prompt_tokens` is a median.
    `best_match_rate` is, where tokens are drawn, the largest that any way of drawing has: over the tested drafts of
    K = 1, the mean of the sum over tokens of the smaller of the exit's and the model's probabilities.
    """

    exit_layer: Size
    prompts: int
    prompt_tokens: int
    settings: BenchSettings
    copy_gb_per_s: Annotated[float, Range(1e-9, 1e9)]
    weight_bytes: dict[GraphName, int]
    ideal_ms_per_token: float
    memory_bytes: Memory
    stages: tuple[StageTime, ...]
    rows: tuple[BenchRow, ...]
    differences: tuple[Difference, ...]
    faults: int
    valid: bool = True
    doubts: tuple[str, ...] = ()
    best_match_rate: float | None = None


def read_report(path: Path) -> BenchReport:
    """Reads what `edgeskip bench --json` wrote.

    Raises:
        RequestError: no such file, or it is not such a report.
    """
    table = read_json(path, RequestError, fix="give a report of `edgeskip bench`", streams=True)
    return structure(BenchReport, table, path, RequestError)


def run_bench(
    model: Model,
    prompts: Sequence[str],
    settings: BenchSettings,
    others: Callable[[], Sequence[Contestant]] = tuple,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measures plain decoding, self-speculation for each length of the grid, and other runtimes.

    Each contestant warms up on the first prompt. Other runtimes are made when ours are done, so that they share neither
    time nor memory with them; being far slower, they run every prompt once.

    Raises:
        RequestError: a setting that cannot be served, or prompts too long for the bundle.
    """
    for k in settings.grid:
        check_num_speculations(k, " or 'auto'")
    settings = replace(settings, sampling=settings.sampling.seeded())
    session = model.session
    prompt_ids = encoded_prompts(model, prompts, settings.prompt_tokens, settings.max_new_tokens)
    longest = max(map(len, prompt_ids))
    if settings.confidence_threshold is None and settings.draft != "ngram":
        weighs = bool(session.confidence_threshold) and (settings.adaptive or settings.adaptive_exit)
        settings = replace(settings, confidence_threshold=session.confidence_threshold, weighs=weighs)
    watch, copy_rates = Watch(session.device), [session.copy_bytes_per_second()]
    exits = settings.exit_layers or (() if settings.adaptive_exit else (model.split.exit_layer,))
    splits = [model.bundle.manifest.split(exit_layer) for exit_layer in exits]
    lengths: tuple[int | Literal["auto"], ...] = (*settings.grid, *(("auto",) if settings.adaptive else ()))
    contestants = [_ours(model, 0, None, settings)]
    contestants += [_ours(model, k, exit_layer, settings) for exit_layer in exits for k in lengths]
    if settings.adaptive_exit:
        contestants.append(_ours(model, "auto", "auto", settings))
        splits = splits or [model.split]
    measured = _take_turns(contestants, prompt_ids, settings.max_new_tokens, settings.repeats, progress)
    weights, memory = read_bytes(model.bundle), session.memory()
    plain_bytes = sum(weights[call.graph] for call in speculative_round(model.split, 0).calls)
    copy_rates.append(session.copy_bytes_per_second())
    copy_rate = max(copy_rates)  # what else runs only ever slows a copy down
    stages = tuple(_time_stages(model, splits, settings.grid, longest, weights, copy_rate))
    repeated = {_name(c): list(map(_ms_of_repeat, kept)) for c, kept in zip(contestants, measured, strict=True)}
    found = doubts(_rates(stages), {**repeated, "copies of memory": copy_rates}, watch.others_share())
    foreign = others()
    contestants += foreign
    measured += _take_turns(foreign, prompt_ids, settings.max_new_tokens, 1, progress, "measuring other runtimes")
    plain_ms = _ms_per_token(measured[0])
    rows = tuple(_row(c, kept, plain_ms) for c, kept in zip(contestants, measured, strict=True))
    differences = tuple(
        dict.fromkeys(
            difference
            for contestant, kept in zip(contestants[1:], measured[1:], strict=True)
            for runs_of_repeat in kept
            for difference in _differences(
                model, contestant, prompt_ids, measured[0][0], runs_of_repeat, settings.sampling
            )
        )
    )
    foreign_modes = {other.mode for other in foreign}
    return BenchReport(
        **vars(provenance(model, command)),
        exit_layer=model.split.exit_layer,
        prompts=len(prompts),
        prompt_tokens=int(statistics.median(map(len, prompt_ids))),
        settings=settings,
        copy_gb_per_s=copy_rate / 1e9,
        weight_bytes=weights,
        ideal_ms_per_token=1e3 * plain_bytes / copy_rate,
        memory_bytes=memory,
        stages=stages,
        rows=rows,
        differences=differences,
        faults=sum(not d.is_tie and d.mode not in foreign_modes for d in differences),
        valid=not found,
        doubts=found,
        best_match_rate=_best_match_rate(model, prompt_ids, settings) if settings.sampling.is_drawn else None,
    )


def check_report(report: BenchReport, place: object) -> None:
    """Refuses a report that is not of an idle machine, by what it says of itself and by its times.

    Raises:
        RequestError: it is not.
    """
    if found := report.doubts or doubts(_rates(report.stages), {}):
        fix = "run `edgeskip bench` again on an idle machine"
        raise RequestError(place, f"not a valid measurement: {'; '.join(found)}", fix=fix)


def _rates(stages: Iterable[StageTime]) -> Iterator[tuple[str, int, float]]:
    for stage in stages:
        yield f"{stage.graph} over {stage.rows} row{'s' * (stage.rows > 1)}", stage.bytes, stage.share_of_copy


def _name(contestant: Contestant) -> str:
    k, exit_layer = contestant.num_speculations, contestant.exit_layer
    where = "" if exit_layer is None else f" from layer {exit_layer}"
    length = "" if contestant.mode == ADAPTIVE else f" with K = {k}"
    return f"{contestant.mode} decoding{where}{length}" if k else "plain decoding"


def _take_turns(
    contestants: Sequence[Contestant],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    repeats: int,
    progress: Progress,
    what: str = "measuring",
) -> list[list[list[Run]]]:
    """Runs by contestant, repeat and prompt, after a warm-up run of each."""
    total, done = len(contestants) * (1 + repeats * len(prompts)), 0

    def run(contestant: Contestant, ids: list[int]) -> Run:
        nonlocal done
        made = contestant.run(ids, max_new_tokens)
        done += 1
        progress(what, done, total)
        return made

    for contestant in contestants:
        run(contestant, prompts[0])
    runs: list[list[list[Run]]] = [[[] for _ in range(repeats)] for _ in contestants]
    for repeat in range(repeats):
        for ids in prompts:
            for kept, contestant in zip(runs, contestants, strict=True):
                kept[repeat].append(run(contestant, ids))
    return runs


def _time_stages(
    model: Model,
    splits: Iterable[Split],
    grid: Sequence[int],
    position: int,
    weights: dict[GraphName, int],
    copy_rate: float,
) -> Iterator[StageTime]:
    """Every graph in the shapes of these rounds, its first row at `position`."""
    position = max(min(position, model.bundle.manifest.max_length - 1 - max(grid, default=0)), 0)
    for call in distinct_calls(splits, (0, *grid), model.bundle.manifest.graphs):
        rows = call.rows
        if rows > model.bundle.manifest.max_length:
            continue  # such a round is never run
        ms = model.session.time_call_ms(call, position, _STAGE_REPEATS)
        size = weights[call.graph] + _cache_bytes(model.bundle, call.graph, position + rows)
        rate = size / ms * 1e3
        yield StageTime(call.graph, rows, ms, size, rate / 1e9, rate / copy_rate)


def _cache_bytes(bundle: Bundle, graph: GraphName, rows: int) -> int:
    """Keys and values of this many rows in a graph's layers."""
    manifest = bundle.manifest
    a = manifest.architecture
    return len(manifest.graphs[graph].layers) * 2 * a.num_kv_heads * a.head_dim * rows * ITEMSIZE[manifest.dtype]


def tie_gap(model: Model, token_ids: Sequence[int], ours: int, theirs: int, sampling: Sampling = GREEDY) -> float:
    """How far the lower of two candidates' logits is below the top one after these tokens: what rounding must bridge.
    Where tokens are drawn, their noise counts.

    Infinite where one of them is -1, no token: a text that ends and one that goes on are not a tie.
    """
    if -1 in (ours, theirs):
        return math.inf
    model.forget()
    prefill(
        model.session, Decoding(model.split), model.embeddings[list(token_ids)], model.bundle.manifest.prefill_chunk
    )
    logits = model.session.read_logits(1)[0]
    if sampling.is_drawn:
        return draw_gap(sampling, logits, len(token_ids), (ours, theirs))
    return float(logits.max() - min(logits[ours], logits[theirs]))


def _best_match_rate(model: Model, prompts: Sequence[list[int]], settings: BenchSettings) -> float:
    session, manifest, sampling = model.session, model.bundle.manifest, settings.sampling
    how = Decoding(model.split, 1, picks="draws")
    round_ = session.bind(replace(speculative_round(model.split, 1), picks="draws"))
    vocabulary, shared = model.split.draft_head.vocabulary, []
    for ids in prompts:
        session.sample(sampling, ids)
        prefill(session, how, model.embeddings[ids], manifest.prefill_chunk)
        position, end = len(ids), min(len(ids) + settings.max_new_tokens, manifest.max_length - 1) - 1
        while position < end:
            round_.start(position)
            result = round_.wait()
            draft = distribution(sampling, session.read(View("draft_logits", 0, 1))[0, :vocabulary])
            target = distribution(sampling, session.read_logits(1)[0])
            shared.append(float(np.minimum(draft, target[:vocabulary]).sum()))
            accepted = count_accepted(result.draft_ids, result.target_ids)
            session.carry(accepted)
            position += accepted + 1
    model.forget()
    return float(np.mean(shared)) if shared else 1.0


def _ours(model: Model, k: int | Literal["auto"], exit_layer: ExitChoice | None, settings: BenchSettings) -> Contestant:
    mode: Mode = "self-speculative" if k else "autoregressive"
    threshold = None if not k or (k == "auto" and settings.weighs) else settings.confidence_threshold

    def run(ids: list[int], max_new_tokens: int) -> Run:
        model.forget()  # every run is a whole one
        generation: Generation = model.complete(
            ids,
            mode=mode,
            num_speculations=k or None,
            confidence_threshold=threshold,
            draft=settings.draft if k else None,
            exit_layer=exit_layer,
            max_new_tokens=max_new_tokens,
            **settings.sampling.settings,
        )
        s = generation.statistics
        seconds = (s.new_tokens - 1) * (s.ms_per_token or 0.0) / 1e3
        return Run(generation.token_ids, s.time_to_first_token_ms / 1e3, seconds, s)

    fixed = None if exit_layer == "auto" else exit_layer
    return Contestant(ADAPTIVE, MAX_SPECULATIONS, run, fixed) if k == "auto" else Contestant(mode, k, run, fixed)


def _ms_per_token(repeats: Sequence[Sequence[Run]]) -> float:
    """Median over repeats of time over tokens."""
    return statistics.median(map(_ms_of_repeat, repeats))


def _ms_of_repeat(runs: Sequence[Run]) -> float:
    """Time over tokens."""
    return 1e3 * sum(run.seconds for run in runs) / max(sum(len(run.token_ids) - 1 for run in runs), 1)


def _row(contestant: Contestant, repeats: Sequence[Sequence[Run]], plain_ms: float) -> BenchRow:
    runs = [run for kept in repeats for run in kept]
    ms = _ms_per_token(repeats)
    stats = [run.statistics for run in runs if run.statistics and run.statistics.rounds]
    histogram = np.sum([s.acceptance_histogram for s in stats], axis=0) if stats else np.zeros(0, int)
    rounds = sum(s.rounds for s in stats)
    accepted, drafted, tested = (sum(getattr(s, n) for s in stats) for n in ("accepted", "drafted", "tested"))
    stages = [s.stage_ms for s in stats if s.stage_ms]
    seconds = sum(run.seconds for run in runs)
    stage_ms = {g: sum(s[g] for s in stages) / rounds for g in stages[0]} if stages else None
    host_ms = None if stage_ms is None else seconds * 1e3 / rounds - sum(stage_ms.values())
    texts = [run.token_ids for run in repeats[0]]
    of_texts = [run.statistics for run in repeats[0] if run.statistics]
    return BenchRow(
        mode=contestant.mode,
        num_speculations=contestant.num_speculations,
        tokens_per_second=1e3 / ms if ms else 0.0,
        ms_per_token=ms,
        speedup=plain_ms / ms if ms else 0.0,
        time_to_first_token_ms=1e3 * statistics.median(run.first_token_seconds for run in runs),
        acceptance_rate=accepted / drafted if drafted else None,
        match_rate=accepted / tested if tested else None,
        tokens_per_round=sum(s.new_tokens - 1 for s in stats) / rounds if rounds else None,
        distinct_tokens=float(np.mean([len(set(ids)) / len(ids) for ids in texts])),
        distinct_4grams=distinct_4grams(texts),
        rounds=rounds // len(repeats) if stats else None,
        acceptance_histogram=tuple(int(n) // len(repeats) for n in histogram) if stats else None,
        stage_ms_per_round=stage_ms,
        host_ms_per_round=host_ms,
        host_share=None if host_ms is None or stage_ms is None else host_ms / sum(stage_ms.values()),
        by_drafter=together([s.by_drafter for s in of_texts]) if stats else None,
        by_exit=together([s.by_exit for s in of_texts]) if stats else None,
        course=courses([s.course for s in of_texts]) if stats else None,
        exit_layer=contestant.exit_layer,
    )


def _differences(
    model: Model,
    contestant: Contestant,
    prompts: Sequence[list[int]],
    plain: Sequence[Run],
    runs: Sequence[Run],
    sampling: Sampling = GREEDY,
) -> Iterator[Difference]:
    for index, (ids, ours, theirs) in enumerate(zip(prompts, plain, runs, strict=True)):
        pairs = zip_longest(ours.token_ids, theirs.token_ids, fillvalue=-1)
        parted = next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), None)
        if parted is not None:
            position, a, b = parted
            gap = tie_gap(model, [*ids, *ours.token_ids[:position]], a, b, sampling)
            exact = model.session.exact and contestant.mode in (*MODES, ADAPTIVE)
            tie = not exact and gap < TIE_GAP[model.bundle.manifest.dtype]
            yield Difference(
                contestant.mode, contestant.num_speculations, index, position, gap, tie, contestant.exit_layer
            )
