"""What a device gets: the bundle as it is, and the engines that were built for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner
from tests.standin import VERSION, HostDevice, StandInTensorRT, put_engines

from edgeskip.cli import main
from edgeskip.exporter.pack import pack
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.bundle.engines import BUILD, EngineKind
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle, verify_hashes
from edgeskip.runtime.bundle.store import add_engines, engines_that_came, read_engines
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.errors import BundleError

PROMPT = list(range(40, 60))
ORIN = EngineKind("tensorrt", VERSION, 87, "standard")


@pytest.fixture
def bundle(bundles, tmp_path):
    return read_bundle(shutil.copytree(bundles("llama-tied", exit_layer=2).folder, tmp_path / "whole"))


@pytest.fixture
def folder(bundle):
    return put_engines(bundle, ORIN)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_packed_as_they_are(weights, bundles, tmp_path):
    whole = bundles("llama-tied", dtype="fp16", weights=weights)
    whole = read_bundle(shutil.copytree(whole.folder, tmp_path / "whole"))
    put_engines(whole, dataclasses.replace(ORIN, dialect="layers"))
    packed = pack(whole, read_engines(whole), tmp_path / "small")
    verify_hashes(packed)
    assert packed.manifest.formats == whole.manifest.formats
    assert packed.manifest.quantization == whole.manifest.quantization
    assert packed.path(WEIGHTS).read_bytes() == whole.path(WEIGHTS).read_bytes()


def test_it_is_the_bundle_byte_for_byte_and_its_engines(bundle, folder, tmp_path):
    made = pack(bundle, read_engines(bundle), tmp_path / "p")
    assert made == read_bundle(made.folder)
    verify_hashes(made)
    engines = {f"engines/{folder.name}/{name}": data for name, data in contents(folder).items()}
    assert contents(made.folder) == contents(bundle.folder) | engines
    assert contents(made.folder)[MANIFEST] == (bundle.folder / MANIFEST).read_bytes()
    assert [one.build for one in engines_that_came(made)[0]] == [one.build for one in read_engines(bundle)]


def test_the_engines_of_another_bundle_of_its_structure_are_its_own_when_packed(bundle, folder, tmp_path):
    """A fine-tune is packed with the engines that the first one built."""
    manifest = dataclasses.replace(bundle.manifest, source="tuned")
    bundle.path(MANIFEST).write_text(manifest.to_json())
    tuned = read_bundle(bundle.folder)
    made = pack(tuned, read_engines(tuned), tmp_path / "p")
    (came,) = engines_that_came(made)[0]
    assert came.build.manifest_sha256 == hashlib.sha256(tuned.path(MANIFEST).read_bytes()).hexdigest()
    assert json.loads((folder / BUILD).read_text())["manifest_sha256"] != came.build.manifest_sha256
    shutil.rmtree(folder)
    assert len(add_engines(made.folder).engines) == 1


def test_added_on_a_device_it_decodes_as_the_bundle_does(bundle, folder, tmp_path):
    def text(one):
        with Model(one, TrtSession(one, read_engines(one)[0], HostDevice(), StandInTensorRT())) as model:
            return model.complete(PROMPT, max_new_tokens=30).text

    made, wanted = pack(bundle, read_engines(bundle), tmp_path / "p"), text(bundle)
    shutil.rmtree(folder)
    add_engines(made.folder)
    assert text(made) == wanted != ""


def test_a_packed_bundle_is_built_and_packed_like_any(bundle, folder, tmp_path):
    made = pack(bundle, read_engines(bundle), tmp_path / "p")
    again = pack(made, read_engines(made), tmp_path / "again")
    assert contents(again.folder) == contents(made.folder)


def test_damaged_engines_are_not_packed(bundle, folder, tmp_path):
    path = folder / "head.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"head\.engine: sha256 is"):
        pack(bundle, read_engines(bundle), tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("name", [WEIGHTS, "draft.onnx", "tokenizer.json"])
def test_a_damaged_bundle_is_not_packed(name, bundle, folder, tmp_path):
    verify_hashes(bundle)
    data = bytearray(bundle.path(name).read_bytes())
    data[-1] ^= 1
    bundle.path(name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: sha256 is .*, as exported"):
        pack(bundle, read_engines(bundle), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_bundle_without_engines_is_not_packed(bundle, tmp_path):
    with pytest.raises(BundleError, match="no engines to pack; build them: edgeskip build"):
        pack(bundle, [], tmp_path / "p")


def test_the_command_packs_what_was_asked_for(bundle, folder, tmp_path):
    put_engines(bundle, dataclasses.replace(ORIN, compute_capability=86))
    put_engines(bundle, dataclasses.replace(ORIN, dialect="primitive"))

    def run(name, *arguments):
        return CliRunner().invoke(main, ["pack", str(bundle.folder), str(tmp_path / name), *arguments])

    def packed(name, *arguments):
        result = run(name, *arguments)
        assert result.exit_code == 0, result.output
        builds = [one.build for one in engines_that_came(read_bundle(tmp_path / name))[0]]
        return sorted((build.compute_capability, build.dialect) for build in builds)

    assert packed("all") == [(86, "standard"), (87, "primitive"), (87, "standard")]
    assert packed("one", "--sm", "86") == [(86, "standard")]
    assert packed("two", "--sm", "87") == [(87, "primitive"), (87, "standard")]
    assert packed("three", "--sm", "87", "--dialect", "primitive") == [(87, "primitive")]
    for arguments, message in (
        (["--sm", "75"], "no engines for SM 75; wanted SM 86, 87"),
        (["--sm", "86", "--dialect", "primitive"], "no engines for SM 86; wanted SM 87"),
    ):
        result = run("none", *arguments)
        assert (result.exit_code, message in result.output) == (4, True)
    result = run("one")
    assert (result.exit_code, "already exists" in result.output) == (4, True)
    for one in read_engines(bundle):
        if one.build.dialect == "primitive":
            shutil.rmtree(one.folder)
    result = run("none", "--dialect", "primitive")
    assert (result.exit_code, "no engines of the primitive dialect" in result.output) == (4, True)
