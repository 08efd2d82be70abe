"""edgeskip cache: what edgeskip keeps for later runs."""

from __future__ import annotations

from pathlib import Path

import click

from edgeskip.runtime.cache import KINDS
from edgeskip.runtime.commands.options import bundle_argument, say


@click.group()
def cache() -> None:
    """List or clear what edgeskip keeps for later runs, or add engines that came with a bundle."""


@cache.command(name="list")
def list_cache() -> None:
    """List what there is: each kind and its size, and each set of engines, the last used first."""
    from datetime import datetime

    from edgeskip.runtime.bundle.engines import read_build
    from edgeskip.runtime.bundle.store import LIMIT, limit_bytes, stored_sets
    from edgeskip.runtime.cache import cache_sizes
    from edgeskip.runtime.errors import BundleError
    from edgeskip.runtime.files import user_cache
    from edgeskip.runtime.terminal import console, shown, table

    limit, sizes, out = limit_bytes(), cache_sizes(), console()
    kinds = table("kind", "MB")
    kinds.add_column("what it is")
    for kind, size in sizes.items():
        kinds.add_row(kind, f"{size / 1e6:.2f}", KINDS[kind])
    if sizes:
        out.print(kinds)
    if "engines" in sizes:
        sets = table("engines", "SM", "version", "dtype", "dialect", "MB", "last used")
        sets.add_column("built for")
        for one in stored_sets():
            used = datetime.fromtimestamp(one.last_used).strftime("%Y-%m-%d %H:%M") if one.last_used else ""
            megabytes = f"{one.bytes / 1e6:.2f}"
            try:
                b = read_build(one.folder)
                about = (b.backend, f"{b.compute_capability}", b.backend_version, b.dtype, b.dialect)
                sets.add_row(*about, megabytes, used, shown(b.source))
            except BundleError as error:
                sets.add_row(shown(one.folder.name), "", "", "", "", megabytes, used, f"of no use: {shown(error)}")
        out.print(sets)
    total = sum(sizes.values())
    where = shown(user_cache()) if sizes else "the cache"
    out.print(f"{total / 1e6:.2f} MB in {where}; engines may take {limit / 1e6:.0f} MB ({LIMIT})")


@cache.command()
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(tuple(KINDS)),
    multiple=True,
    help="Clear only this kind; can be given more than once.  [default: all]",
)
def clear(kinds: tuple[str, ...]) -> None:
    """Remove what is kept, but for what a process has in use. All of it can be made again."""
    from edgeskip.runtime.cache import clear as remove

    cleared = remove(kinds or KINDS)
    parts = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in cleared.freed.items())
    say(f"Freed {sum(cleared.freed.values()) / 1e6:.2f} MB{f' ({parts})' if parts else ''}.")
    for path in cleared.stayed:
        say(f"{path}: stays, as it is in use or cannot be removed.")


@cache.command()
@bundle_argument
def add(bundle: Path) -> None:
    """Add engines that came with a BUNDLE. Engines are code: add none that you would not run."""
    from edgeskip.runtime.bundle.store import add_engines
    from edgeskip.runtime.terminal import progress_bar

    with progress_bar() as progress:
        taken = add_engines(bundle, progress)
    for engines in taken.engines:
        about = "there already" if engines.folder in taken.had else f"{engines.build.bytes / 1e6:.1f} MB"
        say(f"{engines.folder}: {about}.")
    say_removed(taken.removed)


def say_removed(names: tuple[str, ...]) -> None:
    """What went to make room for new engines."""
    if names:
        say(f"Removed what was used least recently, to stay within the limit: {', '.join(names)}.")
