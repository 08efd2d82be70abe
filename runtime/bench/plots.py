"""Plots of reports as SVG: text stays text, in the page's font and ink."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeskip.runtime.files import lend_cache

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]
Plot = tuple[float, Callable[["Axes"], None]]
"""Height in inches, and the function that draws."""

WIDTH = 6.4
"""Of a plot in inches, which a phone's screen still shows whole and legibly."""

PLAIN, SPECULATIVE = "autoregressive", "self-speculative"
BLUE, ORANGE, PURPLE, GREEN, GREY = "#3a80c2", "#c8741c", "#8e6bbf", "#2f9468", "#868c95"  # on light and on dark
COLORS = {"draft": BLUE, "verify": ORANGE, "head": PURPLE, "device": BLUE, "host": GREY}
COLORS |= {"weights": BLUE, "caches": ORANGE, "workspace": PURPLE, "other": GREY}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


def bench_plots(report: Report) -> dict[str, str]:
    """Name -> SVG of each plot for which the report has figures.

    Raises:
        ImportError: matplotlib is missing.
    """
    plots = {"speed": _speed, "stages": _stages, "rounds": _rounds, "acceptance": _acceptance, "memory": _memory}
    return {name: svg(name, *plot) for name, make in plots.items() if (plot := make(report))}


def rows_of(report: Report, *, ours: bool = True) -> list[Mapping[str, Any]]:
    """Rows of our own modes at the default exit, or of other runtimes; those that timed no token are left out."""
    rows = [row for row in report.get("rows") or () if row.get("exit_layer") in (None, report.get("exit_layer"))]
    return [row for row in rows if row.get("ms_per_token") and (row["mode"] in (PLAIN, SPECULATIVE)) == ours]


def best_row(report: Report) -> Mapping[str, Any] | None:
    """The fastest self-speculative row."""
    return min((r for r in rows_of(report) if r["mode"] == SPECULATIVE), key=lambda r: r["ms_per_token"], default=None)


def undrawn_rows(report: Report) -> list[Mapping[str, Any]]:
    """Other runtimes too slow for the plot of speed: they would squash it."""
    limit = 1.6 * max((row["ms_per_token"] for row in rows_of(report)), default=0.0)
    return [row for row in rows_of(report, ours=False) if row["ms_per_token"] > limit]


def acceptance_by_position(histogram: Sequence[int]) -> list[float]:
    """For draft 1, 2, ... of a round: of the rounds that accepted all drafts before it, the share that accepted it too.

    Args:
        histogram: entry a counts the rounds with a accepted drafts. The list returned ends where no round got to.
    """
    reached = list(accumulate(reversed(histogram)))[::-1]  # entry a: rounds with at least a
    return [now / before for before, now in pairwise(reached) if before]


def figure(value: float) -> str:
    """Two decimals, one from 10 on, none from 100 on; three below 0.1."""
    return f"{value:,.{sum(value < bound for bound in (0.1, 10, 100))}f}"


def size(num_bytes: float) -> str:
    """Bytes in GB or MB, of 10^9 and 10^6."""
    return f"{figure(num_bytes / 1e9)} GB" if num_bytes >= 1e9 else f"{figure(num_bytes / 1e6)} MB"


@contextmanager
def _at_the_root() -> Iterator[None]:
    here = os.getcwd()  # noqa: PTH109
    os.chdir(os.sep)
    try:
        yield
    finally:
        os.chdir(here)


def svg(name: str, height: float, draw: Callable[[Axes], None]) -> str:
    """A plot as an element of a page, with ids of its own, described by the heading with this name.

    Raises:
        ImportError: matplotlib is missing.
    """
    lend_cache("MPLCONFIGDIR", "matplotlib")
    with _at_the_root():  # it takes settings from the current folder, which may be a bundle
        from matplotlib import style
        from matplotlib.figure import Figure

    file = StringIO()
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(canvas.add_subplot())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-labelledby="{name}" ', 1)


def _speed(report: Report) -> Plot | None:
    rows, slow, best = rows_of(report), undrawn_rows(report), best_row(report)
    if not rows:
        return None
    others = [row for row in rows_of(report, ours=False) if row not in slow]
    lines = [(row["ms_per_token"], row["mode"], GREY) for row in others]
    lines += [(row["ms_per_token"], "plain decoding", GREY) for row in rows if row["mode"] == PLAIN]
    if ideal := report.get("ideal_ms_per_token"):
        lines.append((ideal, "ideal plain decoder", GREEN))
    lines.sort()

    def draw(ax: Axes) -> None:
        top = 1.15 * max([row["ms_per_token"] for row in rows] + [ms for ms, _, _ in lines])
        for mode, color in ((PLAIN, GREY), (SPECULATIVE, BLUE)):
            points = sorted((row["num_speculations"], row["ms_per_token"]) for row in rows if row["mode"] == mode)
            ax.plot([k for k, _ in points], [ms for _, ms in points], "o-", color=color, markersize=6)
        for row in rows:
            at = (row["num_speculations"], row["ms_per_token"])
            weight = "bold" if row is best else "normal"
            ax.annotate(figure(at[1]), at, (0, 7), textcoords="offset points", ha="center", weight=weight, zorder=4)
        placed = -top
        for ms, label, color in lines:
            ax.axhline(ms, color=color, linewidth=1.2, linestyle="--", zorder=1.5)
            placed = max(ms, placed + 0.07 * top)  # labels keep a line's height apart
            ax.text(1.01, placed, f"{label}, {figure(ms)}", va="center", transform=ax.get_yaxis_transform())
        ks = [row["num_speculations"] for row in rows]
        ax.set(ylim=(0, top), xlim=(min(ks) - 0.5, max(ks) + 0.5), title="ms per token", xlabel="drafts per round, K")
        ax.set_xticks(ks, [str(k) if k else "plain" for k in ks])
        ax.grid(axis="y")

    return 3.2, draw


