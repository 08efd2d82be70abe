"""Dialects of the graph files, as far as a session must know them; exporter/graphs/dialects.py has their operators.

Each graph of a bundle comes in every dialect, and all of them read the same weights file; with quantized tensors, in
every dialect that has a way to read them. A graph does not depend on the weights but only on the model's structure, so
checkpoints of one structure have the same graph files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edgeskip.runtime.bundle.formats import is_quantized
from edgeskip.runtime.bundle.graphs import NEW_ROWS, Tensor


@dataclass(frozen=True)
class Dialect:
    """Conventions of a dialect's graph files.

    `file` is the pattern of their names. `caches` says how a call hands back what it adds to the KV caches. With
    `in-place`, the outputs are the whole caches, bound to the memory of the inputs; with `new-rows`, they are the rows
    of this call [B,N,T,D], which the session writes into the caches. `weights` says whether a graph holds its weights
    as initializers that point into the weights file, or takes them as inputs under their names in that file. `in_parts`
    says that runs of layers come in the parts of layers.py, which the session puts together. `quantized` says whether a
    bundle with quantized tensors has these files: either the graphs read the tensors as they are stored, or the session
    feeds them in the bundle's dtype.
    """

    name: str
    file: str
    caches: Literal["in-place", "new-rows"] = "in-place"
    weights: Literal["initializers", "inputs"] = "initializers"
    in_parts: bool = False
    quantized: bool = True

    @property
    def padded(self) -> bool:
        """Whether a call may have more rows than are wanted: the graphs themselves write nothing into the caches."""
        return self.in_parts or self.caches == "new-rows"

    def output_shape(self, tensor: Tensor) -> tuple[str, ...]:
        """The dimensions of an output: of a cache, those of what is handed back."""
        return NEW_ROWS if tensor.is_cache and self.caches == "new-rows" else tensor.shape


DIALECTS: dict[str, Dialect] = {
    "standard": Dialect("standard", "{}.onnx"),
    "ort": Dialect("ort", "{}.ort.onnx"),
    "cpu": Dialect("cpu", "{}.cpu.onnx"),
    "standard-inputs": Dialect("standard-inputs", "{}.inputs.onnx", weights="inputs", quantized=False),
    "primitive": Dialect("primitive", "{}.primitive.onnx", caches="new-rows", weights="inputs", quantized=False),
    "layers": Dialect("layers", "{}.layers.onnx", weights="inputs", in_parts=True),
}
"""`standard` has ONNX operators only; `ort` also has ONNX Runtime's fused ones, and so has `cpu`, where rows do not
depend on how many a call has. `standard-inputs` is `standard` for engines, `primitive` has none but the operators that
TensorRT has had since 10.3, and `layers` has those without the attention, which is a kernel of ours.
"""

WHOLE = tuple(name for name, dialect in DIALECTS.items() if not dialect.in_parts)
"""Those whose graphs ONNX Runtime can run."""

ENGINE_DIALECTS: dict[str, Dialect] = {
    "standard": DIALECTS["standard-inputs"],
    "primitive": DIALECTS["primitive"],
    "layers": DIALECTS["layers"],
}
"""The dialects that engines are built from, by the names that users know: no weight is in an engine."""


def dialects_of(formats: Iterable[str]) -> dict[str, Dialect]:
    """The dialects that a bundle with tensors in these formats has files of, by name."""
    quantized = is_quantized(formats)
    return {name: dialect for name, dialect in DIALECTS.items() if dialect.quantized or not quantized}


def engine_dialects_of(formats: Iterable[str]) -> dict[str, Dialect]:
    """The dialects that engines of such a bundle are built from, by the names that users know."""
    has = dialects_of(formats)
    return {name: dialect for name, dialect in ENGINE_DIALECTS.items() if dialect.name in has}
