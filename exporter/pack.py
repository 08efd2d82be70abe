"""A bundle with engines, for a device: the bundle as it is, and beside it engines from the user's cache.

packed/
  ...                   every file of the bundle, byte for byte
  engines/<name>/...    the engines, whose build.json says that they are of this bundle
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeskip.runtime.bundle.engines import Engines, copy_engines
from edgeskip.runtime.bundle.manifest import MANIFEST, Bundle, Progress, check_hash, counted
from edgeskip.runtime.bundle.store import FOLDER
from edgeskip.runtime.errors import BundleError
from edgeskip.runtime.files import blocks_of, check_destination, open_plain, whole_folder, write_hashed


def pack(bundle: Bundle, engines: Sequence[Engines], destination: Path, progress: Progress = lambda *_: None) -> Bundle:
    """Writes the bundle with these engines. What is written is compared with its hashes.

    Raises:
        BundleError: no engines, damaged ones, a damaged bundle, or a destination that exists or cannot be written.
    """
    if not engines:
        raise BundleError(
            bundle.folder, "no engines to pack", fix=f"build them: edgeskip build {bundle.folder} --backend ..."
        )
    check_destination(destination)
    files = bundle.manifest.files
    total = sum(record.bytes for record in files.values())
    count = counted("packing", total, progress)
    with whole_folder(destination, total + sum(one.build.bytes for one in engines)) as folder:
        for name, record in files.items():
            with bundle.path(name).open("rb") as file:
                _, found = write_hashed(folder / name, blocks_of(file, count))
            check_hash(bundle.path(name), found, record.sha256, "as exported", "export the bundle again")
        with open_plain(bundle.path(MANIFEST)) as file:
            _, manifest_hash = write_hashed(folder / MANIFEST, blocks_of(file))
        for one in engines:
            target = folder / FOLDER / one.folder.name
            target.mkdir(parents=True)
            copy_engines(one, target, manifest_hash)
    return Bundle(destination, bundle.manifest)
