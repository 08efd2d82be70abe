"""How heads pick tokens from logits, in the graph; runtime/bundle/graphs.py names what they are told about each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnxscript import OpBuilder

Value = ir.Value


def greedy(op: OpBuilder, logits: Value, _: Mapping[str, Value]) -> Value:
    """The token with the largest logit: [B,T,V] -> [B,T] int64."""
    # ONNX Runtime's ArgMax has no bf16 on CUDA; the wider numbers are the same
    ranked = op.Cast(logits, to=ir.DataType.FLOAT) if logits.dtype == ir.DataType.BFLOAT16 else logits
    out: Value = op.ArgMax(ranked, axis=-1, keepdims=0)
    return out


PICKERS: dict[str, Callable[[OpBuilder, Value, Mapping[str, Value]], Value]] = {"greedy": greedy}
"""By name: (logits [B,T,V], row inputs [B,T] by name) -> token ids [B,T]."""
