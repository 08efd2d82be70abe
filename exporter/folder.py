"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgeskip.runtime.errors import BundleError, EdgeskipError, reason


def check_destination(destination: Path, error: type[EdgeskipError] = BundleError) -> None:
    """Refuses a destination that is there already.

    Raises:
        error: it exists, or its name cannot be one.
    """
    try:
        taken = destination.exists() or destination.is_symlink()
    except (OSError, ValueError) as caught:
        raise error(f"{str(destination)[:60]!r}", f"cannot be looked up ({reason(caught)})") from None
    if taken:
        raise error(destination, "already exists", fix="give another folder or remove this one")


@contextmanager
def whole_or_absent(
    destination: Path, weights_bytes: int, error: type[EdgeskipError] = BundleError, *, replace: bool = False
) -> Iterator[Path]:
    """A temporary sibling that becomes `destination` at the end, or goes away with whatever went wrong.

    With `replace` it takes the place of a folder of that name, which stays as it is until then.

    Raises:
        error: the destination exists or cannot be written, or the disk has not `weights_bytes` free.
    """
    if not replace:
        check_destination(destination, error)
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < weights_bytes:
            raise _disk_full(error, destination, free, weights_bytes)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    except OSError as caught:
        raise error(destination, f"cannot be written ({reason(caught)})", fix="give another folder") from None
    try:
        yield folder
        folder.chmod(0o755)
        if replace and destination.is_dir():
            _replace(destination, folder)
        else:
            os.rename(folder, destination)  # noqa: PTH104  (a folder appearing meanwhile must not be replaced)
        _sync_folder(parent)
    except OSError as caught:
        if caught.errno is not None and caught.strerror in ("No space left on device", "Disk quota exceeded"):
            raise _disk_full(error, destination, shutil.disk_usage(parent).free, weights_bytes) from None
        if not replace and (isinstance(caught, FileExistsError) or destination.exists()):
            raise error(destination, "appeared meanwhile", fix="give another folder") from None
        raise error(destination, f"cannot be written ({reason(caught)})", fix="give another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(file: IO[bytes]) -> None:
    """Hands a file's bytes to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _replace(destination: Path, folder: Path) -> None:
    """Puts a folder in another's place; if it cannot be put there, the old one comes back."""
    old = folder.with_name(f"{folder.name}.old")
    destination.rename(old)
    try:
        folder.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _disk_full(error: type[EdgeskipError], destination: Path, free: int, wanted: int) -> EdgeskipError:
    return error(
        destination,
        f"{free / 1e6:.0f} MB free on the disk",
        wanted=f"{wanted / 1e6:.0f} MB for the weights",
        fix="free some room or give a folder on another disk",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
