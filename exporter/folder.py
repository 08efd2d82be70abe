"""A checkpoint's folder: what it is if it is not a checkpoint, and which of its files are its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeskip.exporter.config import read_json
from edgeskip.exporter.index import INDEX, WEIGHTS
from edgeskip.runtime.errors import CheckpointError
from edgeskip.runtime.reading import kind_of

_MERGE = "merge it with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
_DOWNLOAD = "give the model in transformers' format, with config.json and safetensors"
_CONSOLIDATE = "load it with what wrote it, and save the whole model with save_pretrained"


@dataclass(frozen=True)
class Kind:
    """A kind of folder: files that show it, what it is, what to do, and whether a model beside them changes nothing."""

    files: tuple[str, ...]
    found: str
    fix: str
    anyway: bool = False


_KINDS = (
    Kind(("manifest.json",), "a bundle of edgeskip, not a checkpoint", "give the checkpoint that it was exported from"),
    Kind(("model_index.json",), "a pipeline of diffusers, not a language model", _DOWNLOAD),
    Kind(("*.gguf",), "GGUF weights, which llama.cpp reads", _DOWNLOAD),
    Kind(
        ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
        "no safetensors, only pickled weights",
        "save it again with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    ),
    Kind(("consolidated*.safetensors",), "weights in their maker's own format (consolidated.safetensors)", _DOWNLOAD),
    Kind(("shard-*-model-*-of-*.safetensors",), "a distributed checkpoint of transformers", _CONSOLIDATE, anyway=True),
    Kind((".metadata", "*.distcp"), "a distributed checkpoint of torch", _CONSOLIDATE),
    Kind(
        ("zero_to_fp32.py", "global_step*"),
        "a checkpoint of DeepSpeed",
        "make a whole one of it with its zero_to_fp32.py",
    ),
    Kind(("tf_model*.h5", "flax_model*.msgpack"), "weights of TensorFlow or Flax", _DOWNLOAD),
    Kind(
        ("model-*-of-*.safetensors",),
        "shards of weights without model.safetensors.index.json",
        "download the index, or save the model again with transformers",
    ),
    Kind(("rank*.safetensors", "*.engine"), "engines of another builder", _DOWNLOAD),
    Kind(
        ("*.safetensors",),
        "weights under another name than model.safetensors",
        "rename the file if it is the whole model",
    ),
    Kind(("*.onnx",), "ONNX graphs, not a checkpoint", _DOWNLOAD),
    Kind(("checkpoint-*/config.json",), "a folder of checkpoints", "give one of them"),
    Kind(
        ("snapshots/*/config.json",), "a repository in the hub's cache", "give the folder in snapshots, or its hub id"
    ),
)


def refuse_other_kinds(folder: Path) -> None:
    """Refuses a folder that cannot be a checkpoint, and says what else it is.

    Raises:
        CheckpointError: it holds an adapter, or something else in place of weights.
    """
    _refuse_adapter(folder)
    whole = any(kind_of(folder / name, CheckpointError) for name in (WEIGHTS, INDEX))
    for kind in _KINDS:
        for pattern in kind.files if kind.anyway or not whole else ():
            if names := sorted(str(path.relative_to(folder)) for path in folder.glob(pattern) if path.exists()):
                raise CheckpointError(folder, f"{kind.found} ({names[0]})", fix=kind.fix)
    has = {name for name in ("tokenizer.json", "config.json") if kind_of(folder / name, CheckpointError)}
    if has == {"tokenizer.json"} and not whole:
        raise CheckpointError(folder, "a tokenizer without a model", fix=_DOWNLOAD)


def _refuse_adapter(folder: Path) -> None:
    """Also next to a model's own files: where peft is installed, transformers loads the two together."""
    settings = folder / "adapter_config.json"
    weights = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    if not any(kind_of(path, CheckpointError) for path in (settings, *weights)):
        return
    config = read_json(settings) if kind_of(settings, CheckpointError) else {}
    method = config.get("peft_type", "LORA")
    kind = "a LoRA adapter" if method == "LORA" else f"an adapter ({method!s:.20})"
    base = config.get("base_model_name_or_path")
    base = f" of {base:.100}" if base and isinstance(base, str) else ""
    raise CheckpointError(folder, f"{kind}{base}, not a whole model", fix=_MERGE)


def is_own(folder: Path, path: Path) -> bool:
    """Whether a file in a checkpoint's folder is the checkpoint's own: a link may lead to something private.

    In the hub's cache, every file is a link from snapshots/COMMIT into the blobs folder next to it.
    """
    home = folder.resolve()
    own = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(path.resolve().is_relative_to(place) for place in own)
