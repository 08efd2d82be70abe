"""edgeskip build."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import ENGINE_BACKENDS
from edgeskip.runtime.commands.cache import say_removed
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
    help="standard: TensorRT's own attention, from 10.15 on; layers: an attention of ours between engines of parts of "
    "layers, from 10.3 (JetPack 6) on; primitive: attention in parts, likewise.  "
    "[default: the best that the installed version reads]",
)
@click.option(
    "--workspace-mb",
    type=click.IntRange(1, 1 << 20),
    help="The most device memory for a kernel's own use.  [default: all]",
)
@click.option("--force", is_flag=True, help="Build again what the cache has already.")
def build(
    bundle: Path,
    backend: Any,
    compute_capabilities: tuple[int, ...],
    dialect: str | None,
    workspace_mb: int | None,
    force: bool,
) -> None:
    """Build TensorRT engines for a BUNDLE and all of its structure, into the user's cache."""
    require("build")
    from edgeskip.exporter.engines.build import BuildSettings, build_engines
    from edgeskip.runtime.bundle.engines import BUILD
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.terminal import progress_bar

    settings = BuildSettings(backend, compute_capabilities, workspace_mb, dialect, force)
    with progress_bar() as progress:
        outcome = build_engines(read_bundle(bundle), settings, progress)
    for engines in outcome.engines:
        records = engines.build.engines
        if engines.folder in outcome.had:
            built = datetime.fromtimestamp((engines.folder / BUILD).stat().st_mtime)
            when = f"built {built:%Y-%m-%d %H:%M} for {engines.build.source}"
            say(f"{engines.folder}: the cache has them already: {when}; --force builds them again.")
            continue
        if not records:
            say(f"{engines.folder}: no engine is needed: kernels that are compiled while loading do everything.")
            continue
        parts = ", ".join(f"{graph} {record.bytes / 1e6:.1f} MB" for graph, record in records.items())
        peak = max(record.peak_memory_bytes or 0 for record in records.values())
        seconds = sum(record.seconds for record in records.values())
        memory = f", with at most {peak / 1e6:.0f} MB of memory" if peak else ""
        say(f"{engines.folder}: {parts}, in {seconds:.0f} s{memory}.")
    say_removed(outcome.removed)
