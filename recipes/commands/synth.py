"""edgeskip synth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from edgeskip.recipes.commands.options import ALL, rows_of
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.commands.options import Choice, Place, require, say
from edgeskip.runtime.errors import CheckpointError


@click.command()
@click.argument("shape", type=Place())
@click.argument("checkpoint", type=Place(path_type=Path))
@click.option("--exit-layer", "-e", type=int, required=True, help="E: the later layers, layers[E:], are damped.")
@click.option(
    "--match-rate",
    type=float,
    required=True,
    multiple=True,
    metavar="RATE",
    help="Share of greedy tokens that the exit predicts, 0 to 1. Repeat for several that take turns in a text.",
)
@click.option(
    "--segment-tokens",
    type=int,
    default=128,
    show_default=True,
    metavar="TOKENS",
    help="For how many tokens one of several rates holds, on average.",
)
@click.option(
    "--draft-vocabulary",
    type=Choice(ALL),
    metavar="ROWS|all",
    help="Texts keep to this many rows of the vocabulary.  [default: all]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of weights and prompts.")
@click.option("--dtype", type=click.Choice(get_args(DType)), default="fp16", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def synth(
    shape: str,
    checkpoint: Path,
    exit_layer: int,
    match_rate: tuple[float, ...],
    segment_tokens: int,
    draft_vocabulary: Any,
    seed: int,
    dtype: Any,
    device: Any,
) -> None:
    """Make a CHECKPOINT with random weights to measure speed with; SHAPE is a published one or a config.json."""
    given = click.get_current_context().get_parameter_source("segment_tokens")
    if given is ParameterSource.COMMANDLINE and len(match_rate) < 2:
        raise click.UsageError("--segment-tokens is for several match rates: repeat --match-rate, or leave it out")
    draft_vocabulary = rows_of(draft_vocabulary)
    require("synth")
    from edgeskip.recipes.synthetic import DISTINCT_TOKENS, TOLERANCE, SyntheticSettings, synthesize
    from edgeskip.runtime.files import check_destination
    from edgeskip.runtime.terminal import progress_bar

    check_destination(checkpoint, CheckpointError)
    with progress_bar() as progress:
        settings = SyntheticSettings(
            exit_layer,
            match_rate,
            seed,
            dtype,
            device,
            draft_vocabulary=draft_vocabulary,
            segment_tokens=segment_tokens,
        )
        made = synthesize(shape, checkpoint, settings, progress)
    spread = made.match_rate_by_prompt
    say(
        f"{checkpoint}: random weights; exit layer {exit_layer} matches {made.match_rate:.1%} of the tokens (by prompt "
        f"{spread.min:.1%} to {spread.max:.1%}, median {spread.median:.1%}); "
        f"{made.distinct_tokens:.1%} of the tokens of a text are distinct."
    )
    for wanted, segments in zip(match_rate, made.segments, strict=True):
        say(
            f"Match rate {wanted:g}: {segments.match_rate:.1%} at a damping of {segments.damping:.4g}; drafts have a "
            f"probability of {segments.confidence:.1%} on average."
        )
        if abs(segments.match_rate - wanted) > TOLERANCE:
            say(f"That is the nearest to {wanted:g} that was reached.")
    if made.distinct_tokens < DISTINCT_TOKENS:
        say("Its texts repeat tokens: the shape is too small for others.")
    drafting = f" --draft-vocabulary {draft_vocabulary}" if draft_vocabulary else ""
    say(f"Next: edgeskip export {checkpoint} BUNDLE --exit-layer {exit_layer} --dtype {dtype}{drafting}")
