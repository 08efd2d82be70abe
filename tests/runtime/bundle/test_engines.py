"""Sets of engines: what decides their name, and that those that are not what build.json says are told in one line."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from tests.conftest import edit_json
from tests.standin import VERSION, with_engines

from edgeskip.runtime.bundle import engines as module
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import (
    BUILD,
    EngineKind,
    build_command,
    engines_name,
    open_engines,
)
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.bundle.profiles import engine_profiles
from edgeskip.runtime.bundle.store import engines_place, find_engines, read_engines
from edgeskip.runtime.errors import BundleError

KIND = EngineKind("tensorrt", VERSION, 87, "standard")


@pytest.fixture
def bundle(bundles, tmp_path):
    """A bundle that there are engines for, for SM 87 by TensorRT; nothing here runs them."""
    return with_engines(bundles("llama-gqa"), tmp_path / "bundle")


@pytest.fixture
def folder(bundle):
    return engines_place(bundle, KIND)


# Names


def test_bundles_of_one_structure_have_engines_of_one_name(bundle):
    """Whatever their weights, tokenizer, source or own exit's default K; but not whatever their graphs are."""
    name = engines_name(bundle.manifest, KIND)
    files = bundle.manifest.files
    tuned = files | {WEIGHTS: dataclasses.replace(files[WEIGHTS], sha256="1" * 64)}
    assert engines_name(dataclasses.replace(bundle.manifest, files=tuned, source="tuned"), KIND) == name
    ort = files | {"draft.ort.onnx": dataclasses.replace(files["draft.ort.onnx"], sha256="1" * 64)}
    assert engines_name(dataclasses.replace(bundle.manifest, files=ort), KIND) == name
    ours = files | {"draft.inputs.onnx": dataclasses.replace(files["draft.inputs.onnx"], sha256="1" * 64)}
    assert engines_name(dataclasses.replace(bundle.manifest, files=ours), KIND) != name


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "tensorrt-rtx"},
        {"backend_version": "10.99.2"},
        {"compute_capability": 86},
        {"dialect": "primitive"},
        {"workspace_mb": 64},
    ],
    ids=str,
)
def test_whatever_decides_what_engines_are_changes_their_key(change, bundle):
    names = [engines_name(bundle.manifest, kind) for kind in (KIND, dataclasses.replace(KIND, **change))]
    assert names[0].startswith(f"tensorrt-sm87-{VERSION}-")
    assert len({name[-16:] for name in names}) == 2


def test_other_profiles_dtypes_and_versions_of_the_record_change_the_key(bundle, monkeypatch):
    keys = [engines_name(bundle.manifest, KIND)]
    for change in ({"num_speculations": 9}, {"dtype": "fp16"}):
        keys.append(engines_name(dataclasses.replace(bundle.manifest, **change), KIND))
    monkeypatch.setattr(module, "BUILD_VERSION", 99)
    keys.append(engines_name(bundle.manifest, KIND))
    assert len(set(keys)) == 4


def test_the_command_that_builds_them_anew(bundle):
    assert build_command(bundle, "tensorrt", 87) == f"edgeskip build {bundle.folder} --backend tensorrt"
    command = build_command(bundle, "tensorrt-rtx", 86)
    assert command == f"edgeskip build {bundle.folder} --backend tensorrt-rtx --sm 86"


# What is in a set


def test_a_set_is_read_as_it_was_written(bundle, folder):
    (engines,) = read_engines(bundle)
    with open_engines(engines) as files:
        assert {graph: file.read() for graph, file in files.items()} == {
            graph: (folder / f"{graph}.engine").read_bytes() for graph in bundle.manifest.graphs
        }
    assert engines.folder == folder
    assert json.loads((folder / BUILD).read_text()) == json.loads(engines.build.to_json())
    assert engines.build.kind == KIND
    assert engines.path("head") == folder / "head.engine"
    profiles = engine_profiles(bundle.manifest, ENGINE_DIALECTS["standard"], 87)
    assert {graph: record.profiles for graph, record in engines.build.engines.items()} == profiles


def test_progress_counts_the_bytes_of_all_engines(bundle):
    (engines,) = read_engines(bundle)
    seen = []
    with open_engines(engines, lambda *event: seen.append(event)):
        pass
    assert [event[1] for event in seen] == sorted(event[1] for event in seen)
    total = sum(engines.path(graph).stat().st_size for graph in bundle.manifest.graphs)
    assert seen[-1] == ("checking the engines", total, total)
    assert engines.build.bytes == total


def test_a_changed_byte_is_found(bundle, folder):
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
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(BundleError, match=rf"{folder.name}: cannot be opened \(No such file"), open_engines(engines):
        pass


