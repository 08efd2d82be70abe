"""Reports as files: written whole, and checked before the work that they report."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.errors import RequestError, reason
from edgeskip.runtime.files import write_file
from edgeskip.runtime.reading import kind_of


def write_json(path: Path | None, report: Any) -> None:
    """Writes a report as JSON, if it was asked for.

    Args:
        path: where to; `-` is standard output.
        report: a dataclass.

    Raises:
        RequestError: it cannot be written.
    """
    if path is not None:
        write_report(path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def write_report(path: Path, text: str) -> None:
    """Writes a report whole or not at all; `-` is standard output.

    Raises:
        RequestError: it cannot be written.
    """
    data = text.encode(errors="backslashreplace")  # half a character has no encoding
    if str(path) == "-":
        click.echo(data, nl=False)
        return
    try:
        write_file(path, data)
    except (OSError, ValueError) as error:
        raise _refusal(path, reason(error)) from None


def on_stdout(*paths: Path | None) -> bool:
    """Whether one of these reports goes to standard output, so that nothing else may."""
    return "-" in map(str, paths)


def check_writable(*paths: Path | None) -> None:
    """Refuses what `write_report` could not write, before the work that it reports."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        found = kind_of(path, RequestError)
        if found == "a folder":
            raise _refusal(path, "it is a folder")
        folder = Path(os.path.realpath(path)).parent  # where the file is, if the path is a link
        if not kind_of(folder, RequestError):
            raise _refusal(path, "no such folder")
        if found in ("", "a file"):
            try:
                tempfile.TemporaryFile(dir=folder).close()  # there is no other way to tell
            except OSError as error:
                raise _refusal(path, reason(error)) from None
    files = [path for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise RequestError(files[0], "given twice", fix="give each report a file of its own")


def _refusal(path: Path, why: str) -> RequestError:
    return RequestError(path, f"cannot be written ({why})", fix="give another file")
