"""edgeskip recipes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import click

from edgeskip.recipes.commands.options import names_of
from edgeskip.recipes.reader import FOLDERS
from edgeskip.runtime.commands.options import Place, say
from edgeskip.runtime.errors import EdgeskipError, RecipeError, reason
from edgeskip.runtime.printable import printable
from edgeskip.runtime.reading import kind_of, read_text


@click.group()
def recipes() -> None:
    """List, show, copy or validate recipes: models, devices and trainings that edgeskip knows."""


@recipes.command(name="list")
def list_recipes() -> None:
    """List the recipes that ship with edgeskip."""
    from edgeskip.recipes.library import shipped_recipes

    found = list(shipped_recipes())
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(f"{recipe.kind:9} {recipe.name:{width}}  {recipe.title}")


@recipes.command()
@click.argument("recipe", shell_complete=names_of(*FOLDERS))
def show(recipe: str) -> None:
    """Print a RECIPE, by name or file: its text, what it takes from the one it extends, and the format of weights for
    each device where it names none.
    """
    from edgeskip.recipes.library import formats_by_device, recipe_file
    from edgeskip.recipes.reader import MOST_BYTES, read_table

    path = recipe_file(recipe)
    resolved = read_table(path)
    click.echo(printable(read_text(path, RecipeError, most=MOST_BYTES)), nl=False)
    own = read_table(path, extend=False)
    if inherited := {key: value for key, value in resolved.items() if own.get(key) != value}:
        click.echo("\n# From what it extends:")
        for key, value in inherited.items():
            click.echo(printable(f"#   {key} = {json.dumps(value, ensure_ascii=False, default=str)}"))
    devices: list[tuple[str, str]] = []
    with suppress(EdgeskipError):  # what is wrong with a recipe is for `validate` to say
        devices = list(formats_by_device(path))
    if devices:
        click.echo("\n# For a device, edgeskip export takes:")
    for device, text in devices:
        click.echo(printable(f"#   {device}: {text}"))


@recipes.command()
@click.argument("recipe", shell_complete=names_of(*FOLDERS))
@click.argument("file", type=Place(path_type=Path), required=False)
def copy(recipe: str, file: Path | None) -> None:
    """Copy a RECIPE to a FILE of your own, to change it.  [default: its own name, here]"""
    from edgeskip.recipes.library import recipe_file
    from edgeskip.recipes.library import validate as check_recipe
    from edgeskip.recipes.reader import MOST_BYTES
    from edgeskip.runtime.files import write_file

    path = recipe_file(recipe)
    check_recipe(path)
    text = read_text(path, RecipeError, most=MOST_BYTES)
    target = Path(path.name) if file is None else file
    if file is not None and kind_of(file, RecipeError) == "a folder":
        target /= path.name
    try:
        write_file(target, text, new=True)
    except FileExistsError:
        raise RecipeError(target, "is there already", fix="give another file, or remove it") from None
    except (OSError, ValueError) as error:
        raise RecipeError(target, f"cannot be written ({reason(error)})", fix="give another file") from None
    say(f"{target}")


@recipes.command()
@click.argument("names", nargs=-1, metavar="[RECIPE]...", shell_complete=names_of(*FOLDERS))
def validate(names: tuple[str, ...]) -> None:
    """Check RECIPES, by name or file, of any kind.  [default: all that ship with edgeskip]"""
    from edgeskip.recipes.library import recipe_file, shipped_recipes
    from edgeskip.recipes.library import validate as check_recipe

    failed = False
    for path in [recipe_file(name) for name in names] or [recipe.path for recipe in shipped_recipes()]:
        try:
            click.echo(f"{path}: a {check_recipe(path)} recipe")
        except RecipeError as error:
            say(f"edgeskip: {error}")
            failed = True
    if failed:
        raise SystemExit(RecipeError.exit_code)
