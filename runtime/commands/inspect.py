"""edgeskip inspect: what a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeskip.runtime.commands.options import bundle_argument, report_option
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_report

if TYPE_CHECKING:
    from rich.console import Console

    from edgeskip.runtime.bundle.engines import Build
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
    """Each set of engines for the bundle in the user's cache, whether it runs on this machine, and what is wrong with
    the rest; then those that came with the bundle.
    """
    from edgeskip.runtime.backends.choice import why_not_here
    from edgeskip.runtime.backends.engines.targets import readers_text
    from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
    from edgeskip.runtime.bundle.store import add_command, engines_that_came, find_engines
    from edgeskip.runtime.terminal import shown

    (found, problems), (came, wrong) = find_engines(bundle), engines_that_came(bundle)
    has = bundle.manifest.engine_dialects
    readers = readers_text() if has == ENGINE_DIALECTS else f"{', '.join(has)} only, as its weights are quantized"
    if bundle.manifest.has_quantized_layers:
        console.print("no engines are needed, as its layers are quantized")
    else:
        console.print(f"engines can be built from {readers}")
    if not (found or problems or came or wrong):
        console.print("engines: none")
    for engines in found:
        why = why_not_here(engines)
        fits = f"not for this machine: {shown(why)}" if why else "they fit this machine"
        console.print(f"engines: {shown(_about(engines.build))}; {fits}")
    for engines in came:
        add = f"came with the bundle, and are not loaded unless added: {add_command(bundle)}"
        console.print(f"engines: {shown(_about(engines.build))}; {shown(add)}")
    for problem in (*problems, *wrong):
        console.print(f"engines: [bold]of no use[/bold]: {shown(problem)}")


def _about(build: Build) -> str:
    return (
        f"{build.backend} {build.backend_version}, SM {build.compute_capability}, {build.dialect}, {build.dtype}, "
        f"{build.bytes / 1e6:.2f} MB"
    )
