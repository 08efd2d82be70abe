"""The one way in for files from outside: regular files of bounded size, in UTF-8, and JSON of bounded depth.

Whatever the system or the parser says becomes one line of the caller's kind of error.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from edgeskip.runtime.errors import EdgeskipError, reason

MOST_BYTES = 1 << 24
"""The most for a file that is read whole, unless the caller sets another limit."""

_MOST_DEPTH = 64
_MOST_DIGITS = 40  # transformers writes 10^30 for "no limit"

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path, error: type[EdgeskipError]) -> str:
    """What is at a path, with links followed: `a file`, `a folder`, ...; the empty text if there is nothing.

    Raises:
        error: there can be no such path, or it may not be looked at.
    """
    try:
        return _kind(path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as caught:  # ValueError: a NUL, or half a character
        raise error(path, f"cannot be looked up ({reason(caught)})") from None


def expanded(path: str | Path, error: type[EdgeskipError]) -> Path:
    """The path with `~` as the home folder that it means.

    Raises:
        error: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(path, "no such home folder") from None


def read_bytes(
    path: Path, error: type[EdgeskipError], *, fix: str = "", most: int = MOST_BYTES, streams: bool = False
) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        error: what to raise.
        fix: what to do if there is no such file, or it cannot be used.
        most: the most bytes that it may have.
        streams: whether a pipe or a device will do, as for what a user names on the command line.

    Raises:
        error: there is no such file, or it is not regular, not readable, or larger than that.
    """
    wanted = {"a file", "a pipe", "a device"} if streams else {"a file"}
    flags = 0 if streams else getattr(os, "O_NONBLOCK", 0)  # what has meanwhile become a pipe must not hold us up
    try:
        found = _kind(path.stat())  # before it is opened, which alone can set a device going
        if found in wanted:
            with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
                found = _kind(os.fstat(file.fileno()))
                if found in wanted:
                    return read_stream(file, path, error, fix=fix, most=most)
    except FileNotFoundError:
        raise error(path, "no such file", fix=fix) from None
    except (OSError, ValueError) as caught:
        raise error(path, f"cannot be read ({reason(caught)})", fix=fix) from None
    raise error(path, f"is {found}", wanted="a file", fix=fix)


def read_stream(
    file: IO[bytes], place: object, error: type[EdgeskipError], *, fix: str = "", most: int = MOST_BYTES
) -> bytes:
    """The rest of an open file, such as standard input.

    Raises:
        error: it cannot be read, or has more than `most` bytes.
    """
    try:
        data = file.read(most + 1)
    except OSError as caught:
        raise error(place, f"cannot be read ({reason(caught)})", fix=fix) from None
    if len(data) > most:
        raise error(place, "is too large", wanted=f"at most {most / 1e6:.0f} MB", fix=fix)
    return data


def read_text(
    path: Path, error: type[EdgeskipError], *, fix: str = "", most: int = MOST_BYTES, streams: bool = False
) -> str:
    """The content of a file in UTF-8, with its line breaks as they are; see `read_bytes`.

    Raises:
        error: as in `read_bytes`, or it is not text.
    """
    return decode_text(read_bytes(path, error, fix=fix, most=most, streams=streams), path, error, fix=fix)


def decode_text(data: bytes, place: object, error: type[EdgeskipError], *, fix: str = "") -> str:
    """Text from UTF-8, with its line breaks as they are.

    Raises:
        error: it is not text.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as caught:
        raise error(place, f"not UTF-8 text ({caught.reason} at byte {caught.start})", fix=fix) from None


def read_json(path: Path, error: type[EdgeskipError], *, fix: str = "", streams: bool = False) -> Any:
    """The data of a JSON file; see `read_bytes`.

    Raises:
        error: as in `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, error, fix=fix, streams=streams), path, error, fix=fix)


def parse_json(data: bytes, place: object, error: type[EdgeskipError], *, fix: str = "") -> Any:
    """Data from JSON in UTF-8.

    Raises:
        error: it is not JSON, or not plain (see `check_plain`).
    """
    try:
        parsed = json.loads(data.decode("utf-8"))
        check_plain(parsed)
    except (ValueError, RecursionError) as caught:
        raise error(place, f"not valid JSON ({caught})", fix=fix) from None
    return parsed


def check_plain(data: Any) -> None:
    """Checks that data can be walked, printed and computed with: tables and lists not too deep, numbers not too long.

    Raises:
        ValueError: it cannot be.
    """
    level = [data]
    for _ in range(_MOST_DEPTH):
        for number in level:
            if isinstance(number, int) and abs(number) >= 10**_MOST_DIGITS:
                raise ValueError(f"a number of more than {_MOST_DIGITS} digits")
        tables = [list(value.values()) for value in level if isinstance(value, dict)]
        level = [item for part in (*tables, *(value for value in level if isinstance(value, list))) for item in part]
        if not level:
            return
    raise ValueError(f"nested more than {_MOST_DEPTH} deep")


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
