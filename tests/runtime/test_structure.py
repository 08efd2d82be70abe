"""Plain data becomes dataclasses only where every key, type and bound is right; a fault is told with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from edgeskip.runtime.errors import BundleError, RecipeError
from edgeskip.runtime.structure import Range, structure

FILE = Path("/folder/file.json")


@dataclass(frozen=True)
class Inner:
    size: int
    rate: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        if self.size == 13:
            raise BundleError("size", "found 13", fix="take another")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    kind: Literal["apple", "pear"] = "apple"
    flag: bool = False
    limit: Annotated[int, Range(1)] | None = None
    near: Inner | None = None
    path: Path = Path("none")
    numbers: tuple[int, ...] = ()
    inners: tuple[Inner, ...] = ()
    table: dict[str, Inner] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)


LEAST = {"name": "n", "inner": {"size": 1}}


def read(**changes):
    return structure(Outer, LEAST | changes, FILE, BundleError)


def test_absent_keys_take_their_defaults():
    assert read() == Outer("n", Inner(1, 0.5))


def test_every_kind_of_value_is_read():
    made = read(
        inner={"size": 2, "rate": 1},
        kind="pear",
        flag=True,
        limit=7,
        near={"size": 3},
        path="sub/x",
        numbers=[1, 2],
        inners=[{"size": 4}],
        table={"x": {"size": 5}},
        counts={"3": 1},
        lists={"y": ["a", "b"]},
    )
    assert made == Outer(
        name="n",
        inner=Inner(2, 1.0),
        kind="pear",
        flag=True,
        limit=7,
        near=Inner(3),
        path=Path("/folder/sub/x"),
        numbers=(1, 2),
        inners=(Inner(4),),
        table={"x": Inner(5)},
        counts={3: 1.0},
        lists={"y": ("a", "b")},
    )
    assert isinstance(made.inner.rate, float)
    assert isinstance(made.counts[3], float)


def test_a_path_is_relative_to_the_file_unless_it_is_absolute(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [read(path=text).path for text in ("/a/b", "../c", "~/d")] == [
        Path("/a/b"),
        Path("/folder/../c"),
        Path("/home/me/d"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": "n"}, "unknown key 'nmae'; did you mean 'name'?"),
        ({"inner": {"size": 1, "rat": 1}}, "inner: unknown key 'rat'; did you mean 'rate'?"),
        ({"inner": {"size": 1, "xyz": 1}}, "inner: unknown key 'xyz'; known here: size, rate"),
        ({"inner": {}}, "inner: key 'size' is missing"),
        ({"inner": 3}, "inner: found 3; wanted a table"),
        ({"inner": [1]}, "inner: found [1]; wanted a table"),
        ({"inner": None}, "inner: found None; wanted a table"),
        ({"inner": {"size": 1.0}}, "inner.size: found 1.0; wanted a whole number"),
        ({"inner": {"size": True}}, "inner.size: found True; wanted a whole number"),
        ({"inner": {"size": 13}}, "inner.size: found 13; take another"),
        ({"inner": {"size": 1, "rate": True}}, "inner.rate: found True; wanted a number"),
        ({"inner": {"size": 1, "rate": "1"}}, "inner.rate: found '1'; wanted a number"),
        ({"inner": {"size": 1, "rate": 1.5}}, "inner.rate: found 1.5; wanted 0 to 1"),
        ({"inner": {"size": 1, "rate": float("nan")}}, "inner.rate: found nan; wanted 0 to 1"),
        ({"name": 1}, "name: found 1; wanted a text"),
        ({"name": None}, "name: found None; wanted a text"),
        ({"name": ["n"]}, "name: found ['n']; wanted a text"),
        ({"kind": "aple"}, "kind: found 'aple'; wanted 'apple' or 'pear'; did you mean 'apple'?"),
        ({"kind": ["apple"]}, "kind: found ['apple']; wanted 'apple' or 'pear'; did you mean 'apple'?"),
        ({"flag": 1}, "flag: found 1; wanted true or false"),
        ({"limit": "7"}, "limit: found '7'; wanted a whole number"),
        ({"limit": 0}, "limit: found 0; wanted at least 1"),
        ({"near": {"sise": 1}}, "near: unknown key 'sise'; did you mean 'size'?"),
        ({"path": 1}, "path: found 1; wanted a path"),
        ({"numbers": 1}, "numbers: found 1; wanted a list"),
        ({"numbers": "12"}, "numbers: found '12'; wanted a list"),
        ({"numbers": [1, "2"]}, "numbers[1]: found '2'; wanted a whole number"),
        ({"inners": [{"size": 1}, {"rate": 1}]}, "inners[1]: key 'size' is missing"),
        ({"table": []}, "table: found []; wanted a table"),
        ({"table": {"x": {"size": "1"}}}, "table.x.size: found '1'; wanted a whole number"),
        ({"counts": {"x": 1}}, "counts: found the key 'x'; wanted whole numbers as keys"),
        ({"lists": {"y": ["a", 1]}}, "lists.y[1]: found 1; wanted a text"),
    ],
)
def test_a_fault_is_told_with_its_place_and_the_fix(changes, message):
    with pytest.raises(BundleError) as caught:
        read(**changes)
    assert str(caught.value) == f"{FILE}: {message}"


@pytest.mark.parametrize("data", [None, 1, "text", [], [["name", "n"]]])
def test_what_is_no_table_is_refused(data):
    with pytest.raises(RecipeError) as caught:
        structure(Outer, data, FILE, RecipeError)
    assert str(caught.value) == f"{FILE}: found {data!r}; wanted a table"


def test_what_is_missing_is_named_as_key_or_table():
    with pytest.raises(BundleError, match="key 'name' is missing"):
        structure(Outer, {"inner": {"size": 1}}, FILE, BundleError)
    with pytest.raises(BundleError, match="table 'inner' is missing"):
        structure(Outer, {"name": "n"}, FILE, BundleError)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(BundleError) as caught:
        read(limit="x" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("bounds", "within", "outside", "text"),
    [
        (Range(0, 1), [0, 0.5, 1], [-0.1, 1.1], "0 to 1"),
        (Range(low=1), [1, 1e9], [0.9], "at least 1"),
        (Range(high=3), [3, -1e9], [3.1], "at most 3"),
    ],
)
def test_bounds_are_inclusive(bounds, within, outside, text):
    assert all(value in bounds for value in within)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == text
