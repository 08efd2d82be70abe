"""Export: what is in a bundle, and what happens when it cannot be written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import edit_json, make_model, save_checkpoint

import edgeskip
from edgeskip.exporter import checkpoint as checkpoint_module
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS
from edgeskip.runtime.errors import BundleError, CheckpointError, RequestError


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy of a checkpoint to spoil."""
    return Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))


def export(folder, destination, **settings):
    return export_bundle(open_checkpoint(str(folder)), destination, ExportSettings(**({"exit_layer": 2} | settings)))


def test_weights_are_there_once_in_order_and_aligned(bundles, reference):
    bundle, model = bundles("llama-tied"), reference("llama-tied")
    with safe_open(bundle.path(WEIGHTS), "pt") as file:
        names = [name for name in file.keys() if not name.startswith("padding.")]  # noqa: SIM118
        q, k, v = file.get_tensor("model.layers.1.self_attn.qkv_proj.weight").split([64, 32, 32])
        gate, up = file.get_tensor("model.layers.3.mlp.gate_up_proj.weight").split(96)
    layer1, layer3 = model.model.layers[1], model.model.layers[3]
    assert torch.equal(q, layer1.self_attn.q_proj.weight)
    assert torch.equal(k, layer1.self_attn.k_proj.weight)
    assert torch.equal(v, layer1.self_attn.v_proj.weight)
    assert torch.equal(gate, layer3.mlp.gate_proj.weight)
    assert torch.equal(up, layer3.mlp.up_proj.weight)
    assert "lm_head.weight" not in names
    header_size = int.from_bytes(bundle.path(WEIGHTS).read_bytes()[:8], "little")
    header = json.loads(bundle.path(WEIGHTS).read_bytes()[8 : 8 + header_size])
    assert all((8 + header_size + header[name]["data_offsets"][0]) % 64 == 0 for name in names)
    assert set(names) == set(header) - {"__metadata__"} - {n for n in header if n.startswith("padding.")}


def test_a_sharded_bf16_checkpoint_gives_the_same_bundle_as_a_single_file(tmp_path):
    model = make_model("llama-gqa").to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "one")
    save_checkpoint(model, tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    hashes = {
        export(tmp_path / name, tmp_path / f"{name}-bundle").manifest.files[WEIGHTS].sha256 for name in ("one", "many")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_dtypes_are_converted_as_torch_converts(stored, dtype, torch_dtype, tmp_path):
    model = make_model("llama-gqa").to(stored)
    save_checkpoint(model, tmp_path / "checkpoint")
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle", dtype=dtype)
    with safe_open(bundle.path(WEIGHTS), "pt") as file:
        assert torch.equal(
            file.get_tensor("model.embed_tokens.weight"), model.model.embed_tokens.weight.to(torch_dtype)
        )


def test_a_bundle_is_complete_and_small(checkpoint, tmp_path):
    (checkpoint / "LICENSE.txt").write_text("free")
    edit_json(checkpoint / "generation_config.json", lambda c: c.update(eos_token_id=[1, 7]))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    bundle = export(checkpoint, tmp_path / "deep" / "bundle", max_length=50, num_speculations=3)
    on_disk = {p.name: p for p in bundle.folder.iterdir()}
    assert set(on_disk) == set(bundle.manifest.files) | {MANIFEST}
    assert {"LICENSE.txt", "chat_template.jinja", "tokenizer.json"} <= set(on_disk)
    for name, record in bundle.manifest.files.items():
        assert hashlib.sha256(on_disk[name].read_bytes()).hexdigest() == record.sha256
    assert bundle.manifest.eos_token_ids == (1, 7)
    assert (bundle.manifest.max_length, bundle.manifest.num_speculations) == (50, 3)
    moved = shutil.move(bundle.folder, tmp_path / "elsewhere")
    with edgeskip.load(moved) as model:
        assert model.complete("a", max_new_tokens=3).statistics.new_tokens == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": 0}, "exit layer: 0; wanted 1 to 3: the model has 4 layers"),
        ({"exit_layer": 4}, "exit layer: 4; wanted 1 to 3"),
        ({"exit_layer": -1}, "exit layer: -1"),
        ({"max_length": 97}, "max length: 97; wanted 2 to 96: the model's context"),
        ({"max_length": 1}, "max length: 1"),
        ({"num_speculations": 0}, "num speculations: 0; wanted 1 to 16"),
        ({"num_speculations": 17}, "num speculations: 17"),
    ],
)
def test_settings_that_the_model_cannot_have(settings, message, checkpoint, tmp_path):
    with pytest.raises(RequestError, match=message):
        export(checkpoint, tmp_path / "bundle", **settings)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_length_beyond_the_sliding_window_is_refused(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("mistral"), tmp_path / "mistral"))
    edit_json(folder / "config.json", lambda c: c.update(sliding_window=32))
    with pytest.raises(RequestError, match="wanted 2 to 32: its attention window is 32"):
        export(folder, tmp_path / "bundle", max_length=64)
    assert export(folder, tmp_path / "bundle").manifest.max_length == 32


def spoil(name):
    def decorate(function):
        SPOILED[name] = function
        return function

    return decorate


SPOILED = {}


@spoil("no config.json")
def _(folder):
    (folder / "config.json").unlink()
    return "config.json: no such file"


@spoil("config.json cut short")
def _(folder):
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json: not valid JSON"


@spoil("config.json a list")
def _(folder):
    (folder / "config.json").write_text("[]")
    return "config.json: not a JSON object"


