"""Engines on disk: those that are not what their build.json says, or not of this bundle, are told in one line."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from tests.conftest import edit_json
from tests.standin import VERSION, with_engines

from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.bundle.engines import BUILD, FOLDER, build_command, engines_folder, open_engines, read_engines
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.errors import BundleError


@pytest.fixture
def bundle(bundles, tmp_path):
    """A bundle with engines for SM 87 by TensorRT; nothing here runs them."""
    return with_engines(bundles("llama-gqa"), tmp_path / "bundle")


@pytest.fixture
def folder(bundle):
    return engines_folder(bundle, "tensorrt", 87, VERSION)


def test_every_folder_with_a_build_is_read(bundle, folder):
    (bundle.folder / FOLDER / ".half-built").mkdir()
    (engines,) = read_engines(bundle)
    with open_engines(engines):
        pass
    assert engines.folder == folder
    assert folder.name == f"tensorrt-sm87-{VERSION}"
    assert json.loads((folder / BUILD).read_text()) == json.loads(engines.build.to_json())
    assert engines.path("head") == folder / "head.engine"


def test_a_bundle_without_engines_has_none(bundles):
    assert read_engines(bundles("llama-gqa")) == []


def test_the_command_that_builds_them_anew(bundle):
    assert build_command(bundle, "tensorrt", 87) == f"edgeskip build {bundle.folder} --backend tensorrt"
    command = build_command(bundle, "tensorrt-rtx", 86)
    assert command == f"edgeskip build {bundle.folder} --backend tensorrt-rtx --sm 86"


def test_progress_counts_the_bytes_of_all_engines(bundle):
    (engines,) = read_engines(bundle)
    total, seen = sum(record.bytes for record in engines.build.engines.values()), []
    with open_engines(engines, lambda *event: seen.append(event)):
        pass
    assert [event[1] for event in seen] == sorted(event[1] for event in seen)
    assert seen[-1] == ("checking the engines", total, total)


def test_a_changed_byte_is_found(bundle, folder):
    (engines,) = read_engines(bundle)
    path = folder / "verify.engine"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (engines,) = read_engines(bundle)  # of the right size
    message = r"verify.engine: sha256 is .*, as built; copy it again or build it again"
    with pytest.raises(BundleError, match=message), open_engines(engines):
        pass


def test_an_engine_that_goes_away_is_told(bundle, folder):
    (engines,) = read_engines(bundle)
    (folder / "head.engine").unlink()
    with pytest.raises(BundleError, match=r"head.engine: cannot be read \(No such file"), open_engines(engines):
        pass


def rewritten(change):
    return lambda folder: edit_json(folder / BUILD, change)


SPOILED = {
    "cut short": (lambda folder: os.truncate(folder / "draft.engine", 20), r"draft.engine: 20 bytes; wanted \d+ bytes"),
    "empty": (lambda folder: os.truncate(folder / "head.engine", 0), r"head.engine: 0 bytes; wanted"),
    "missing": (
        lambda folder: (folder / "verify.engine").unlink(),
        r"verify.engine: no such file; wanted .* or run edge",
    ),
    "no JSON": (lambda folder: (folder / BUILD).write_text('{"build'), r"build.json: not valid JSON"),
    "not text": (lambda folder: (folder / BUILD).write_bytes(b"\xff\xfe"), r"build.json: not valid JSON"),
    "deep": (lambda folder: (folder / BUILD).write_text("[" * 10**5), r"build.json: not valid JSON"),
    "a list": (lambda folder: (folder / BUILD).write_text("[1]"), r"build.json: build version \[1\]; wanted 1"),
    "newer": (rewritten(lambda b: b.update(build_version=2)), r"build version 2; wanted 1; build the engines again"),
    "no version": (rewritten(lambda b: b.pop("build_version")), r"build version None; wanted 1"),
    "a key more": (rewritten(lambda b: b.update(gpus=1)), r"build.json: unknown key 'gpus'; did you mean 'gpu'"),
    "a key less": (rewritten(lambda b: b.pop("gpu")), r"build.json: key 'gpu' is missing"),
    "another backend": (rewritten(lambda b: b.update(backend="tvm")), r"backend: found 'tvm'; wanted 'tensorrt' or"),
    "an SM in letters": (rewritten(lambda b: b.update(compute_capability="8.7")), r"compute_capability: found '8.7'"),
    "an SM as a pair": (rewritten(lambda b: b.update(compute_capability=8)), r"compute_capability: found 8; wanted 50"),
    "a graph less": (rewritten(lambda b: b["engines"].pop("head")), r"engines of draft, verify; wanted draft, verify"),
    "no graphs": (rewritten(lambda b: b["engines"].clear()), r"engines of nothing; wanted draft, verify, head"),
    "a profile cut": (
        rewritten(lambda b: b["engines"]["draft"]["profiles"][1].pop("max_rows")),
        r"engines.draft.profiles\[1\]: key 'max_rows' is missing",
    ),
    "other weights": (
        rewritten(lambda b: b.update(weights_sha256="0" * 64)),
        r"built from another draft graph or other",
    ),
    "another graph": (
        rewritten(lambda b: b["engines"]["verify"].update(onnx_sha256="0" * 64)),
        r"built from another verify graph or other weights; edgeskip build .* --backend tensorrt$",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_engines_are_one_line(name, bundle, folder):
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(BundleError, match=message) as caught:
        read_engines(bundle)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_engines_are_stale_as_soon_as_the_bundle_has_other_weights(bundle):
    edit_json(bundle.path(MANIFEST), lambda manifest: manifest["files"][WEIGHTS].update(sha256="1" * 64))
    with pytest.raises(BundleError, match="other weights"):
        read_engines(read_bundle(bundle.folder))


def moved_out(path, tmp_path):
    """Puts a link in the place of a file or folder, to where it is moved."""
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere", target_is_directory=(tmp_path / "elsewhere").is_dir())


@pytest.mark.parametrize("name", ["", "{folder}", "{folder}/build.json", "{folder}/head.engine"])
def test_a_link_that_leads_out_of_the_bundle_is_refused(name, bundle, folder, tmp_path):
    path = bundle.folder / FOLDER / name.format(folder=folder.name)
    moved_out(path, tmp_path)
    with pytest.raises(BundleError, match=rf"{path.name}: leads out of the bundle; do not use this bundle"):
        read_engines(bundle)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_session(bundle, backend="tensorrt")


def test_a_bundle_with_engines_behind_a_link_is_read(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle.folder)
    assert len(read_engines(read_bundle(tmp_path / "link"))) == 1


def test_what_is_read_from_an_engine_is_what_was_compared(bundle, folder):
    (engines,) = read_engines(bundle)
    wanted = (folder / "draft.engine").read_bytes()
    with open_engines(engines) as files:
        (folder / "other").write_bytes(b"x" * len(wanted))
        (folder / "other").replace(folder / "draft.engine")
        assert files["draft"].read() == wanted
    (folder / "draft.engine").unlink()
    (folder / "draft.engine").symlink_to("verify.engine")
    with pytest.raises(BundleError, match=r"draft.engine: cannot be read"), open_engines(engines):
        pass


def test_a_record_that_was_changed_is_told(folder, bundle):
    (folder / BUILD).write_text((folder / BUILD).read_text().replace('"seconds": 1.0', '"seconds": 2.0', 1))
    with pytest.raises(
        BundleError, match=r"build.json: what it says has the sha256 .*; wanted .*, as written; copy it"
    ):
        read_engines(bundle)


def test_engines_that_a_killed_build_hid_are_found(bundle, folder):
    folder.rename(folder.with_name(f".{folder.name}.old.edgeskip"))
    assert [engines.folder for engines in read_engines(bundle)] == [folder]
