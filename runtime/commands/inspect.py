"""edgeskip inspect: what a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeskip.runtime.commands.options import bundle_argument, report_option
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_report

if TYPE_CHECKING:
    from rich.console import Console

    from edgeskip.runtime.bundle.manifest import Bundle


@click.command()
@bundle_argument
@report_option("json", "Write the manifest to FILE; without FILE, to stdout.")
def inspect(bundle: Path, json_path: Path | None) -> None:
    """Show what a BUNDLE holds: model, split, graphs, files, engines."""
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.terminal import console, print_bundle

    check_writable(json_path)
    opened = read_bundle(bundle)
    if not on_stdout(json_path):
        print_bundle(opened, console())
        _print_engines(opened, console())
    if json_path is not None:
        write_report(json_path, opened.manifest.to_json())


def _print_engines(bundle: Bundle, console: Console) -> None:
    """Each set of engines, whether it runs on this machine, and what is wrong with the rest."""
    from edgeskip.runtime.backends.choice import why_not_here
    from edgeskip.runtime.bundle.engines import find_engines
    from edgeskip.runtime.terminal import shown

    found, problems = find_engines(bundle)
    if not found and not problems:
        console.print("engines: none")
    for engines in found:
        build, why = engines.build, why_not_here(engines)
        size = sum(record.bytes for record in build.engines.values()) / 1e6
        console.print(
            f"engines: {build.backend} {shown(build.backend_version)}, SM {build.compute_capability}, {build.dtype}, "
            f"{size:.2f} MB; " + (f"not for this machine: {shown(why)}" if why else "they fit this machine")
        )
    for problem in problems:
        console.print(f"engines: [bold]of no use[/bold]: {shown(problem)}")
