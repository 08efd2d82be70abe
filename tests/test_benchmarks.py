"""The published benchmarks: the page shows what the kept reports say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
REPORTS = sorted(FOLDER.glob("*.json"))


def test_the_tables_are_those_of_the_reports():
    result = subprocess.run([sys.executable, FOLDER / "tables.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_is_whole_and_honest(path):
    report = json.loads(path.read_text())
    assert report["synthetic"]
    assert report["faults"] == 0
    assert report["rows"][0]["distinct_tokens"] >= 0.9
    assert report["rows"][0]["rounds"] * report["settings"]["repeats"] >= 200  # enough to tell the host's share
    assert report["versions"]["onnxruntime-gpu"]
    assert f"edgeskip bench work/{path.stem}-bundle" in report["command"]
