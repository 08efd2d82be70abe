"""Types of numbers: the one table of what each library calls them. Importing it loads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["fp32", "fp16", "bf16"]
"""The types that are computed in: activations and caches."""


@dataclass(frozen=True)
class NumberType:
    """A type of numbers: its size, and its name in NumPy, safetensors, ONNX, ONNX Runtime, TensorRT and torch.

    NumPy has no bf16, so a runtime without further libraries holds it as raw 16-bit words. `onnx` is its number in
    TensorProto.
    """

    bytes: int
    numpy: str
    safetensors: str
    onnx: int
    ort: str
    tensorrt: str
    torch: str


NUMBER_TYPES: dict[str, NumberType] = {
    "fp32": NumberType(4, "float32", "F32", 1, "tensor(float)", "FLOAT", "float32"),
    "fp16": NumberType(2, "float16", "F16", 10, "tensor(float16)", "HALF", "float16"),
    "bf16": NumberType(2, "uint16", "BF16", 16, "tensor(bfloat16)", "BF16", "bfloat16"),
    "int64": NumberType(8, "int64", "I64", 7, "tensor(int64)", "INT64", "int64"),
    "int8": NumberType(1, "int8", "I8", 3, "tensor(int8)", "INT8", "int8"),
    "uint8": NumberType(1, "uint8", "U8", 2, "tensor(uint8)", "UINT8", "uint8"),
}

ITEMSIZE: dict[str, int] = {name: number.bytes for name, number in NUMBER_TYPES.items()}
"""Bytes of one number."""

BY_SAFETENSORS: dict[str, str] = {number.safetensors: name for name, number in NUMBER_TYPES.items()}
"""Our names, by those of safetensors."""
