"""From a checkpoint's config.json to an `Architecture`, refusing what would change the mathematics.

Every key is either read, known to be inert at inference, or refused by name: a model is never exported wrongly
because of a field that nobody looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edgeskip.runtime import reading
from edgeskip.runtime.bundle.architecture import (
    MODEL_TYPES,
    MOST_CONTEXT,
    MOST_LAYERS,
    MOST_SIZE,
    Architecture,
    Rope,
)
from edgeskip.runtime.errors import CheckpointError
from edgeskip.runtime.structure import MOST_FLOAT

_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "hidden_act",
}  # fmt: skip

SYNTHETIC = "edgeskip_synthetic"
"""The key of a checkpoint that `edgeskip synth` made, with what it measured."""

_INERT = {
    SYNTHETIC,
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_max_length", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "use_cache", "_attn_implementation", "_attn_implementation_autoset",
    "tokenizer_class", "torchscript", "hidden_dropout", "attention_probs_dropout_prob",
}  # fmt: skip

_ROPE_KEYS: dict[Any, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_REQUIRED_VALUE: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
}
"""Keys that are harmless only at these values."""


def read_json(path: Path, otherwise: str = "download the checkpoint again") -> dict[str, Any]:
    """Reads a JSON object; `otherwise` says what to do where there is no such file.

    Raises:
        CheckpointError: there is none.
    """
    if not reading.kind_of(path, CheckpointError):
        raise CheckpointError(path, "no such file", fix=otherwise)
    data = reading.read_json(path, CheckpointError, fix="download the checkpoint again")
    if not isinstance(data, dict):
        raise CheckpointError(path, "not a JSON object", fix="download the checkpoint again")
    return data


def architecture_from_config(config: Mapping[str, Any], place: object) -> Architecture:
    """Reads a config.json, of transformers 4 or 5.

    Args:
        config: the parsed file.
        place: its path, for messages.

    Raises:
        CheckpointError: a model type, RoPE type or field that is not handled, or a missing or malformed one.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(place, f"model_type {model_type!r}", wanted=f"one of {', '.join(MODEL_TYPES)}")
    _refuse_unknown(config, place)
    fields = _Fields(config, place)
    hidden_size, num_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    head_dim = fields.whole("head_dim", 128 if model_type == "qwen3" else max(hidden_size // num_heads, 1))
    kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(model_type, num_heads)
    num_kv_heads = fields.whole("num_key_value_heads", kv_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            place, f"{num_heads} attention heads over {num_kv_heads} KV heads", wanted="a whole ratio"
        )
    if head_dim % 2:
        raise CheckpointError(place, f"head_dim {head_dim}", wanted="an even number, for RoPE")
    attention_bias = fields.flag("attention_bias")
    context = fields.whole("max_position_embeddings", 2048, high=MOST_CONTEXT)
    return Architecture(
        model_type=model_type,
        num_layers=fields.whole("num_hidden_layers", high=MOST_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.whole("vocab_size"),
        max_position_embeddings=min(context, sliding_window(config, place) or context),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=_rope(config, place),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias and model_type != "qwen2",
        mlp_bias=fields.flag("mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
    )


@dataclass(frozen=True)
class _Fields:
    """A table of config.json, read key by key; an absent or null key takes the default."""

    table: Mapping[str, Any]
    place: object

    def whole(self, key: str, default: int | None = None, *, high: int = MOST_SIZE) -> int:
        value = default if self.table.get(key) is None else self.table[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted=f"a whole number from 1 to {high}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = default if self.table.get(key) is None else self.table[key]
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not (1 / MOST_FLOAT <= value <= MOST_FLOAT)
        ):
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted="a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.table.get(key) or False
        if value is not True and value is not False:
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted="true or false")
        return value


def sliding_window(config: Mapping[str, Any], place: object) -> int | None:
    """Tokens that attention looks back over, or None where it sees all: Mistral always, Qwen where switched on."""
    if config.get("model_type") in ("qwen2", "qwen3"):
        layer_types = config.get("layer_types") or []
        if not config.get("use_sliding_window") and "sliding_attention" not in layer_types:
            return None
    return (
        None
        if config.get("sliding_window") is None
        else _Fields(config, place).whole("sliding_window", high=MOST_CONTEXT)
    )


def _refuse_unknown(config: Mapping[str, Any], place: object) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(place, f"hidden_act {activation!r}", wanted="'silu'")
    layer_types = config.get("layer_types") or []
    others = [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]
    if others:
        raise CheckpointError(place, f"layer_types has {others[0]!r:.60}", wanted="'full_attention'")
    for key, value in config.items():
        if key in _REQUIRED_VALUE:
            if value not in _REQUIRED_VALUE[key]:
                raise CheckpointError(place, f"{key} is {value!r}", wanted=f"{_REQUIRED_VALUE[key][0]!r}")
        elif key not in _READ and key not in _INERT and value is not None:
            raise CheckpointError(
                place,
                f"{key} is {value!r:.60}, which may change the mathematics and is not handled",
                fix="remove it only if it has no effect on the model",
            )


def _rope(config: Mapping[str, Any], place: object) -> Rope:
    """Either spelling: rope_theta with rope_scaling, or rope_parameters with both."""
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = config.get(key) or {}
        if not isinstance(table, Mapping):
            raise CheckpointError(place, f"{key} is {table!r:.60}", wanted="a table")
        parameters.update(table)
    fields = _Fields({"rope_theta": config.get("rope_theta")} | parameters, place)
    kinds = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or any(other != kind for other in kinds) or kind not in _ROPE_KEYS:
        raise CheckpointError(place, f"RoPE type {kinds[-1]!r:.60}", wanted="default, linear or llama3")
    if fields.positive("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(place, "partial_rotary_factor is not 1", wanted="RoPE over the whole head")
    keys = _ROPE_KEYS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *keys, *(["factor"] if not keys else [])}
    unknown = sorted(key for key in parameters if key not in known)
    if unknown:
        raise CheckpointError(place, f"RoPE parameter {unknown[0]!r} is not handled for type {kind!r}")
    for key in keys:
        if parameters.get(key) is None:
            raise CheckpointError(place, f"RoPE type {kind!r} without {key}", wanted="a number")
    values: dict[str, Any] = {key: fields.positive(key) for key in keys}
    if kind == "llama3":
        values["original_max_position_embeddings"] = fields.whole("original_max_position_embeddings", high=MOST_CONTEXT)
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise CheckpointError(place, "low_freq_factor is not below high_freq_factor")
    return Rope(theta=fields.positive("rope_theta", 10000.0), type=cast(Any, kind), **values)
