"""Which checkpoints come quantized, by what config.json says, and which of them can be taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeskip.exporter.config import QUANTIZED, read_json
from edgeskip.exporter.quantization.layouts import AWQ, COMPRESSED_TENSORS, GPTQ, GPTQ_V2, ORIGINAL, Layout
from edgeskip.runtime.errors import CheckpointError
from edgeskip.runtime.reading import kind_of

_GPTQ_FILE = "quantize_config.json"
"""Where AutoGPTQ says it, if config.json does not."""

_METHODS = "compressed-tensors, gptq or awq"


@dataclass(frozen=True)
class Method:
    """What a checkpoint was quantized by, and how its matrices are stored."""

    name: str
    layout: Layout
    bits: int


def method_of(folder: Path, config: Mapping[str, Any]) -> Method | None:
    """How a checkpoint came to be quantized; None if it is not.

    Raises:
        CheckpointError: a method, or a setting of it, that is not taken over.
    """
    place, key = folder / "config.json", next((key for key in QUANTIZED if config.get(key) is not None), "")
    settings = config.get(key)
    if not key and kind_of(folder / _GPTQ_FILE, CheckpointError):
        place = folder / _GPTQ_FILE
        settings = {"quant_method": "gptq"} | read_json(place)
    if settings is None:
        return None
    table = _Table(settings, place, key or _GPTQ_FILE)
    name = table.get("quant_method")
    if name == "compressed-tensors":
        return _compressed_tensors(table)
    if name == "gptq":
        return _gptq(table)
    if name == "awq":
        return _awq(table)
    raise table.refused(f"is by {name!r:.40}", f"{_METHODS}, or a model that is not quantized")


@dataclass(frozen=True)
class _Table:
    """A table of settings and where it stands."""

    values: Any
    place: Path
    name: str

    def get(self, key: str, default: Any = None) -> Any:
        if not isinstance(self.values, dict):
            raise CheckpointError(self.place, f"{self.name} is {self.values!r:.60}", wanted="a table")
        value = self.values.get(key)
        return default if value is None else value

    def names(self) -> list[str]:
        self.get("")
        return list(self.values)

    def table(self, key: str) -> _Table:
        return _Table(self.get(key, {}), self.place, f"{self.name}.{key}")

    def check(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """A value that is one of those that are taken over."""
        value = self.get(key, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self.refused(f"has {key} {value!r:.40}", " or ".join(f"{one!r}" for one in allowed))
        return value

    def refused(self, found: str, wanted: str) -> CheckpointError:
        return CheckpointError(self.place, f"{self.name} {found}", wanted=wanted, fix=ORIGINAL)


def _gptq(table: _Table) -> Method:
    """AutoGPTQ's and GPTQModel's settings."""
    table.check("desc_act", False, default=False)
    table.check("sym", True, default=True)
    table.check("pack_dtype", "int32", default="int32")
    table.check("dynamic", {}, default={})  # other settings for some modules
    layouts = {"gptq": GPTQ, "gptq_v2": GPTQ_V2}
    version = table.check("checkpoint_format", *layouts, default=table.check("format", *layouts, default="gptq"))
    return Method("gptq", layouts[version], table.check("bits", 4, 8))


def _awq(table: _Table) -> Method:
    """AutoAWQ's settings."""
    table.check("zero_point", False)
    table.check("version", "gemm", default="gemm")
    return Method("awq", AWQ, table.check("bits", 4))


def _compressed_tensors(table: _Table) -> Method:
    """The settings of compressed-tensors, for one or more groups of modules, in which numbers have the same bits."""
    table.check("format", "pack-quantized")
    table.check("quantization_status", "compressed", "frozen", default="compressed")  # the latter by older versions
    table.check("kv_cache_scheme", {}, default={})
    table.check("transform_config", {}, default={})
    table.table("sparsity_config").check("format", "dense", default="dense")
    groups = table.table("config_groups")
    bits = set()
    for name in groups.names():
        group = groups.table(name)
        group.check("input_activations", {}, default={})
        group.check("output_activations", {}, default={})
        group.check("format", "pack-quantized", default="pack-quantized")
        weights = group.table("weights")
        weights.check("type", "int", default="int")
        weights.check("symmetric", True, default=True)
        weights.check("dynamic", False, default=False)
        weights.check("strategy", "group", "channel")
        weights.check("actorder", "weight", "static", False, default=False)  # these store nothing in another order
        bits.add(weights.check("num_bits", 4, 8))
    if len(bits) != 1:
        raise groups.refused(f"have {' and '.join(map(str, sorted(bits))) or 'no'} bits", "4 or 8 in all of them")
    return Method("compressed-tensors", COMPRESSED_TENSORS, *bits)
