"""edgeskip check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.bundle.dialects import WHOLE
from edgeskip.runtime.commands.options import (
    Place,
    backend_option,
    bundle_argument,
    command_line,
    device_option,
    json_option,
    prompts_option,
    require,
    threads_option,
)
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_json


@click.command()
@bundle_argument
@click.option(
    "--reference",
    type=Place(),
    help="The CHECKPOINT to compare with, a folder or hub id; of a quantized bundle, what was lost to quantization is "
    "told.  [default: the bundle's weights]",
)
@prompts_option
@click.option(
    "--num-prompts", type=click.IntRange(1), default=8, show_default=True, help="Use only this many, the first ones."
)
@click.option(
    "--layers", is_flag=True, help="Narrow a failure down to the first layer that departs from the reference."
)
@json_option
@click.option(
    "--dialect",
    type=click.Choice(WHOLE),
    help="The dialect of ONNX Runtime's graphs.  [default: the device's]",
)
@backend_option
@device_option
@threads_option
def check(
    bundle: Path,
    reference: str | None,
    prompts: Path | None,
    num_prompts: int,
    layers: bool,
    json_path: Path | None,
    dialect: str | None,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Compare what a BUNDLE's graphs compute here with transformers in fp32, call by call and text by text."""
    require("check")
    from edgeskip.exporter.check.golden import Golden
    from edgeskip.exporter.check.report import print_check
    from edgeskip.exporter.check.run import run_check
    from edgeskip.runtime.bench.prompts import load_prompts
    from edgeskip.runtime.bundle.formats import is_quantized
    from edgeskip.runtime.load import load
    from edgeskip.runtime.terminal import console, progress_bar

    check_writable(json_path)
    texts = load_prompts(prompts)[:num_prompts]
    settings: Any = {"backend": backend, "device": device, "threads": threads, "dialect": dialect}
    with progress_bar() as progress, load(bundle, **settings, progress=progress) as model:
        quantized = is_quantized(model.bundle.manifest.formats.values())
        where = model.session.device, threads
        golden = Golden(model.bundle, None if quantized else reference, *where)
        original = Golden(model.bundle, reference, *where) if quantized and reference else None
        choice: Any = {"layers": layers, "command": command_line(), "progress": progress}
        report = run_check(model, golden, texts, original=original, **choice)
    print_check(report, console(stderr=on_stdout(json_path)))
    write_json(json_path, report)
    if not report.passed:
        raise SystemExit(1)
