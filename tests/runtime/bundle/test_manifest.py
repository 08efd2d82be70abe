"""A bundle is read only if it is whole: each kind of damage is one line that names the file and the fix."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.conftest import edit_json

import edgeskip
from edgeskip.runtime.bundle.manifest import FORMAT_VERSION, MANIFEST, WEIGHTS, read_bundle, verify_hashes
from edgeskip.runtime.errors import BackendError, BundleError


@pytest.fixture
def folder(bundles, tmp_path):
    """A copy of a bundle to spoil."""
    return Path(shutil.copytree(bundles("llama-gqa").folder, tmp_path / "bundle"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_refused(folder, message, error=BundleError):
    with pytest.raises(error, match=message) as caught:
        edgeskip.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def flip_a_bit(path, at=100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rename_in_manifest(folder, old, new):
    edit_json(folder / MANIFEST, lambda m: m["files"].update({new: m["files"].pop(old)}))


def test_a_whole_bundle_is_read(folder, cache):
    bundle = read_bundle(folder)
    verify_hashes(bundle)
    assert bundle.manifest.exit_layer == 2
    assert bundle.manifest.max_length == bundle.manifest.architecture.max_position_embeddings == 96
    assert bundle.manifest.weights_bytes == (folder / WEIGHTS).stat().st_size
    assert json.loads(bundle.manifest.to_json()) == json.loads((folder / MANIFEST).read_text())


def test_no_such_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", "no such folder; give the folder that `edgeskip export` wrote")


def test_a_file_in_place_of_a_folder(folder):
    assert_refused(folder / MANIFEST, "a file; give the folder")


def test_a_folder_without_manifest(tmp_path):
    assert_refused(tmp_path, "no manifest.json, so not a bundle; make one with `edgeskip export`")


@pytest.mark.parametrize("name", ["draft.onnx", "head.ort.onnx", WEIGHTS, "tokenizer.json", "config.json"])
def test_a_changed_byte_in_any_file(name, folder, cache):
    flip_a_bit(folder / name)
    assert_refused(folder, f"{name}: sha256 is .*; wanted .* as exported; copy the bundle again or export it again")


@pytest.mark.parametrize("name", ["draft.ort.onnx", WEIGHTS, "tokenizer.json"])
def test_a_missing_file(name, folder):
    (folder / name).unlink()
    assert_refused(folder, f"{name}: missing; copy the bundle again")


def test_a_folder_in_place_of_a_file(folder):
    (folder / "head.onnx").unlink()
    (folder / "head.onnx").mkdir()
    assert_refused(folder, "head.onnx: missing")


def test_a_file_cut_short(folder):
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size - 1)
    assert_refused(folder, f"{WEIGHTS}: {size - 1} bytes; wanted {size}; copy the bundle again")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT_VERSION + 1, f"format version {FORMAT_VERSION + 1}; wanted {FORMAT_VERSION}; upgrade edgeskip"),
        (FORMAT_VERSION - 1, "export it again: edgeskip export CHECKPOINT NEW_BUNDLE --exit-layer 2 --dtype fp32"),
        ("1", "no format_version, so not a bundle's manifest"),
        (None, "no format_version"),
    ],
)
def test_another_format_version_is_told_before_anything_else(version, message, folder):
    edit_json(folder / MANIFEST, lambda m: (m.update(format_version=version, from_the_future=1), m.pop("source")))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("renumbered", "message"),
    [
        (False, "--draft-vocabulary 128 --keep-token-ids, and the options that its weights were"),
        (True, "--draft-vocabulary 128, and --calibration with the texts .*, and the options that its weights were"),
    ],
)
def test_the_command_that_exports_an_older_bundle_again_has_what_its_manifest_tells(renumbered, message, folder):
    told = {"num_speculations": 6, "heads": {"draft_head": {"vocabulary": 128}}, "renumbered": renumbered}
    edit_json(folder / MANIFEST, lambda m: m.update(format_version=FORMAT_VERSION - 1, quantization={"a": 1}, **told))
    assert_refused(folder, f"--num-speculations 6 {message}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/name", "edgeskip export owner/name NEW_BUNDLE --exit-layer 2 .* --num-speculations .$"),
        ("llama-1b", "edgeskip export CHECKPOINT NEW_BUNDLE .*, where CHECKPOINT is the folder of 'llama-1b'$"),
    ],
)
def test_that_command_names_a_checkpoint_where_it_can_be_found(source, message, folder):
    edit_json(folder / MANIFEST, lambda m: m.update(format_version=FORMAT_VERSION - 1, source=source))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format_version": 1', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "no format_version"),
        (b"null", "no format_version"),
        (b"[" * 100_000, "not valid JSON"),
        (f'{{"format_version": {FORMAT_VERSION}}}'.encode(), "key 'edgeskip_version' is missing"),
    ],
)
def test_a_malformed_manifest(text, message, folder):
    (folder / MANIFEST).write_bytes(text)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(exit_layer_=2), "unknown key 'exit_layer_'; did you mean 'exit_layer'?"),
        (
            lambda m: m["architecture"].update(hidden=64),
            "architecture: unknown key 'hidden'; did you mean",
        ),
        (lambda m: m.pop("max_length"), "key 'max_length' is missing"),
        (lambda m: m.update(dtype="int8"), "dtype: found 'int8'; wanted 'fp32' or 'fp16' or 'bf16'"),
        (lambda m: m.update(max_length="96"), "max_length: found '96'; wanted a whole number"),
        (lambda m: m.update(eos_token_ids=[1, "2"]), r"eos_token_ids\[1\]: found '2'; wanted a whole number"),
        (lambda m: m["files"][WEIGHTS].pop("sha256"), rf"files.{WEIGHTS}: key 'sha256' is missing"),
        (lambda m: m.update(exit_layer=0), r"exit_layer 0; wanted one of \(2,\)"),
        (lambda m: m.update(exit_layers=[4]), r"exit_layers \(4,\); wanted layers in order, of 1 to 3"),
        (lambda m: m.update(exit_layers=[3, 2]), r"exit_layers \(3, 2\); wanted layers in order, of 1 to 3"),
        (lambda m: m.update(exit_layers=[]), r"exit_layers \(\); wanted layers in order"),
        (lambda m: m["heads"]["head"].update(vocabulary=301), "head 'head' .*; wanted 1 to 300 rows"),
        (lambda m: m["heads"]["head"].update(vocabulary=299), "no greedy head knows the whole vocabulary"),
        (lambda m: m["heads"]["head"].update(picker="best"), "head 'head' .*; wanted 1 to 300 rows, by greedy"),
        (
            lambda m: m["formats"].update({"lm_head.weight": "int3"}),
            "formats: 'lm_head.weight' in 'int3', where fp32 has fp32",
        ),
        (lambda m: m["formats"].update({"lm_head": "fp32"}), "formats: 'lm_head' is no tensor of the model"),
        (
            lambda m: m["formats"].update({"lm_head.weight": "fp16"}),
            "formats: 'lm_head.weight' in 'fp16', where fp32 has fp32",
        ),
        (lambda m: m.update(exit_layer=3, exit_layers=[3]), "its graphs are not those of this version"),
        (lambda m: m["graphs"].pop("head"), "its graphs are not those of this version"),
        (lambda m: m["chains"]["2"].update(draft=["draft"]), "its graphs are not those of this version"),
        (lambda m: m.update(eos_token_ids=[300]), r"eos_token_ids \(300,\); wanted 0 to 299"),
        (lambda m: m.update(prefill_chunk=0), "prefill_chunk: found 0; wanted"),
        (lambda m: m["architecture"].update(head_dim=-1), "architecture.head_dim: found -1; wanted"),
        (lambda m: m["files"].pop("tokenizer.json"), "lists no tokenizer.json"),
        (lambda m: m["files"].pop("verify.ort.onnx"), "lists no verify.ort.onnx"),
    ],
)
def test_a_manifest_that_is_not_consistent(change, message, folder):
    edit_json(folder / MANIFEST, change)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(max_length=97),
        lambda m: m.update(dtype="fp16"),
        lambda m: m["architecture"].update(hidden_size=128),
        lambda m: m["architecture"].update(num_kv_heads=4),
        lambda m: m["architecture"].update(head_dim=32),
        lambda m: [
            part.update(change)
            for part, change in (
                (m["architecture"], {"vocab_size": 310}),
                (m["heads"]["head"], {"vocabulary": 310}),
                (m["graphs"]["head"]["head"], {"vocabulary": 310}),
            )
        ],
    ],
)
def test_a_manifest_of_other_weights(change, folder):
    edit_json(folder / MANIFEST, change)
    assert_refused(folder, "by its manifest; export the bundle again|max_length 97; wanted 2 to 96")


def test_a_graph_of_another_bundle(folder, bundles):
    data = bundles("llama-gqa", max_length=64).path("verify.cpu.onnx").read_bytes()
    (folder / "verify.cpu.onnx").write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder / MANIFEST, lambda m: m["files"].update({"verify.cpu.onnx": record}))
    assert_refused(folder, "verify.cpu.onnx: its tensors are not those of the manifest; export the bundle again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["architecture"].update(num_layers=10**9), "architecture.num_layers: found 1000000000; wanted"),
        (lambda m: m["architecture"].update(vocab_size=1 << 30), "architecture.vocab_size: found 1073741824; wanted"),
        (lambda m: m["architecture"].update(rms_norm_eps=10**400), "not valid JSON .a number of more than 40 digits"),
        (lambda m: m["architecture"]["rope"].update(theta=-1), "architecture.rope.theta: found -1; wanted"),
        (lambda m: m["architecture"]["rope"].update(theta=float("inf")), "architecture.rope.theta: found inf; wanted"),
        (lambda m: m.update(max_length=97), "max_length 97; wanted 2 to 96, the model's context"),
        (lambda m: m.update(max_length=1), "max_length 1; wanted 2 to 96"),
        (lambda m: m.update(prefill_chunk=97), "prefill_chunk 97; wanted 1 to 96"),
        (lambda m: m["files"][WEIGHTS].update(bytes=-1), f"files.{WEIGHTS}.bytes: found -1; wanted 0 to"),
        (lambda m: m.update(exit_layer=10**30), "exit_layer: found 1000"),
    ],
)
def test_numbers_are_bounded_before_anything_is_made_of_them(change, message, folder):
    edit_json(folder / MANIFEST, change)
    assert_refused(folder, message)


def test_a_link_that_leads_to_itself(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(BundleError, match=r"config\.json: cannot be looked up"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["../x.json", "sub/x.json", "{absolute}", "..", ".hidden", "", "a\\b", "x.json\n"])
def test_a_name_that_leads_out_of_the_folder(name, folder):
    """The file is there and as its record says, so nothing but its place is wrong."""
    name = name.format(absolute=folder.parent / "x.json")
    for place in (folder.parent / "x.json", folder / "sub" / "x.json"):
        place.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "config.json", place)
    rename_in_manifest(folder, "config.json", name)
    assert_refused(folder, "leads out of the bundle; do not use this bundle")


def test_a_link_that_leads_out_of_the_folder(folder):
    shutil.move(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")
    assert_refused(folder, "file 'config.json' leads out of the bundle")


def test_a_manifest_that_is_a_link_is_refused(folder):
    (folder / MANIFEST).rename(folder.parent / "m.json")
    (folder / MANIFEST).symlink_to("../m.json")
    assert_refused(folder, f"{MANIFEST}: a link, which may lead out of the bundle; do not use this bundle")


def test_a_changed_entry_of_the_manifest_is_found(folder):
    text = (folder / MANIFEST).read_text()
    data = json.loads(text)
    (folder / MANIFEST).write_text(json.dumps(data, sort_keys=True))  # no change of what it says
    read_bundle(folder)
    own = data.pop("sha256")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    assert own == hashlib.sha256(canonical).hexdigest()  # as docs/DESIGN.md has it
    assert data["eos_token_ids"] == [1]
    (folder / MANIFEST).write_text(json.dumps({**data, "eos_token_ids": [2], "sha256": own}))
    assert_refused(
        folder, rf"what it says has the sha256 .*; wanted {own[:12]}..., as written; copy the bundle again or"
    )
    (folder / MANIFEST).write_text(json.dumps(data))
    assert_refused(folder, "wanted one under 'sha256'; copy the bundle again or export it again")


def test_a_bundle_behind_a_link_is_read(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    with edgeskip.load(tmp_path / "link") as model:
        assert model.complete("a", max_new_tokens=2).statistics.new_tokens == 2


def test_a_bundle_in_bf16_is_refused_on_a_cpu(bundles):
    bundle = bundles("llama-gqa", dtype="bf16")
    assert_refused(bundle.folder, "bf16, which ONNX Runtime does not compute.*export with --dtype fp32", BackendError)


def hashed(folder):
    """The files that a load reads through, by what it reports."""
    reports = []
    verify_hashes(read_bundle(folder), lambda what, done, total: reports.append((what, done, total)))
    return reports


def test_the_first_check_reads_everything_and_the_second_nothing(folder, cache):
    total = sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    first = hashed(folder)
    assert {(what, whole) for what, _, whole in first} == {("checking the bundle", total)}
    assert [done for _, done, _ in first] == sorted(done for _, done, _ in first)
    assert first[-1][1] == total
    assert hashed(folder) == []


def test_a_touched_file_is_hashed_again(folder, cache):
    hashed(folder)
    os.utime(folder / WEIGHTS, ns=(1, 1))
    assert hashed(folder)
    assert hashed(folder) == []


def test_a_file_changed_after_the_check_is_found(folder, cache):
    hashed(folder)
    flip_a_bit(folder / WEIGHTS, at=-1)
    assert_refused(folder, f"{WEIGHTS}: sha256 is")
    assert_refused(folder, f"{WEIGHTS}: sha256 is")  # a failed check leaves no stamp


def test_a_file_changed_in_place_with_its_time_set_back_is_found(folder, cache):
    hashed(folder)
    stat = (folder / WEIGHTS).stat()
    flip_a_bit(folder / WEIGHTS, at=-1)
    os.utime(folder / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_ino == stat.st_ino
    assert_refused(folder, f"{WEIGHTS}: sha256 is")


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_found(folder, cache):
    hashed(folder)
    stat = (folder / WEIGHTS).stat()
    shutil.copy(folder / WEIGHTS, folder / "other")
    flip_a_bit(folder / "other")
    (folder / "other").replace(folder / WEIGHTS)
    os.utime(folder / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_refused(folder, f"{WEIGHTS}: sha256 is")


def test_a_manifest_with_other_hashes_is_checked_again(folder, cache):
    hashed(folder)
    edit_json(folder / MANIFEST, lambda m: m["files"][WEIGHTS].update(sha256="0" * 64))
    assert_refused(folder, "wanted 000000000000")


def test_a_moved_bundle_is_checked_where_it_is(folder, cache):
    hashed(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    assert hashed(moved)
    assert hashed(moved) == []


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed(folder)
    assert hashed(folder)


def test_a_user_without_a_home_is_no_error(folder, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    assert hashed(folder)
    assert hashed(folder)


@pytest.mark.parametrize("text", [b"", b"{}", b"[[", b"\xff"])
def test_a_spoiled_stamp_is_not_believed(text, folder, cache):
    hashed(folder)
    (stamp,) = cache.rglob("*.json")
    stamp.write_bytes(text)
    assert hashed(folder)
    assert hashed(folder) == []


def test_hashes_are_compared_before_any_graph_is_loaded(folder, cache, monkeypatch):
    from edgeskip.runtime import load

    def fail(*_, **__):
        raise AssertionError("a session was made of a bundle that was not checked")

    monkeypatch.setattr(load, "open_session", fail)
    flip_a_bit(folder / "draft.ort.onnx")
    assert_refused(folder, "draft.ort.onnx: sha256 is")
