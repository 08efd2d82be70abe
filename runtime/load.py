"""A bundle loaded: read, checked, put on a device."""

from __future__ import annotations

import logging
from pathlib import Path

from edgeskip.runtime.backends.choice import BackendChoice, DeviceChoice, open_elsewhere, open_session
from edgeskip.runtime.bundle.manifest import Progress, read_bundle, verify_hashes
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.decoding.text import load_tokenizer
from edgeskip.runtime.drafting.drafters import ExitChoice
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.host import release_freed_memory
from edgeskip.runtime.hub.access import local_bundle
from edgeskip.runtime.structure import plain

_LOG = logging.getLogger(__name__)
logging.getLogger("edgeskip").addHandler(logging.NullHandler())  # what is said goes where the program sends it


def load(
    bundle: str | Path,
    *,
    backend: BackendChoice = "auto",
    device: DeviceChoice = "auto",
    threads: int = 0,
    dialect: str | None = None,
    exit_layer: ExitChoice | None = None,
    progress: Progress = lambda *_: None,
) -> Model:
    """Loads a bundle: reads and checks it, and takes the memory it needs.

    Args:
        bundle: the folder that `edgeskip export` wrote, or the id of a bundle on the hub, such as `owner/name`, where
            there is no such folder: it is fetched into the user's cache.
        backend: `onnxruntime`, `tensorrt`, `tensorrt-rtx`, or `auto`: engines that fit this machine, else ONNX Runtime.
        device: ONNX Runtime's: `cpu`, `cuda`, or `auto`, which takes the GPU where there is one.
        threads: CPU threads; 0 means one per core.
        dialect: `cpu`, `ort` or `standard`; by default what suits the device.
        exit_layer: the exit that drafts, by default the bundle's own, or `auto`, which chooses one for each round. It
            must be one that the bundle was cut at, except where engines of the `layers` dialect run, which serve any.
        progress: called while the files are checked.

    Raises:
        RequestError: the bundle has no such exit, or another setting has a value that cannot be.
        BundleError: the bundle is damaged, foreign or not there; on the hub, gated or not reached.
        BackendError: no backend can run it here; or the hub's library is not installed.
    """
    if not isinstance(bundle, str | Path) or bundle == "":
        raise RequestError("bundle", f"{bundle!r:.60}", wanted="a folder, or the id of a bundle on the hub")
    if not callable(progress):
        raise RequestError("progress", f"{progress!r:.60}", wanted="a function")
    backend, device, threads, dialect, exit_layer = map(plain, (backend, device, threads, dialect, exit_layer))
    opened = read_bundle(local_bundle(bundle))
    verify_hashes(opened, progress, weights=False)  # those are for the session, which reads them
    tokenizer = load_tokenizer(opened)  # which takes more memory for a while: so before there are weights
    fixed = None if exit_layer == "auto" else exit_layer
    if fixed is not None and (type(fixed) is not int or fixed not in opened.manifest.exit_layers):
        usable = backend != "auto" or (device != "cpu" and dialect is None)
        opened, session = open_elsewhere(opened, fixed, backend, engines=usable, progress=progress)
    else:
        session = open_session(
            opened,
            backend=backend,
            device=device,
            threads=threads,
            dialect=dialect,
            exit_layer=fixed,
            progress=progress,
        )
    _LOG.info("%s: %s", opened.folder, session.description)
    try:
        model = Model(opened, session, exit_layer, tokenizer)
        release_freed_memory()  # what reading the tokenizer and trying out the graphs took
        return model
    except BaseException:
        session.close()
        raise