def _stages(report: Report) -> Plot | None:
    stages = [stage for stage in report.get("stages") or () if stage.get("ms")]
    if not stages:
        return None

    def label(stage: Mapping[str, Any]) -> str:
        rate, share = stage.get("gb_per_s"), stage.get("share_of_copy")
        parts = [f"{figure(stage['ms'])} ms"]
        parts += [] if rate is None else [f"{figure(rate)} GB/s"]
        parts += [] if share is None else [f"{share:.0%} of the copy rate"]
        return ", ".join(parts)

    def draw(ax: Axes) -> None:
        names = [f"{stage['graph']}, {stage['rows']} row{'s' * (stage['rows'] != 1)}" for stage in stages]
        colors = [COLORS.get(stage["graph"], GREEN) for stage in stages]
        _bars(ax, names, [([stage["ms"] for stage in stages], colors)], [label(stage) for stage in stages])

    return 0.5 + 0.27 * len(stages), draw


def _rounds(report: Report) -> Plot | None:
    rows = [row for row in rows_of(report) if row.get("stage_ms_per_round")]
    if not rows:
        return None
    parts = [{**row["stage_ms_per_round"], "host": max(row.get("host_ms_per_round") or 0.0, 0.0)} for row in rows]

    def label(row: Mapping[str, Any], times: Mapping[str, float]) -> str:
        share, tokens = row.get("host_share"), row.get("tokens_per_round")
        for_tokens = f" for {figure(tokens)} tokens" if tokens and row["num_speculations"] else ""
        return f"{figure(sum(times.values()))} ms{for_tokens}" + ("" if share is None else f", host {share:.0%}")

    def draw(ax: Axes) -> None:
        names = [f"K = {row['num_speculations']}" if row["num_speculations"] else "plain" for row in rows]
        kinds = list(dict.fromkeys(kind for times in parts for kind in times))
        layers = [([times.get(kind, 0.0) for times in parts], [COLORS.get(kind, GREEN)] * len(rows)) for kind in kinds]
        _bars(ax, names, layers, [label(*pair) for pair in zip(rows, parts, strict=True)])
        _legend(ax, kinds)

    return 0.75 + 0.27 * len(rows), draw


def _acceptance(report: Report) -> Plot | None:
    histograms = {row["num_speculations"]: row.get("acceptance_histogram") or () for row in rows_of(report)}
    shares = {k: share for k, histogram in histograms.items() if (share := acceptance_by_position(histogram))}
    if not shares:
        return None

    def draw(ax: Axes) -> None:
        left, ticks = 0.0, []
        crowded = sum(k + 1 for k in shares) > 45
        for k, share in shares.items():
            ax.bar([left + j for j in range(len(share))], share, width=0.85, color=BLUE)
            for j, value in enumerate(share if not crowded else ()):
                ax.annotate(f"{100 * value:.0f}", (left + j, value), (0, 3), textcoords="offset points", ha="center")
            ticks.append(left + (k - 1) / 2)
            left += k + 1
        ax.set(ylim=(0, 1.05), xlim=(-1, max(left - 1, 12)), xlabel="drafts per round, K")
        ax.set_title("% accepted; in each group the first draft, the second, ...")
        ax.set_xticks(ticks, [str(k) for k in shares])
        ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="y")

    return 2.5, draw


def _memory(report: Report) -> Plot | None:
    kinds = {kind: num for kind, num in (report.get("memory_bytes") or {}).items() if num}
    if not kinds:
        return None

    def draw(ax: Axes) -> None:
        layers = [([num], [COLORS.get(kind, GREEN)]) for kind, num in kinds.items()]
        _bars(ax, [""], layers, [size(sum(kinds.values()))])
        _legend(ax, [f"{kind} {size(num)}" for kind, num in kinds.items()])

    return 0.8, draw


def _bars(
    ax: Axes, names: Sequence[str], layers: Sequence[tuple[Sequence[float], Sequence[str]]], labels: Sequence[str]
) -> None:
    """Horizontal bars from the top down, a layer stacked on the next, each with a label at its end."""
    at, ends = range(len(names)), np.zeros(len(names))
    for sizes, colors in layers:
        ax.barh(at, sizes, left=ends, color=colors, height=0.7)
        ends = ends + sizes
    for y, end, label in zip(at, ends, labels, strict=True):
        ax.annotate(label, (end, y), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(at, names)
    ax.set(xlim=(0, ends.max()), ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)


def _legend(ax: Axes, names: Sequence[str]) -> None:
    """Names of the layers of `_bars`, in one line above it."""
    handles = [container[0] for container in ax.containers]
    legend = ax.legend(handles, names, ncols=len(names), loc="lower left", handlelength=0.8, handletextpad=0.4)
    legend.set_bbox_to_anchor((0, 1), ax.transAxes)
