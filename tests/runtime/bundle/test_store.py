"""The store of engines: one set for bundles of one structure, none that the user did not build or add, and a limit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
import sys

import pytest
from tests.conftest import edit_json, make_model, save_checkpoint
from tests.standin import VERSION, put_engines, with_engines

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.pack import pack
from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.bundle.engines import BUILD, EngineKind, open_engines
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.bundle.store import (
    FOLDER,
    KIND,
    LIMIT,
    engines_place,
    engines_that_came,
    find_engines,
    limit_bytes,
    make_room,
    mark_used,
    read_engines,
    stored_sets,
    whole_engines,
)
from edgeskip.runtime.errors import BundleError, RequestError
from edgeskip.runtime.files import cache_folder, shared

ORIN = EngineKind("tensorrt", VERSION, 87, "standard")
RTX = EngineKind("tensorrt-rtx", VERSION, 86, "primitive")


@pytest.fixture
def bundle(bundles):
    return bundles("llama-gqa")


@pytest.fixture
def folder(bundle):
    """Stand-in engines for SM 87 by TensorRT; nothing here runs them."""
    return put_engines(bundle, ORIN)


@pytest.fixture
def packed(bundle, folder, tmp_path):
    """A bundle with those engines, on a machine that has none."""
    made = pack(bundle, read_engines(bundle), tmp_path / "packed")
    shutil.rmtree(folder)
    return made


def spoil_cache():
    cache_folder(KIND).chmod(0o777)


# What serves a bundle


def test_a_fine_tune_has_the_same_graphs_and_so_the_same_engines(bundle, folder, tmp_path):
    save_checkpoint(make_model("llama-gqa", seed=5), tmp_path / "tuned")
    tuned = export_bundle(open_checkpoint(str(tmp_path / "tuned")), tmp_path / "b", ExportSettings(2, prefill_chunk=8))
    assert tuned.path(WEIGHTS).read_bytes() != bundle.path(WEIGHTS).read_bytes()
    assert tuned.path("draft.inputs.onnx").read_bytes() == bundle.path("draft.inputs.onnx").read_bytes()
    assert [engines.folder for engines in read_engines(tuned)] == [folder]
    assert whole_engines(tuned, ORIN) == read_engines(bundle)[0]


def test_a_bundle_without_engines_has_none(bundle):
    assert find_engines(bundle) == ([], [])
    assert whole_engines(bundle, ORIN) is None


def test_all_kinds_are_found_the_last_used_first(bundle, folder):
    limited = dataclasses.replace(ORIN, workspace_mb=64)
    folders = [folder, put_engines(bundle, RTX), put_engines(bundle, limited)]
    for age, one in enumerate(folders):
        os.utime(one / BUILD, (age, age))
    assert [engines.folder for engines in read_engines(bundle)] == folders[::-1]
    mark_used(read_engines(bundle)[-1])
    assert [engines.build.kind for engines in read_engines(bundle)] == [ORIN, limited, RTX]
    assert engines_place(bundle, limited) == folders[2]


def test_what_others_have_in_the_store_is_no_problem_of_a_bundle(bundle, bundles):
    put_engines(bundles("llama-tied"), ORIN)
    (put_engines(bundles("llama-mha"), ORIN) / BUILD).write_text("{")
    (cache_folder(KIND) / "x").mkdir()
    (cache_folder(KIND) / "tensorrt-sm999-1-0123456789abcdef").mkdir()
    (cache_folder(KIND) / ".half-built").mkdir()
    assert find_engines(bundle) == ([], [])


def test_a_quantized_bundle_has_the_engines_of_parts_of_layers_alone(bundle, bundles, folder, tmp_path):
    """Those of the plain bundle's, whose graphs are the same; the others of it are no problem."""
    quantized = bundles("llama-gqa", weights="int4")
    layers = put_engines(bundle, dataclasses.replace(ORIN, dialect="layers"))
    primitive = put_engines(bundle, RTX)
    assert [engines.folder for engines in read_engines(quantized)] == [layers]
    assert {engines.folder for engines in read_engines(bundle)} == {folder, layers, primitive}
    copied = shutil.copytree(quantized.folder, tmp_path / "copied")
    shutil.copytree(primitive, copied / FOLDER / primitive.name)
    found, problems = engines_that_came(read_bundle(copied))
    assert not found
    assert "engines of primitive, for quantized weights; wanted layers" in str(problems[0])


def test_damaged_engines_are_not_whole(bundle, folder):
    assert whole_engines(bundle, ORIN) is not None
    path = folder / "verify.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(read_engines(bundle)) == 1  # of the right size
    assert whole_engines(bundle, ORIN) is None


def test_engines_that_a_killed_build_hid_are_found(bundle, folder):
    folder.rename(folder.with_name(f".{folder.name}.old.edgeskip"))
    assert [engines.folder for engines in read_engines(bundle)] == [folder]


