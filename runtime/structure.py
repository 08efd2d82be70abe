"""Strict reading of plain data (JSON, TOML) into frozen dataclasses: names, types and bounds, each checked once; and
what a program gives, made plain.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgeskip.runtime.errors import EdgeskipError

T = TypeVar("T")

MOST_WHOLE, MOST_FLOAT = 10**18, 1e30
"""No number may be farther from 0: whole numbers fit a machine's words, and products of others are finite."""


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number, in a field's type: `Annotated[float, Range(0, 1)]`."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        if not abs(value) <= MOST_FLOAT:  # nor NaN
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low}"
        return f"at most {self.high}" if self.low is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Pattern:
    """What a text has to look like, in a field's type: `Annotated[str, Pattern("[0-9]+", "digits")]`."""

    expression: str
    name: str

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.expression, text) is not None

    def __str__(self) -> str:
        return self.name


Positive = Annotated[float, Range(1 / MOST_FLOAT)]


def plain(value: Any) -> Any:
    """What a program gives as a setting, in Python's own types: of NumPy and the like, a scalar is the number or text
    that it is, and an array is a list.
    """
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def structure(kind: type[T], table: Any, path: Path, error: type[EdgeskipError]) -> T:
    """Builds a dataclass from what `json.load` or `tomllib.load` gave.

    Tables become dataclasses or dicts, and lists become tuples; whole numbers serve as floats, and texts as paths
    relative to the file's folder. An absent key takes the field's default. `__post_init__` may raise `error` too, with
    the key as its place.

    Args:
        kind: the dataclass.
        table: the data.
        path: the file it is from.
        error: what to raise.

    Raises:
        error: an entry that is unknown, missing, mistyped or out of bounds, named by its dotted key.
    """
    try:
        return _Reader(path.parent, error).dataclass(kind, table, "")
    except error as caught:
        place = f"{path}: {caught.place}" if caught.place else path
        raise error(place, caught.found, wanted=caught.wanted, fix=caught.fix) from None


@dataclass(frozen=True)
class _Reader:
    """Reads values by type hint; `place` is the dotted name of a value, empty at the top."""

    folder: Path
    error: type[EdgeskipError]

    def dataclass(self, kind: type[T], table: Any, place: str) -> T:
        table = self.typed(Mapping, table, "a table", place)
        hints = get_type_hints(kind, include_extras=True)
        for key in table:
            if key not in hints:
                nearest = difflib.get_close_matches(str(key)[:100], hints, n=1, cutoff=0.5)
                fix = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(hints)}"
                raise self.error(place, f"unknown key {key!r}", fix=fix)
        values = {}
        for entry in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
            if entry.name in table:
                values[entry.name] = self.value(hints[entry.name], table[entry.name], _dotted(place, entry.name))
            elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
                what = "table" if dataclasses.is_dataclass(hints[entry.name]) else "key"
                raise self.error(place, f"{what} {entry.name!r} is missing")
        try:
            return kind(**values)
        except self.error as caught:
            raise self.error(_dotted(place, caught.place), caught.found, wanted=caught.wanted, fix=caught.fix) from None

    def value(self, hint: Any, value: Any, place: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            kind, bounds = arguments
            if kind is float:
                number = float(self.typed((int, float), value, "a number", place))
            else:
                number = self.value(kind, value, place)
            if number not in bounds:
                raise self.error(place, f"found {value!r:.60}", wanted=str(bounds))
            return number
        if origin in (Union, types.UnionType):  # X | None
            return None if value is None else self.value(arguments[0], value, place)
        if origin is Literal:
            if value not in arguments or type(value) not in map(type, arguments):
                texts = [argument for argument in arguments if isinstance(argument, str)]
                nearest = difflib.get_close_matches(str(value)[:100], texts, n=1)
                fix = f"did you mean {nearest[0]!r}?" if nearest else ""
                raise self.error(place, f"found {value!r}", wanted=" or ".join(map(repr, arguments)), fix=fix)
            return value
        if origin is tuple:
            items = self.typed(list, value, "a list", place)
            return tuple(self.value(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(items))
        if origin in (dict, Mapping):
            return {
                self.key(arguments[0], key, place): self.value(arguments[1], item, _dotted(place, key))
                for key, item in self.typed(Mapping, value, "a table", place).items()
            }
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, value, place)  # type: ignore[arg-type]
        if hint is Path:
            try:
                return self.folder / Path(self.typed(str, value, "a path", place)).expanduser()
            except RuntimeError:
                raise self.error(place, f"found {value!r:.60}", wanted="a home folder that there is") from None
        if hint is float:
            return self.value(Annotated[float, Range(-MOST_FLOAT, MOST_FLOAT)], value, place)
        names = {bool: "true or false", int: "a whole number", str: "a text"}
        return self.typed(hint, value, names[hint], place)

    def typed(self, wanted: Any, value: Any, name: str, place: str) -> Any:
        # A bool is an int in Python, but not in a file.
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise self.error(place, f"found {value!r:.60}", wanted=name)
        if isinstance(value, int) and abs(value) > MOST_WHOLE:
            raise self.error(place, f"found {value!r:.60}", wanted=f"{name} of at most 18 digits")
        return value

    def key(self, kind: Any, key: str, place: str) -> Any:
        if get_origin(kind) is Literal:
            return self.value(kind, key, place)
        try:
            return kind(key)
        except ValueError:
            raise self.error(place, f"found the key {key!r}", wanted="whole numbers as keys") from None


def _dotted(place: str, name: str) -> str:
    return f"{place}.{name}" if place and name else place or name
