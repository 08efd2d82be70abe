"""What figures were measured on, and with what: the head of every report."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeskip.runtime.bundle.architecture import Size
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.weights import bytes_by_format
from edgeskip.runtime.packages import RUNTIME_PACKAGES, versions

if TYPE_CHECKING:
    from edgeskip.runtime.decoding.model import Model


@dataclass(frozen=True)
class HardwareNames:
    """The device's own name, the system and processor type of its host, and a GPU's SM, 87 for 8.7."""

    device: str
    host: str
    compute_capability: int | None = None


@dataclass(frozen=True)
class Provenance:
    """The model, the machine, the software and the command of a measurement.

    `source` names the checkpoint, `synthetic` says that its weights are random; `backend` is the session's description,
    and `versions` has those of Python and of the packages involved. `formats` counts the bytes of weights
    by their format.
    """

    source: str
    synthetic: bool
    backend: str
    hardware: HardwareNames
    versions: dict[str, str]
    command: str
    dtype: DType
    num_layers: Size
    max_length: Size
    formats: dict[str, int] = field(default_factory=dict, kw_only=True)


def hardware_names(device: str, compute_capability: int | None = None) -> HardwareNames:
    """The names of a device on this host."""
    return HardwareNames(device, f"{platform.system()} {platform.machine()}", compute_capability)


def provenance(model: Model, command: str) -> Provenance:
    """The head of a report on a loaded model, as it is now."""
    manifest, session = model.bundle.manifest, model.session
    return Provenance(
        source=manifest.source,
        synthetic=manifest.synthetic,
        backend=session.description,
        hardware=hardware_names(session.hardware, session.compute_capability),
        versions=versions(RUNTIME_PACKAGES),
        command=command,
        dtype=manifest.dtype,
        num_layers=manifest.architecture.num_layers,
        max_length=manifest.max_length,
        formats=bytes_by_format(manifest.tensors.values(), manifest.dtype),
    )
