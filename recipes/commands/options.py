"""Options that name a recipe, and their completion in a shell."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from edgeskip.recipes.reader import FOLDERS, Kind
from edgeskip.runtime.commands.options import first

ALL = "all"
"""What --draft-vocabulary is where drafts come from all rows, whatever a recipe or a bundle says."""

Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def rows_of(given: int | str | None, otherwise: int | None = None) -> int | None:
    """The rows of --draft-vocabulary, or null for all; by default those of a recipe or a bundle."""
    return None if given == ALL else first(given, otherwise)


def names_of(*kinds: Kind) -> Completion:
    """Completion with the names of recipes of these kinds that ship with edgeskip, or with files."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = sorted(path.stem for kind in kinds for path in FOLDERS[kind].glob("*.toml"))
        return [*map(CompletionItem, (n for n in names if n.startswith(incomplete))), CompletionItem("", type="file")]

    return complete


recipe_option = click.option(
    "--recipe",
    "-r",
    shell_complete=names_of("model"),
    help="A model recipe, by name or file; `edgeskip recipes list` shows them.",
)
