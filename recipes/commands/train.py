"""edgeskip train."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.commands.options import Place, require, say


@click.command()
@click.argument("recipe", type=Place(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=Place(path_type=Path),
    help="The model's folder.  [default: runs/NAME, after the recipe]",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the output folder.")
@click.option("--stop-after-minutes", type=float, help="Save and stop after this time; continue with --resume.")
@click.option("--data", type=Place(path_type=Path), help="The corpus folder, in place of the recipe's.")
def train(recipe: Path, output: Path | None, resume: bool, stop_after_minutes: float | None, data: Path | None) -> None:
    """Train a LayerSkip model with a RECIPE, from scratch or continuing a checkpoint."""
    require("train")
    from edgeskip.recipes.train.training import train as run

    result = run(recipe, output, resume, stop_after_minutes, data)
    done = f"{result.steps} steps, {result.tokens:,} tokens, {result.minutes:.1f} minutes"
    say(f"{result.output}: {done}" + ("" if result.finished else "; continue with --resume"))
