"""LayerSkip models on the edge: self-speculative decoding from one set of weights.

with edgeskip.load("bundle") as model:
    for piece in model.generate("def fibonacci(n):"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeskip.runtime.generate import Generation as Generation
    from edgeskip.runtime.generate import Model as Model
    from edgeskip.runtime.generate import Piece as Piece
    from edgeskip.runtime.generate import load as load

__version__ = "0.1.0"
__all__ = ["Generation", "Model", "Piece", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from edgeskip.runtime import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'edgeskip' has no attribute {name!r}")
