"""edgeskip build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import ENGINE_BACKENDS
from edgeskip.runtime.commands.options import bundle_argument, require, say


@click.command()
@bundle_argument
@click.option(
    "--backend",
    type=click.Choice(ENGINE_BACKENDS),
    required=True,
    help="tensorrt builds on the device that runs the engines, such as a Jetson; tensorrt-rtx also for other machines.",
)
@click.option(
    "--sm",
    "compute_capabilities",
    multiple=True,
    type=int,
    help="Build for GPUs of this compute capability, 86 for 8.6; can be given more than once.  [default: the GPU here]",
)
@click.option(
    "--dialect",
    type=click.Choice(tuple(ENGINE_DIALECTS)),
    help="standard: TensorRT's own attention, from 10.15 on; primitive: attention in parts, from 10.3 (JetPack 6) on.  "
    "[default: the best that the installed version reads]",
)
@click.option(
    "--workspace-mb",
    type=click.IntRange(1, 1 << 20),
    help="The most device memory for a kernel's own use.  [default: all]",
)
def build(
    bundle: Path, backend: Any, compute_capabilities: tuple[int, ...], dialect: str | None, workspace_mb: int | None
) -> None:
    """Build TensorRT engines from a BUNDLE, into the bundle."""
    require("build")
    from edgeskip.exporter.engines.build import BuildSettings, build_engines
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.terminal import progress_bar

    settings = BuildSettings(backend, compute_capabilities, workspace_mb, dialect)
    with progress_bar() as progress:
        made = build_engines(read_bundle(bundle), settings, progress)
    for engines in made:
        records = engines.build.engines
        parts = ", ".join(f"{graph} {record.bytes / 1e6:.1f} MB" for graph, record in records.items())
        peak = max(record.peak_memory_bytes or 0 for record in records.values())
        seconds = sum(record.seconds for record in records.values())
        memory = f", with at most {peak / 1e6:.0f} MB of memory" if peak else ""
        say(f"{engines.folder}: {parts}, in {seconds:.0f} s{memory}.")
