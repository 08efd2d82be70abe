"""edgeskip bench: speed, measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeskip.runtime.commands.options import (
    Choice,
    backend_option,
    bundle_argument,
    command_line,
    device_option,
    draft_option,
    drawing_options,
    exit_layers_option,
    first,
    html_option,
    json_option,
    max_new_tokens_option,
    num_prompts_option,
    prompt_tokens_option,
    prompts_option,
    require,
    threads_option,
    threshold_option,
)
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_json, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeskip.runtime.bench.measure import Contestant


@click.command()
@bundle_argument
@click.option(
    "--num-speculations",
    "-k",
    "grid",
    multiple=True,
    type=Choice(),
    help="Speculation lengths to measure, auto among them; can be given more than once.  [default: 1 to 8]",
)
@draft_option
@exit_layers_option(
    "Exits to measure, of those that the bundle has, as 3,5,auto; auto chooses exit and K for each round.  [default: "
    "its first]",
    auto=True,
)
@threshold_option
@max_new_tokens_option
@prompts_option
@num_prompts_option
@prompt_tokens_option
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Repeats of each run; medians are shown."
)
@click.option("--compare", type=click.Choice(["transformers"]), help="Measure another runtime in the same run.")
@drawing_options
@json_option
@html_option
@backend_option
@device_option
@threads_option
def bench(
    bundle: Path,
    grid: tuple[Any, ...],
    draft: Any,
    exit_layers: tuple[Any, ...] | None,
    confidence_threshold: float | None,
    max_new_tokens: int,
    prompts: Path | None,
    num_prompts: int | None,
    prompt_tokens: int | None,
    repeats: int,
    compare: str | None,
    json_path: Path | None,
    html_path: Path | None,
    backend: Any,
    device: Any,
    threads: int,
    **drawing: Any,
) -> None:
    """Measure plain and self-speculative decoding of a BUNDLE, interleaved, on held-out prompts."""
    from edgeskip.runtime.bench.measure import BenchSettings, run_bench
    from edgeskip.runtime.bench.page import bench_page
    from edgeskip.runtime.bench.prompts import load_prompts
    from edgeskip.runtime.bench.report import print_bench
    from edgeskip.runtime.load import load
    from edgeskip.runtime.sampling import GREEDY
    from edgeskip.runtime.terminal import console, progress_bar

    check_writable(json_path, html_path)
    if html_path is not None:
        require("bench --html")
    if compare:
        require("bench --compare")
    lengths = tuple(dict.fromkeys(k for k in grid if k != "auto"))
    exits = tuple(dict.fromkeys(one for one in exit_layers or () if one != "auto"))
    if lengths and exit_layers and not exits:
        raise click.UsageError("-k with a number is for an exit: give one, as --exit-layer 3,auto, or leave it out")
    settings = BenchSettings(
        lengths or (() if grid else tuple(range(1, 9))),
        max_new_tokens,
        repeats,
        confidence_threshold,
        prompt_tokens,
        GREEDY.changed(**drawing),
        first(draft, BenchSettings.draft),
        "auto" in grid,
        exits,
        "auto" in (exit_layers or ()),
    )
    texts = load_prompts(prompts)[:num_prompts]
    with (
        progress_bar() as progress,
        load(bundle, backend=backend, device=device, threads=threads, progress=progress) as model,
    ):

        def others() -> Sequence[Contestant]:
            if not compare:
                return ()
            from edgeskip.exporter.reference import transformers_contestants

            return transformers_contestants(model.bundle, model.session.device, threads)

        report = run_bench(model, texts, settings, others, command_line(), progress)
    print_bench(report, console(stderr=on_stdout(json_path, html_path)))
    write_json(json_path, report)
    if html_path is not None:
        write_report(html_path, bench_page(dataclasses.asdict(report)))
    if report.faults:
        raise SystemExit(1)