def rewritten(change):
    return lambda folder: edit_json(folder / BUILD, change)


SPOILED = {
    "cut short": (lambda folder: os.truncate(folder / "draft.engine", 20), r"draft.engine: 20 bytes; wanted \d+ bytes"),
    "empty": (lambda folder: os.truncate(folder / "head.engine", 0), r"head.engine: 0 bytes; wanted"),
    "missing": (
        lambda folder: (folder / "verify.engine").unlink(),
        r"verify.engine: no such file; wanted .*; edgeskip build .* --backend tensorrt$",
    ),
    "no record": (lambda folder: (folder / BUILD).unlink(), r"build.json: no such file; build the engines again"),
    "no JSON": (lambda folder: (folder / BUILD).write_text('{"build'), r"build.json: not valid JSON"),
    "not text": (lambda folder: (folder / BUILD).write_bytes(b"\xff\xfe"), r"build.json: not valid JSON"),
    "deep": (lambda folder: (folder / BUILD).write_text("[" * 10**5), r"build.json: not valid JSON"),
    "a list": (lambda folder: (folder / BUILD).write_text("[1]"), r"build.json: build version \[1\]; wanted 3"),
    "newer": (rewritten(lambda b: b.update(build_version=4)), r"build version 4; wanted 3; build the engines again"),
    "no version": (rewritten(lambda b: b.pop("build_version")), r"build version None; wanted 3"),
    "a key more": (rewritten(lambda b: b.update(gpus=1)), r"build.json: unknown key 'gpus'; did you mean 'gpu'"),
    "a key less": (rewritten(lambda b: b.pop("gpu")), r"build.json: key 'gpu' is missing"),
    "another backend": (rewritten(lambda b: b.update(backend="tvm")), r"backend: found 'tvm'; wanted 'tensorrt' or"),
    "a path as a version": (rewritten(lambda b: b.update(backend_version="/../x")), r"found '/../x'; wanted a version"),
    "an unknown dialect": (rewritten(lambda b: b.update(dialect="ort")), r"dialect: found 'ort'; wanted 'standard' or"),
    "an SM in letters": (rewritten(lambda b: b.update(compute_capability="8.7")), r"compute_capability: found '8.7'"),
    "an SM as a pair": (rewritten(lambda b: b.update(compute_capability=8)), r"compute_capability: found 8; wanted 50"),
    "another SM": (
        rewritten(lambda b: b.update(compute_capability=86)),
        r"not of the engines that the folder is named",
    ),
    "another dialect": (rewritten(lambda b: b.update(dialect="primitive")), r"not of the engines that the folder is"),
    "a limit": (rewritten(lambda b: b.update(workspace_mb=64)), r"not of the engines that the folder is named for"),
    "another dtype": (rewritten(lambda b: b.update(dtype="fp16")), r"engines in fp16; wanted fp32"),
    "a graph less": (rewritten(lambda b: b["engines"].pop("head")), r"engines of draft, verify; wanted draft, verify"),
    "no graphs": (rewritten(lambda b: b["engines"].clear()), r"engines of nothing; wanted draft, verify, head"),
    "a profile cut": (
        rewritten(lambda b: b["engines"]["draft"]["profiles"][0].pop("max_rows")),
        r"engines.draft.profiles\[0\]: key 'max_rows' is missing",
    ),
    "another profile": (
        rewritten(lambda b: b["engines"]["draft"]["profiles"][0].update(max_rows=5)),
        r"draft built for other numbers of rows; edgeskip build",
    ),
    "another graph": (
        rewritten(lambda b: b["engines"]["verify"].update(onnx_sha256="0" * 64)),
        r"built from another verify graph; edgeskip build .* --backend tensorrt$",
    ),
    "by accident": (
        lambda folder: (folder / BUILD).write_text((folder / BUILD).read_text().replace('s": 1.0', 's": 2.0', 1)),
        r"build.json: what it says has the sha256 .*; wanted .*, as written; build the engines again",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_engines_are_one_line_and_are_not_found(name, bundle, folder):
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(BundleError, match=message) as caught:
        read_engines(bundle)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert find_engines(bundle)[0] == []


def test_engines_of_other_graphs_are_none_of_a_bundles(bundle, bundles):
    other = bundles("llama-gqa", exit_layer=3)
    assert find_engines(other) == ([], [])
    edit_json(bundle.path(MANIFEST), lambda m: m["files"]["draft.inputs.onnx"].update(sha256="1" * 64))
    assert find_engines(read_bundle(bundle.folder)) == ([], [])


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
