"""What tuning found, for people: tables, the choice as an export recipe, and a page with plots."""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from edgeskip.recipes.tune.tune import WORTH, Drafting, Pair, TuneReport
from edgeskip.runtime.bench.page import no_plots, render
from edgeskip.runtime.bench.plots import BLUE, GREY, ORANGE, Plot, figure, svg
from edgeskip.runtime.bench.report import print_doubts
from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.tensors import TABLES, kind_of
from edgeskip.runtime.terminal import bytes_text, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOP = 5
_CROWDED = 40
"""From this many exit layers on, plots leave out figures."""


def print_tuning(report: TuneReport, console: Console) -> None:
    """The best pair of every exit layer, and the best of all."""
    best, measured = report.best, report.measured
    synthetic = ", [bold]synthetic weights[/bold]" if report.synthetic else ""
    console.print(
        f"{shown(report.source)}{synthetic}, {report.num_layers} layers; {shown(report.backend)}; "
        f"{shown(report.hardware.device)}"
    )
    if len(report.formats) > 1:
        console.print(f"Weights: {bytes_text(report.formats)}")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("exit layer", "match", "best K", "ms", "speedup", "accept", "per round"):
        table.add_column(name, justify="right", no_wrap=True)
    for exit_layer, match_rate in report.match_rates.items():
        pair = min((p for p in report.pairs if p.exit_layer == exit_layer), key=lambda p: p.ms_per_token)
        table.add_row(
            str(exit_layer),
            f"{match_rate:.0%}",
            str(pair.num_speculations),
            f"{pair.ms_per_token:.3f}",
            f"{pair.speedup:.2f}x",
            f"{pair.acceptance_rate:.0%}",
            f"{pair.tokens_per_round:.2f}",
            style="bold" if pair == best else "",
        )
    console.print(table)
    threshold = report.settings.confidence_threshold
    console.print(
        f"{report.prompts} prompts, {report.new_tokens} new tokens; match: the share that an exit drafts right; ms "
        "per token; " + (f"drafting ends below a confidence of {threshold:g}\n" if threshold else "always K drafts\n")
    )
    if report.draft_vocabulary is not None:
        console.print(
            f"Drafts come from {report.draft_vocabulary} rows of the vocabulary, which have {report.covered:.1%} of "
            "these tokens." + _without(report)
        )
    top = sorted(report.pairs, key=lambda p: p.ms_per_token)[:_TOP]
    console.print("Fastest: " + ", ".join(f"E={p.exit_layer} K={p.num_speculations} {p.ms_per_token:.3f}" for p in top))
    console.print(
        f"Measured here: plain {measured.plain_ms_per_token:.3f} ms per token, the bundle's "
        f"{_pair_text(report.present)}: {report.scale:.2f} times what its calls add up to, a factor that is applied to "
        "all pairs."
    )
    if report.here:
        console.print(f"In this bundle, at best: {'; '.join(map(_pair_text, report.here))}.")
    if report.departures:
        console.print(f"{report.departures} of the tokens are ties, which the probe rounds the other way.")
    console.print("\nWhat should draft:")
    console.print(_drafting_table(report))
    console.print(
        "--exit-layer: what to export with; drafted by: the share of rounds with drafts of each exit, and of n-grams\n"
    )
    console.print(f"[bold]{verdict(report)}[/bold]")
    print_doubts(report.doubts, console)


