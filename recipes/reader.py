"""Recipes: strict TOML, read into frozen dataclasses.

A recipe is a dataclass whose fields carry their own bounds (`Annotated[float, Range(0, 1)]`); a table in the
file is a dataclass in a field. `read_recipe` checks names, types and bounds, and `__post_init__` what concerns
several fields. Whoever holds a recipe need not check it again.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.reading import check_plain, kind_of, read_text
from edgeskip.runtime.structure import Positive as Positive
from edgeskip.runtime.structure import Range, structure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PositiveInt = Annotated[int, Range(1, 10**9)]
Share = Annotated[float, Range(0, 1)]

MOST_BYTES = 1 << 16
"""Of a recipe's file."""

_MOST_BASES = 16
_MOST_COLUMNS = 4096  # a key of more parts than that takes minutes to read

Kind = Literal["model", "device", "training"]
FOLDERS: dict[Kind, Path] = {
    "model": Path(__file__).parent,
    "device": Path(__file__).parent / "devices",
    "training": Path(__file__).parent / "train",
}
"""Where the recipes lie that ship with edgeskip."""

RecipeT = TypeVar("RecipeT")


def read_recipe(path: str | Path, kind: type[RecipeT]) -> RecipeT:
    """Read the recipe file at `path` as a dataclass of this `kind`; paths in it are relative to its folder.

    Raises:
        RecipeError: no such file, not TOML, a base that is missing or extends itself, or an entry that is unknown,
            missing, mistyped or out of bounds.
    """
    path = Path(path)
    return structure(kind, read_table(path), path, RecipeError)


def read_table(path: Path, *, extend: bool = True) -> dict[str, Any]:
    """The recipe file's entries over those of the base that it extends, if asked: tables merged, all else replaced.

    A base is named without its suffix, and lies beside the file or among the recipes that ship with edgeskip.

    Raises:
        RecipeError: as `read_recipe`, before any entry is looked at.
    """
    return _extended(path, ()) if extend else _parsed(path)


def find_file(name: str, folders: Iterable[Path], what: str, relative_to: Path = Path()) -> Path:
    """The file of a recipe given by name, in the first of the folders that has one, or by its path.

    Raises:
        RecipeError: there is none; the nearest name is said.
    """
    folders = list(folders)
    if name.endswith(".toml") or "/" in name:
        return relative_to / name
    found = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.toml")}
    if name in found:
        return found[name]
    if os.path.isfile(relative_to / name):  # noqa: PTH113  # any name, however long
        return relative_to / name
    names = sorted(found)
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    fix = f"did you mean {nearest[0]!r}?" if nearest else ""
    raise RecipeError(what, f"no {name[:60]!r}", wanted=f"a file, or one of {', '.join(names)}", fix=fix)


def _parsed(path: Path) -> dict[str, Any]:
    text = read_text(path, RecipeError, fix="give a recipe in TOML", most=MOST_BYTES)
    if (longest := max(map(len, text.split("\n")))) > _MOST_COLUMNS:
        raise RecipeError(path, f"a line of {longest} characters", wanted=f"at most {_MOST_COLUMNS}")
    try:
        table = tomllib.loads(text)
        check_plain(table)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise RecipeError(path, f"is not TOML: {error}") from None
    return table


def _extended(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    table = _parsed(path)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends", f"found {base!r:.60}", wanted="the name of a recipe")
    found = find_file(base, (path.parent, *FOLDERS.values()), f"{path}: extends", path.parent)
    above = (*above, path.resolve())
    if len(above) > _MOST_BASES:
        raise RecipeError(f"{path}: extends", f"{len(above)} files, each of which extends another", fix="join some")
    if kind_of(found, RecipeError) and found.resolve() in above:
        raise RecipeError(f"{path}: extends", f"{base!r} leads back to itself", fix="remove it from one of the files")
    return _merged(_extended(found, above), table)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = base.keys() & over.keys()
    tables = {key for key in both if isinstance(base[key], Mapping) and isinstance(over[key], Mapping)}
    return {**base, **over, **{key: _merged(base[key], over[key]) for key in tables}}
