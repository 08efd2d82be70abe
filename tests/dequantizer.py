"""What quantized tensors stand for, computed anew from the layout that runtime/bundle/formats.py describes: the judge
of all that writes and reads them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from edgeskip.runtime.bundle.manifest import WEIGHTS, Bundle


def dequantized(format_: str, numbers: Any, scales: Any) -> Any:
    """A matrix [N,K] in float64 from its numbers and scales, before it is rounded to the bundle's dtype."""
    numbers, scales = np.asarray(numbers), np.asarray(scales, np.float64)
    if format_ == "int8":
        assert numbers.dtype == np.int8
        assert scales.shape == (len(numbers), 1)
        return numbers * scales
    size = int(format_.removeprefix("int4-"))
    assert numbers.dtype == np.uint8
    rows, columns = numbers.shape[0], 2 * numbers.shape[1]
    assert scales.shape == (rows, columns // size)
    values = np.empty((rows, columns))
    for k in range(columns):
        nibble = numbers[:, k // 2].astype(int) // 16 if k % 2 else numbers[:, k // 2].astype(int) % 16
        values[:, k] = np.where(nibble < 8, nibble, nibble - 16) * scales[:, k // size]
    return values


def stored_weights(bundle: Bundle) -> dict[str, Any]:
    """Every tensor of a bundle by name, in the bundle's dtype, as torch tensors."""
    arrays = load_file(bundle.path(WEIGHTS))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[bundle.manifest.dtype]
    tensors = {}
    for name in bundle.manifest.tensors:
        format_ = bundle.manifest.formats.get(name)
        tensors[name] = arrays[name]
        if format_ is not None:
            scales = arrays[f"{name}.scales"]
            assert scales.dtype == dtype
            values = dequantized(format_, arrays[name].numpy(), scales.float().numpy())
            tensors[name] = torch.from_numpy(values).to(dtype)
        assert tensors[name].dtype == dtype
    return tensors


def dequantized_model(bundle: Bundle, model: Any) -> Any:
    """A copy of a transformers model with a bundle's weights."""
    made = copy.deepcopy(model)
    parameters = dict(made.named_parameters())
    tensors = stored_weights(bundle)
    with torch.no_grad():
        for name, record in bundle.manifest.tensors.items():
            rows = torch.split(tensors[name], [count for _, count in record.sources]) if record.sources else ()
            for (source, _), values in zip(record.sources, rows, strict=True):
                parameters[source].copy_(values)
    return made
