"""Files and folders written whole or not at all, what killed processes leave of them, and the user's cache.

What is being written has a hidden name next to its own, `.NAME.TAG.edgeskip`, until it is whole and on the disk; then
one rename puts it in place. Its writer holds a lock on it, which the system takes back however the writer ends. So the
next one to write into a folder can tell what nobody owns any more, and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from edgeskip.runtime.errors import BundleError, EdgeskipError, reason

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked and so nothing is taken for left behind
    fcntl = None  # type: ignore[assignment]

_HIDDEN = re.compile(r"\.(.+)\.([0-9a-f]{8}|old)\.edgeskip", re.DOTALL)
_OLD = "old"  # the tag of what a rename is about to replace, where the system cannot exchange two names at once
_PLAIN = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))  # no link, no waiting
_NO_REPLACE, _EXCHANGE = 1, 2  # linux/fs.h
_AT_FDCWD = -100
_TRIES = 20  # another process that looks for what is left holds a lock for a moment
_BLOCK_BYTES = 1 << 22

Count = Callable[[int], None]
"""Called with the number of bytes as they are read."""


class InUseError(OSError):
    """Another process has the lock."""


# Files


def write_file(path: Path, data: bytes | str, *, new: bool = False) -> None:
    """Writes a file whole or not at all; see `whole_file`."""
    with whole_file(path, new=new) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_file(path: Path, *, new: bool = False, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write, which takes its place if the block ends well, and goes away if it does not.

    A link stays a link, and what it leads to is replaced. A device or a pipe, which nothing may replace, is written as
    it is.

    Args:
        path: the file.
        new: whether the file must not exist yet.
        mode: its permissions, less the umask; those of an older file are kept.

    Raises:
        FileExistsError: with `new`, the file exists.
        OSError: it cannot be written.
    """
    if not new and _is_stream(path):
        with path.open("wb") as file:
            yield file
        return
    path = path.absolute() if new else Path(os.path.realpath(path))
    if new and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    older = None if new or not path.exists() else path.stat()

    def make(part: Path) -> None:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, mode))

    with _owned(path, None, make, os.O_RDWR) as (part, descriptor):
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            if older is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, older.st_mode & 0o777)
            yield file
        os.fsync(descriptor)
        if fcntl is None:
            os.close(descriptor)  # Windows does not rename what is open
        if new:
            _rename_new(part, path)
        else:
            part.replace(path)
        sync(path.parent)


def write_hashed(path: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file, usually in a `whole_folder`; returns its size and its sha256.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def open_plain(path: Path) -> IO[bytes]:
    """Opens a file to read, unless it is a link.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | _PLAIN))


def blocks_of(file: IO[bytes], count: Count = lambda _: None, size: int | None = None) -> Iterator[bytes]:
    """The rest of an open file, or its next `size` bytes, counted as they are read."""
    left = sys.maxsize if size is None else size
    while left and (block := file.read(min(left, _BLOCK_BYTES))):
        left -= len(block)
        count(len(block))
        yield block


def sha256_of(file: IO[bytes], count: Count = lambda _: None) -> str:
    """The hash of the rest of an open file."""
    digest = hashlib.sha256()
    for block in blocks_of(file, count):
        digest.update(block)
    return digest.hexdigest()


# Folders


def check_destination(destination: Path, error: type[EdgeskipError] = BundleError) -> None:
    """Refuses a destination that exists already.

    Raises:
        error: it exists, or its name is not possible.
    """
    try:
        taken = destination.exists() or destination.is_symlink()
    except (OSError, ValueError) as caught:
        raise error(f"{str(destination)[:60]!r}", f"cannot be looked up ({reason(caught)})") from None
    if taken:
        raise error(destination, "already exists", fix="give another folder or remove this one")


@contextmanager
def whole_folder(
    destination: Path,
    num_bytes: int,
    error: type[EdgeskipError] = BundleError,
    *,
    replace: bool = False,
    mode: int = 0o755,
) -> Iterator[Path]:
    """A hidden sibling that becomes `destination` at the end, or goes away if anything goes wrong.

    With `replace`, it takes the place of a folder of that name, which stays as it is until then: one of the two is
    always there. `mode` is its permissions.

    Raises:
        error: the destination exists, cannot be written or is being written by another process, or the disk does not
            have `num_bytes` free.
    """
    if not replace:
        check_destination(destination, error)
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _owned_folder(parent / destination.name, _tag(destination.name)) as folder:
            if (free := shutil.disk_usage(parent).free) < num_bytes:
                raise _disk_full(error, destination, free, num_bytes)
            yield folder
            folder.chmod(mode)
            sync_tree(folder)
            if replace and destination.is_dir():
                _replace(destination, folder)
                with _undisturbed():
                    _remove(folder)  # the old one, by now
            else:
                _rename_new(folder, destination)
            sync(parent)
    except InUseError as caught:
        raise error(destination, reason(caught), fix="wait for it, or give another folder") from None
    except OSError as caught:
        if caught.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(error, destination, shutil.disk_usage(parent).free, num_bytes) from None
        if not replace and isinstance(caught, FileExistsError) and os.path.lexists(destination):
            raise error(destination, "appeared meanwhile", fix="give another folder") from None
        raise error(destination, f"cannot be written ({reason(caught)})", fix="give another folder") from None


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary files, which goes away at the end or, after a kill, with the next such one.

    Raises:
        OSError: it cannot be made.
    """
    with _owned_folder(Path(tempfile.gettempdir()) / name, None) as folder:
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process, if the file system has locks.

    Raises:
        InUseError: another process has it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Keeps a folder from being removed, together with whoever else does, if the file system has locks.

    Raises:
        InUseError: another process is removing or replacing it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, "LOCK_SH")
        if not _is_at(descriptor, folder):
            raise InUseError(errno.EWOULDBLOCK, "another process has replaced it", str(folder))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Writes a file, or the names in a folder, through to the disk.

    Raises:
        OSError: that fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _PLAIN)
    except PermissionError:  # a folder whose names may not be read; any folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some file systems
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Writes all files below a folder through to the disk.

    Raises:
        OSError: that fails.
    """
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def put_back(folder: Path) -> None:
    """Gives folders that a killed process was about to replace their names back."""
    for path, name, tag in _hidden(folder):
        _put_back(path, name, tag)


def sweep(folder: Path) -> None:
    """Removes, or gives back its name, what no living process owns."""
    for path, name, tag in _hidden(folder):
        if not _put_back(path, name, tag):
            _clear(path)


def discard(path: Path) -> bool:
    """Removes a file or folder unless another process has a lock on it; its name is free at once.

    Returns whether it is gone.
    """
    gone = False
    with _undisturbed(), suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | _PLAIN)
        try:
            _lock(descriptor)
            if _is_at(descriptor, path):
                _take_away(path)
                gone = True
        finally:
            os.close(descriptor)
    return gone


# The user's cache


def kept(kind: str, name: str) -> bytes | None:
    """What the user's cache has under a name; None if it has nothing, or cannot be trusted."""
    folder = cache_folder(kind)
    if folder is None:
        return None
    try:
        with open_plain(folder / name) as file:
            return file.read()
    except OSError:
        return None


