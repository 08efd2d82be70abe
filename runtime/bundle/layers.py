"""Engines of parts of a layer, which serve every layer of a model: what lies between one attention and the next.

    hidden -> first -> qkv -> attention -> attended -> between -> hidden, qkv -> attention -> ... -> last -> hidden

    first    norm, qkv_proj                                            of the layer that comes
    between  o_proj, sum, norm, MLP, sum   of the layer that ends;     norm, qkv_proj of the one that comes
    last     o_proj, sum, norm, MLP, sum   of the layer that ends

The weights are inputs, named `layer.*` for the layer that ends and `next.*` for the one that comes; a session binds
them to those of a layer. So any run of layers is made of the same three engines, and a model exits after any layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dialects import Dialect
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.graphs import Graph, GraphName, Tensor

_HIDDEN = Tensor("hidden_states", "float", ("B", "T", "H"))
_OUT = Tensor("output_states", "float", ("B", "T", "H"))
_QKV = Tensor("qkv", "float", ("T", "Q"))
_ATTENDED = Tensor("attended", "float", ("T", "A"))

PARTS: dict[GraphName, Graph] = {
    "first": Graph(0, 0, (_HIDDEN,), (_QKV,)),
    "between": Graph(0, 0, (_HIDDEN, _ATTENDED), (_OUT, _QKV)),
    "last": Graph(0, 0, (_HIDDEN, _ATTENDED), (_OUT,)),
}
"""The parts by name. Dimensions besides those of graphs.py: Q rows of the qkv projection, A = Nq * D."""

ENDS, COMES = "layer.", "next."
"""What the names of weights begin with."""


LEAST_SM = 80
"""The first with the tensor cores' instructions for both fp16 and bf16."""


def has_products(architecture: Architecture, dtype: DType, formats: Iterable[str], compute_capability: int) -> bool:
    """Whether a session computes the rows of a round without these engines, its head included: whether the kernels of
    backends/engines/products.py read matrices in these formats, in packs of 16 bytes, on a GPU of this SM.
    """
    a = architecture
    sizes = (a.hidden_size, a.intermediate_size, a.num_heads * a.head_dim)
    step = 16 if "int8" in formats else 8
    return dtype != "fp32" and compute_capability >= LEAST_SM and all(size % step == 0 for size in sizes)


def files_of(graphs: Mapping[GraphName, Graph], dialect: Dialect) -> dict[GraphName, Graph]:
    """What a dialect has files of, for a bundle with these graphs."""
    if not dialect.in_parts:
        return dict(graphs)
    return PARTS | {name: graph for name, graph in graphs.items() if graph.head}


def weight_of(name: str, ends: int | None, comes: int | None) -> str:
    """The tensor that an input of a part stands for, between these layers."""
    for prefix, layer in ((ENDS, ends), (COMES, comes)):
        if name.startswith(prefix):
            return f"model.layers.{layer}.{name.removeprefix(prefix)}"
    return name
