"""What the ONNX parser of TensorRT 10.3 reads, as far as graphs for it need it; tests hold every node to this table.

The source is the page "Supported ONNX Operators" of github.com/onnx/onnx-tensorrt in its release 10.1-GA ("opset 9 to
opset 20"), the last before 10.3 that was at hand. By the changelog there, 10.2 and 10.3 took nothing away: they brought
clearer errors, changes within `GRU`, `Squeeze` and `ScatterElements`, and `axes` of `Slice` that are no constants.
"""

from __future__ import annotations

OPSETS = range(9, 21)

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ALL = _NUMBERS | {"BOOL"}

OPERATORS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("MatMul", "Sigmoid", "Softmax", "Sqrt"), _FLOATS),
    **dict.fromkeys(("Add", "ArgMax", "Div", "Less", "LessOrEqual", "Mul", "Range", "ReduceMean", "Sub"), _NUMBERS),
    **dict.fromkeys(("Concat", "Constant", "Gather", "GatherND", "Reshape", "Shape"), _ALL),
    **dict.fromkeys(("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"), _ALL),
    **dict.fromkeys(("Cast", "CastLike"), _ALL | {"UINT8"}),
}
"""Types of what an operator takes, and of what a `Constant` gives, as ONNX spells them."""

CONSTANT_INPUTS: dict[str, int] = {"ReduceMean": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1}
"""The number of an input that must be a constant of the graph: all of them are axes."""
