"""The store of engines, in the user's cache: which of them serve a bundle, how they get there, and what has to go.

    $XDG_CACHE_HOME/edgeskip/engines/
      tensorrt-rtx-sm86-1.7.1.116-0123456789abcdef/   what engines.py reads
      tensorrt-sm87-10.3.0-fedcba9876543210/          ...

Engines are code, so they are loaded from here alone, where the user built them or took them in. Those that come inside
a bundle, from `edgeskip pack`, only lie there until they are taken in. A set was last used when its build.json was last
touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgeskip.runtime.bundle.engines import (
    BUILD,
    EngineBackend,
    EngineKind,
    Engines,
    build_command,
    check_engines,
    copy_engines,
    engines_name,
    manifest_sha256,
    open_engines,
    read_build,
)
from edgeskip.runtime.bundle.manifest import Bundle, Progress, read_bundle
from edgeskip.runtime.cache import size_of
from edgeskip.runtime.errors import BundleError, RequestError, reason
from edgeskip.runtime.files import discard, put_back, sweep, trusted_folder, whole_folder

KIND = "engines"
"""Of what the cache keeps."""

FOLDER = "engines"
"""Where engines lie in a bundle that they came with."""

LIMIT, LIMIT_MB = "EDGESKIP_CACHE_MB", 2000
"""The variable that limits the size of all engines, in MB, and the limit where it is not set."""

_NAME = re.compile(r"(tensorrt|tensorrt-rtx)-sm([0-9]{2,3})-(.+)-[0-9a-f]{16}")


@dataclass(frozen=True)
class StoredSet:
    """A set of engines in the store; `last_used` is in seconds since 1970."""

    folder: Path
    bytes: int
    last_used: float


@dataclass(frozen=True)
class Outcome:
    """What came of building engines, or of adding those of a bundle: the engines, those of them that the store had
    already, and the names of older sets that went to make room.
    """

    engines: tuple[Engines, ...]
    had: frozenset[Path]
    removed: tuple[str, ...]


# What serves a bundle


def find_engines(bundle: Bundle) -> tuple[list[Engines], list[BundleError]]:
    """The store's engines for a bundle, the last used first, without looking into the engines themselves; and what is
    wrong with others that have the name of such engines: a malformed build.json, an engine that is missing or has
    another size. If there is no cache that can be trusted, that is what is wrong.
    """
    found: list[Engines] = []
    problems: list[BundleError] = []
    try:
        root = trusted_folder(KIND)
        put_back(root)
        folders = _folders(root)
    except BundleError as error:
        return [], [error]
    for folder in folders:
        name, engines = folder.name, None
        try:
            build = read_build(folder)
            if build.dialect in bundle.manifest.engine_dialects and name == engines_name(bundle.manifest, build.kind):
                engines = check_engines(bundle, folder, build)
            problem = BundleError(folder / BUILD, "not of the engines that the folder is named for", fix="build again")
        except BundleError as error:
            problem = error
        except OSError as error:
            problem = BundleError(folder, f"cannot be read ({reason(error)})")
        if engines is not None:
            found.append(engines)
        elif name in _names_like(bundle, name):
            problems.append(problem)
    return sorted(found, key=lambda engines: -_last_used(engines.folder)), problems


def read_engines(bundle: Bundle) -> list[Engines]:
    """The store's engines for a bundle, the last used first.

    Raises:
        BundleError: something is wrong with one of them, or there is no cache that can be trusted.
    """
    found, problems = find_engines(bundle)
    if problems:
        raise problems[0]
    return found


def engines_place(bundle: Bundle, kind: EngineKind) -> Path:
    """Where a bundle's engines of a kind belong.

    Raises:
        BundleError: there is no cache that can be trusted.
    """
    return trusted_folder(KIND) / engines_name(bundle.manifest, kind)


def whole_engines(bundle: Bundle, kind: EngineKind) -> Engines | None:
    """A bundle's engines of a kind, compared with their hashes, and from now on used; None if the store has none, or
    damaged ones. Removes what killed processes left there.

    Raises:
        BundleError: there is no cache that can be trusted.
    """
    folder = engines_place(bundle, kind)
    sweep(folder.parent)
    try:
        engines = check_engines(bundle, folder, read_build(folder))
        with open_engines(engines):
            mark_used(engines)
        return engines
    except BundleError:
        return None


def mark_used(engines: Engines) -> None:
    """Has engines be the last ones used, so that they go last."""
    with suppress(OSError):
        os.utime(engines.folder / BUILD)


def _names_like(bundle: Bundle, name: str) -> set[str]:
    """What engines of this bundle would be called, of the backend, GPU and version that a name says."""
    if not (match := _NAME.fullmatch(name)):
        return set()
    backend: EngineBackend = "tensorrt" if match[1] == "tensorrt" else "tensorrt-rtx"
    kinds = (EngineKind(backend, match[3], int(match[2]), dialect) for dialect in bundle.manifest.engine_dialects)
    return {engines_name(bundle.manifest, kind) for kind in kinds}


# Engines that came with a bundle


def engines_that_came(bundle: Bundle) -> tuple[list[Engines], list[BundleError]]:
    """The engines inside a bundle, without looking into the engines themselves, and what is wrong with others: as for
    the store's, or they are not for this bundle, or a link leads out of it.
    """
    found: list[Engines] = []
    problems: list[BundleError] = []
    try:
        _check_within(bundle, bundle.folder / FOLDER)
        folders = _folders(bundle.folder / FOLDER)
    except BundleError as error:
        return [], [error]
    for folder in folders:
        try:
            for own in (folder, *folder.iterdir()):
                _check_within(bundle, own)
            engines = check_engines(bundle, folder, read_build(folder))
            if engines.build.manifest_sha256 != manifest_sha256(bundle):
                again = "pack the bundle again"
                raise BundleError(folder / BUILD, "engines of a bundle with another manifest.json", fix=again)
            found.append(engines)
        except BundleError as error:
            problems.append(error)
        except OSError as error:
            problems.append(BundleError(folder, f"cannot be read ({reason(error)})"))
    return found, problems


def not_loaded(bundle: Bundle, backend: EngineBackend | None = None) -> BundleError | None:
    """Why engines that came with a bundle, for any backend or for this one, are not loaded; None if there are none."""
    with suppress(BundleError):
        matches = (_NAME.fullmatch(folder.name) for folder in _folders(bundle.folder / FOLDER))
        names = [match[1] for match in matches if match and backend in (None, match[1])]
        if names:
            build = build_command(bundle, "tensorrt-rtx" if names[0] == "tensorrt-rtx" else "tensorrt")
            fix = f"build your own with `{build}`, or, if you trust where they come from, `{add_command(bundle)}`"
            return BundleError(bundle.folder, "has engines that came with it, which are code", fix=fix)
    return None


def add_command(bundle: Bundle) -> str:
    """The command that takes in engines that came with a bundle."""
    return f"edgeskip cache add {bundle.folder}"


def add_engines(bundle: str | Path, progress: Progress = lambda *_: None) -> Outcome:
    """Takes engines that came with a bundle into the store: from then on they are loaded and run.

    They are whatever code their maker put there. What is checked is that they are whole and say that they are for this
    bundle. Those that the store has already stay as they are.

    Raises:
        BundleError: the bundle has no engines, or something is wrong with one of them; there is no cache that can be
            trusted, or it cannot be written.
        RequestError: EDGESKIP_CACHE_MB is not a number.
    """
    opened = read_bundle(bundle)
    limit_bytes()
    found, problems = engines_that_came(opened)
    if problems:
        raise problems[0]
    if not found:
        raise BundleError(opened.folder, "no engines came with it", fix=f"edgeskip build {opened.folder} --backend ...")
    taken: list[Engines] = []
    had: set[Path] = set()
    for engines in found:
        kept = whole_engines(opened, engines.build.kind)
        place = engines_place(opened, engines.build.kind)
        if kept is None:
            with whole_folder(place, engines.build.bytes, replace=True, mode=0o700) as folder:
                copy_engines(engines, folder, engines.build.manifest_sha256, progress)
        else:
            had.add(place)
        taken.append(kept or Engines(place, engines.build))
    return Outcome(tuple(taken), frozenset(had), make_room({engines.folder for engines in taken}))


def _check_within(bundle: Bundle, path: Path) -> None:
    """Checks that a file or folder of the bundle is not a link to elsewhere.

    Raises:
        BundleError: it leads out of the bundle.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle.folder)):
        raise BundleError(path, "leads out of the bundle", fix="do not use this bundle")


