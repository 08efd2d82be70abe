"""LayerSkip models on the edge: self-speculative decoding from one set of weights.

with edgeskip.load("bundle") as model:
    for piece in model.generate("def fibonacci(n):"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeskip.runtime.decoding.model import Generation as Generation
    from edgeskip.runtime.decoding.model import Model as Model
    from edgeskip.runtime.decoding.model import Piece as Piece
    from edgeskip.runtime.load import load as load

__version__ = "0.1.0"
_HOMES = dict.fromkeys(("Generation", "Model", "Piece"), "edgeskip.runtime.decoding.model") | {
    "load": "edgeskip.runtime.load"
}
__all__ = ["Generation", "Model", "Piece", "__version__", "load"]

for _library in ("ORT", "HF_HUB"):  # read when they are imported: nothing is sent unless the user says so
    os.environ.setdefault(f"{_library}_DISABLE_TELEMETRY", "1")

if not Path(__file__).with_name("runtime").is_dir():  # a clone without symbolic links, as on Windows
    __path__.insert(0, str(Path(__file__).resolve().parents[2]))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgeskip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
