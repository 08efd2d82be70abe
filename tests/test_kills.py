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


def engines(folder):
    """The number of sets of engines in a bundle; what is there must be all of it."""
    from edgeskip.runtime.bundle.engines import open_engines, read_engines
    from edgeskip.runtime.bundle.manifest import read_bundle

    found = read_engines(read_bundle(folder))
    for one in found:
        with open_engines(one):
            assert len(list(one.folder.iterdir())) == 4
    return len(found)


def one_of(check):
    """What may be there after a kill: all or nothing."""
    return lambda root: assert_(check(root) in (0, 1))


def assert_(value):
    assert value


def export(name):
    return ("export", "checkpoint", name, "-e", "2")


BUILD = ("build", "bundle", "--backend", "tensorrt-rtx", "--sm", "86")
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

    build._run = made


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
    return Campaign(
        BUILD,
        lambda root: assert_(engines(root / "bundle") in ((1,) if old else (0, 1))),
        lambda _: BUILD,
        lambda root: assert_(engines(root / "bundle") == 1),
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
        one_of(lambda root: whole(root / "packed") and engines(root / "packed")),
        lambda root: ("pack", "bundle", "second" if whole(root / "packed") else "packed"),
        lambda root: assert_(engines(root / "packed") == 1),
        ("edgeskip.exporter.pack",),
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
def prepared(checkpoints, bundles, tmp_path):
    """A folder that has what a command needs."""

    def get(name):
        folder = tmp_path / "root"
        folder.mkdir()
        if name == "export":
            shutil.copytree(checkpoints("llama-gqa"), folder / "checkpoint")
        elif name == "train":
            from tests.recipes import conftest

            conftest.write_corpus(folder / "corpus")
            text = conftest.RECIPE.replace("max_steps = 6", "max_steps = 3\ncheckpoint_steps = 1")
            (folder / "tiny.toml").write_text(text)
        elif name != "recipes copy":
            from tests.standin import with_engines

            shutil.copytree(bundles("llama-gqa", dtype="fp32" if name == "bench" else "fp16").folder, folder / "bundle")
            (folder / "prompt.txt").write_text("def f(x):")
            (folder / "report.json").write_text(OLD)
            if "again" in name or "real" in name or name == "pack":
                import tensorrt_rtx

                from edgeskip.runtime.bundle.manifest import read_bundle

                version = tensorrt_rtx.__version__
                made = read_bundle(folder / "bundle")
                with_engines(made, folder / "bundle", backend="tensorrt-rtx", sm=86, version=version)
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
