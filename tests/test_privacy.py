"""Nothing is sent unasked, and nothing is written but what a command is told to, and what only saves time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"])
def test_telemetry_is_off_unless_the_user_says_otherwise(name):
    code = f"import edgeskip, os; print(os.environ['{name}'])"
    environment = {key: value for key, value in os.environ.items() if key != name}
    for given, wanted in (({}, "1"), ({name: "0"}, "0")):
        out = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True)
        assert out.stdout == f"{wanted}\n"


def test_nothing_is_written_elsewhere(bundles, tmp_path):
    """By any library: ONNX Runtime, for one, keeps what it would send in a database below the home folder."""
    home, work, temporary = (tmp_path / name for name in ("home", "work", "temporary"))
    for folder in (home, work, temporary):
        folder.mkdir()
    shutil.copytree(bundles("llama-gqa").folder, work / "bundle")
    (work / "a.txt").write_text("def f(x):")
    before = {path.relative_to(work) for path in work.rglob("*")}
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(temporary)}
    for name in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY", "MPLCONFIGDIR"):
        environment.pop(name, None)
    command = "bench bundle --prompts a.txt -k 2 -n 4 --repeats 1 --html page.html --json report.json"
    subprocess.run([sys.executable, "-m", "edgeskip", *command.split()], cwd=work, env=environment, check=True)
    assert {str(path.relative_to(work)) for path in work.rglob("*")} == {*map(str, before), "page.html", "report.json"}
    assert list(temporary.iterdir()) == []
    files = [path.relative_to(home).parts for path in home.rglob("*") if path.is_file()]
    assert {parts[:2] for parts in files} == {(".cache", "edgeskip")}
