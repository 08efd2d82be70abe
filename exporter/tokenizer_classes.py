"""The tokenizer classes of transformers, and what each makes of a tokenizer.json.

Some take it as it is. Others take its vocabulary and merges alone, and have a normalizer, a pre-tokenizer, a decoder
and special tokens of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeskip.runtime.errors import CheckpointError

Settings = dict[str, Any]


@dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers.

    Args:
        name: the class.
        build: tokenizer.json as the class makes it from the vocabulary in the stored one and the settings; None takes
            the stored one.
        named, own: special tokens that it has where the settings are silent, those of `NAMED` and others.
        adds_bos: it adds BOS to a text, whatever tokenizer.json says.
        marks_all_special: it adds all special tokens once more.
    """

    name: str
    build: Callable[[Settings, Settings], Settings] | None = None
    named: Mapping[str, str | None] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    marks_all_special: bool = False


def _built(stored: Settings, model: Settings, normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Settings:
    """A tokenizer.json with the vocabulary, the merges and the post-processor of the stored one."""
    bare: Settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    bare |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    kept = {key: stored["model"][key] for key in ("type", "vocab", "merges")}
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "added_tokens": []}
    parts |= {"truncation": None, "padding": None}
    return stored | parts | {"model": bare | model | kept}


def _sentencepiece(stored: Settings, prepend: str, strip: bool, unk_token: str | None = None) -> Settings:
    """Spaces as ▁, other characters as bytes where the vocabulary has no token for them."""
    steps: list[Settings] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": False}
    model = {"unk_token": unk_token, "fuse_unk": True, "byte_fallback": True}
    return _built(stored, model, None, metaspace, {"type": "Sequence", "decoders": steps})


def _llama(stored: Settings, settings: Settings) -> Settings:
    prefix = settings.get("add_prefix_space") is None or bool(settings["add_prefix_space"])
    prepend = "never" if not prefix else "always" if settings.get("legacy") else "first"
    return _sentencepiece(stored, prepend, strip=prefix)


def _code_llama(stored: Settings, settings: Settings) -> Settings:
    prefix = settings.get("add_prefix_space") is None or bool(settings["add_prefix_space"])
    return _sentencepiece(
        stored, "first" if prefix else "never", strip=True, unk_token=str(settings.get("unk_token", "<unk>"))
    )


def _byte_level(add_prefix_space: Any, use_regex: bool) -> Settings:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _gpt2(stored: Settings, settings: Settings) -> Settings:
    words = _byte_level(settings.get("add_prefix_space", False), use_regex=True)
    return _built(stored, {}, None, words, _byte_level(True, use_regex=True))


def _qwen2(stored: Settings, settings: Settings) -> Settings:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    prefix = settings.get("add_prefix_space")
    steps = [split, _byte_level(False if prefix is None else prefix, use_regex=False)]
    words = {"type": "Sequence", "pretokenizers": steps}
    return _built(stored, {}, {"type": "NFC"}, words, _byte_level(True, use_regex=True))


_END = "<|endoftext|>"
_SENTENCEPIECE_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_STORED = TokenizerClass("PreTrainedTokenizerFast")
_CLASSES = {
    "PreTrainedTokenizer": _STORED,  # `Fast` is dropped from all names
    "TokenizersBackend": _STORED,
    "LlamaTokenizer": TokenizerClass("LlamaTokenizer", _llama, _SENTENCEPIECE_TOKENS),
    "CodeLlamaTokenizer": TokenizerClass(
        "CodeLlamaTokenizer", _code_llama, _SENTENCEPIECE_TOKENS, _INFILLING, adds_bos=True
    ),
    "GPT2Tokenizer": TokenizerClass(
        "GPT2Tokenizer", _gpt2, {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}
    ),
    "Qwen2Tokenizer": TokenizerClass(
        "Qwen2Tokenizer",
        _qwen2,
        {"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END},
        marks_all_special=True,
    ),
}


def tokenizer_class(place: Path, settings: Settings, config: Mapping[str, Any], byte_level: bool) -> TokenizerClass:
    """The class that transformers' AutoTokenizer takes for a model type and the class that the files name."""
    asked = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name, model_type = str(asked).removesuffix("Fast"), config.get("model_type")
    if model_type == "qwen2":  # known to name others wrongly
        name = "Qwen2Tokenizer"
    elif model_type == "mistral" or (name == "LlamaTokenizer" and byte_level):
        name = "TokenizersBackend"
    elif not name:
        name = "Qwen2Tokenizer" if model_type == "qwen3" else "TokenizersBackend"
    if name not in _CLASSES:
        wanted = f"PreTrainedTokenizerFast, {', '.join(kind.name for kind in _CLASSES.values() if kind.build)}"
        raise CheckpointError(place, f"tokenizer_class is {asked!r:.60}", wanted=wanted)
    return _CLASSES[name]
