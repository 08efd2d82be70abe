"""Speed, measured: every way of decoding takes turns on the same prompts in one process; medians over repeats."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import zip_longest
from pathlib import Path

import numpy as np

from edgeskip.runtime.decode import prefill
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.generate import Generation, Model
from edgeskip.runtime.graphs import MAX_SPECULATIONS
from edgeskip.runtime.manifest import Progress
from edgeskip.runtime.statistics import Statistics, distinct_4grams

TIE_GAP = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.4}
"""Kernels round differently for one row and for many: a token may differ where the two top logits lie closer."""


@dataclass(frozen=True)
class BenchSettings:
    """Speculation lengths to measure, tokens a prompt, how often, and when drafting ends early.

    `confidence_threshold` is that of `Model.generate`: None takes the backend's.
    """

    grid: tuple[int, ...]
    max_new_tokens: int
    repeats: int
    confidence_threshold: float | None = None


@dataclass(frozen=True)
class Run:
    """One contestant on one prompt: `seconds` are those after the first token."""

    token_ids: tuple[int, ...]
    first_token_seconds: float
    seconds: float
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Contestant:
    """A way of decoding: prompt ids and a number of tokens -> run."""

    mode: str
    num_speculations: int
    run: Callable[[list[int], int], Run]


@dataclass(frozen=True)
class BenchRow:
    """One contestant over all prompts.

    Rates are over the tokens after each first one. `acceptance_histogram`, `stage_ms_per_round` (mean time in each
    graph) and `host_ms_per_round` (mean of the rest) are null for other runtimes. `distinct_4grams` is the share of
    distinct 4-grams in the texts: a model that loops flatters every rate.
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
    distinct_4grams: float
    acceptance_histogram: tuple[int, ...] | None
    stage_ms_per_round: dict[str, float] | None
    host_ms_per_round: float | None


@dataclass(frozen=True)
class Difference:
    """A contestant's first token that is not plain decoding's.

    `gap` lies between the logits of the two tokens, infinite unless they are the two top ones.
    """

    mode: str
    num_speculations: int
    prompt: int
    position: int
    gap: float
    is_tie: bool


@dataclass(frozen=True)
class BenchReport:
    """`faults` are the differences that are no ties, other runtimes left out: there must be none."""

    source: str
    backend: str
    exit_layer: int
    num_layers: int
    prompts: int
    settings: BenchSettings
    rows: tuple[BenchRow, ...]
    differences: tuple[Difference, ...]
    faults: int


def load_prompts(path: Path | None = None) -> list[str]:
    """The held-out prompts that ship with edgeskip, or the text files of a folder, or one file.

    Raises:
        RequestError: nothing there, or not text.
    """
    if path is None:
        text = (resources.files("edgeskip.runtime") / "prompts.json").read_text(encoding="utf-8")
        return [prompt["text"] for prompt in json.loads(text)]
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(path, f"not readable as text ({error})", wanted="a text file or a folder of them") from None
    if not any(texts):
        raise RequestError(path, "no text in it", wanted="a text file or a folder of them")
    return [text for text in texts if text]


