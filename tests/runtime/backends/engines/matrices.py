"""Matrices as weights files store them, by the description of the formats and independently of the library."""

from __future__ import annotations

import numpy as np

BLOCK_OF = {"plain": 0, "int8": 0, "int4-32": 32, "int4-64": 64, "int4-128": 128}


def stored(matrix, format_, kind):
    """(bytes, scales, what they stand for in fp64) of a matrix [N, K] in a format, with scales of a NumPy type."""
    if format_ == "plain":
        whole = matrix.astype(kind)
        return whole, None, whole.astype(np.float64)
    if format_ == "int8":
        scales = (np.abs(matrix).max(1, keepdims=True) / 127).astype(kind)
        numbers = np.clip(np.rint(matrix / np.maximum(scales.astype(np.float64), 1e-30)), -128, 127).astype(np.int8)
        return numbers, scales, numbers * scales.astype(np.float64)
    block = BLOCK_OF[format_]
    blocks = matrix.reshape(len(matrix), -1, block)
    scales = (np.abs(blocks).max(2) / 7).astype(kind)
    numbers = np.rint(blocks / np.maximum(scales.astype(np.float64), 1e-30)[..., None])
    numbers = np.clip(numbers, -8, 7).astype(np.int8)
    whole = (numbers * scales.astype(np.float64)[..., None]).astype(kind).astype(np.float64).reshape(matrix.shape)
    nibbles = numbers.reshape(len(matrix), -1, 2).view(np.uint8) & 15
    return nibbles[..., 0] | nibbles[..., 1] << 4, scales, whole
