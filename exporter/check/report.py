"""A check's report as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add

from rich.console import Console
from rich.table import Table

from edgeskip.exporter.check.comparison import Errors
from edgeskip.exporter.check.run import CheckReport, Departure, TensorReport
from edgeskip.runtime.terminal import bytes_text, shown, table

_SHOWN = 6
"""How many failing tensors are named, at most; the JSON report has them all."""


def print_check(report: CheckReport, console: Console) -> None:
    """The outputs' table, the thresholds, the texts, and what follows from them."""
    console.print(
        f"{shown(report.source)}, {report.dtype}, exit layer {report.exit_layer} of {report.num_layers}; "
        f"{shown(report.backend)}; {shown(report.hardware.device)}"
    )
    if len(report.formats) > 1:
        console.print(f"Weights: {bytes_text(report.formats)}")
    console.print(f"Against transformers in fp32, from {shown(report.reference)}:\n")
    console.print(_table(report.tensors))
    t = report.thresholds
    console.print(
        f"At most, in the mean over rows: 1-cos {t.cosine_loss:g}, norm {t.norm_loss:g} off; in the worst row: "
        f"{t.row_cosine_loss:g}, {t.row_norm_loss:g}; no NaN, no Inf; no logit {report.tie_gap:g} off."
    )
    if report.rounded_to_8_bits:
        console.print(
            "Wider than the dtype's: here, products with quantized weights round what they multiply to 8 bits. "
            "--dialect standard runs without that."
        )
    cut = f", {report.prompts_cut} cut to half the capacity" if report.prompts_cut else ""
    console.print(f"{report.prompts} prompts{cut}; rows up to {report.rows_used} of {report.max_length}.\n")
    for mode, agreed in report.agreed.items():
        console.print(f"{mode}: {agreed} of {report.prompts} greedy texts are the golden ones")
    for d in report.disagreements:
        what = f"a tie, under {report.tie_gap:g}" if d.is_tie else "NOT a tie"
        gap = "one text ends" if d.gap is None else f"{d.gap:.2g} below the top golden logit"
        console.print(f"{d.mode}, prompt {d.prompt}, token {d.position}: {gap}, {what}")
    failed = [tensor for tensor in report.tensors if not tensor.passed]
    for tensor in failed[:_SHOWN]:
        e = tensor.errors
        non_finite = f", {e.nans} NaN and {e.infs} Inf" if e.nans or e.infs else ""
        console.print(f"{tensor.graph} {tensor.tensor}, {tensor.kind}: farthest off in row {e.worst_row}{non_finite}")
    if len(failed) > _SHOWN:
        console.print(f"and {len(failed) - _SHOWN} more")
    _print_stored(report, console)
    for graph in report.failed_graphs:
        console.print(f"[bold red]{graph} fails.[/bold red] {_where(report, graph)}")
    if report.passed:
        console.print("What runs is what was trained.")
    elif not report.failed_graphs and all(one.passed for one in report.stored or ()):
        console.print("[bold red]Each graph is right by itself, but the texts are not.[/bold red]")


def _print_stored(report: CheckReport, console: Console) -> None:
    """Tensors of the weights file that do not stand for the checkpoint's, and what quantization cost."""
    wrong = [one for one in report.stored or () if not one.passed]
    for one in wrong[:_SHOWN]:
        console.print(f"[bold red]{one.tensor} is not the checkpoint's[/bold red]: {one.format}, {_losses(one.errors)}")
    if len(wrong) > _SHOWN:
        console.print(f"and {len(wrong) - _SHOWN} more")
    if not report.lost:
        return
    if report.stored is None:
        console.print("Its layers came quantized, so its weights are not compared with the checkpoint's one by one.")
    lost = table("exit layer", "perplexity", "ratio", "KL", "same token", "matches last layer")
    for e in report.lost:
        perplexity = f"{e.original_perplexity:.4g} -> {e.perplexity:.4g}"
        match = "" if e is report.lost[-1] else f"{e.original_match:.1%} -> {e.match:.1%}"
        lost.add_row(str(e.exit_layer), perplexity, f"{e.ratio:.3f}", f"{e.kl:.4f}", f"{e.agreement:.1%}", match)
    last = report.lost[-1]
    console.print(
        f"Lost to quantization: perplexity x{last.ratio:.3f}, KL {last.kl:.4f} nats, "
        f"{1 - last.agreement:.1%} of greedy tokens, over {last.tokens} tokens of the prompts:"
    )
    console.print(lost)


def _losses(errors: Errors) -> str:
    """What a block of numbers is off, in the mean and at worst."""
    return (
        f"1-cos {1 - errors.cosine:.0e}, norm {errors.norm_ratio - 1:+.0e}; worst, in block {errors.worst_row}: "
        f"{1 - errors.row_cosine:.0e}, {errors.row_norm_ratio - 1:+.0e}"
    )


def _table(tensors: Iterable[TensorReport]) -> Table:
    """A line per output, over all kinds of calls; caches are joined by graph and part."""
    lines: dict[tuple[str, str], list[TensorReport]] = {}
    for t in tensors:
        name = f"{t.tensor.rpartition('.')[2]} caches" if t.kind == "cache" else t.tensor
        lines.setdefault((t.graph, name), []).append(t)
    made = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("graph", "output"):
        made.add_column(name, no_wrap=True)
    for name in ("rows", "max", "mean", "1-cos", "norm", "worst\n1-cos", "worst\nnorm"):
        made.add_column(name, justify="right", no_wrap=True)
    for (graph, name), found in lines.items():
        e = reduce(add, (t.errors for t in found))
        losses = f"{max(1 - e.cosine, 0):.0e}", f"{e.norm_ratio - 1:+.0e}"
        worst = f"{max(1 - e.row_cosine, 0):.0e}", f"{e.row_norm_ratio - 1:+.0e}"
        style = "" if all(t.passed for t in found) else "bold red"
        made.add_row(graph, name, str(e.rows), f"{e.max_abs:.0e}", f"{e.mean_abs:.0e}", *losses, *worst, style=style)
    return made


def _where(report: CheckReport, graph: str) -> str:
    """The sentence that follows a failing graph."""
    if report.departures is None:
        return "--layers tells where it departs."
    departure: Departure | None = dict(report.departures)[graph]
    if departure is None:
        return "No part of its file departs in ONNX Runtime: suspect the session."
    place = departure.part if departure.layer is None else f"layer {departure.layer}, {departure.part}"
    seen = "" if departure.seen_in == "graph" else ", in the session's caches only: the file itself is right"
    return f"First to depart: {place} ({departure.tensor}{seen})."
