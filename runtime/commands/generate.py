"""edgeskip generate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.commands.options import (
    Place,
    backend_option,
    bundle_argument,
    device_option,
    draft_option,
    exit_option,
    length_option,
    report_option,
    require,
    sampling_options,
    threads_option,
    threshold_option,
)
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_report
from edgeskip.runtime.decoding.rounds import MODES
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.grammar import Grammar
from edgeskip.runtime.reading import decode_text, read_json, read_stream
from edgeskip.runtime.sampling import GREEDY


@click.command()
@bundle_argument
@click.option("--prompt", "-p", help="The text to continue.")
@click.option("--prompt-file", "-f", type=click.File("rb"), help="A file with the text to continue; - is stdin.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message through the model's chat template.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default=MODES[0],
    show_default=True,
    help="autoregressive decodes plainly, to the same text; early-exit leaves out the later layers, to another text, "
    "but for tokens that the exit gives less than --confidence-threshold.",
)
@length_option
@draft_option
@exit_option
@threshold_option
@click.option("--max-new-tokens", "-n", type=int, default=256, show_default=True, help="The most tokens to generate.")
@click.option("--stop", multiple=True, help="End at this text; can be given more than once.")
@sampling_options
@click.option("--json-schema", type=Place(path_type=Path), help="Make it JSON that fits the schema in this file.")
@click.option("--regex", help="Make it a text that this regular expression matches as a whole.")
@click.option("--logprobs", type=int, help="Add log-probabilities to --json: each token's, and this many others'.")
@report_option("json", "Write text, tokens and statistics to FILE as a JSON object; without FILE, to stdout.")
@backend_option
@device_option
@threads_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Any,
    chat: bool,
    mode: Any,
    num_speculations: Any,
    draft: Any,
    exit_layer: Any,
    confidence_threshold: float | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    json_schema: Path | None,
    regex: str | None,
    logprobs: int | None,
    json_path: Path | None,
    backend: Any,
    device: Any,
    threads: int,
    **sampling: Any,
) -> None:
    """Continue a prompt. On a terminal, text that the early layers drafted is green."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with --prompt TEXT, --prompt-file FILE or --prompt-file -")
    if logprobs is not None and json_path is None:
        raise click.UsageError("--logprobs needs --json, where they are written")
    check_writable(json_path)
    GREEDY.changed(**sampling)  # what cannot be is said before a model is loaded
    grammar = _grammar(json_schema, regex)
    text = prompt if prompt is not None else _read_text(prompt_file)
    from edgeskip.runtime.load import load
    from edgeskip.runtime.terminal import console, print_model, print_statistics, progress_bar, stream

    with progress_bar() as progress:
        model = load(bundle, backend=backend, device=device, threads=threads, exit_layer=exit_layer, progress=progress)
    with model:
        settings: Any = {
            "mode": mode,
            "num_speculations": num_speculations,
            "draft": draft,
            "confidence_threshold": confidence_threshold,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "logprobs": logprobs,
            "grammar": grammar,
            **sampling,
        }
        asked: Any = [{"role": "user", "content": text}] if chat else text
        if on_stdout(json_path):
            generation = model.complete(asked, **settings)
        else:
            generation = stream(model.generate(asked, **settings), console())
            print_model(model, console(stderr=True))
            print_statistics(generation, console(stderr=True))
        if json_path is not None:
            write_report(json_path, json.dumps(dataclasses.asdict(generation)) + "\n")


def _grammar(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """What the text must be, if anything was asked for."""
    if json_schema is not None and regex is not None:
        raise click.UsageError("give --json-schema or --regex, not both")
    if json_schema is None and regex is None:
        return None
    require("generate --json-schema")
    if json_schema is not None:
        return Grammar.from_json_schema(read_json(json_schema, RequestError, streams=True))
    return Grammar.from_regex(regex or "")


def _read_text(file: Any) -> str:
    name = getattr(file, "name", None)
    place = name if isinstance(name, str) else "stdin"
    return decode_text(read_stream(file, place, RequestError), place, RequestError, fix="give a text file")