# The size of it all


def limit_bytes() -> int:
    """How large all engines together may get.

    Raises:
        RequestError: EDGESKIP_CACHE_MB is not a number.
    """
    text = os.environ.get(LIMIT, "") or str(LIMIT_MB)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise RequestError(LIMIT, f"{text!r:.40}", wanted="a whole number of MB")
    return int(text) * 10**6


def stored_sets() -> list[StoredSet]:
    """All that the store has, the last used first.

    Raises:
        BundleError: there is no cache that can be trusted.
    """
    sets = [StoredSet(folder, size_of(folder), _last_used(folder)) for folder in _folders(trusted_folder(KIND))]
    return sorted(sets, key=lambda one: -one.last_used)


def make_room(keep: Collection[Path]) -> tuple[str, ...]:
    """Removes the sets that were used least recently until the others are within the limit; returns their names.

    What is in `keep`, or is being read by a process, stays.

    Raises:
        BundleError: there is no cache that can be trusted.
        RequestError: EDGESKIP_CACHE_MB is not a number.
    """
    sets, limit = stored_sets(), limit_bytes()
    total = sum(one.bytes for one in sets)
    removed = []
    for one in reversed(sets):
        if total > limit and one.folder not in keep and discard(one.folder):
            total -= one.bytes
            removed.append(one.folder.name)
    return tuple(removed)


def _folders(root: Path) -> list[Path]:
    """The folders in one, less what is being written there, in order.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(root, f"cannot be read ({reason(error)})") from None


def _last_used(folder: Path) -> float:
    try:
        return (folder / BUILD).stat().st_mtime
    except OSError:  # of no use, so the first to go
        return 0.0