def run_bench(
    model: Model,
    prompts: Sequence[str],
    settings: BenchSettings,
    others: Sequence[Contestant] = (),
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measures plain decoding, self-speculation for each length of the grid, and other runtimes.

    Raises:
        RequestError: a setting that cannot be served, or prompts too long for the bundle.
    """
    for k in settings.grid:
        if not 1 <= k <= MAX_SPECULATIONS:
            raise RequestError("num speculations", f"{k}", wanted=f"1 to {MAX_SPECULATIONS}")
    manifest = model.bundle.manifest
    prompt_ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    longest = max(map(len, prompt_ids))
    room = manifest.max_length - longest
    if room < 2:
        raise RequestError("prompts", f"one of {longest} tokens", wanted=f"at most {manifest.max_length - 2}")
    if not 2 <= settings.max_new_tokens <= room:
        raise RequestError(
            "max new tokens", f"{settings.max_new_tokens}", wanted=f"2 to {room}, behind the longest prompt"
        )
    if settings.confidence_threshold is None:
        settings = replace(settings, confidence_threshold=model.session.confidence_threshold)
    contestants = [_ours(model, k, settings) for k in (0, *settings.grid)] + list(others)
    total = (settings.repeats + 1) * len(prompt_ids) * len(contestants)
    done = 0
    runs: list[list[list[Run]]] = [[] for _ in contestants]  # by contestant, repeat, prompt
    for repeat in range(settings.repeats + 1):  # the first one warms up
        for kept in runs:
            kept.append([])
        for ids in prompt_ids:
            for kept, contestant in zip(runs, contestants, strict=True):
                kept[repeat].append(contestant.run(ids, settings.max_new_tokens))
                done += 1
                progress("measuring", done, total)
    measured = [kept[1:] for kept in runs]
    plain_ms = _ms_per_token(measured[0])
    rows = tuple(_row(c, kept, plain_ms) for c, kept in zip(contestants, measured, strict=True))
    differences = tuple(
        dict.fromkeys(
            difference
            for contestant, kept in zip(contestants[1:], measured[1:], strict=True)
            for runs_of_repeat in kept
            for difference in _differences(model, contestant, prompt_ids, measured[0][0], runs_of_repeat)
        )
    )
    foreign = {other.mode for other in others}
    return BenchReport(
        source=manifest.source,
        backend=model.session.description,
        exit_layer=manifest.exit_layer,
        num_layers=manifest.architecture.num_layers,
        prompts=len(prompts),
        settings=settings,
        rows=rows,
        differences=differences,
        faults=sum(not d.is_tie and d.mode not in foreign for d in differences),
    )


def tie_gap(model: Model, token_ids: Sequence[int], ours: int, theirs: int) -> float:
    """How far the logits of two candidates lie apart behind these tokens; infinite unless they are the two top ones."""
    prefill(model.session, model.embeddings[list(token_ids)], model.bundle.manifest.prefill_chunk)
    logits = model.session.read_logits(1)[0]
    second, first = np.argsort(logits)[-2:]
    return float(logits[first] - logits[second]) if {ours, theirs} == {first, second} else math.inf


def _ours(model: Model, k: int, settings: BenchSettings) -> Contestant:
    mode = "self-speculative" if k else "autoregressive"

    def run(ids: list[int], max_new_tokens: int) -> Run:
        generation: Generation = model.complete(
            ids,
            mode=mode,
            num_speculations=k or None,
            confidence_threshold=settings.confidence_threshold,
            max_new_tokens=max_new_tokens,
        )
        s = generation.statistics
        seconds = (s.new_tokens - 1) * (s.ms_per_token or 0.0) / 1e3
        return Run(generation.token_ids, s.time_to_first_token_ms / 1e3, seconds, s)

    return Contestant(mode, k, run)


def _ms_per_token(repeats: Sequence[Sequence[Run]]) -> float:
    """Median over repeats of time over tokens."""
    return statistics.median(
        1e3 * sum(run.seconds for run in runs) / max(sum(len(run.token_ids) - 1 for run in runs), 1) for runs in repeats
    )


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
        distinct_4grams=distinct_4grams([run.token_ids for run in repeats[0]]),
        acceptance_histogram=tuple(int(n) // len(repeats) for n in histogram) if stats else None,
        stage_ms_per_round=stage_ms,
        host_ms_per_round=None if stage_ms is None else seconds * 1e3 / rounds - sum(stage_ms.values()),
    )


def _differences(
    model: Model, contestant: Contestant, prompts: Sequence[list[int]], plain: Sequence[Run], runs: Sequence[Run]
) -> Iterator[Difference]:
    for index, (ids, ours, theirs) in enumerate(zip(prompts, plain, runs, strict=True)):
        pairs = zip_longest(ours.token_ids, theirs.token_ids, fillvalue=-1)
        parted = next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), None)
        if parted is not None:
            position, a, b = parted
            gap = tie_gap(model, [*ids, *ours.token_ids[:position]], a, b)
            tie = gap < TIE_GAP[model.bundle.manifest.dtype]
            yield Difference(contestant.mode, contestant.num_speculations, index, position, gap, tie)
