"""The entry: nothing is run from the current folder, and an early Ctrl-C has no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgeskip

SOURCE = str(Path(edgeskip.__file__).parents[1])
PACKAGES = ("click", "numpy", "onnxruntime", "tokenizers", "rich", "jinja2")


def startup_modules():
    """What Python imports by itself, for `-m` too, before anything of ours."""
    command = [sys.executable, "-X", "importtime", "-m", "antigravity_of_nobody"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines} | set(sys.builtin_module_names)


MODULES = (*sorted({*sys.stdlib_module_names} - startup_modules() - {"sitecustomize", "usercustomize"}), *PACKAGES)


@pytest.fixture
def trap(tmp_path):
    """A folder with modules and commands of names that are likely to be wanted."""
    (tmp_path / "folder").mkdir()
    for name in MODULES:
        (tmp_path / "folder" / f"{name}.py").write_text("raise SystemExit('run from the current folder')")
    command = tmp_path / "folder" / "uname"
    command.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    command.chmod(0o755)
    return tmp_path / "folder"


def entered(trap, code, **environment):
    """What a process in the folder prints that enters as the command does, and goes on with this code."""
    code = f"import sys; sys.path.remove(''); sys.argv[1:] = ['--version']; from edgeskip.__main__ import main\n{code}"
    environment = os.environ | {"PYTHONPATH": SOURCE} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=trap, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", ["", ".:", "../folder:", "folder/..:."])
def test_commands_are_not_taken_from_the_current_folder(path, trap):
    code = "import subprocess, platform; print(platform.uname().processor, subprocess.getoutput('echo $PATH'))"
    out = entered(trap, code, PATH=f"{path}:{os.environ['PATH']}:{path}")
    assert out.returncode == 0, out.stderr
    assert all(entry.startswith("/") for entry in out.stdout.split()[-1].split(":"))
    assert not (trap.parent / "sprung").exists()


def test_a_path_of_the_current_folder_alone_is_none(trap):
    out = entered(trap, "import os; print(os.environ.get('PATH'))", PATH=":")
    assert out.stdout == "None\n"


@pytest.mark.parametrize("path", ["{source}:", ":{source}", ".:{source}", "{source}:../folder"])
def test_modules_are_not_taken_from_the_current_folder(path, trap):
    code = f"import json, {', '.join(PACKAGES)}, subprocess; print(subprocess.getoutput('echo $PYTHONPATH'))"
    out = entered(trap, code, PYTHONPATH=path.format(source=SOURCE))
    assert (out.returncode, out.stdout) == (0, f"{SOURCE}\n"), out.stderr


@pytest.mark.parametrize("module", ["edgeskip", "edgeskip.cli"])
def test_python_m_leaves_it_out_too(module, bundles, trap):
    command = [sys.executable, "-m", module, "generate", str(bundles("llama-gqa").folder), "-p", "a", "-n", "2"]
    out = subprocess.run(command, cwd=trap, env=os.environ | {"PYTHONPATH": SOURCE}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert not (trap.parent / "sprung").exists()


def test_the_current_folder_may_be_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    code = f"import os, sys; os.rmdir({str(tmp_path / 'gone')!r}); sys.path.insert(0, {SOURCE!r})\n"
    code += "from edgeskip.__main__ import main; main(['--version'])"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert out.stdout.startswith("edgeskip, version"), out.stderr


def test_an_interrupt_before_the_command_line_is_there_has_no_traceback():
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from edgeskip.__main__ import main; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout, out.stderr) == (-signal.SIGINT, "", "")
