"""A plan as a person reads it: what fits, how fast, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from edgeskip.recipes.plan.plan import PairPlan, Plan, SpeedPlan
from edgeskip.runtime.terminal import bytes_text, shown, table

_WIDTH = 60
_COLORS = (
    *("blue", "dark_orange", "magenta", "green", "cyan", "yellow", "red", "white", "bright_black", "violet"),
    "gold3",
)
_NGRAM_LENGTHS = (1, 4, 8, 16)
_EXITS = 6
"""How many exit layers of unknown match rate are shown, at most; the JSON has all."""


def print_plan(plan: Plan, console: Console) -> None:
    """Memory as a bar, times as tables, and the verdict."""
    k = f"auto (calls of K = {plan.num_speculations})" if plan.adaptive else plan.num_speculations
    cut = f" (cut after {', '.join(map(str, plan.other_exits))} too)" if plan.other_exits else ""
    console.print(
        f"[bold]{shown(plan.model)}[/bold] on [bold]{shown(plan.device)}[/bold]: {plan.backend}"
        f"{f' ({plan.dialect} dialect)' if plan.dialect else ''}, {plan.dtype}, "
        f"exit layer {plan.exit_layer} of {plan.num_layers}{cut}, K = {k}, "
        f"{plan.max_length} tokens\n"
    )
    _print_formats(plan, console)
    _print_memory(plan, console)
    console.print(f"On disk: {_sizes(plan.disk)}.")
    if plan.build:
        console.print(f"Building engines takes about {plan.build / 1e9:.2f} GB of the builder's memory.")
    console.print(f"\nTimes on the device with {plan.position} tokens in the caches; {shown(plan.efficiency)}:")
    _print_times(plan, console)
    for note in plan.notes:
        console.print(f"[dim]{shown(note)}[/dim]")
    for problem in plan.problems:
        console.print(f"[bold red]Will not work:[/bold red] {shown(problem.found)}; {shown(problem.fix)}.")
    if plan.works:
        fits = f"[bold green]It fits[/bold green], with up to {plan.largest_max_length} tokens."
        console.print(f"{fits} {_verdict(plan)}")


def _print_formats(plan: Plan, console: Console) -> None:
    """In what the weights are stored, and why."""
    if plan.recommended is None:
        console.print(f"Weights: {bytes_text(plan.formats)}.\n")
        return
    console.print(f"{shown(plan.recommended.reason)} ({bytes_text(plan.formats)}).")
    chosen = plan.dtype if plan.recommended.weights == "dtype" else plan.recommended.weights
    formats = table("weights", "GB to run", "most tokens", "plain ms per token")
    for one in plan.recommended.compared:
        style = "bold" if one.weights == chosen else ""
        most = str(one.largest_max_length) if one.largest_max_length else "none"
        formats.add_row(one.weights, f"{one.memory / 1e9:.2f}", most, f"{one.plain_ms_per_token:.2f}", style=style)
    console.print(formats)


def _print_memory(plan: Plan, console: Console) -> None:
    total = sum(plan.memory.values())
    whole = max(total, plan.available)
    bar = Text()
    drawn = 0.0
    for size, color in zip(plan.memory.values(), _COLORS, strict=False):
        end = drawn + size
        bar.append("█" * (round(end / whole * _WIDTH) - round(drawn / whole * _WIDTH)), color)
        drawn = end
    bar.append("░" * (_WIDTH - round(drawn / whole * _WIDTH)), "dim")
    over = "" if total <= plan.available else f", [bold red]{(total - plan.available) / 1e9:.2f} too much[/bold red]"
    console.print(f"To run: {total / 1e9:.2f} GB of the {plan.available / 1e9:.2f} that are free{over}")
    console.print(bar)
    parts = zip(plan.memory.items(), _COLORS, strict=False)
    console.print(", ".join(f"[{color}]■[/] {kind} {size / 1e9:.3f}" for (kind, size), color in parts))


def _sizes(sizes: Mapping[Any, int]) -> str:
    return ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sizes.items())


def _print_times(plan: Plan, console: Console) -> None:
    stages = table("graph", "rows", "MB", "ms")
    for stage in plan.stages:
        stages.add_row(stage.graph, str(stage.rows), f"{stage.bytes / 1e6:.0f}", f"{stage.ms:.2f}")
    console.print(stages)
    console.print(
        f"First token after a prompt of {plan.position} tokens: {plan.first_token_ms:.0f} ms. A plain token: "
        f"{plan.plain_ms_per_token:.2f} ms ({1e3 / plan.plain_ms_per_token:.0f} tokens/s); just reading the weights, "
        f"at the rate of a copy: {plan.ideal_ms_per_token:.2f} ms.\n"
    )
    if plan.other_speeds:
        _print_side_by_side(plan, console)
    else:
        _print_speeds(plan, console)
    rates = table("match rate", "best K", "ms per token", "speedup")
    for rate in plan.rates:
        k = "plain" if rate.num_speculations is None else str(rate.num_speculations)
        speedup = f"{plan.plain_ms_per_token / rate.ms_per_token:.2f}x"
        rates.add_row(f"{rate.match_rate:.1f}", k, f"{rate.ms_per_token:.2f}", speedup)
    console.print(f"What a match rate gives at exit layer {plan.exit_layer}:")
    console.print(rates)
    exits = table("exit layer", "loses below", "match rate", "best K", "ms per token")
    own = {plan.exit_layer, *plan.other_exits}
    unknown = [e.exit_layer for e in plan.exits if e.match_rate is None]
    shown = set(unknown[:: max(1, -(-len(unknown) // _EXITS))]) | own
    for exit_plan in plan.exits:
        if exit_plan.match_rate is None and exit_plan.exit_layer not in shown:
            continue
        cells = [str(exit_plan.exit_layer), _number(exit_plan.break_even, ".2f", "always")]
        cells += [_number(exit_plan.match_rate, ".2f", ""), _number(exit_plan.num_speculations, "d", "")]
        cells.append(_number(exit_plan.ms_per_token, ".2f", ""))
        exits.add_row(*cells, style="bold" if exit_plan.exit_layer in own else "")
    console.print("Exit layers, and the match rate below which self-speculation loses:")
    console.print(exits)
    _print_choice(plan, console)
    if (head := plan.draft_head) is not None:
        console.print(
            f"Drafts from {head.rows} rows of the vocabulary (--draft-vocabulary): a round with K = "
            f"{head.num_speculations} takes {head.round_ms:.2f} ms and not {head.all_rows_ms:.2f}, which pays unless "
            f"it brings {1 - head.round_ms / head.all_rows_ms:.0%} fewer tokens."
        )
    _print_ngrams(plan, console)


def _print_speeds(plan: Plan, console: Console) -> None:
    """Rounds of the only exit."""
    speeds = table("K", "ms per round", "tokens per round", "ms per token", "tokens/s", "speedup")
    for speed in plan.speeds:
        cells = [_length(speed), f"{speed.round_ms:.2f}"]
        if speed.ms_per_token is not None:
            cells += [f"{speed.tokens_per_round:.2f}", f"{speed.ms_per_token:.2f}", f"{1e3 / speed.ms_per_token:.0f}"]
            cells += [f"{plan.plain_ms_per_token / speed.ms_per_token:.2f}x"]
        speeds.add_row(*cells, style="bold" if speed.num_speculations == plan.num_speculations else "")
    console.print(speeds)


def _print_side_by_side(plan: Plan, console: Console) -> None:
    """Rounds of each exit, and what they take per token where the match rate is known."""
    by_exit = {plan.exit_layer: plan.speeds} | plan.other_speeds
    speeds = table("K", *(name for e in by_exit for name in (f"E = {e}: ms per round", "ms per token", "speedup")))
    for row in zip(*by_exit.values(), strict=True):
        cells = [_length(row[0])]
        for speed in row:
            ms = speed.ms_per_token
            faster = "" if ms is None else f"{plan.plain_ms_per_token / ms:.2f}x"
            cells += [f"{speed.round_ms:.2f}", _number(ms, ".2f", ""), faster]
        speeds.add_row(*cells)
    console.print(speeds)


def _length(speed: SpeedPlan) -> str:
    return str(speed.num_speculations) if speed.num_speculations else "plain"


def _print_choice(plan: Plan, console: Console) -> None:
    """What choosing exit and K by the text could bring."""
    choice, several = plan.choice, bool(plan.other_exits)
    options = "-e auto" if several else "-k auto"
    if choice is None:
        if several or plan.adaptive:
            rates = "for each exit" if several else "of several kinds of text, as 0.9,0.3"
            console.print(f"What a choice by the text ({options}) could bring: give --match-rate {rates}.")
    elif len(choice.by_kind) == 1:
        console.print(
            f"With these match rates throughout, {_pair(choice.fixed)} is the fastest, and a choice by the text "
            f"({options}) brings nothing: it gains where texts differ. Give rates of several kinds, as E=0.9,0.3."
        )
    else:
        kinds, gain = "; ".join(map(_pair, choice.by_kind)), choice.fixed.ms_per_token / choice.ms_per_token
        console.print(
            f"If a text has as many tokens of each of these {len(choice.by_kind)} kinds, {_pair(choice.fixed)} is the "
            f"fastest throughout. The fastest for each kind: {kinds}. A choice by the text ({options}) takes at least "
            f"{choice.ms_per_token:.2f} ms per token, {gain:.2f} times as fast as the former; it has to find out which "
            "kind it is, and that takes part of the gain."
        )


def _pair(one: PairPlan) -> str:
    name = "plain decoding" if one.exit_layer is None else f"E = {one.exit_layer} with K = {one.num_speculations}"
    return f"{name} ({one.ms_per_token:.2f} ms)"


def _print_ngrams(plan: Plan, console: Console) -> None:
    """Drafts of the text, which need no exit."""
    ngrams = plan.ngrams
    times = ", ".join(f"{ngrams.rounds_ms[k]:.2f} ms with {k}" for k in _NGRAM_LENGTHS)
    pays = "never pays" if ngrams.break_even is None else f"pays from a match rate of {ngrams.break_even:.2f}"
    console.print(f"Drafts of the text (--draft ngram): a round takes {times}, and {pays}.")
    if ngrams.ms_per_token is not None:
        console.print(
            f"Where {ngrams.share:.0%} of the rounds have some, {ngrams.match_rate:.0%} of which are right: with K = "
            f"{ngrams.num_speculations}, {ngrams.ms_per_token:.2f} ms per token, "
            f"{plan.plain_ms_per_token / ngrams.ms_per_token:.2f}x plain."
        )


def _verdict(plan: Plan) -> str:
    if plan.best is None or plan.best.ms_per_token is None:
        own = next(e for e in plan.exits if e.exit_layer == plan.exit_layer)
        if own.break_even is None:
            return f"Self-speculation from exit layer {plan.exit_layer} loses whatever the match rate."
        return f"Self-speculation from exit layer {plan.exit_layer} pays from a match rate of {own.break_even:.2f}."
    best, speedup = plan.best, plan.plain_ms_per_token / plan.best.ms_per_token
    if speedup <= 1:
        return "Plain decoding is faster than any exit whose match rate is known."
    return (
        f"Of the exits whose match rate is known, E = {best.exit_layer} with K = {best.num_speculations} is the "
        f"fastest: {best.ms_per_token:.2f} ms per token, {speedup:.2f}x plain."
    )


def _number(value: float | None, spec: str, none: str) -> str:
    return none if value is None else format(value, spec)
