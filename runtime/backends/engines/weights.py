"""A bundle's weights in device memory: the bytes of its file, once for each process, whoever uses them.

The file goes to the device in pieces, each hashed while the next one is read, so that what is on the device is what was
exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from edgeskip.runtime.backends.device import CudaDevice, out_of_memory
from edgeskip.runtime.bundle.manifest import (
    WEIGHTS,
    Bundle,
    Progress,
    check_file_hash,
    counted,
    keep_checked,
    verify_hashes,
)
from edgeskip.runtime.bundle.weights import StoredArray, stored_arrays
from edgeskip.runtime.errors import BundleError, reason
from edgeskip.runtime.files import open_plain

PIECE_BYTES = 32 << 20
"""Of the file, and of each of the two buffers in page-locked host memory that it goes through."""


@dataclass
class DeviceWeights:
    """The file in device memory; `close` gives it back if nobody else uses it."""

    address: int
    bytes: int
    arrays: Mapping[str, StoredArray]
    key: tuple[str, int]
    users: int = field(default=1)

    def address_of(self, name: str) -> int:
        """Where an array of the file is."""
        return self.address + self.arrays[name].offset

    def close(self, device: CudaDevice) -> None:
        """Ends one use of it."""
        self.users -= 1
        if not self.users:
            del _HELD[self.key]
            with suppress(Exception):  # after an error that sticks, nothing can be freed
                device.free(self.address)


_HELD: dict[tuple[str, int], DeviceWeights] = {}
"""What this process has on its devices, by the file's sha256 and the device."""


def weights_on_device(bundle: Bundle, device: CudaDevice, progress: Progress = lambda *_: None) -> DeviceWeights:
    """The weights of a bundle on a device, to be closed when they are no longer used; for one thread at a time.

    Raises:
        BundleError: the file is not what was exported.
        BackendError: not enough device memory.
    """
    record = bundle.manifest.files[WEIGHTS]
    key, arrays = (record.sha256, device.index), stored_arrays(bundle)
    if key in _HELD:
        verify_hashes(bundle, progress)  # prompts read their embeddings from this bundle's own file
        _HELD[key].users += 1
        return _HELD[key]
    free = device.free_bytes()
    if record.bytes > free:
        raise out_of_memory(bundle.folder, record.bytes, free)
    verify_hashes(bundle, progress, weights=False)
    address = device.allocate(record.bytes)
    try:
        check_file_hash(bundle, WEIGHTS, _copied(bundle, device, address, progress))
        keep_checked(bundle)
    except BaseException:
        with suppress(Exception):
            device.free(address)
        raise
    _HELD[key] = DeviceWeights(address, record.bytes, arrays, key)
    return _HELD[key]


def _copied(bundle: Bundle, device: CudaDevice, address: int, progress: Progress) -> str:
    """Copies the file to an address; returns its sha256."""
    path, size = bundle.path(WEIGHTS), bundle.manifest.weights_bytes
    count = counted("loading the weights", size, progress)
    digest, done, hashed = hashlib.sha256(), 0, [Future[Any](), Future[Any]()]
    for future in hashed:
        future.set_result(None)
    try:
        with (
            open_plain(path) as file,
            device.borrowed(2 * PIECE_BYTES) as pinned,
            ThreadPoolExecutor(1) as pool,
        ):
            pieces = (pinned[:PIECE_BYTES], pinned[PIECE_BYTES:])
            copied = [device.stopwatch() for _ in pieces]
            while done < size:
                turn = (done // PIECE_BYTES) % 2
                piece = pieces[turn][: min(PIECE_BYTES, size - done)]
                hashed[turn].result()
                if done >= len(pieces) * PIECE_BYTES:
                    copied[turn].elapsed_ns()
                if file.readinto(piece.data) != len(piece):  # type: ignore[attr-defined]
                    raise BundleError(path, "ends early", fix="copy the bundle again or export it again")
                hashed[turn] = pool.submit(digest.update, piece.data)
                copied[turn].start()
                device.copier(address + done, piece.ctypes.data, len(piece))()
                copied[turn].stop()
                done += len(piece)
                count(len(piece))
            for future in hashed:
                future.result()
            device.stream.sync()
    except OSError as error:
        raise BundleError(path, f"cannot be read ({reason(error)})") from None
    return digest.hexdigest()