@spoil("no tokenizer.json")
def _(folder):
    (folder / "tokenizer.json").unlink()
    return "no tokenizer.json; save it again with transformers"


@spoil("only tokenizer.model")
def _(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    return "only tokenizer.model, without tokenizer.json"


@spoil("no weights")
def _(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors: no such file"


@spoil("pickled weights")
def _(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "no safetensors, only pickled weights"


@spoil("weights cut short")
def _(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    return "model.safetensors: not a whole safetensors file"


@spoil("weights empty")
def _(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return "model.safetensors: not a whole safetensors file"


@spoil("missing shard")
def _(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00002-of-00002.safetensors: no such file"


@spoil("shard outside the folder")
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    return "leads out of the folder"


@spoil("index names a tensor that the shard lacks")
def _(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lost": "model-1.safetensors"}}))
    return "model-1.safetensors: lacks lost"


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@spoil("a tensor missing")
def _(folder):
    edit_weights(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    return "no tensor model.layers.2.mlp.up_proj.weight"


@spoil("a tensor too many")
def _(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    return "has model.layers.0.self_attn.q_norm.weight, for which config.json has no place"


@spoil("a tensor of another shape")
def _(folder):
    edit_json(folder / "config.json", lambda c: c.update(intermediate_size=80))
    return r"gate_proj.weight has shape \[96, 64\]; wanted \[80, 64\], by config.json"


@spoil("quantized weights")
def _(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    return "lm_head.weight has dtype I8; wanted F64, F32, F16, BF16"


@spoil("a value that is not finite")
def _(folder):
    edit_weights(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    return "model.norm.weight has values that are not finite in fp32; the checkpoint is damaged"


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_one_line_and_leaves_nothing(name, checkpoint, tmp_path):
    message = SPOILED[name](checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        export(checkpoint, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_value_too_large_for_fp16_is_refused_with_its_name(checkpoint, tmp_path):
    edit_weights(checkpoint, lambda t: t["model.layers.1.mlp.down_proj.weight"][0, 0].fill_(1e5))
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.down_proj.weight has values .* fp16; export in another dtype"
    ):
        export(checkpoint, tmp_path / "bundle", dtype="fp16")
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nowhere", "wanted a model folder or a hub id"),
        ("owner/name", "not in the local cache and the hub was not reached"),
        ("own er/na me", "neither a folder nor a valid hub id"),
    ],
)
def test_a_source_that_is_not_there(source, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, offline=True)


def test_of_the_hub_s_folders_only_chat_templates_are_downloaded():
    names = ["model.safetensors", "config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    others = [
        "original/model.safetensors",
        "onnx/config.json",
        "adapter/adapter_config.json",
        "consolidated.00.safetensors",
    ]
    chosen = filter_repo_objects(
        names + others,
        allow_patterns=checkpoint_module._HUB_PATTERNS,
        ignore_patterns=checkpoint_module._HUB_DUPLICATES,
    )
    assert list(chosen) == names


def test_an_existing_destination_is_left_alone(checkpoint, tmp_path):
    destination = tmp_path / "bundle"
    destination.mkdir()
    (destination / "mine").write_text("precious")
    with pytest.raises(BundleError, match="already exists"):
        export(checkpoint, destination)
    assert (destination / "mine").read_text() == "precious"


def test_a_destination_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        export(checkpoint, tmp_path / "file" / "bundle")


def test_a_full_disk_is_refused_before_the_work(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match="0 MB free on the disk; wanted 1 MB; free some room"):
        export(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_disk_that_fills_up_during_the_export_leaves_nothing(checkpoint, tmp_path):
    """A limit on the size of files makes the write itself fail, as a full disk does."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from edgeskip.cli import main; main(sys.argv[1:])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "export", str(checkpoint), str(tmp_path / "bundle"), "-e", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 4
    assert "cannot be written (File too large)" in out.stderr
    assert "Traceback" not in out.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_ctrl_c_during_the_export_leaves_nothing(checkpoints, tmp_path):
    """The process interrupts itself when the first weights are written."""
    code = (
        "import contextlib, os, signal, sys; from edgeskip import cli; from edgeskip.runtime import terminal\n"
        "interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "terminal.progress_bar = lambda: contextlib.nullcontext(interrupt)\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["export", checkpoints("llama-gqa"), tmp_path / "bundle", "-e", "2"]
    out = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert out.returncode == 130
    assert out.stderr == "edgeskip: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_export_streams_so_memory_stays_below_the_weights(tmp_path):
    """Anonymous memory of the process, by the kernel, while it exports 460 MB (fp16) of weights."""

    folder = tmp_path / "checkpoint"
    model = make_model(
        "llama-gqa", vocab_size=200_000, hidden_size=512, num_attention_heads=8, tie_word_embeddings=True
    )
    save_checkpoint(model.to(torch.bfloat16), folder)
    del model
    code = (
        "import sys, re, pathlib\n"
        "from edgeskip.exporter.bundle import *; from edgeskip.exporter.checkpoint import open_checkpoint\n"
        "anonymous = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "peak = 0\n"
        "def watch(*_):\n"
        "    global peak; peak = max(peak, anonymous())\n"
        "export_bundle(open_checkpoint(sys.argv[1]), pathlib.Path(sys.argv[2]), ExportSettings(2, 'fp32'), watch)\n"
        "print(peak)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "bundle")], capture_output=True, text=True, check=True
    )
    written = (tmp_path / "bundle" / WEIGHTS).stat().st_size
    assert written > 400e6
    assert int(out.stdout) < 0.75 * written
