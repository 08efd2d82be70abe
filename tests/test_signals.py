"""What signals do to a run: how it ends, and that what the parent ignores stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells which handlers are there")

ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def waiting(bundle, ignored=()):
    """A run that has its handlers and waits for its prompt."""

    def ignore():
        for number in ENDS:  # whoever runs the tests may ignore some
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    command = [sys.executable, "-m", "edgeskip", "generate", bundle.folder, "-f", "-", "-n", "4"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, preexec_fn=ignore, **pipes)
    wanted = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGHUP) if number not in ignored)
    while wanted & ~caught(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def caught(pid):
    """The signals that a process has handlers for, as bits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["SigCgt"], 16)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_the_run_without_a_traceback(number, bundles):
    with waiting(bundles("llama-gqa")) as process:
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert process.returncode == ENDS[number]
    assert (stdout, stderr) == ("", "edgeskip: interrupted\n" if number == signal.SIGINT else "")


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_that_the_parent_ignores_stays_ignored(number, bundles):
    """SIGHUP by nohup, SIGINT by a shell for its jobs in the background."""
    with waiting(bundles("llama-gqa"), ignored=[number]) as process:
        process.send_signal(number)
        stdout, stderr = process.communicate("def f(x):")
    assert process.returncode == 0, stderr
    assert stdout


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_within_a_destructor_ends_the_run_too(number):
    """Python drops what a destructor raises, and says so on stderr."""
    code = (
        "import os, signal, sys, time\n"
        "from edgeskip import cli\n"
        "class Last:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(number)}); time.sleep(0)\n"
        "def work(*_):\n"
        "    Last()\n"
        "    while True: time.sleep(0.01)\n"
        "cli._Group.get_command = lambda *_: __import__('click').Command('work', callback=work)\n"
        "cli.main(['work'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "edgeskip: interrupted\n" if number == signal.SIGINT else ""
    assert (out.returncode, out.stderr) == (ENDS[number], said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_library_is_imported_is_no_failure_of_it(number, bundles, tmp_path):
    """Libraries in C++ make an ImportError of whatever ends their initialization."""
    (tmp_path / "onnxruntime.py").write_text(
        "import os\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "except BaseException as error:\n"
        "    raise ImportError('initialization failed') from error\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "edgeskip", "generate", bundles("llama-gqa").folder, "-p", "a", "-n", "4"]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    said = "edgeskip: interrupted\n" if number == signal.SIGINT else ""
    assert (out.returncode, out.stdout, out.stderr) == (ENDS[number], "", said)