def _drafting_table(report: TuneReport) -> Table:
    """What exits, n-grams and both give, each with its best pair."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("--exit-layer", "--draft", "-e", "-k", "ms", "speedup", "match", "per round", "drafted by"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.drafting:
        options = options_text(one)
        table.add_row(
            options["--exit-layer"],
            one.draft,
            options["-e"],
            options["-k"],
            f"{one.ms_per_token:.3f}",
            f"{one.speedup:.2f}x",
            f"{one.match_rate:.0%}",
            f"{one.tokens_per_round:.2f}",
            shares_text(one),
            style="bold" if one == report.fastest else "",
        )
    return table


def options_text(one: Drafting) -> dict[str, str]:
    """What these options are given: the first when exporting, the others when decoding; empty where it says nothing."""
    return {
        "--exit-layer": "" if one.draft == "ngram" else ",".join(map(str, one.exit_layers)),
        "-e": "" if one.draft == "ngram" else str(one.exit_layer or "auto"),
        "-k": str(one.num_speculations or "auto"),
    }


def shares_text(one: Drafting) -> str:
    """The shares of rounds with drafts of each exit and of the text."""
    shares = {f"E={e}": share for e, share in one.exit_shares.items()} | {"ngram": one.ngram_share}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)


def decoding_text(one: Drafting) -> str:
    """The options to decode so with a bundle exported for it."""
    exit_layer = " -e auto" if one.chooses_exit else ""
    return f"--draft {one.draft}{exit_layer} -k {options_text(one)['-k']}"


def _without(report: TuneReport) -> str:
    """What a head over all rows would give, in a sentence."""
    other = report.best_of_all_rows
    if other is None:
        return ""
    text = f" From all rows: at best exit layer {other.exit_layer} with {_drafts(other)}, {other.ms_per_token:.3f} ms"
    return f"{text}, which is faster: export with --draft-vocabulary all." if _is_faster(other, report) else f"{text}."


def _is_faster(other: Pair | None, report: TuneReport) -> bool:
    return other is not None and other.ms_per_token < report.best.ms_per_token


def verdict(report: TuneReport) -> str:
    """The choice in some sentences: the best pair, which exits to export, and what should draft."""
    return " ".join(_verdicts(report))


def _verdicts(report: TuneReport) -> Iterator[str]:
    fastest, alone, together = report.fastest, report.alone, report.together
    yield _pair_verdict(report)
    if together is not None and WORTH * together.ms_per_token < alone.ms_per_token:
        gain = alone.ms_per_token / together.ms_per_token
        yield f"Worth exporting together: {_choice_text(together)}, {gain:.2f} times as fast as one exit alone."
    elif together is not None and fastest.speedup > 1:
        yield f"One exit is enough: at best, {_choice_text(together)}."
    if fastest.speedup <= 1:
        yield "Nor does anything else."
    elif fastest == report.drafting[0]:
        yield "Drafts of the text bring no more: --draft exit."
    else:
        exits = "" if fastest.draft == "ngram" else f" after an export with {_export_text(fastest)}"
        yield (
            f"Fastest is {decoding_text(fastest)}{exits}: {fastest.ms_per_token:.3f} ms, {fastest.speedup:.2f} times "
            "as fast as plain decoding."
        )


def _choice_text(together: Drafting) -> str:
    return f"{_export_text(together)} with -e auto takes {together.ms_per_token:.3f} ms"


def _export_text(one: Drafting) -> str:
    return f"--exit-layer {options_text(one)['--exit-layer']}"


def _pair_verdict(report: TuneReport) -> str:
    """The same of drafts of the exit alone."""
    best, present = report.best, report.present
    if best.speedup <= 1:
        return (
            f"No pair beats plain decoding here: at best, exit layer {best.exit_layer} with {_drafts(best)}, "
            f"{best.speedup:.2f} times as fast."
        )
    gain = present.ms_per_token / best.ms_per_token
    same = (best.exit_layer, best.num_speculations) == (present.exit_layer, present.num_speculations)
    return (
        f"Exit layer {best.exit_layer} with {_drafts(best)} per round: {best.ms_per_token:.3f} ms per token, "
        f"{best.speedup:.2f} times as fast as plain decoding, "
        + ("the bundle's own pair." if same else f"{gain:.2f} times as fast as the bundle's pair.")
    )


def tuned_recipe(report: TuneReport, file: str) -> str:
    """The choice as an export recipe in TOML, for `edgeskip export --recipe`."""
    other, text = report.best_of_all_rows, _toml_text
    best = other if other is not None and _is_faster(other, report) else _best(report)
    others = [e for e in report.fastest.exit_layers if e != best.exit_layer] if report.fastest.chooses_exit else []
    source = (
        f"edgeskip tune, {report.hardware.device}, {datetime.date.today().isoformat()}: {report.prompts} prompts, "
        f"{report.new_tokens} new tokens; {figure(best.ms_per_token)} ms per token, plain "
        f"{figure(report.measured.plain_ms_per_token)}"
    )
    rates = (f"{exit_layer} = {rate:.3f}" for exit_layer, rate in report.match_rates.items())
    lines = [
        _comment(f"Made by: {report.command}"),
        _comment(f"Used by: edgeskip export --recipe {shlex.quote(file)} [CHECKPOINT] BUNDLE"),
        *_drafting_comment(report),
        "",
        f"checkpoint = {text(report.source)}",
        f"exit_layer = {best.exit_layer}",
        *([f"other_exits = {others}"] if others and best is not other else []),
        f"num_speculations = {best.num_speculations}",
        f"dtype = {text(report.dtype)}",
        f"max_length = {report.max_length}",
        *_formats(report.tensor_formats, report.num_layers, came=report.quantizer is None),
        *([f"draft_vocabulary = {report.draft_vocabulary}"] if other is not None and best is not other else []),
        *(['quantizer = "gptq"'] if report.quantizer == "gptq" else []),
        f"source = {text(source)}",
        "",
        "[match_rates]  # exit layer -> share of the greedy tokens that it predicts",
        *rates,
    ]
    return "\n".join(lines) + "\n"


def _best(report: TuneReport) -> Pair:
    """The pair to export: the best, or, where something else is faster, the best at the exit that it has first."""
    exit_layer = report.best.exit_layer if report.fastest.draft == "ngram" else report.fastest.exit_layers[0]
    return min((p for p in report.pairs if p.exit_layer == exit_layer), key=lambda p: p.ms_per_token)


def _drafting_comment(report: TuneReport) -> Iterator[str]:
    """How to decode with it, where that is not what a bundle does by itself."""
    fastest = report.fastest
    if fastest != report.drafting[0] and fastest.speedup > 1:
        ms = figure(fastest.ms_per_token)
        yield _comment(f"Fastest on these texts with {decoding_text(fastest)}: {ms} ms per token")


def _formats(formats: Mapping[str, str], num_layers: int, *, came: bool) -> Iterator[str]:
    """The keys that give tensors these formats, by name, or a comment where no recipe can say them; of a checkpoint
    that came with quantized layers, those of its tables.
    """
    formats = {name: one for name, one in formats.items() if not came or name in TABLES}
    if not formats:
        return
    kinds = {kind_of(name) for name in formats if name not in TABLES}
    by_layer = [{formats.get(f"model.layers.{i}.{kind}.weight", "dtype") for kind in kinds} for i in range(num_layers)]
    tables = {formats[name] for name in TABLES if name in formats}
    sizes = {size for one in formats.values() if (size := FORMATS[one].block_size)}
    if len(sizes) > 1 or any(len(of) > 1 for of in (*by_layer, tables)):
        yield _comment("The formats of its single matrices are not for a recipe to say: give --weights.")
        return
    choices = [_choice(of) for of in by_layer]
    most = statistics.mode(choices)
    others = [f"{i}={choice}" for i, choice in enumerate(choices) if choice != most]
    yield from [] if came else [f"weights = {_toml_text(most)}"]
    yield f"head = {_toml_text(_choice(tables))}"
    yield from [f"layers = {json.dumps(others)}"] if others else []
    yield from [f"block_size = {size}" for size in sizes]


def _choice(formats: Iterable[str]) -> str:
    """What a recipe calls the only one of these formats, if there is one."""
    return next(iter(formats), "dtype").partition("-")[0]


def _comment(text: str) -> str:
    return "# " + "".join(character if character.isprintable() else " " for character in text)


def _toml_text(text: str) -> str:
    """A basic string: JSON's, which TOML reads as it is, except for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _drafts(pair: Pair) -> str:
    return f"{pair.num_speculations} draft{'s' * (pair.num_speculations > 1)}"


