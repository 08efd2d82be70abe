"""The shapes of the published LayerSkip checkpoints (facebook/layerskip-*), one config.json each in shapes/."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeskip.exporter.config import architecture_from_config, read_json
from edgeskip.runtime.architecture import Architecture
from edgeskip.runtime.errors import RequestError, reason

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
    """Reads a published shape by its name, or any config.json by its path.

    Raises:
        RequestError: neither such a name nor a file.
        CheckpointError: the file is no config.json of a model that is supported.
    """
    names = shape_names()
    path = FOLDER / f"{name}.json" if name in names else Path(name)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:
        raise RequestError(f"shape {name[:60]!r}", f"cannot be looked up ({reason(error)})") from None
    if not found:
        nearest = difflib.get_close_matches(name.lower(), names, n=1)
        raise RequestError(
            "shape",
            f"{name!r} is neither a published shape nor a config.json",
            wanted=f"one of {', '.join(names)}, or a file",
            fix=f"did you mean {nearest[0]!r}?" if nearest else "",
        )
    config = read_json(path)
    return Shape(name if name in names else path.name, config, architecture_from_config(config, path))
