"""edgeskip demo."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.commands.options import (
    Place,
    require,
    threads_option,
)


@click.command()
@click.option("--keep", type=Place(path_type=Path), help="Export to this folder and keep it.")
@threads_option
def demo(keep: Path | None, threads: int) -> None:
    """See it work: export the model that ships with edgeskip, decode it both ways, compare."""
    require("demo")
    from edgeskip.recipes.demo import run_demo
    from edgeskip.runtime.terminal import console, progress_bar

    with progress_bar() as progress:
        same = run_demo(console(), keep, threads, progress)
    if not same:
        raise SystemExit(1)
