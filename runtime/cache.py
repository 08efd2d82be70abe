"""What is in the user's cache, by kind, and clearing it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgeskip.runtime.files import discard, trusted_folder, user_cache

KINDS = {
    "engines": "TensorRT engines",
    "kernels": "what TensorRT-RTX compiled, and kernels of ours",
    "timings": "what TensorRT timed while it built engines",
    "checked": "which bundles were checked",
    "inductor": "what torch compiled",
    "matplotlib": "matplotlib's list of fonts",
    "bundles": "bundles from the hub",
}
"""What the cache keeps. All of it can be made again."""


@dataclass(frozen=True)
class Cleared:
    """The bytes that went, by kind, and what stayed because a process has it or it cannot be removed."""

    freed: dict[str, int]
    stayed: tuple[Path, ...]


def cache_sizes() -> dict[str, int]:
    """Bytes by kind; kinds that there is nothing of are left out."""
    sizes = {kind: size_of(folder) for kind in KINDS if (folder := _folder(kind)) is not None}
    return {kind: size for kind, size in sizes.items() if size}


def clear(kinds: Iterable[str]) -> Cleared:
    """Removes what there is of some kinds.

    Raises:
        BundleError: the cache cannot be trusted.
    """
    freed: dict[str, int] = {}
    stayed: list[Path] = []
    for kind in kinds:
        if _folder(kind) is None:
            continue
        folder = trusted_folder(kind)
        for path in sorted(folder.iterdir()):
            size = size_of(path)
            if discard(path):
                freed[kind] = freed.get(kind, 0) + size
            else:
                stayed.append(path)
    return Cleared(freed, tuple(stayed))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what goes away meanwhile has none."""
    if not path.is_dir():
        return _bytes_of(path)
    return sum(_bytes_of(Path(folder) / name) for folder, _, files in os.walk(path) for name in files)


def _bytes_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _folder(kind: str) -> Path | None:
    """The folder of one kind, if it is there; it is not made."""
    try:
        folder = user_cache() / kind
    except RuntimeError:  # no home folder
        return None
    return folder if folder.is_dir() else None
