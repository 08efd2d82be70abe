"""The published figures: the pages show what the kept reports say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "benchmarks"
REPORTS = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("script", ["benchmarks/tables.py", "tuning/run.py"])
def test_the_tables_are_those_of_the_reports(script):
    result = subprocess.run([sys.executable, DOCS / script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted((DOCS / "tuning").glob("*.json")), ids=lambda path: path.stem)
def test_what_tune_picked_is_within_its_bar_of_the_best_pair_measured(path):
    report = json.loads(path.read_text())
    measured = {(e, k): ms for e, row in report["measured_ms_per_token"].items() for k, ms in enumerate(row)}
    assert len(measured) == 11 * 8
    for one in report["tuned"]:
        foretold = {(e, k): ms for e, row in one["foretold_ms_per_token"].items() for k, ms in enumerate(row)}
        assert measured[min(foretold, key=foretold.get)] <= 1.05 * min(measured.values())


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_is_whole_and_honest(path):
    report = json.loads(path.read_text())
    assert report["synthetic"]
    assert report["faults"] == 0
    assert report["rows"][0]["distinct_tokens"] >= 0.9
    assert report["rows"][0]["rounds"] * report["settings"]["repeats"] >= 200  # enough to tell the host's share
    assert report["versions"]["onnxruntime-gpu"]
    assert f"edgeskip bench work/{path.stem}-bundle" in report["command"]
