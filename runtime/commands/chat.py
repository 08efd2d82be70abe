"""edgeskip chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.commands.options import (
    backend_option,
    bundle_argument,
    device_option,
    draft_option,
    exit_option,
    length_option,
    require,
    sampling_options,
    threads_option,
    threshold_option,
)
from edgeskip.runtime.sampling import GREEDY


@click.command()
@bundle_argument
@click.option("--system", help="The system prompt.")
@length_option
@draft_option
@exit_option
@threshold_option
@click.option(
    "--max-new-tokens", "-n", type=click.IntRange(1), help="The most tokens of an answer.  [default: what has room]"
)
@sampling_options
@backend_option
@device_option
@threads_option
def chat(
    bundle: Path,
    system: str | None,
    num_speculations: Any,
    draft: Any,
    exit_layer: Any,
    confidence_threshold: float | None,
    max_new_tokens: int | None,
    backend: Any,
    device: Any,
    threads: int,
    **sampling: Any,
) -> None:
    """Talk with a BUNDLE. Text that the early layers drafted is green; /help shows what else there is."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        require("chat")
    GREEDY.changed(**sampling)  # what cannot be is said before a model is loaded
    from edgeskip.runtime.chat.conversation import Chat
    from edgeskip.runtime.chat.repl import converse, read_lines, read_terminal
    from edgeskip.runtime.load import load
    from edgeskip.runtime.terminal import console, print_model, progress_bar

    notes = console(stderr=True)
    with progress_bar() as progress:
        model = load(bundle, backend=backend, device=device, threads=threads, exit_layer=exit_layer, progress=progress)
    with model:
        settings: Any = {
            "num_speculations": num_speculations,
            "draft": draft,
            "confidence_threshold": confidence_threshold,
            "max_new_tokens": max_new_tokens,
            **sampling,
        }
        conversation = Chat(model, system=system, **settings)
        if is_terminal:
            print_model(model, notes)
        failed = converse(conversation, read_terminal() if is_terminal else read_lines, console(), notes)
    if failed and not is_terminal:
        raise SystemExit(failed)
