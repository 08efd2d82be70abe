"""Whole folders: the tensors that are read are those that transformers loads, or the folder is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.conftest import edit_json

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import TensorReader, open_checkpoint
from edgeskip.exporter.reference import reference_model
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.errors import CheckpointError
from edgeskip.runtime.sampling import Sampling

HEAD, TABLE, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A checkpoint to change; its head is not tied."""
    return Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors, name="model.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def shard(folder, shards, places):
    """In place of the single file: tensors by file, and an index."""
    (folder / "model.safetensors").unlink()
    for name, tensors in shards.items():
        write(folder, tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read(folder, warn=lambda _: None):
    """All tensors that an export would read."""
    checkpoint = open_checkpoint(str(folder), warn=warn)
    with TensorReader(checkpoint) as reader:
        tensors = {name: np.concatenate(list(reader.blocks(name))) for name in checkpoint.tensors}
    if checkpoint.architecture.tie_word_embeddings:
        assert HEAD not in tensors
        tensors[HEAD] = tensors[TABLE]
    return tensors


def judged(folder):
    """All tensors of the model that transformers loads, every one of them from the files."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same(tensors, wanted):
    assert set(tensors) == set(wanted)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), wanted[name], err_msg=name)


def other(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))


def renamed(change):
    return lambda folder: write(folder, {change(name): tensor for name, tensor in weights(folder).items()})


def tied(folder):
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))


def of_a_base_model(folder):
    tied(folder)
    tensors = weights(folder)
    del tensors[HEAD]
    write(folder, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def tied_and_twice_the_same(folder):
    tied(folder)
    tensors = weights(folder)
    write(folder, tensors | {HEAD: tensors[TABLE].clone()})


def tied_and_only_the_head(folder):
    tied(folder)
    tensors = weights(folder)
    del tensors[TABLE]
    write(folder, tensors)


def an_index_beside_the_file(folder):
    """Of an earlier save, with other values."""
    tensors = weights(folder)
    write(folder, {name: other(tensor) for name, tensor in tensors.items()}, "model-00001-of-00001.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def a_name_in_two_shards(folder):
    tensors = weights(folder)
    shards = {
        "model-1.safetensors": tensors | {DOWN: other(tensors[DOWN])},
        "model-2.safetensors": {DOWN: tensors[DOWN]},
    }
    shard(folder, shards, dict.fromkeys(tensors, "model-1.safetensors") | {DOWN: "model-2.safetensors"})


def a_name_that_no_index_places(folder):
    tensors = weights(folder)
    places = dict.fromkeys(tensors, "model-1.safetensors")
    del places[DOWN]
    shard(folder, {"model-1.safetensors": tensors}, places)


def stray_files(folder):
    write(folder, {NORM: other(weights(folder)[NORM])}, "model-00002-of-00002.safetensors")
    write(folder, {"x": torch.zeros(1)}, "optimizer.safetensors")


TAKEN = {
    "as it was saved": lambda folder: None,
    "without model.": renamed(lambda name: name.removeprefix("model.")),
    "with model. twice": renamed(lambda name: name.replace("model.", "model.model.", 1)),
    "the head with model.": renamed(lambda name: f"model.{name}" if name == HEAD else name),
    "a base model, tied": of_a_base_model,
    "tied": lambda folder: (tied(folder), write(folder, {k: t for k, t in weights(folder).items() if k != HEAD})),
    "tied, and a head of its own": tied,
    "tied, and the table twice": tied_and_twice_the_same,
    "tied, and only the head": tied_and_only_the_head,
    "an index beside the file": an_index_beside_the_file,
    "a name in two shards": a_name_in_two_shards,
    "a name that no index places": a_name_that_no_index_places,
    "stray files": stray_files,
    "frequencies of RoPE": lambda folder: write(
        folder, weights(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    ),
    "in 64 bits": lambda folder: write(folder, {k: tensor.double() for k, tensor in weights(folder).items()}),
    "in several dtypes": lambda folder: write(
        folder, {k: tensor.half() if "mlp" in k else tensor.bfloat16() for k, tensor in weights(folder).items()}
    ),
    "another dtype than config.json says": lambda folder: edit_json(
        folder / "config.json", lambda config: config.update(dtype="bfloat16")
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_read_is_what_transformers_loads(name, folder):
    TAKEN[name](folder)
    tensors, wanted = read(folder), judged(folder)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    assert_same(tensors, wanted)


def test_the_index_counts_whatever_the_order_of_the_shards(folder):
    """Transformers reads the last of them; a user who edits an index means what it says, and is told."""
    tensors = weights(folder)
    shards = {
        "model-1.safetensors": {DOWN: tensors[DOWN]},
        "model-2.safetensors": tensors | {DOWN: other(tensors[DOWN])},
    }
    shard(folder, shards, dict.fromkeys(tensors, "model-2.safetensors") | {DOWN: "model-1.safetensors"})
    warnings = []
    assert_same(read(folder, warnings.append), {name: tensor.numpy() for name, tensor in tensors.items()})
    assert [warning.partition(": ")[2] for warning in warnings] == [
        f"also has {DOWN}, which transformers would use; the one in model-1.safetensors is used, as the index says"
    ]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("an index beside the file", "model.safetensors is used, as in transformers, and not the shards of"),
        (
            "tied, and a head of its own",
            "ties the head to the embeddings, but the weights have a separate one; it is used",
        ),
    ],
)
def test_a_folder_that_says_two_things_is_taken_with_a_warning(name, warning, folder):
    TAKEN[name](folder)
    warnings = []
    read(folder, warnings.append)
    assert len(warnings) == 1
    assert warning in warnings[0]


def test_a_head_of_its_own_is_exported_and_judged_as_such(folder, tmp_path):
    tied(folder)
    bundle = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(2))
    assert not bundle.manifest.architecture.tie_word_embeddings
    tokens = torch.arange(2, 30)[None]
    with torch.inference_mode():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(reference_model(bundle)(tokens).logits, wanted)


def without_a_head(folder):
    tensors = weights(folder)
    del tensors[HEAD]
    write(folder, tensors)


REFUSED = {
    "a base model without a head": (
        without_a_head,
        r"a model without a head: no tensor lm_head.weight, and config.json does not tie it to the embeddings",
    ),
    "one tensor under two names": (
        lambda folder: write(folder, weights(folder) | {"norm.weight": weights(folder)[NORM]}),
        "model.norm.weight and norm.weight are one tensor of the model",
    ),
    "under DataParallel's names": (renamed(lambda name: f"module.{name}"), "no tensor model.embed_tokens.weight"),
    "a head of another size": (
        lambda folder: (tied(folder), write(folder, weights(folder) | {HEAD: torch.zeros(301, 64)})),
        r"lm_head.weight has shape \[301, 64\]; wanted \[300, 64\]",
    ),
    "whole numbers": (
        lambda folder: write(folder, weights(folder) | {HEAD: torch.zeros(300, 64, dtype=torch.int8)}),
        "lm_head.weight has dtype I8; wanted F64, F32, F16, BF16; export an unquantized model",
    ),
    "a pointer of Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0"
        ),
        "model.safetensors: a pointer of Git LFS, not the file; run `git lfs pull` there",
    ),
    "an index that names no files": (
        lambda folder: shard(folder, {}, {NORM: 1}),
        "no weight_map of tensors to files",
    ),
    "a link to nothing": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors").symlink_to("../blobs/0"),
        ),
        "model.safetensors: a link to nothing; wanted a file of weights; download the checkpoint again",
    ),
    "a shard with a name too long": (lambda folder: shard(folder, {}, {NORM: "x" * 300}), "File name too long"),
    "a shard elsewhere": (lambda folder: shard(folder, {}, {NORM: "sub/x.safetensors"}), "leads out of the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_by_name(name, folder, tmp_path):
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(2))


def test_settings_that_would_change_a_greedy_text_are_told(folder):
    settings = {"temperature": 0.6, "top_k": 20, "do_sample": True, "num_beams": 1, "repetition_penalty": 1.1}
    edit_json(folder / "generation_config.json", lambda config: config.update(settings))
    warnings = []
    found = open_checkpoint(str(folder), warn=warnings.append)
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "asks for repetition_penalty 1.1, which is not applied: a text is what the model itself finds most likely"
    ]
    assert found.sampling == Sampling(0.6, top_k=20)
    edit_json(folder / "generation_config.json", lambda config: config.update(do_sample=False))
    assert open_checkpoint(str(folder)).sampling == Sampling(0, top_k=20)
    edit_json(folder / "generation_config.json", lambda config: config.update(top_k=0.5))
    with pytest.raises(CheckpointError, match=r"config\.json: top k: 0\.5; wanted a whole"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_licence_travels_where_it_is_the_checkpoints_own(place, folder, tmp_path):
    """Real files, or links into the blobs beside a snapshot, which is how the hub's cache is laid out."""
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    wanted = ["LICENSE"]
    (folder / "LICENSE").write_text("free")
    if place == "cache":
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
        folder = snapshot
    (folder / "LICENSE.txt").symlink_to(secret)
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "USE_POLICY.md").symlink_to("nothing")
    warnings = []
    checkpoint = open_checkpoint(str(folder), warn=warnings.append)
    assert [path.name for path in checkpoint.licences] == [*wanted, "NOTICE"]
    assert warnings == [f"{folder / 'LICENSE.txt'}: left out, as it is a link out of the checkpoint"]
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(2))
    assert [path for path in bundle.folder.iterdir() if b"secret" in path.read_bytes()] == []
    assert bundle.path("NOTICE").read_text() == "free"


def test_a_licence_of_any_name_travels_but_not_of_any_size(folder, tmp_path):
    name = f"LICENSE é {'x' * 230}"
    (folder / name).write_text("free")
    bundle = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(2))
    assert [path.read_text() for path in read_bundle(bundle.folder).folder.glob("LICENSE*")] == ["free"]
    with (folder / "NOTICE").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="NOTICE: is too large"):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "other", ExportSettings(2))


def test_a_chat_template_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: is a link out of the checkpoint"):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportSettings(2))
