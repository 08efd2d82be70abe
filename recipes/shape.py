"""The shapes of models: those of the published LayerSkip checkpoints (facebook/layerskip-*), one config.json each in
shapes/, and any config.json.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeskip.exporter.config import QUANTIZED, architecture_from_config, read_json
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.errors import BackendError, CheckpointError, RequestError
from edgeskip.runtime.reading import kind_of

FOLDER = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Shape:
    """A model less its weights: `config` is its config.json, `name` a published name or that file's."""

    name: str
    config: dict[str, Any]
    architecture: Architecture


def shape_names() -> tuple[str, ...]:
    """The published shapes."""
    return tuple(sorted(path.name.removesuffix(".json") for path in FOLDER.glob("*.json")))


def load_shape(name: str) -> Shape:
    """Reads a published shape by its name, or the config.json of a path, a checkpoint folder or a hub id.

    Raises:
        RequestError: no such name, file, folder or hub id.
        CheckpointError: the config.json is not that of a supported model, or of one that comes quantized, or cannot be
            had from the hub.
    """
    names = shape_names()
    path = FOLDER / f"{name}.json" if name in names else Path(name)
    found = kind_of(path, RequestError)
    if found == "a folder":
        path /= "config.json"
    elif not found:
        path = _from_hub(name, names)
    config = read_json(path, "give a checkpoint in transformers' format")
    if any(config.get(key) is not None for key in QUANTIZED):  # its tensors' formats are told by their files alone
        fix = "export it and plan the bundle, or give the checkpoint that this one was made from"
        raise CheckpointError(path, "is of a model that comes quantized", wanted="one that is not", fix=fix)
    whose = path.parent if path.name == "config.json" else path
    return Shape(name if name in names else whose.name, config, architecture_from_config(config, path))


def _from_hub(name: str, names: tuple[str, ...]) -> Path:
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            from edgeskip.exporter.checkpoint import download_config
        except ImportError as error:
            raise BackendError(name, f"cannot be fetched ({error})", fix='pip install "edgeskip[export]"') from None
        return download_config(name)
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    raise RequestError(
        "shape",
        f"{name!r} is neither a published shape nor a config.json",
        wanted=f"one of {', '.join(names)}, or a file",
        fix=f"did you mean {nearest[0]!r}?" if nearest else "",
    )
