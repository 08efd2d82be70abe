"""What people see: streamed text, statistics, tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from edgeskip.runtime.bench.measure import ADAPTIVE, BenchReport, BenchRow, Difference
from edgeskip.runtime.decoding.statistics import Stretch
from edgeskip.runtime.terminal import bytes_text, memory_sizes, shown, table


def print_bench(report: BenchReport, console: Console) -> None:
    """The tables of a bench, and what differed."""
    settings, plain = report.settings, report.rows[0]
    best = max((row for row in report.rows if row.num_speculations), key=lambda row: row.speedup, default=None)
    synthetic = ", [bold]synthetic weights[/bold]" if report.synthetic else ""
    console.print(
        f"{shown(report.source)}{synthetic}, exit layer {report.exit_layer} of {report.num_layers}; "
        f"{shown(report.backend)}; {shown(report.hardware.device)}"
    )
    if len(report.formats) > 1:
        console.print(f"Weights: {bytes_text(report.formats)}")
    speed = table("mode", "E", "K", "tokens/s", "ms", "speedup", "accept", "match", "per round")
    for row in report.rows:
        speed.add_row(*_speed_cells(row), style="bold" if row is best else "")
    console.print(speed)
    console.print(
        f"{report.prompts} prompts, {settings.max_new_tokens} tokens each, medians of {settings.repeats} interleaved "
        f"repeats; ms per token; {plain.distinct_tokens:.0%} of tokens and {plain.distinct_4grams:.0%} of 4-grams "
        "distinct; "
        + (
            f"drafting ends below a confidence of {settings.confidence_threshold:g}"
            + (", with K auto where one more does not pay\n" if settings.weighs else "\n")
            if settings.confidence_threshold
            else "always K drafts\n"
        )
    )
    if report.best_match_rate is not None:
        console.print(f"Drawn with {settings.sampling}; the best possible match is {report.best_match_rate:.1%}.")
    read_gb = report.ideal_ms_per_token * report.copy_gb_per_s / 1e3
    console.print(
        f"An ideal plain decoder, which just reads {read_gb:.2f} GB of weights at the "
        f"{report.copy_gb_per_s:.0f} GB/s of a copy: {report.ideal_ms_per_token:.3f} ms per token"
        + (f"; the best K takes {best.ms_per_token:.3f}.\n" if best else ".\n")
    )
    _print_rounds(report, console)
    _print_drafters(report, console)
    stages = table("graph", "rows", "ms", "MB", "GB/s", "of a copy")
    for stage in report.stages:
        cells = (f"{stage.ms:.3f}", f"{stage.bytes / 1e6:.1f}", f"{stage.gb_per_s:.0f}", f"{stage.share_of_copy:.0%}")
        stages.add_row(stage.graph, str(stage.rows), *cells)
    console.print("Each graph by itself, and what it has to read:")
    console.print(stages)
    console.print(memory_sizes(report.memory_bytes) + "\n")
    for d in report.differences:
        where = f" E={d.exit_layer}" if d.exit_layer else ""
        what = "a tie, legal" if d.is_tie else "NOT a tie"
        console.print(
            f"{d.mode}{where} K={_length(d)}, prompt {d.prompt}: token {d.position} is not plain decoding's; "
            f"the lower of their logits is {d.gap:.2g} below the top one: {what}"
        )
    if not report.differences:
        console.print("Every mode gave exactly the tokens of plain decoding.")
    print_doubts(report.doubts, console)


def print_doubts(doubts: Sequence[str], console: Console) -> None:
    """Why a measurement is not valid."""
    if doubts:
        console.print(f"[bold red]Not a valid measurement:[/bold red] {shown('; '.join(doubts))}.", soft_wrap=True)
        console.print("Run it again when the machine does nothing else.")


def _print_rounds(report: BenchReport, console: Console) -> None:
    """Where a round's time goes, for each K."""
    names = list(report.rows[0].stage_ms_per_round or ())
    rounds = table("E", "K", *(f"{name} ms" for name in names), "host ms", "share", "first token ms")
    for row in report.rows:
        if row.stage_ms_per_round is not None:
            times = [*row.stage_ms_per_round.values(), row.host_ms_per_round]
            rounds.add_row(
                _exit(row),
                _length(row),
                *(f"{ms:.3f}" for ms in times),
                f"{row.host_share:.1%}",
                f"{row.time_to_first_token_ms:.1f}",
            )
    console.print("Where a round's time goes:")
    console.print(rounds)


def _print_drafters(report: BenchReport, console: Console) -> None:
    """What each drafter cost and brought, for each K."""
    drafters = table("E", "K", "drafter", "rounds", "ms", "drafted", "accepted", "share", "rounds by drafts")
    for row in report.rows:
        made = {f"exit {layer}": one for layer, one in (row.by_exit or {}).items()}
        made |= {name: one for name, one in (row.by_drafter or {}).items() if name != "exit"}
        for name, one in made.items():
            lengths = " ".join(f"{k}:{n}" for k, n in enumerate(one.rounds_by_length) if n)
            cells = (f"{one.rounds}", f"{1e3 * one.seconds / one.rounds:.3f}", f"{one.drafted}", f"{one.accepted}")
            drafters.add_row(_exit(row), _length(row), name, *cells, f"{one.accepted / one.drafted:.0%}", lengths)
    console.print("Rounds with drafts, by what drafted; ms per round:")
    console.print(drafters)
    for row in report.rows:
        if row.mode == ADAPTIVE and row.course:
            parts = ", ".join(map(_stretch_text, row.course))
            console.print(
                f"E = {_exit(row)}, K = auto, from the first rounds of a text to the last: {parts}", soft_wrap=True
            )


def _stretch_text(part: Stretch) -> str:
    """Mean drafts of a round, and the exits that drafted."""
    exits = " ".join(f"{layer}:{n / part.rounds:.0%}" for layer, n in part.rounds_by_exit.items())
    return f"K {part.drafted / part.rounds:.1f} from {exits or 'none'}"


def _exit(row: BenchRow) -> str:
    chosen = "auto" if row.mode == ADAPTIVE else ""
    return chosen if row.exit_layer is None else str(row.exit_layer)


def _length(row: BenchRow | Difference) -> str:
    return "auto" if row.mode == ADAPTIVE else str(row.num_speculations)


def _speed_cells(row: BenchRow) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        row.mode,
        _exit(row),
        _length(row) if row.num_speculations else "",
        f"{row.tokens_per_second:.0f}",
        f"{row.ms_per_token:.3f}",
        f"{row.speedup:.2f}x",
        share(row.acceptance_rate),
        share(row.match_rate),
        "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
    ]
