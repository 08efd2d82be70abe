"""Reports as files: written whole, and looked at before the work whose result they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgeskip.runtime.errors import RequestError, reason
from edgeskip.runtime.files import write_file


def write_report(path: Path, text: str) -> None:
    """Writes a report whole or not at all; `-` is standard output.

    Raises:
        RequestError: it cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        write_file(path, text)
    except (OSError, ValueError) as error:
        raise RequestError(path, f"cannot be written ({reason(error)})", fix="give another file") from None


def check_writable(*paths: Path | None) -> None:
    """Refuses what `write_report` could not write, before the work whose result it is."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        try:
            folder = path.absolute().parent
            found = "it is a folder" if path.is_dir() else "" if folder.is_dir() else "no such folder"
            if not found and not os.access(folder, os.W_OK):
                found = "its folder is read-only"
        except OSError as error:
            found = str(error.strerror)
        if found:
            raise RequestError(path, f"cannot be written ({found})", fix="give another file")
    files = [path for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise RequestError(files[0], "given twice", fix="give each report a file of its own")