def _pair_text(pair: Pair) -> str:
    return f"exit layer {pair.exit_layer} with {_drafts(pair)} {pair.ms_per_token:.3f}"


def tuning_page(report: TuneReport) -> str:
    """The page: ms per token over exit layer and speculation length, and match rates.

    Raises:
        BackendError: matplotlib is missing.
    """
    try:
        drawn = {"surface": _surface(report), "drafting": _drafting(report), "match": _match(report)}
        plots = {name: svg(name, *plot) for name, plot in drawn.items()}
    except ImportError as error:
        raise no_plots("tune page", error) from None
    return render(
        "tune.html.jinja", report=report, verdict=verdict(report), plots=plots, options=options_text, shares=shares_text
    )


def _surface(report: TuneReport) -> Plot:
    ks = sorted({pair.num_speculations for pair in report.pairs})
    layers, best, present = list(report.match_rates), report.best, report.present
    plain, at_best = report.measured.plain_ms_per_token, report.best.ms_per_token

    def color(ms: float) -> tuple[str, float]:
        if ms >= plain:
            return GREY, 0.15
        return BLUE, 0.12 + 0.75 * (plain - ms) / (plain - at_best)

    def draw(ax: Axes) -> None:
        for pair in report.pairs:
            x, y = ks.index(pair.num_speculations), layers.index(pair.exit_layer)
            ax.barh(y, 0.94, 0.9, left=x - 0.47, color=color(pair.ms_per_token))
            if len(layers) < _CROWDED:
                weight = "bold" if pair == best else "normal"
                ax.annotate(figure(pair.ms_per_token), (x, y), ha="center", va="center", weight=weight)
        for pair, edge in ((present, GREY), (best, ORANGE)):
            if pair.num_speculations in ks:
                x, y = ks.index(pair.num_speculations), layers.index(pair.exit_layer)
                ax.barh(y, 0.94, 0.9, left=x - 0.47, fill=False, edgecolor=edge, linewidth=2)
        ax.set(xlim=(-0.5, len(ks) - 0.5), ylim=(len(layers) - 0.5, -0.5), xlabel="drafts per round, K")
        ax.set(ylabel="exit layer, E", title="ms per token")
        ax.set_xticks(range(len(ks)), [str(k) for k in ks])
        _layer_ticks(ax.set_yticks, layers)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)

    return 0.9 + 0.26 * min(len(layers), _CROWDED), draw


