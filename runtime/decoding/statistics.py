"""What a generation cost, from its rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TypeVar

import numpy as np

from edgeskip.runtime.drafting.drafters import DRAFTERS, Drafter

_K = TypeVar("_K")


@dataclass(frozen=True)
class RoundRecord:
    """One round as it was emitted: without tokens after a stop, and without the drafts that became them.

    `drafted` and `accepted` count drafts, which `drafter` made, at `exit_layer` if that is an exit, and `trusted` those
    that were accepted untested; `seconds` is the time from the start of the round to its text, or what the device took
    where it went on working while nobody waited.
    """

    tokens: int
    drafted: int
    accepted: int
    seconds: float
    drafter: Drafter = "exit"
    trusted: int = 0
    exit_layer: int | None = None

    @property
    def tested(self) -> int:
        """Drafts that were compared with the whole model's tokens: up to the first that was wrong."""
        return min(self.accepted + 1, self.drafted) - self.trusted


@dataclass(frozen=True)
class Drafting:
    """Rounds with drafts of one drafter. `rounds_by_length[k]` counts those with k drafts."""

    rounds: int
    drafted: int
    tested: int
    accepted: int
    seconds: float
    rounds_by_length: tuple[int, ...]


@dataclass(frozen=True)
class Stretch:
    """A part of a text: its rounds, their drafts, and those of the rounds that drafted from each exit."""

    rounds: int
    drafted: int
    rounds_by_exit: dict[int, int]


STRETCHES = 8
"""Parts of a text that statistics tell apart."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt as it was run: its tokens, those of them whose rows the caches held already, and the time to the first
    new token.
    """

    tokens: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Statistics:
    """Times and rates of one generation.

    `cached_tokens` are those of the prompt that needed no computing, as the caches held their rows. `acceptance_rate`
    is accepted / drafted, as LayerSkip reports it; `match_rate` is that of the drafts which were tested: those after
    the first mismatch of their round are not, nor are the `trusted` ones, which early exit took without the later
    layers. `acceptance_histogram[a]` counts rounds with a accepted drafts. Rates of tokens leave out the first token,
    which comes from the prefill; a token's latency is its round's time over the round's tokens. `stage_ms` is the time
    in each graph, without the prefill; null where the device hides it. `captured_rounds` is how many rounds ran as one
    captured CUDA graph; null on a CPU. `by_drafter` has the rounds with drafts, by what made them, and `by_exit` those
    with drafts of an exit, by its layer. `course` has all rounds in order, in up to eight parts of as many rounds.
    """

    mode: str
    num_speculations: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    rounds: int
    drafted: int
    tested: int
    accepted: int
    trusted: int
    acceptance_rate: float | None
    match_rate: float | None
    tokens_per_round: float | None
    acceptance_histogram: tuple[int, ...]
    time_to_first_token_ms: float
    tokens_per_second: float | None
    ms_per_token: float | None
    latency_ms: dict[str, float] | None
    stage_ms: dict[str, float] | None
    captured_rounds: int | None
    by_drafter: dict[Drafter, Drafting]
    by_exit: dict[int, Drafting]
    course: tuple[Stretch, ...]


