"""From a checkpoint's config.json to an `Architecture`, refusing what would change the mathematics.

Every key is either read, known to be inert at inference, or refused by name: a model is never exported wrongly
because of a field that nobody looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from edgeskip.runtime.architecture import Architecture, Rope
from edgeskip.runtime.errors import CheckpointError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "hidden_act",
}  # fmt: skip

_INERT = {
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


def architecture_from_config(config: Mapping[str, Any], place: object) -> Architecture:
    """Reads a config.json, of transformers 4 or 5.

    Args:
        config: the parsed file.
        place: its path, for messages.

    Raises:
        CheckpointError: a model type, RoPE type or field that is not handled, or a missing or malformed one.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED:
        raise CheckpointError(place, f"model_type {model_type!r}", wanted=f"one of {', '.join(SUPPORTED)}")
    _refuse_unknown(config, place)

    def whole(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(place, f"{key} is {value!r}", wanted="a positive whole number")
        return value

    hidden_size, num_heads = whole("hidden_size"), whole("num_attention_heads")
    head_dim = whole("head_dim", 128 if model_type == "qwen3" else max(hidden_size // num_heads, 1))
    num_kv_heads = whole("num_key_value_heads", {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(model_type, num_heads))
    if num_heads % num_kv_heads:
        raise CheckpointError(
            place, f"{num_heads} attention heads over {num_kv_heads} KV heads", wanted="a whole ratio"
        )
    if head_dim % 2:
        raise CheckpointError(place, f"head_dim {head_dim}", wanted="an even number, for RoPE")
    attention_bias = bool(config.get("attention_bias", False))
    return Architecture(
        model_type=model_type,
        num_layers=whole("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=whole("vocab_size"),
        max_position_embeddings=_context(config, whole("max_position_embeddings", 2048)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, place),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias and model_type != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
    )


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that attention looks back over, or None where it sees all: Mistral always, Qwen where switched on."""
    window = config.get("sliding_window")
    if config.get("model_type") in ("qwen2", "qwen3"):
        layer_types = config.get("layer_types") or []
        if not config.get("use_sliding_window") and "sliding_attention" not in layer_types:
            return None
    return int(window) if window else None


def _refuse_unknown(config: Mapping[str, Any], place: object) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(place, f"hidden_act {activation!r}", wanted="'silu'")
    others = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise CheckpointError(place, f"layer_types has {sorted(others)[0]!r}", wanted="'full_attention'")
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


def _context(config: Mapping[str, Any], max_position_embeddings: int) -> int:
    return min(max_position_embeddings, sliding_window(config) or max_position_embeddings)


def _rope(config: Mapping[str, Any], place: object) -> Rope:
    """Either spelling: rope_theta with rope_scaling, or rope_parameters with both."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None)
    kind = parameters.pop("type", kind) if kind is None else kind
    parameters.pop("type", None)
    kind = kind or "default"
    keys = _ROPE_KEYS.get(kind)
    if keys is None:
        raise CheckpointError(place, f"RoPE type {kind!r}", wanted="default, linear or llama3")
    if float(parameters.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        raise CheckpointError(place, "partial_rotary_factor is not 1", wanted="RoPE over the whole head")
    if kind == "default":
        parameters.pop("factor", None)
    for key in keys:
        if not isinstance(parameters.get(key), (int, float)):
            raise CheckpointError(place, f"RoPE type {kind!r} without {key}", wanted="a number")
    unknown = sorted(key for key in parameters if key not in keys)
    if unknown:
        raise CheckpointError(place, f"RoPE parameter {unknown[0]!r} is not handled for type {kind!r}")
    values = {key: parameters[key] for key in keys}
    return Rope(theta=float(theta), type=cast(Any, kind), **values)