def keep(kind: str, name: str, data: bytes) -> None:
    """Keeps what only saves time in the user's cache, for the user alone; if that is not possible, it is not kept."""
    with suppress(OSError):
        if folder := cache_folder(kind):
            with whole_file(folder / name, mode=0o600) as file:
                file.write(data)


def lend_cache(variable: str, kind: str) -> bool:
    """Has a library keep its files in the user's cache, through its environment variable, unless the user has set it.

    False if there is no cache that can be trusted.
    """
    if variable not in os.environ and (folder := cache_folder(kind)):
        os.environ[variable] = str(folder)
    return variable in os.environ


def user_cache() -> Path:
    """Where edgeskip keeps what only saves time; the folder may not exist yet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else Path.home() / ".cache"  # a relative one does not count, by its specification
    if not base.is_absolute():
        raise RuntimeError("no home folder")
    return base / "edgeskip"


def cache_folder(kind: str) -> Path | None:
    """The user's cache folder of one kind, made if it does not exist; None if there is none that can be trusted.

    What is in it is believed, and kernels in it are run, so nobody else must be able to write it.
    """
    try:
        folder = user_cache() / kind
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            with suppress(FileExistsError):
                part.mkdir(mode=0o700)
            if not _is_ours_alone(part.stat()):
                return None
    except (OSError, RuntimeError):  # read-only, or no home folder
        return None
    return folder


def trusted_folder(kind: str) -> Path:
    """The user's cache folder of one kind, for what cannot do without.

    Raises:
        BundleError: there is none that can be trusted.
    """
    if folder := cache_folder(kind):
        return folder
    try:
        place: object = user_cache() / kind
    except RuntimeError:
        place = "~/.cache/edgeskip"
    found = f"cannot be made, or others can write it, and what is kept as {kind} is believed or run"
    raise BundleError(place, found, fix="set XDG_CACHE_HOME to a folder of your own")


def _is_ours_alone(status: os.stat_result) -> bool:
    if os.name == "nt":
        return True
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


# Hidden names


def _tag(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def _hidden(folder: Path) -> list[tuple[Path, str, str]]:
    """What a folder holds under hidden names of ours, with the names that they are for, or begin with, and tags."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  (the names alone)
    except OSError:
        return []
    found = ((name, _HIDDEN.fullmatch(name)) for name in names)
    return [(folder / name, match[1], match[2]) for name, match in found if match]


