"""Dialects of the graph files, as far as a session must know them; exporter/graphs/dialects.py has their operators.

Each graph of a bundle comes in every dialect, and all of them read the same weights file. A graph does not depend on
the weights but only on the model's structure, so checkpoints of one structure have the same graph files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """Conventions of a dialect's graph files.

    `file` is the pattern of their names. `caches` says how a call hands back what it adds to the KV caches. With
    `in-place`, the outputs are the whole caches, bound to the memory of the inputs; with `new-rows`, they are the rows
    of this call [B,N,T,D], which the session writes into the caches. `weights` says whether a graph holds its weights
    as initializers that point into the weights file, or takes them as inputs under their names in that file.
    """

    name: str
    file: str
    caches: Literal["in-place", "new-rows"] = "in-place"
    weights: Literal["initializers", "inputs"] = "initializers"


DIALECTS: dict[str, Dialect] = {
    "standard": Dialect("standard", "{}.onnx"),
    "ort": Dialect("ort", "{}.ort.onnx"),
    "standard-inputs": Dialect("standard-inputs", "{}.inputs.onnx", weights="inputs"),
    "primitive": Dialect("primitive", "{}.primitive.onnx", caches="new-rows", weights="inputs"),
}
"""`standard` has ONNX operators only; `ort` also has ONNX Runtime's fused ones. `standard-inputs` is `standard` for
engines, and `primitive` has none but the operators that TensorRT has had since 10.3.
"""

ENGINE_DIALECTS: dict[str, Dialect] = {
    "standard": DIALECTS["standard-inputs"],
    "primitive": DIALECTS["primitive"],
}
"""The dialects that engines are built from, by the names that users know: no weight is in an engine."""
