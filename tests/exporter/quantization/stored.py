"""Checkpoints that come quantized, packed here number by number as their libraries document it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's WQLinear_GEMM: row 8c + AWQ_ORDER[i] is at bits 4i of word c."""


def words_along(numbers: Any, axis: int, bits: int, order: tuple[int, ...] | None = None) -> Any:
    """Numbers from 0, so many bits each, as words of 32 along an axis, the first at the lowest bits."""
    moved = np.moveaxis(np.asarray(numbers, np.uint64), axis, 0)
    count = 32 // bits
    words = np.zeros((moved.shape[0] // count, *moved.shape[1:]), np.uint64)
    for place, i in enumerate(order or range(count)):
        words |= moved[i::count] << np.uint64(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, 0, axis)).astype(np.uint32).view(np.int32))


def rounded(weight: Any, bits: int, group: int) -> tuple[Any, Any]:
    """Numbers [N,K] from 0, whose middle is zero, and scales [N,K/G], by the largest magnitude."""
    rows, columns = weight.shape
    blocks = weight.double().numpy().reshape(rows, columns // group, group)
    scales = (np.abs(blocks).max(axis=2) / (2 ** (bits - 1) - 1)).astype(np.float16)
    numbers = np.rint(blocks / scales[..., None].astype(np.float64)) + 2 ** (bits - 1)
    return np.clip(numbers, 0, 2**bits - 1).reshape(rows, columns).astype(int), scales


def compressed_tensors(numbers: Any, scales: Any, bits: int) -> dict[str, Any]:
    return {
        "weight_packed": words_along(numbers, 1, bits),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(numbers.shape),
    }


def gptq(numbers: Any, scales: Any, bits: int, below: int = 1) -> dict[str, Any]:
    groups, columns = scales.shape[1], numbers.shape[1]
    zeros = np.full((groups, len(numbers)), 2 ** (bits - 1) - below)
    return {
        "qweight": words_along(numbers.T, 0, bits),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
        "qzeros": words_along(zeros, 1, bits),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def gptq_v2(numbers: Any, scales: Any, bits: int) -> dict[str, Any]:
    return gptq(numbers, scales, bits, below=0)


def awq(numbers: Any, scales: Any, bits: int) -> dict[str, Any]:
    return {
        "qweight": words_along(numbers.T, 1, bits, AWQ_ORDER),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
        "qzeros": words_along(np.full((scales.shape[1], len(numbers)), 8), 1, bits, AWQ_ORDER),
    }


def settings_of(method: str, bits: int, group: int) -> dict[str, Any]:
    """What config.json says."""
    if method == "compressed-tensors":
        strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "observer": "minmax",
            **strategy,
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }
    if method == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": False, "version": "gemm"}
    version = "gptq_v2" if method == "gptq_v2" else "gptq"
    made = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True}
    return made | {"checkpoint_format": version, "damp_percent": 0.01, "true_sequential": True}


PACKED = {"compressed-tensors": compressed_tensors, "gptq": gptq, "gptq_v2": gptq_v2, "awq": awq}


def quantized_checkpoint(source: Path, folder: Path, method: str, bits: int, group: int) -> dict[str, Any]:
    """A copy of a checkpoint with the layers' matrices quantized; returns what each stands for, in float64.

    Args:
        source: the checkpoint.
        folder: where the copy goes.
        method: a key of PACKED.
        bits: of a number.
        group: numbers of a row that share a scale, or -1 for all.
    """
    shutil.copytree(source, folder)
    tensors, values = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        numbers, scales = rounded(weight, bits, weight.shape[1] if group == -1 else group)
        spread = np.repeat(scales.astype(np.float64), weight.shape[1] // scales.shape[1], axis=1)
        values[name] = (numbers - 2 ** (bits - 1)) * spread
        parts = PACKED[method](numbers, scales, bits)
        tensors |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings_of(method, bits, group)
    (folder / "config.json").write_text(json.dumps(config))
    return values
