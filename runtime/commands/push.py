"""edgeskip push."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.commands.options import Place, bundle_argument, require, say
from edgeskip.runtime.errors import BundleError, RequestError
from edgeskip.runtime.hub.access import is_hub_id
from edgeskip.runtime.reading import read_json


@click.command()
@bundle_argument
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is a new one.")
@click.option(
    "--base-model", help="The hub id that the bundle was made from.  [default: what was exported, if it is one]"
)
@click.option("--license", "license_id", help="The licence as the hub spells it, such as apache-2.0.")
@click.option(
    "--report",
    "reports",
    type=Place(path_type=Path),
    multiple=True,
    help="A report of `edgeskip bench --json` to show; can be given more than once.",
)
@click.option(
    "--check",
    "checks",
    type=Place(path_type=Path),
    multiple=True,
    help="A report of `edgeskip check --json` to show; can be given more than once.",
)
def push(
    bundle: Path,
    name: str,
    private: bool,
    base_model: str | None,
    license_id: str | None,
    reports: tuple[Path, ...],
    checks: tuple[Path, ...],
) -> None:
    """Upload a BUNDLE to the hub as OWNER/NAME, with a page that says what it is."""
    if not is_hub_id(name):
        raise RequestError(name, "not a valid hub id", wanted="owner/name")
    require("push")
    from edgeskip.runtime.bundle.manifest import read_bundle, verify_hashes
    from edgeskip.runtime.hub.access import upload_bundle
    from edgeskip.runtime.hub.card import bench_figures, check_figures, model_card
    from edgeskip.runtime.terminal import progress_bar

    opened = read_bundle(bundle)
    figures = [line for path in checks for line in check_figures(read_json(path, RequestError), path)]
    figures += [line for path in reports for line in bench_figures(read_json(path, RequestError), path)]
    source = opened.manifest.source
    guessed = source if source.count("/") == 1 and not source.startswith((".", "/", "~")) else None
    card = model_card(opened.manifest, name, base_model=base_model or guessed, license_id=license_id, figures=figures)
    with progress_bar() as progress:
        verify_hashes(opened, progress)
    if "README.md" in opened.manifest.files:
        raise BundleError(
            bundle, "has a README.md of its own, where its page on the hub would be", fix="export it again"
        )
    say(f"{name}: {upload_bundle(opened, name, card, private=private)}")
