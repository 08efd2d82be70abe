"""A folder that is no checkpoint is called what it is, with what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.errors import CheckpointError


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A checkpoint without its weights."""
    made = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (made / "model.safetensors").unlink()
    return made


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "adapter_config.json",
            json.dumps(ADAPTER),
            "a LoRA adapter of owner/base, not a whole model; merge it with peft",
        ),
        ("adapter_config.json", json.dumps({"peft_type": "IA3"}), r"an adapter \(IA3\), not a whole model"),
        ("adapter_model.safetensors", "", "a LoRA adapter, not a whole model"),
        ("manifest.json", "{}", r"a bundle of edgeskip, not a checkpoint \(manifest.json\)"),
        ("model-q4_k_m.gguf", "", r"GGUF weights, which llama.cpp reads \(model-q4_k_m.gguf\)"),
        ("pytorch_model-00001-of-00002.bin", "", "no safetensors, only pickled weights"),
        ("consolidated.00.pth", "", "no safetensors, only pickled weights"),
        ("consolidated.safetensors", "", "weights in their maker's own format"),
        ("tf_model.h5", "", "weights of TensorFlow or Flax"),
        ("model-00001-of-00002.safetensors", "", "shards of weights without model.safetensors.index.json"),
        ("model.fp16.safetensors", "", r"another name than model.safetensors \(model.fp16.safetensors\)"),
        ("model_index.json", "{}", "a pipeline of diffusers"),
        ("__0_0.distcp", "", "a distributed checkpoint of torch"),
        ("shard-00001-model-00001-of-00001.safetensors", "", "a distributed checkpoint of transformers"),
        ("decoder.onnx", "", "ONNX graphs, not a checkpoint"),
        (
            "checkpoint-500/config.json",
            "{}",
            r"a folder of checkpoints \(checkpoint-500/config.json\); give one of them",
        ),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_is_called_what_it_is(file, content, message, config, folder):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(content)
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_a_tokenizer_alone(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="a tokenizer without a model"):
        open_checkpoint(str(folder))


def test_an_adapter_beside_a_whole_model_is_refused(checkpoints, tmp_path):
    """With peft, transformers would load both."""
    folder = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(CheckpointError, match="a LoRA adapter of owner/base"):
        open_checkpoint(str(folder))


def test_shards_of_many_processes_count_before_a_model_beside_them(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (folder / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(CheckpointError, match="a distributed checkpoint of transformers"):
        open_checkpoint(str(folder))


def test_a_bundle_is_no_checkpoint(bundles):
    with pytest.raises(CheckpointError, match=r"a bundle of edgeskip, not a checkpoint .*; give the checkpoint"):
        open_checkpoint(str(bundles("llama-gqa").folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_what_stands_in_the_place_of_a_file_is_not_passed_over(name, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: (is )?a pipe; wanted a file"):
        open_checkpoint(str(folder))