def test_what_a_killed_build_left_goes_when_the_next_one_looks(bundle, folder):
    left = folder.with_name(f".{folder.name}.01234567.edgeskip")
    left.mkdir()
    assert whole_engines(bundle, ORIN)
    assert not left.exists()


def test_a_cache_that_cannot_be_trusted_is_one_line_with_its_fix(bundle, folder, monkeypatch):
    spoil_cache()
    message = r"edgeskip/engines: cannot be made, or others can write it.*; set XDG_CACHE_HOME to a folder of your own"
    for use in (read_engines, lambda b: whole_engines(b, ORIN), lambda b: open_session(b, backend="tensorrt")):
        with pytest.raises(BundleError, match=message) as caught:
            use(bundle)
        assert "\n" not in str(caught.value)
    with open_session(bundle) as session:
        assert "others can write it" in session.description
    with open_session(bundle, device="cpu") as session:
        assert "others can write it" not in session.description
    folder.parent.chmod(0o700)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(BundleError, match=r"~/.cache/edgeskip: cannot be made, .* set XDG_CACHE_HOME"):
        read_engines(bundle)


# Engines that came with a bundle


def test_engines_that_came_with_a_bundle_are_not_loaded(packed):
    message = (
        rf"^{packed.folder}: has engines that came with it, which are code; build your own with `edgeskip build "
        rf"{packed.folder} --backend tensorrt`, or, if you trust where they come from, `edgeskip cache add "
        rf"{packed.folder}`$"
    )
    assert find_engines(packed) == ([], [])
    with pytest.raises(BundleError, match=message):
        open_session(packed, backend="tensorrt")
    with pytest.raises(BundleError, match="no tensorrt-rtx engines for it in the cache"):
        open_session(packed, backend="tensorrt-rtx")
    with open_session(packed) as session:
        assert session.device == "cpu"
        assert "has engines that came with it, which are code; build" in session.description


def test_engines_that_were_added_are_those_of_the_bundle(packed, bundle):
    outcome = edgeskip.add_engines(packed.folder)
    (engines,) = read_engines(packed)
    assert outcome.engines == (engines,)
    assert (outcome.had, outcome.removed) == (frozenset(), ())
    assert engines.folder == engines_place(bundle, ORIN)
    (came,) = engines_that_came(packed)[0]
    assert came.build == engines.build
    for graph in bundle.manifest.graphs:
        assert engines.path(graph).read_bytes() == came.path(graph).read_bytes()
    with open_session(packed) as session:
        assert "came with it" not in session.description
    assert stat.S_IMODE(engines.folder.stat().st_mode) == 0o700


def test_what_the_user_built_is_not_replaced_by_what_came(packed, bundle):
    own = put_engines(bundle, ORIN)
    edit_json(own / BUILD, lambda build: build.update(source="my own"))
    outcome = edgeskip.add_engines(packed.folder)
    assert outcome.had == {own}
    assert outcome.engines[0].build.source == "my own"
    (own / "draft.engine").write_bytes(b"damaged")
    assert edgeskip.add_engines(packed.folder).had == frozenset()
    assert read_engines(bundle)[0].build.source == bundle.manifest.source


def test_a_bundle_that_has_none_says_so(bundle):
    with pytest.raises(BundleError, match="no engines came with it; edgeskip build"):
        edgeskip.add_engines(bundle.folder)


def changed_build(**values):
    return lambda packed, came: edit_json(came / BUILD, lambda build: build.update(**values))


def change_byte(packed, came):
    path = came / "verify.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def change_manifest(packed, came):
    edit_json(packed.path(MANIFEST), lambda manifest: manifest.update(source="another"))


def change_graph(packed, came):
    edit_json(packed.path(MANIFEST), lambda m: m["files"]["draft.inputs.onnx"].update(sha256="1" * 64))


def unseal(packed, came):
    (came / BUILD).write_text((came / BUILD).read_text().replace('s": 1.0', 's": 2.0', 1))


