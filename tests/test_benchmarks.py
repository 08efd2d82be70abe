"""The published figures: the pages show what the kept reports say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("script", ["benchmarks/tables.py", "tuning/run.py"])
def test_the_tables_are_those_of_the_reports(script):
    result = subprocess.run([sys.executable, DOCS / script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
