"""edgeskip tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.commands.options import (
    Choice,
    Place,
    backend_option,
    bundle_argument,
    command_line,
    device_option,
    html_option,
    json_option,
    max_new_tokens_option,
    num_prompts_option,
    prompt_tokens_option,
    require,
    threads_option,
    threshold_option,
)
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_json, write_report
from edgeskip.runtime.errors import RecipeError, RequestError


@click.command()
@bundle_argument
@click.option(
    "--num-speculations",
    "-k",
    "grid",
    multiple=True,
    type=Choice(),
    help="Speculation lengths to choose from; can be given more than once. auto is weighed in any case.  [default: 1 "
    "to 8]",
)
@threshold_option
@max_new_tokens_option
@click.option(
    "--prompts",
    type=Place(path_type=Path),
    help="A text file with one prompt, or a folder of such files: texts like those you will run.  [default: built in]",
)
@num_prompts_option
@prompt_tokens_option
@click.option("--recipe", type=Place(path_type=Path), help="Write the choice to this file, as an export recipe.")
@json_option
@html_option
@backend_option
@device_option
@threads_option
def tune(
    bundle: Path,
    grid: tuple[Any, ...],
    confidence_threshold: float | None,
    max_new_tokens: int,
    prompts: Path | None,
    num_prompts: int | None,
    prompt_tokens: int | None,
    recipe: Path | None,
    json_path: Path | None,
    html_path: Path | None,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Find the best exit layers and speculation length for your text and this device, from one BUNDLE."""
    require("tune")
    if html_path is not None:
        require("tune --html")
    check_writable(recipe, json_path, html_path)
    if recipe is not None and recipe.exists():
        raise RecipeError(recipe, "is there already", fix="give another file, or remove it")
    from edgeskip.recipes.tune.report import print_tuning, tuned_recipe, tuning_page
    from edgeskip.recipes.tune.tune import TuneSettings
    from edgeskip.recipes.tune.tune import tune as run
    from edgeskip.runtime.bench.prompts import load_prompts
    from edgeskip.runtime.load import load
    from edgeskip.runtime.terminal import console, progress_bar

    lengths = tuple(k for k in grid if k != "auto") or tuple(range(1, 9))
    settings = TuneSettings(lengths, max_new_tokens, confidence_threshold, prompt_tokens)
    texts = load_prompts(prompts)[:num_prompts]
    choice: Any = {"backend": backend, "device": device, "threads": threads}
    with progress_bar() as progress:
        report = run(lambda: load(bundle, **choice, progress=progress), texts, settings, command_line(), progress)
    print_tuning(report, console(stderr=on_stdout(recipe, json_path, html_path)))
    write_json(json_path, report)
    if html_path is not None:
        write_report(html_path, tuning_page(report))
    if recipe is not None and not report.valid:
        raise RequestError(recipe, "not written: the measurement is not valid", fix="run it again on an idle machine")
    if recipe is not None:
        write_report(recipe, tuned_recipe(report, str(recipe)))