FOREIGN = {
    "a byte": (change_byte, r"verify.engine: sha256 is .*, as built"),
    "the bundle": (change_manifest, r"build.json: engines of a bundle with another manifest.json"),
    "a graph": (change_graph, r"build.json: built from another draft graph"),
    "the record": (unseal, r"build.json: what it says has the sha256"),
    "the hash of the bundle": (changed_build(manifest_sha256="0" * 64), r"engines of a bundle with another manifest"),
    "a version that is a path": (changed_build(backend_version="/../../../x"), r"wanted a version"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_engines_that_are_not_what_they_say_are_not_added(name, packed):
    change, message = FOREIGN[name]
    (came,) = (packed.folder / FOLDER).iterdir()
    change(packed, came)
    before = {path: path.read_bytes() for path in packed.folder.rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match=message):
        edgeskip.add_engines(packed.folder)
    assert stored_sets() == []
    assert [path.name for path in cache_folder(KIND).iterdir()] == []
    assert {path: path.read_bytes() for path in packed.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["", "{}", "{}/build.json", "{}/head.engine"])
def test_a_link_that_leads_out_of_the_bundle_is_refused(name, packed, tmp_path):
    (came,) = (packed.folder / FOLDER).iterdir()
    path = packed.folder / FOLDER / name.format(came.name)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere", target_is_directory=(tmp_path / "elsewhere").is_dir())
    with pytest.raises(BundleError, match=rf"{path.name}: leads out of the bundle; do not use this bundle"):
        edgeskip.add_engines(packed.folder)
    assert stored_sets() == []


def test_a_bundle_behind_a_link_is_added(packed, tmp_path):
    (tmp_path / "link").symlink_to(packed.folder)
    assert len(edgeskip.add_engines(tmp_path / "link").engines) == 1


def test_nothing_is_added_to_a_cache_that_cannot_be_trusted(packed):
    spoil_cache()
    with pytest.raises(BundleError, match="set XDG_CACHE_HOME"):
        edgeskip.add_engines(packed.folder)


# The limit


@pytest.fixture
def aged(bundles):
    """Three sets of a megabyte and little more, the oldest first."""
    folders = []
    for age, variant in enumerate(("llama-gqa", "llama-mha", "llama-tied")):
        folders.append(put_engines(bundles(variant), ORIN))
        (folders[-1] / "padding").write_bytes(bytes(10**6))
        os.utime(folders[-1] / BUILD, (1000 + age, 1000 + age))
    return folders


def left():
    return [one.folder for one in stored_sets()]


def test_the_sets_are_told_with_their_sizes_the_last_used_first(aged):
    assert left() == aged[::-1]
    for one in stored_sets():
        assert one.bytes == sum(path.stat().st_size for path in one.folder.iterdir())
        assert one.last_used == (one.folder / BUILD).stat().st_mtime


def test_the_least_recently_used_go_first(aged, monkeypatch):
    assert make_room(()) == ()  # far from 2 GB
    monkeypatch.setenv(LIMIT, "3")  # each is a little more than 1 MB
    assert make_room(()) == (aged[0].name,)
    assert left() == [aged[2], aged[1]]
    assert [path.name for path in aged[0].parent.iterdir() if path.name.startswith(".")] == []


def test_a_set_that_is_used_goes_last(aged, bundles, monkeypatch):
    mark_used(read_engines(bundles("llama-gqa"))[0])
    monkeypatch.setenv(LIMIT, "2")
    assert make_room(()) == (aged[1].name, aged[2].name)


def test_the_new_one_stays_whatever_the_limit(aged, monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    assert make_room({aged[0]}) == (aged[1].name, aged[2].name)
    assert left() == [aged[0]]


def test_a_set_that_a_process_reads_stays(aged, monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    code = (
        "import sys; from pathlib import Path; from edgeskip.runtime.files import shared\n"
        "with shared(Path(sys.argv[1])): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, aged[0]]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with reader, shared(aged[0]):  # two readers are in nobody's way
        assert reader.stdout.readline() == b"open\n"
        assert make_room(()) == (aged[1].name, aged[2].name)
        assert left() == [aged[0]]
    assert make_room(()) == (aged[0].name,)


def test_engines_that_are_open_are_read_by_a_process(bundle, folder, monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    with open_engines(read_engines(bundle)[0]):
        assert make_room(()) == ()
    assert make_room(()) == (folder.name,)


def test_what_is_of_no_use_goes_first(aged, monkeypatch):
    (aged[2] / BUILD).unlink()
    monkeypatch.setenv(LIMIT, "3")
    assert make_room(()) == (aged[2].name,)


@pytest.mark.parametrize("text", ["-1", "2.5", "two", "1e3", "9" * 30, " 5", "\u0665"])
def test_a_limit_that_is_no_number_is_one_line(text, monkeypatch):
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(RequestError, match=r"EDGESKIP_CACHE_MB: .*; wanted a whole number of MB"):
        limit_bytes()


def test_the_limit_is_2_gb_unless_it_is_set(monkeypatch):
    monkeypatch.setenv(LIMIT, "")
    assert limit_bytes() == 2 * 10**9
    monkeypatch.setenv(LIMIT, "5")
    assert limit_bytes() == 5 * 10**6


def test_adding_makes_room(packed, bundles, monkeypatch):
    old = put_engines(bundles("llama-tied"), ORIN)
    monkeypatch.setenv(LIMIT, "0")
    assert edgeskip.add_engines(packed.folder).removed == (old.name,)
    assert left() == [engines_place(packed, ORIN)]


def test_a_copy_of_a_bundle_has_its_engines(bundle, folder, tmp_path):
    copied = with_engines(bundle, tmp_path / "copy")
    assert read_engines(read_bundle(copied.folder))[0].folder == folder