def summarize(
    mode: str,
    num_speculations: int,
    prompt: Prefilled,
    rounds: Sequence[RoundRecord],
    stage_ms: dict[str, float] | None,
    captured_rounds: int | None,
) -> Statistics:
    """Sums up a generation whose first token came from the prefill and the others from `rounds`."""
    whole = _drafting(rounds)
    drafted, tested, accepted = whole.drafted, whole.tested, whole.accepted
    trusted = sum(r.trusted for r in rounds)
    by_drafter = {name: [r for r in rounds if r.drafted and r.drafter == name] for name in DRAFTERS}
    exits = sorted({r.exit_layer for r in rounds if r.drafted and r.exit_layer is not None})
    tokens = sum(r.tokens for r in rounds)
    seconds = sum(r.seconds for r in rounds)
    histogram = np.bincount([r.accepted for r in rounds], minlength=num_speculations + 1)
    return Statistics(
        mode=mode,
        num_speculations=num_speculations,
        prompt_tokens=prompt.tokens,
        cached_tokens=prompt.cached,
        new_tokens=tokens + 1,
        rounds=len(rounds),
        drafted=drafted,
        tested=tested,
        accepted=accepted,
        trusted=trusted,
        acceptance_rate=accepted / drafted if drafted else None,
        match_rate=(accepted - trusted) / tested if tested else None,
        tokens_per_round=tokens / len(rounds) if rounds else None,
        acceptance_histogram=tuple(int(n) for n in histogram),
        time_to_first_token_ms=prompt.seconds * 1e3,
        tokens_per_second=tokens / seconds if tokens else None,
        ms_per_token=seconds * 1e3 / tokens if tokens else None,
        latency_ms=_latencies_ms(rounds) if tokens else None,
        stage_ms=stage_ms,
        captured_rounds=captured_rounds,
        by_drafter={name: _drafting(some) for name, some in by_drafter.items() if some},
        by_exit={e: _drafting([r for r in rounds if r.drafted and r.exit_layer == e]) for e in exits},
        course=tuple(_stretch(part) for part in _parts(rounds)),
    )


def _drafting(rounds: Sequence[RoundRecord]) -> Drafting:
    lengths = np.bincount([r.drafted for r in rounds])
    return Drafting(
        rounds=len(rounds),
        drafted=sum(r.drafted for r in rounds),
        tested=sum(r.tested for r in rounds),
        accepted=sum(r.accepted for r in rounds),
        seconds=sum(r.seconds for r in rounds),
        rounds_by_length=tuple(int(n) for n in lengths),
    )


def together(texts: Sequence[Mapping[_K, Drafting]]) -> dict[_K, Drafting]:
    """The rounds of several texts, by what drafted."""
    return {name: _sum([text[name] for text in texts if name in text]) for name in {n for text in texts for n in text}}


def courses(texts: Sequence[Sequence[Stretch]]) -> tuple[Stretch, ...]:
    """The same parts of several texts together."""
    return tuple(_stretches([one for one in part if one]) for part in zip_longest(*texts))


def _stretches(some: Sequence[Stretch]) -> Stretch:
    exits = sorted({e for one in some for e in one.rounds_by_exit})
    by_exit = {e: sum(one.rounds_by_exit.get(e, 0) for one in some) for e in exits}
    return Stretch(sum(one.rounds for one in some), sum(one.drafted for one in some), by_exit)


def _parts(rounds: Sequence[RoundRecord]) -> list[Sequence[RoundRecord]]:
    ends = [len(rounds) * i // STRETCHES for i in range(STRETCHES + 1)]
    return [rounds[first:last] for first, last in pairwise(ends) if last > first]


def _stretch(rounds: Sequence[RoundRecord]) -> Stretch:
    exits = Counter(r.exit_layer for r in rounds if r.drafted and r.exit_layer is not None)
    return Stretch(len(rounds), sum(r.drafted for r in rounds), dict(sorted(exits.items())))


def _sum(some: Sequence[Drafting]) -> Drafting:
    lengths = [sum(n) for n in zip_longest(*(one.rounds_by_length for one in some), fillvalue=0)]
    totals = {name: sum(getattr(one, name) for one in some) for name in ("rounds", "drafted", "tested", "accepted")}
    return Drafting(**totals, seconds=sum(one.seconds for one in some), rounds_by_length=tuple(lengths))


def distinct_4grams(texts: Sequence[Sequence[int]]) -> float:
    """Mean over texts of the share of 4-grams that repeat no earlier one, 0 to 1; 1 if no text has any.

    Small models loop, and a loop is easy to draft: a low share flatters every rate.
    """
    grams = [list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)) for ids in texts]
    shares = [len(set(g)) / len(g) for g in grams if g]
    return float(np.mean(shares)) if shares else 1.0


def _latencies_ms(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    latencies = np.repeat([r.seconds * 1e3 / r.tokens for r in rounds], [r.tokens for r in rounds])
    return {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 99)}
