"""Strict reading of plain data (JSON, TOML) into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgeskip.runtime.errors import EdgeskipError

T = TypeVar("T")


def structure(cls: type[T], data: Any, place: str, error: type[EdgeskipError]) -> T:
    """Builds a dataclass from plain data, checking every key and type on the way.

    Lists become tuples, tables become dataclasses or dicts, whole numbers serve as floats. An absent key takes
    the field's default.

    Args:
        cls: a dataclass, its fields annotated with plain types, dataclasses, `tuple[X, ...]`, `dict[str, X]`,
            `Literal[...]` or `X | None`.
        data: what `json.load` or `tomllib.load` gave.
        place: where the data is from; keys are appended to it in messages.
        error: what to raise.

    Raises:
        error: unknown or missing key, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise error(place, f"found {_kind(data)}", wanted="a table")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise error(place, f"unknown key {key!r}", fix=fix)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{place}: {name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(place, f"no key {name!r}", fix="add it")
    return cls(**values)


def _value(hint: Any, value: Any, place: str, error: type[EdgeskipError]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _value(hint, value, place, error)
    if origin is typing.Literal:
        if value in args:
            return value
        raise error(place, f"found {value!r}", wanted=" or ".join(map(repr, args)))
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, f"{place}[{i}]", error) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(args[1], item, f"{place}.{key}", error) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return structure(typing.cast(type, hint), value, place, error)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise error(place, f"found {_kind(value)}", wanted=_NAMES.get(origin or hint, str(hint)))


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
    dict: "a table",
}


def _kind(value: Any) -> str:
    return f"{value!r:.60}" if not isinstance(value, (Mapping, list)) else f"a {type(value).__name__}"
