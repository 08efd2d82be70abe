"""What a device gets: engines, and of the bundle only what they cannot do without."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tests.conftest import edit_json
from tests.standin import HostDevice, StandInTensorRT, with_engines

from edgeskip.cli import main
from edgeskip.exporter.pack import pack
from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.backends.trt_session import TrtSession
from edgeskip.runtime.bundle.engines import BUILD, read_engines
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle, verify_hashes
from edgeskip.runtime.bundle.tensors import EMBEDDINGS
from edgeskip.runtime.bundle.weights import embedding_table, read_bytes
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.errors import BackendError, BundleError

PROMPT = list(range(40, 60))


@pytest.fixture
def bundle(bundles, tmp_path):
    return with_engines(bundles("llama-tied", exit_layer=2), tmp_path / "whole")


def packed(bundle, folder):
    pack(bundle, read_engines(bundle), folder)
    made = read_bundle(folder)
    verify_hashes(made)
    return made


def test_no_graph_and_no_weight_but_the_embeddings_is_in_it(bundle, tmp_path):
    made = packed(bundle, tmp_path / "p")
    files = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    (engines,) = read_engines(made)
    name = engines.folder.name
    assert files == {
        MANIFEST,
        WEIGHTS,
        "tokenizer.json",
        "config.json",
        *(f"engines/{name}/{file}" for file in ("draft.engine", "verify.engine", "head.engine", BUILD)),
    }
    tensors = load_file(made.path(WEIGHTS))
    assert list(tensors) == [EMBEDDINGS]
    np.testing.assert_array_equal(tensors[EMBEDDINGS], embedding_table(bundle)[:])
    np.testing.assert_array_equal(embedding_table(made)[:], embedding_table(bundle)[:])
    assert read_bytes(made) == read_bytes(bundle)


def test_it_decodes_as_the_whole_bundle_does(bundle, tmp_path):
    made = packed(bundle, tmp_path / "p")
    bundle.folder.rename(tmp_path / "elsewhere")  # nothing of it is needed but what the stand-in engines point to
    (tmp_path / "whole").symlink_to(tmp_path / "elsewhere")
    texts = []
    for one in (made, read_bundle(tmp_path / "elsewhere")):
        session = TrtSession(one, read_engines(one)[0], HostDevice(), StandInTensorRT())
        with Model(one, session) as model:
            texts.append(model.complete(PROMPT, max_new_tokens=30).text)
    assert texts[0] == texts[1] != ""


def test_onnxruntime_says_that_it_has_no_graphs(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeskip.runtime.backends.device.CudaDevice", HostDevice)
    made = packed(bundle, tmp_path / "p")
    with pytest.raises(BundleError, match="packed: it has engines, no graphs"):
        open_session(made, backend="onnxruntime", device="cpu")
    with pytest.raises(BackendError, match="tensorrt: not usable"):
        open_session(made)


def test_engines_of_other_weights_do_not_belong_to_it(bundle, bundles, tmp_path):
    made = packed(bundle, tmp_path / "p")
    other = with_engines(bundles("llama-gqa", exit_layer=2), tmp_path / "other")
    (engines,), (target,) = read_engines(other), read_engines(made)
    (target.folder / BUILD).write_text((engines.folder / BUILD).read_text())
    with pytest.raises(BundleError, match="built from another draft graph or other weights"):
        read_engines(made)


def test_damaged_engines_are_not_packed(bundle, tmp_path):
    (engines,) = read_engines(bundle)
    path = engines.path("head")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"head\.engine: sha256 is"):
        pack(bundle, read_engines(bundle), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_damaged_weights_are_not_packed(bundle, tmp_path):
    path = bundle.path(WEIGHTS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="weights.safetensors: sha256 is".replace(".", r"\.")):
        pack(bundle, read_engines(bundle), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_manifest_that_misses_a_graph_is_refused(bundle, tmp_path):
    made = packed(bundle, tmp_path / "p")
    edit_json(made.path(MANIFEST), lambda m: m["packed"]["read_bytes"].pop("head"))
    with pytest.raises(BundleError, match="packed: not of every graph; wanted draft, verify, head"):
        read_bundle(made.folder)


def test_the_command_packs_what_was_asked_for(bundle, tmp_path):
    with_engines(bundle, bundle.folder, sm=86)
    run = lambda *arguments: CliRunner().invoke(main, ["pack", str(bundle.folder), *arguments])  # noqa: E731
    result = run(str(tmp_path / "one"), "--sm", "86")
    assert result.exit_code == 0, result.output
    assert [one.build.compute_capability for one in read_engines(read_bundle(tmp_path / "one"))] == [86]
    assert run(str(tmp_path / "all")).exit_code == 0
    assert len(read_engines(read_bundle(tmp_path / "all"))) == 2
    result = run(str(tmp_path / "none"), "--sm", "75")
    assert result.exit_code == 4
    assert "no engines for SM 75; wanted SM 86, 87" in result.output
    result = run(str(tmp_path / "one"))
    assert (result.exit_code, "already exists" in result.output) == (4, True)
    assert json.loads((tmp_path / "one" / MANIFEST).read_text())["packed"]["weights_sha256"]
