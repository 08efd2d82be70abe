"""The package where the file system has no symbolic links, so that Git wrote text files in their place."""

from __future__ import annotations

import os
import pydoc
import subprocess
import sys
from pathlib import Path

import edgeskip
import edgeskip.runtime

ROOT = Path(edgeskip.runtime.__file__).resolve().parents[1]


def test_help_lists_all_that_there_is():
    text = pydoc.plain(pydoc.render_doc(edgeskip))
    listed = edgeskip.__doc__.splitlines()
    for name in set(edgeskip.__all__) - {"__version__"}:
        assert any(line.startswith(f"{name} ") for line in listed)
        assert f"    {name}(" in text or f"class {name}(" in text


def test_a_clone_without_links_reads_the_folders_at_its_top(tmp_path):
    package = tmp_path / "src" / "edgeskip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(Path(edgeskip.__file__).read_text())
    for name in ("runtime", "exporter", "recipes", "cli.py"):
        (package / name).write_text(f"../../{name}")
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        "from edgeskip.cli import main; main(['recipes', 'list'], standalone_mode=False)\n"
        "import edgeskip, edgeskip.exporter.config; print(edgeskip.load.__module__, edgeskip.exporter.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "orin-nano-8gb" in run.stdout
    assert run.stdout.splitlines()[-1] == f"edgeskip.runtime.load {tmp_path / 'exporter' / '__init__.py'}"
