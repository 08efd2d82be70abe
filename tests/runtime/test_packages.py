"""Packages, verbs and versions, against what is installed and what pyproject.toml says."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgeskip.cli import main
from edgeskip.runtime.packages import LEAST_VERSIONS, NEEDS, PACKAGES, RUNTIME_PACKAGES, missing_modules, versions

ROOT = Path(__file__).parents[2]


def test_versions_are_those_that_are_installed(tmp_path, monkeypatch):
    (tmp_path / "odd-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)  # installed, and without metadata
    found = versions([*PACKAGES, "odd", "no-such-package"])
    assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert {"edgeskip", "numpy", "tokenizers", "onnx", "onnxscript", "polygraphy", "torch"} <= set(found)
    assert not {"odd", "no-such-package"} & set(found)
    assert all(version == metadata.version(name) for name, version in found.items())
    assert set(RUNTIME_PACKAGES) < set(PACKAGES)


def test_missing_modules_are_looked_for_and_not_imported():
    sys.modules.pop("antigravity", None)
    assert missing_modules(["antigravity", "no_such_module", "json"]) == ["no_such_module"]
    assert "antigravity" not in sys.modules


@pytest.fixture(scope="module")
def extras():
    """Requirements by extra, those of other extras among them."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]

    def flat(extra):
        for requirement in optional[extra]:
            inner = re.fullmatch(r"edgeskip\[(.*)\]", requirement)
            yield from (one for name in inner[1].split(",") for one in flat(name)) if inner else [requirement]

    return {extra: list(flat(extra)) for extra in optional} | {"": project["dependencies"]}


def test_every_extra_brings_the_modules_that_its_verb_looks_for(extras):
    for verb, need in NEEDS.items():
        brought = {re.split(r"[^\w-]", one)[0].lower() for extra in need.extras.split(",") for one in extras[extra]}
        assert set(need.modules) <= brought, verb


def test_the_command_line_looks_for_what_the_doctor_looks_for():
    texts = [path.read_text() for path in ROOT.glob("*/commands/*.py")]
    looked_for = [name for text in texts for name in re.findall(r'\brequire\("([^"]+)"\)', text)]
    assert sorted(looked_for) == sorted(NEEDS)
    assert {verb.split()[0] for verb in NEEDS} <= set(main.list_commands(None))


@pytest.mark.parametrize(
    ("package", "extra"),
    [("onnxruntime", "cpu"), ("onnxruntime-gpu", "cuda"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")],
)
def test_the_least_versions_are_those_of_the_extras(package, extra, extras):
    wanted = f">={'.'.join(map(str, LEAST_VERSIONS[package]))}"
    assert any(re.fullmatch(rf"{package}(\[.*\])?{re.escape(wanted)}", one) for one in extras[extra])
