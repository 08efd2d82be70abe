"""edgeskip pack."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.commands.options import Place, bundle_argument, say
from edgeskip.runtime.errors import BundleError


@click.command()
@bundle_argument
@click.argument("folder", type=Place(path_type=Path))
@click.option(
    "--sm", "wanted", type=int, multiple=True, help="Only engines for this SM, 87 for 8.7; can be given more than once."
)
@click.option("--dialect", type=click.Choice(tuple(ENGINE_DIALECTS)), help="Only engines of this dialect.")
def pack(bundle: Path, folder: Path, wanted: tuple[int, ...], dialect: str | None) -> None:
    """Write to FOLDER a copy of a BUNDLE with the engines that you have built for it."""
    from edgeskip.exporter.pack import pack as write
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.bundle.store import read_engines
    from edgeskip.runtime.terminal import progress_bar

    opened = read_bundle(bundle)
    found = read_engines(opened)
    chosen = [engines for engines in found if dialect in (None, engines.build.dialect)]
    if found and not chosen:
        raise BundleError(bundle, f"no engines of the {dialect} dialect", fix="build them, or leave out --dialect")
    targets = sorted({engines.build.compute_capability for engines in chosen})
    missing = [sm for sm in wanted if sm not in targets]
    if found and missing:
        raise BundleError(bundle, f"no engines for SM {missing[0]}", wanted=f"SM {', '.join(map(str, targets))}")
    chosen = [engines for engines in chosen if not wanted or engines.build.compute_capability in wanted]
    with progress_bar() as progress:
        write(opened, chosen, folder, progress)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder}: {size / 1e6:.1f} MB, engines {', '.join(one.folder.name for one in chosen)}.")
