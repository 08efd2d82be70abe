"""LayerSkip models on the edge: self-speculative decoding from one set of weights.

with edgeskip.load("bundle") as model:
    for piece in model.generate("def fibonacci(n):"):
        print(piece, end="", flush=True)

load         loads a bundle and returns a Model
Model        generate, complete and agenerate continue prompts; encode and tokenizer make tokens of them
Piece        streamed text, and whether an early exit drafted it
Generation   a whole text, with tokens and statistics
Chat         a conversation with a model
Sampling     how tokens are drawn
Grammar      what a text must be: JSON after a schema, or a regular expression
add_engines  takes TensorRT engines that came with a bundle into the user's cache

What users can mend is an edgeskip.runtime.errors.EdgeskipError. The logger `edgeskip` tells what is loaded and dropped.
"""

import os
import sys

# Nothing but these two, which Python has by now, is imported here: the current folder, which may be a bundle, may be on
# the path. While `python -m` looks for what it was given, that folder is in front; it goes before anything else comes.
if getattr(sys, "argv", [])[:1] == ["-m"] and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgeskip.runtime.bundle.store import add_engines as add_engines
    from edgeskip.runtime.chat.conversation import Chat as Chat
    from edgeskip.runtime.decoding.model import Generation as Generation
    from edgeskip.runtime.decoding.model import Model as Model
    from edgeskip.runtime.decoding.model import Piece as Piece
    from edgeskip.runtime.grammar.grammar import Grammar as Grammar
    from edgeskip.runtime.load import load as load
    from edgeskip.runtime.sampling import Sampling as Sampling

__version__ = "0.1.0"
_HOMES = dict.fromkeys(("Generation", "Model", "Piece"), "edgeskip.runtime.decoding.model") | {
    "Chat": "edgeskip.runtime.chat.conversation",
    "add_engines": "edgeskip.runtime.bundle.store",
    "Grammar": "edgeskip.runtime.grammar.grammar",
    "load": "edgeskip.runtime.load",
    "Sampling": "edgeskip.runtime.sampling",
}
__all__ = ["Chat", "Generation", "Grammar", "Model", "Piece", "Sampling", "__version__", "add_engines", "load"]

for _library in ("ORT", "HF_HUB"):  # read when they are imported: nothing is sent unless the user says so
    os.environ[f"{_library}_DISABLE_TELEMETRY"] = os.environ.get(f"{_library}_DISABLE_TELEMETRY") or "1"

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "runtime")):  # noqa: PTH112, PTH118, PTH120
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # noqa: PTH120
    __path__.insert(0, top)  # a clone without symbolic links, as on Windows


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgeskip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