def _put_back(path: Path, name: str, tag: str) -> bool:
    """Whether this is a folder that nobody owns, which was to be replaced and now has its name back."""
    if tag != _OLD or os.path.lexists(path.with_name(name)):
        return False
    with suppress(OSError), _claimed(path) as claimed:
        if claimed:
            path.rename(path.with_name(name))
    return True


def _clear(path: Path) -> None:
    """Removes what nobody owns; its name is free at once."""
    with _undisturbed(), suppress(OSError), _claimed(path) as claimed:
        if claimed:
            _take_away(path)


def _take_away(path: Path) -> None:
    """Renames it at once, so that nobody sees half of it, and removes it."""
    away = path.with_name(f".left.{secrets.token_hex(4)}.edgeskip")
    path.rename(away)
    _remove(away)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether what is there is ours and no living process owns it; nobody else can claim it meanwhile.

    Raises:
        OSError: that cannot be found out.
    """
    descriptor = os.open(path, os.O_RDONLY | _PLAIN)
    try:
        is_ours = fcntl is not None and os.fstat(descriptor).st_uid == os.geteuid()
        yield is_ours and _lock(descriptor) and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


@contextmanager
def _owned(path: Path, tag: str | None, make: Callable[[Path], None], access: int) -> Iterator[tuple[Path, int]]:
    """Makes what will be `path`, under a hidden name; yields that name and a descriptor, which holds the lock.

    Whatever has that name at the end is removed.

    Raises:
        InUseError: another process is making it, as the tag tells.
        OSError: it cannot be made.
    """
    part: Path | None = None
    descriptor = -1
    try:
        for _ in range(_TRIES):
            part = path.with_name(f".{path.name[:40]}.{tag or secrets.token_hex(4)}.edgeskip")
            sweep(path.parent)
            try:
                make(part)
            except FileExistsError:
                break
            descriptor = _opened(part, access)
            if descriptor >= 0:
                break
        if part is None or descriptor < 0:
            raise InUseError(errno.EWOULDBLOCK, f"another process is writing it, as {part and part.name}", str(path))
        yield part, descriptor
    finally:
        with _undisturbed(), suppress(OSError):
            if part is not None:
                if _is_at(descriptor, part):
                    _remove(part)
                _clear(part)  # an interrupt came before the descriptor, or before what was replaced was removed
            if descriptor >= 0:
                os.close(descriptor)


def _opened(part: Path, access: int) -> int:
    """A descriptor that holds the lock on what this process has just made; -1 if a sweeping process was faster."""
    with suppress(FileNotFoundError):
        descriptor = os.open(part, access | _PLAIN)
        with suppress(InUseError):
            _lock(descriptor)
            if _is_at(descriptor, part):
                return descriptor
        os.close(descriptor)
    return -1


@contextmanager
def _owned_folder(path: Path, tag: str | None) -> Iterator[Path]:
    """An empty folder of this process under a hidden name, removed at the end if it still has that name."""
    with _owned(path, tag, lambda part: part.mkdir(mode=0o700), os.O_RDONLY) as (part, _):
        yield part


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts off what signals raise, in the main thread only, so that nothing is left half removed."""
    caught: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number and callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    signal.signal(number, lambda number, _: caught.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)


def _lock(descriptor: int, how: str = "LOCK_EX") -> bool:
    """Locks what is open until it is closed, for this process or to share; False if the file system has no locks.

    Raises:
        InUseError: another process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, getattr(fcntl, how) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(errno.EWOULDBLOCK, "another process has it") from None
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Renames


def _rename_new(source: Path, target: Path) -> None:
    """Renames to a name that is not in use.

    Raises:
        FileExistsError: it is in use.
    """
    if _rename_with(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _replace(destination: Path, folder: Path) -> None:
    """Swaps the names of two folders; if that fails, nothing changes."""
    with shared(destination):  # the lock goes with it, so that nobody takes the old one for left behind
        if _rename_with(folder, destination, _EXCHANGE):
            return
        old = destination.with_name(f".{destination.name}.{_OLD}.edgeskip")
        destination.rename(old)
        try:
            folder.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        old.rename(folder)


def _rename_with(source: Path, target: Path, flag: int) -> bool:
    """Linux's rename with a flag; False if the system or the file system does not have it.

    Raises:
        OSError: it is refused.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    sys.audit("os.rename", os.fspath(source), os.fspath(target), -1, -1)
    if not renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(target))


def _is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe, or the name of an open file."""
    return path.exists() and (not path.is_file() or str(path.absolute()).startswith(("/dev/", "/proc/")))


def _disk_full(error: type[EdgeskipError], destination: Path, free: int, wanted: int) -> EdgeskipError:
    return error(
        destination,
        f"{free / 1e6:.0f} MB free on the disk",
        wanted=f"{wanted / 1e6:.0f} MB" if wanted else "",
        fix="free some room or give a folder on another disk",
    )
