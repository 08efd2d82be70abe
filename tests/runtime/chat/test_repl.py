"""A conversation on a terminal, and through a pipe: what is said, stopped, kept and shown."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import edgeskip

READY = r"\?2004h"  # what comes with the prompt: the terminal marks what is pasted


@pytest.fixture
def folder(chat_bundles):
    return str(chat_bundles(1024).folder)


def answers(folder, said, *options):
    """What a conversation through a pipe gives."""
    command = [sys.executable, "-m", "edgeskip", "chat", folder, "--device", "cpu", "--threads", "1", *options]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=60)


def test_lines_of_a_pipe_are_messages_and_commands(folder, tmp_path):
    kept = tmp_path / "talk.json"
    lines = [
        "Hi",
        "/stats",
        f"/save {kept}",
        "/system S",
        "Hi",
        "/reset",
        f"/load {kept}",
        "/nothing",
        "And?",
        "/bye",
        "no",
    ]
    run = answers(folder, "\n".join(lines), "-n", "8", "--temperature", "0")
    assert run.returncode == 5, run.stderr  # of what is no command
    with edgeskip.load(folder, device="cpu", threads=1) as model:
        chat, other = edgeskip.Chat(model, max_new_tokens=8), edgeskip.Chat(model, system="S", max_new_tokens=8)
        wanted = [chat.ask("Hi"), other.ask("Hi"), chat.ask("And?")]
    assert run.stdout == "".join(f"{text}\n" for text in wanted)
    assert json.loads(kept.read_text())["messages"][1]["content"] == wanted[0]
    for note in (
        "8 tokens, ",
        "context: ",
        "2 messages",
        "with this system prompt",
        "/nothing: no such command; wanted",
    ):
        assert note in run.stderr


def test_what_goes_wrong_with_a_message_or_a_file_ends_nothing(folder, tmp_path):
    lines = ["x" * 1200, f"/load {tmp_path / 'none'}", f"/save {tmp_path}", "/save", "Hi"]
    assert answers(folder, lines[-1], "-n", "4").returncode == 0
    run = answers(folder, "\n".join(lines), "-n", "4")
    assert run.returncode == 5
    assert len(run.stdout.strip()) > 0
    for note in ("wanted at most 1024", "no such file", "cannot be written", "/save: no file; wanted /save FILE"):
        assert note in run.stderr
    assert "Traceback" not in run.stderr


def test_what_no_conversation_can_be_had_with_is_refused_at_once(folder, bundles):
    for run in (answers(bundles("llama-gqa").folder, "Hi"), answers(folder, "Hi", "--temperature", "-1")):
        assert run.returncode == 5
        assert len(run.stderr.splitlines()) == 1


class Terminal:
    """`edgeskip chat` on a terminal of its own."""

    def __init__(self, folder, *options):
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "edgeskip", "chat", folder, "--device", "cpu", "--threads", "1", *options]
            os.execv(sys.executable, command)
        self.shown = ""

    def until(self, pattern, seconds=30):
        """Waits until something is shown after what was waited for last."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self._terminal], [], [], 0.1)[0]:
                data = os.read(self._terminal, 1 << 16)
                if b"\x1b[6n" in data:  # it asks where the cursor is
                    os.write(self._terminal, b"\x1b[1;1R")
                self.shown += data.decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, keys):
        os.write(self._terminal, keys.encode())

    def end(self):
        with suppress(OSError):  # as soon as nobody has the other end
            while os.read(self._terminal, 1 << 16):
                pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal_drafts_are_green_and_an_answer_can_be_stopped(folder, tmp_path):
    terminal = Terminal(folder)
    try:
        terminal.until(READY)
        terminal.type("tell\x1b\rme\r")  # of two lines
        text = terminal.until("\x1b\\[32m")  # green
        os.kill(terminal.pid, signal.SIGINT)
        terminal.until("stopped")
        terminal.until(READY)
        terminal.type(f"/save {tmp_path / 'talk.json'}\r")
        terminal.until("2 messages")
        user, assistant = json.loads((tmp_path / "talk.json").read_text())["messages"]
        assert user == {"role": "user", "content": "tell\nme"}
        assert 0 < len(assistant["content"]) < 1000
        terminal.until(READY)
        terminal.type("again\x03")  # a line that is given up
        terminal.until(READY)
        os.kill(terminal.pid, signal.SIGINT)  # there is no answer to stop
        terminal.until(READY)
        terminal.type("/bye\r")
        assert terminal.end() == 0
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(terminal.pid, signal.SIGKILL)
        raise
    assert "Traceback" not in text
