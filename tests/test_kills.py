"""Whoever is killed, wherever: destinations are whole, old or absent, and the next run succeeds and clears up.

A few points of each command, drawn by a fixed seed; EDGESKIP_KILLS=all takes every point, and builds real engines too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.kills import Campaign

ALL = os.environ.get("EDGESKIP_KILLS") == "all"
OLD = "an older report"
RECIPE = "orin-nano-8gb"


def whole(folder):
    """Whether a bundle is there; what is there must be all of it."""
    from edgeskip.runtime.bundle.manifest import read_bundle, verify_hashes

    if not folder.exists():
        return False
    verify_hashes(read_bundle(folder))
    return True


def all_of_them(found):
    """The number of sets of engines; what is there must be all of it."""
    from edgeskip.runtime.bundle.engines import open_engines

    for one in found:
        with open_engines(one):
            assert len(list(one.folder.iterdir())) == 4
    return len(found)


def stored(root):
    """The number of sets of engines for the bundle in the cache."""
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.bundle.store import read_engines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        return all_of_them(read_engines(read_bundle(root / "bundle")))


def packed(folder):
    """The number of sets of engines in a packed bundle."""
    from edgeskip.runtime.bundle.manifest import read_bundle
    from edgeskip.runtime.bundle.store import engines_that_came

    found, problems = engines_that_came(read_bundle(folder))
    assert problems == []
    return all_of_them(found)


def one_of(check):
    """What may be there after a kill: all or nothing."""
    return lambda root: assert_(check(root) in (0, 1))


def assert_(value):
    assert value


def export(name):
    return ("export", "checkpoint", name, "-e", "2")


BUILD = ("build", "bundle", "--backend", "tensorrt-rtx", "--sm", "86")
ADD = ("cache", "add", "bundle")
TRAIN = ("train", "tiny.toml", "-o", "out")
BENCH = ("bench", "bundle", "--prompts", "prompt.txt", "-k", "1", "-n", "2", "--repeats", "1", "--json", "report.json")


def stand_in():
    """Engines that are written and not built."""
    from edgeskip.exporter.engines import build
    from edgeskip.exporter.engines.process import Built

    def made(job, *_):
        data = f"{job.onnx} by {os.getpid()}".encode()
        Path(job.engine).write_bytes(data)
        return Built(hashlib.sha256(data).hexdigest(), len(data), None)

    build._builder = lambda _: nullcontext(made)


def stand_in_without_exchange():
    from edgeskip.runtime import files

    stand_in()
    files._rename_with = lambda *_: False


def has_recipe(path):
    from edgeskip.recipes.library import recipe_file

    return path.exists() and bool(assert_(path.read_bytes() == recipe_file(RECIPE).read_bytes()) or True)


def report_is_whole(root):
    text = (root / "report.json").read_text()
    assert text == OLD or json.loads(text)["rows"]
    return text != OLD


trained = {}  # the weights of an unbroken training, by folder


def model_is_whole(root):
    if not (root / "out" / "config.json").exists():
        return False
    found = hashlib.sha256((root / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert found == trained.setdefault(root, found)
    assert {"tokenizer.json", "training.json", "recipe.toml"} <= {path.name for path in (root / "out").iterdir()}
    return True


def training_is_over(root):
    assert model_is_whole(root)
    assert {path.name for path in (root / "out" / "training").iterdir()} == {"checkpoint-2", "checkpoint-3"}


def build_campaign(patch, *, old, ways=("kill", "interrupt")):
    command = (*BUILD, "--force") if old else BUILD
    return Campaign(
        command,
        lambda root: assert_(stored(root) in ((1,) if old else (0, 1))),
        lambda _: command,
        lambda root: assert_(stored(root) == 1),
        ("edgeskip.exporter.engines.build", "tensorrt_rtx"),
        patch,
        ways,
    )


CAMPAIGNS = {
    "export": Campaign(
        export("bundle"),
        one_of(lambda root: whole(root / "bundle")),
        lambda root: export("second" if whole(root / "bundle") else "bundle"),
        lambda root: assert_(whole(root / "bundle")),
        ("edgeskip.exporter.bundle", "edgeskip.exporter.checkpoint", "edgeskip.recipes.plan.plan", "huggingface_hub"),
    ),
    "build": build_campaign(stand_in, old=False),
    "build again": build_campaign(stand_in, old=True),
    "build again by two renames": build_campaign(stand_in_without_exchange, old=True, ways=("kill",)),
    "pack": Campaign(
        ("pack", "bundle", "packed"),
        one_of(lambda root: whole(root / "packed") and packed(root / "packed")),
        lambda root: ("pack", "bundle", "second" if whole(root / "packed") else "packed"),
        lambda root: assert_(packed(root / "packed") == 1),
        ("edgeskip.exporter.pack",),
    ),
    "cache add": Campaign(
        ADD, one_of(stored), lambda _: ADD, lambda root: assert_(stored(root) == 1), ("edgeskip.runtime.bundle.store",)
    ),
    "cache clear": Campaign(
        ("cache", "clear"),
        one_of(stored),
        lambda _: ("cache", "clear"),
        lambda root: assert_(stored(root) == 0),
        ("edgeskip.runtime.cache", "edgeskip.runtime.bundle.store"),
    ),
    "train": Campaign(
        TRAIN,
        one_of(model_is_whole),
        lambda _: (*TRAIN, "--resume"),
        training_is_over,
        ("edgeskip.recipes.train.training", "transformers.models.llama.modeling_llama"),
    ),
    "recipes copy": Campaign(
        ("recipes", "copy", RECIPE, "mine.toml"),
        one_of(lambda root: has_recipe(root / "mine.toml")),
        lambda root: ("recipes", "copy", RECIPE, "second.toml" if has_recipe(root / "mine.toml") else "mine.toml"),
        lambda root: assert_(has_recipe(root / "mine.toml")),
        ("edgeskip.recipes.library",),
    ),
    "bench": Campaign(
        BENCH,
        one_of(report_is_whole),
        lambda _: BENCH,
        lambda root: assert_(report_is_whole(root)),
        ("edgeskip.runtime.load", "edgeskip.runtime.bench.measure", "onnxruntime"),
    ),
    "build real engines": build_campaign(lambda: None, old=True),
}
POINTS = {"train": 1, "bench": 2, "recipes copy": 0}  # in the suite; 0 for all


@pytest.fixture
def prepared(checkpoints, bundles, tmp_path, monkeypatch):
    """A folder that has what a command needs."""

    def get(name):
        folder = tmp_path / "root"
        folder.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        if name == "export":
            shutil.copytree(checkpoints("llama-gqa"), folder / "checkpoint")
        elif name == "train":
            from tests.recipes import conftest

            conftest.write_corpus(folder / "corpus")
            text = conftest.RECIPE.replace("max_steps = 6", "max_steps = 3\ncheckpoint_steps = 1")
            (folder / "tiny.toml").write_text(text)
        elif name != "recipes copy":
            from edgeskip.runtime.bundle.engines import EngineKind
            from tests.standin import put_engines

            shutil.copytree(bundles("llama-gqa", dtype="fp32" if name == "bench" else "fp16").folder, folder / "bundle")
            (folder / "prompt.txt").write_text("def f(x):")
            (folder / "report.json").write_text(OLD)
            if name not in ("bench", "build"):
                import tensorrt_rtx

                from edgeskip.exporter.pack import pack
                from edgeskip.runtime.bundle.manifest import read_bundle
                from edgeskip.runtime.bundle.store import read_engines

                made = read_bundle(folder / "bundle")
                put_engines(made, EngineKind("tensorrt-rtx", tensorrt_rtx.__version__, 86, "standard"))
                if name == "cache add":
                    pack(made, read_engines(made), folder / "packed")
                    shutil.rmtree(folder / "bundle")
                    shutil.rmtree(folder / "cache")
                    (folder / "packed").rename(folder / "bundle")
        return folder

    return get


@pytest.mark.timeout(0 if ALL else 300)
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_kill_anywhere(name, prepared):
    if "real" in name and not ALL:
        pytest.skip("with EDGESKIP_KILLS=all: it takes minutes")
    points = 0 if ALL else POINTS.get(name, 3)
    command = [sys.executable, "-m", "tests.kills", name, str(prepared(name)), str(points), "20"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert out.returncode == 0, out.stderr
    figures = json.loads(out.stdout.splitlines()[-1])
    print(f"{name}: {figures['points']} points, kills {figures['kills']}, {figures['seconds']} s")
    assert not figures["failures"], "\n".join(figures["failures"])
