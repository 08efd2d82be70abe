"""Files gone wrong in every way that comes to mind: values that no reader expects, bytes that moved, no file at all."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 65, 1.5, -0.0, 1e-300, 1e300, float("nan"), float("inf")),
    *(2**31, 2**31 - 1, 2**63, 2**64 - 1, 10**9, 10**18, 10**30, 10**400, -(10**400)),
    *("", "x", "0", "a\0b", "\x1b[31mred\x9b0m", "\ud800", "\u202e", "[/red]", "../x", "/dev/zero", "~nobody/x"),
    *("{{ 1 }}", "%s%n", "x" * 300, "y" * 100_000, "\n", "fp32", "nan"),
    *([], {}, [[]], [None], {"": None}, ["x"] * 1000, list(range(300)), {"a": {"b": {"c": 1}}}),
)
TOML_VALUES = (
    *("true", "0", "1", "-1", "1.5", "nan", "inf", "-inf", "1e300", "1e999", "9" * 400, "0x" + "f" * 5000, "0o7"),
    *('""', '"x"', '"a\\u0000b"', '"\\u001b[31m\\u009b"', '"[/red]"', '"/dev/zero"', '"~nobody/x"', '"../x.toml"'),
    *(f'"{"x" * 300}"', f'"{"y" * 100_000}"', "[]", "{}", "[1, [2]]", "[" * 60 + "]" * 60, "[" * 5000 + "]" * 5000),
    *("1979-05-27", "07:32:00", '"""\nlines\n"""', "{a = 1}", "", "x"),
)


def mutated_json(random: Random, text: bytes) -> bytes:
    """JSON with one value, key or order changed, or the text of one."""
    data = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2))):
        data = _changed(random, data)
    return json.dumps(data, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def mutated_toml(random: Random, text: bytes) -> bytes:
    """TOML with one value or line changed."""
    lines = text.decode().splitlines()
    at = random.choice([i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")])
    kind = random.randrange(8)
    if kind < 4:
        lines[at] = re.sub(r"=.*", lambda _: f"= {random.choice(TOML_VALUES)}", lines[at])
    elif kind == 4:
        del lines[at]
    elif kind == 5:
        lines.insert(at, random.choice(lines))
    elif kind == 6:
        key = random.choice(("extends", "new", "a.b.c", "a." * 5000 + "b"))
        lines.insert(at, f"{key} = {random.choice(TOML_VALUES)}")
    else:
        lines[at] = lines[at].replace(random.choice(lines[at]), random.choice(("=", "[", '"', "\0", "\x1b", "x")), 1)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_text(random: Random, data: bytes) -> bytes:
    """Bytes changed, lost, doubled or put in."""
    cut, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    kind = random.randrange(9)
    if kind == 0:
        return data[:cut]
    if kind == 1:
        return data[:cut] + data[min(end, cut + 40) :]
    if kind == 2:
        return data[:cut] + random.randbytes(random.randrange(1, 20)) + data[cut:]
    if kind == 3:
        return data[:cut] + data[cut : cut + 40] * random.choice((2, 50)) + data[cut:]
    if kind == 4:
        return random.choice((b"", b"\xef\xbb\xbf" + data, data[::-1], data.replace(b" ", b"\0"), b"[" * 100_000))
    if kind == 5:
        return data[:cut] + random.choice((b"\x1b[2J", b"\xc2\x9b", b"\xff", b"\xed\xa0\x80", b"\r")) + data[cut:]
    changed = bytearray(data or b" ")
    for _ in range(random.choice((1, 1, 3, 20))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def mutated_header(random: Random, data: bytes) -> bytes:
    """A safetensors file whose header was changed, by its values or by its bytes, or whose size was."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(8)
    if kind < 4:
        header = mutated_json(random, header)
    elif kind == 4:
        header = mutated_text(random, header)
    elif kind == 5:
        return random.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    elif kind == 6:
        rest = rest[: random.randrange(len(rest))] if random.random() < 0.5 else rest + bytes(random.randrange(200))
    else:
        entries = json.loads(header)
        one, other = random.sample(sorted(entries), 2)
        part = random.choice(("dtype", "shape", "data_offsets"))
        if part in entries[one] and part in entries[other]:
            entries[one][part], entries[other][part] = entries[other][part], entries[one][part]
        header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + rest


def put_in_place_of(random: Random, path: Path, *, pipes: bool = True) -> None:
    """Something that is no regular file, or an endless one, where a file was."""
    path.unlink()
    kind = random.choice((0, *((1,) if pipes else ()), 2, 3, 4, 5, 6, 7))
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("nothing")
    elif kind == 4:
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem", "/dev/fd/0")))
    elif kind == 5:
        path.symlink_to(".")
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(1 << 36)  # with a hole, so it takes no disk


def clear(path: Path) -> None:
    """Removes whatever stands at a path."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _changed(random: Random, data: Any) -> Any:
    """The data with a change at one place, which may be its top."""
    places = list(_places(data))
    *path, last = random.choice(places) if places and random.random() < 0.97 else [None]
    if last is None:
        return random.choice(VALUES)
    made = copy.deepcopy(data)
    parent = made
    for key in path:
        parent = parent[key]
    value = parent[last]
    kind = random.randrange(10)
    if kind < 5:
        parent[last] = copy.deepcopy(random.choice(VALUES))
    elif kind == 5 and isinstance(value, (int, float)):
        parent[last] = random.choice(
            (value + 1, value - 1, 2 * value, -value, float(value) if abs(value) < 1e300 else 0.5, str(value))
        )
    elif kind == 5 and isinstance(value, str):
        parent[last] = random.choice((value.upper(), value + "x", value[:-1], value * 1000, value + "\0"))
    elif kind == 6:
        del parent[last]
    elif kind == 7:
        *others, key = random.choice(places)
        source = data
        for part in (*others, key):
            source = source[part]
        parent[last] = copy.deepcopy(source)
    elif kind == 8:
        for _ in range(random.choice((40, 70, 400))):
            value = [value] if random.random() < 0.5 else {"a": value}
        parent[last] = value
    elif isinstance(parent, dict):
        parent[random.choice(("new", "", "\x1b", "\ud800", "x" * 10_000, str(last).upper(), str(last)[:-1]))] = value
    else:
        parent.extend(copy.deepcopy(parent) * random.choice((1, 200)))
    return made


def _places(data: Any, path: tuple[Any, ...] = ()) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


Mutation = Callable[[Random, bytes], bytes]