def _drafting(report: TuneReport) -> Plot:
    names = [_name(one) for one in report.drafting]
    times = [one.ms_per_token for one in report.drafting]
    plain, fastest = report.measured.plain_ms_per_token, report.drafting.index(report.fastest)

    def draw(ax: Axes) -> None:
        places = range(len(times) + 1)
        colors = [GREY, *(BLUE if place == fastest else GREY for place in range(len(times)))]
        ax.barh(places, [plain, *times], height=0.8, color=colors)
        for place, ms in zip(places, [plain, *times], strict=True):
            ax.annotate(figure(ms), (ms, place), (3, 0), textcoords="offset points", va="center")
        ax.set_yticks(places, ["plain", *names])
        ax.set(ylim=(len(times) + 0.6, -0.6), xlim=(0, 1.12 * max(plain, *times)), xlabel="ms per token")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")

    return 0.7 + 0.26 * (len(times) + 1), draw


def _name(one: Drafting) -> str:
    exits = "" if one.draft == "ngram" else f", E = {options_text(one)['--exit-layer']}"
    return f"{one.draft}{exits}, K = {options_text(one)['-k']}"


def _match(report: TuneReport) -> Plot:
    layers, rates = list(report.match_rates), list(report.match_rates.values())

    def draw(ax: Axes) -> None:
        colors = [BLUE if layer == report.best.exit_layer else GREY for layer in layers]
        ax.bar(range(len(layers)), rates, width=0.8, color=colors)
        for x, rate in enumerate(rates if len(layers) < _CROWDED else ()):
            ax.annotate(f"{100 * rate:.0f}", (x, rate), (0, 3), textcoords="offset points", ha="center")
        ax.set(ylim=(0, 1.08), xlim=(-0.6, max(len(layers), 12) - 0.4), xlabel="exit layer, E", title="% drafted right")
        _layer_ticks(ax.set_xticks, layers)
        ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="y")

    return 2.3, draw


def _layer_ticks(set_ticks: Any, layers: Sequence[int]) -> None:
    step = 1 + len(layers) // _CROWDED
    set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
