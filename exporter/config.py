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
    MOST_WEIGHTS,
    Architecture,
    Rope,
)
from edgeskip.runtime.bundle.tensors import num_weights
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
    # where it comes from, what reads it, which tokens are special
    "_commit_hash", "_name_or_path", "name_or_path", "architectures", "auto_map", "custom_pipelines", "model_name",
    "tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "transformers_version",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "unsloth_bnb_4bit_use_double_quant",
    "is_llama_config", "model_max_length", "max_sequence_length", "max_seq_len", "seq_length",
    "bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "cls_token_id", "mask_token_id", "end_token_id", "decoder_start_token_id",
    # how it is held and run
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention",
    "chunk_size_feed_forward", "dtype", "torch_dtype", "use_bfloat16", "gradient_checkpointing",
    "is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict",
    "tensor_parallel_degree", "torchscript", "tf_legacy_loss", "use_cache", "cache_implementation",
    # training, and heads of other tasks
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout",
    "hidden_dropout", "hidden_dropout_prob", "classifier_dropout", "initializer_range", "finetuning_task", "id2label",
    "label2id", "num_labels", "problem_type", "prefix", "task_specific_params", "neftune_noise_alpha",
    # generation, which generation_config.json took over
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip

QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Keys that say how a checkpoint was quantized; quantization/methods.py reads them."""

_ROPE_KEYS: dict[Any, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_LAYER_TYPES = ("full_attention", "sliding_attention")

_REQUIRED_VALUE: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "is_causal": (True, None),
    "use_rope": (True, None),
}
"""Keys that are harmless only at these values; for any other key, `false` switches off what the model does not have."""

_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128,
    },
}  # fmt: skip
"""What transformers takes for a key that is absent; null is a different matter."""


def read_json(path: Path, otherwise: str = "download the checkpoint again") -> dict[str, Any]:
    """Reads a JSON object; `otherwise` says what to do if there is no such file.

    Raises:
        CheckpointError: there is no JSON object.
    """
    if not reading.kind_of(path, CheckpointError):
        raise CheckpointError(path, "no such file", fix=otherwise)
    data = reading.read_json(path, CheckpointError, fix="download the checkpoint again")
    if not isinstance(data, dict):
        raise CheckpointError(path, "not a JSON object", fix="download the checkpoint again")
    return data


def architecture_from_config(config: Mapping[str, Any], place: object) -> Architecture:
    """Reads a config.json written by transformers 4 or 5.

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
    fields = _Fields(_DEFAULTS[model_type] | dict(config), place)
    hidden_size, num_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if model_type == "llama" and hidden_size % num_heads:  # transformers refuses it even where head_dim is given
        raise CheckpointError(
            place, f"hidden_size {hidden_size} over {num_heads} attention heads", wanted="a whole ratio"
        )
    head_dim = fields.whole("head_dim", None if model_type == "qwen3" else max(hidden_size // num_heads, 1))
    num_kv_heads = fields.whole("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            place, f"{num_heads} attention heads over {num_kv_heads} KV heads", wanted="a whole ratio"
        )
    if head_dim % 2:
        raise CheckpointError(place, f"head_dim {head_dim}", wanted="an even number, for RoPE")
    attention_bias = fields.flag("attention_bias") and model_type in ("llama", "qwen3")
    context = fields.whole("max_position_embeddings", high=MOST_CONTEXT)
    architecture = Architecture(
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
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
    )
    if (weights := num_weights(architecture)) > MOST_WEIGHTS:
        raise CheckpointError(place, f"a model of {weights:.3g} weights", wanted=f"at most {MOST_WEIGHTS:.0e}")
    return architecture


@dataclass(frozen=True)
class _Fields:
    """A table of config.json, read key by key. `default` stands for a whole number that is absent or null, and for any
    other value that is absent.
    """

    table: Mapping[str, Any]
    place: object

    def whole(self, key: str, default: int | None = None, *, high: int = MOST_SIZE) -> int:
        value = default if self.table.get(key) is None else self.table[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted=f"a whole number from 1 to {high}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.table.get(key, default)
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not (1 / MOST_FLOAT <= value <= MOST_FLOAT)
        ):
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted="a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.table.get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(self.place, f"{key} is {value!r:.60}", wanted="true or false")
        return value


def sliding_window(config: Mapping[str, Any], place: object) -> int | None:
    """Tokens that a layer with a window looks back over; None if all layers see everything: always in Llama, and in
    Qwen if the window is switched off or begins after the last layer.
    """
    model_type = config["model_type"]
    fields = _Fields(_DEFAULTS[model_type] | dict(config), place)
    slides = model_type != "llama" and fields.table.get("sliding_window") is not None
    layer_types = config.get("layer_types")
    if model_type in ("qwen2", "qwen3"):
        slides = fields.flag("use_sliding_window") and slides
        if layer_types is None:
            first = config.get("max_window_layers", 28)
            if type(first) is not int:
                raise CheckpointError(place, f"max_window_layers is {first!r:.60}", wanted="a whole number")
            slides = slides and first < fields.whole("num_hidden_layers", high=MOST_LAYERS)
    if layer_types is not None and model_type != "llama":
        if "sliding_attention" in layer_types and not slides:
            raise CheckpointError(place, "layer_types has 'sliding_attention', but there is no sliding_window")
        slides = "sliding_attention" in layer_types
    return fields.whole("sliding_window", high=MOST_CONTEXT) if slides else None


def _refuse_unknown(config: Mapping[str, Any], place: object) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(place, f"hidden_act {activation!r:.60}", wanted="'silu'")
    layer_types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if layer_types is not None:
        others = [kind for kind in layer_types if kind not in _LAYER_TYPES] if isinstance(layer_types, list) else []
        if others:
            raise CheckpointError(place, f"layer_types has {others[0]!r:.60}", wanted=f"{_LAYER_TYPES[0]!r}")
        if not isinstance(layer_types, list) or len(layer_types) != layers:
            wanted = f"a list for {layers!r:.9} layers"
            raise CheckpointError(place, f"layer_types is {layer_types!r:.60}", wanted=wanted)
    for key, value in config.items():
        if key in _REQUIRED_VALUE:
            if value not in _REQUIRED_VALUE[key]:
                raise CheckpointError(place, f"{key} is {value!r:.60}", wanted=f"{_REQUIRED_VALUE[key][0]!r}")
        elif key not in {*_READ, *_INERT, *QUANTIZED} and value is not None and value is not False:
            raise CheckpointError(
                place,
                f"{key} is {value!r:.60}, which may change the mathematics and is not handled",
                fix="remove it only if it has no effect on the model",
            )


def _rope(config: Mapping[str, Any], place: object) -> Rope:
    """Either spelling: rope_theta with rope_scaling, or rope_parameters with both. Of two tables, the older counts."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise CheckpointError(place, f"{key} is {config[key]!r:.60}", wanted="a table")
    parameters: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    fields = _Fields({"rope_theta": config.get("rope_theta", 10000.0)} | dict(parameters), place)
    kinds = [parameters[key] for key in ("rope_type", "type") if key in parameters] or ["default"]
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
    return Rope(theta=fields.positive("rope_theta"), type=cast(Any, kind), **values)
