"""edgeskip inspect: what a bundle holds."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.commands.options import (
    bundle_argument,
)


@click.command()
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds: model, split, graphs, files."""
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.terminal import console, print_bundle

    opened = read_bundle(bundle)
    if as_json:
        click.echo(opened.manifest.to_json(), nl=False)
    else:
        print_bundle(opened, console())
