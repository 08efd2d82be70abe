"""What is around a command can be missing, closed, full or odd: it does its work or says so in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeskip.cli import main
from edgeskip.recipes.train import training
from edgeskip.runtime.bench import measure
from edgeskip.runtime.bundle.manifest import MANIFEST
from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.host import usable_cores
from tests.conftest import edit_json, make_tokenizer
from tests.recipes.conftest import RECIPE, write_corpus
from tests.test_cli import assert_one_line, run, succeed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="closes and limits as Linux has them")
EDGESKIP = f"{sys.executable} -m edgeskip.cli"


@pytest.fixture
def bundle(bundles):
    return bundles("llama-gqa").folder


def shell(script, **settings):
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, **settings)


# Streams


def test_a_closed_stdout_is_told_and_no_file_takes_its_place(bundle):
    done = shell(f"{EDGESKIP} inspect {bundle} >&-")
    assert done.returncode == 5
    assert done.stderr == "edgeskip: stdout: cannot be written (Bad file descriptor)\n"
    done = shell(f"{EDGESKIP} recipes validate nowhere.toml >&- <&- 2>&-; echo $?")
    assert (done.stdout, done.stderr) == ("7\n", "")


@pytest.mark.parametrize("words", ["--help", "--version", "recipes list"])
def test_a_full_stdout_is_told(words):
    done = shell(f"{EDGESKIP} {words} >/dev/full")
    assert done.returncode == 5
    assert done.stderr == "edgeskip: stdout: cannot be written (No space left on device)\n"


def test_a_full_stderr_changes_no_exit_code(tmp_path):
    assert shell(f"{EDGESKIP} inspect {tmp_path} 2>/dev/full").returncode == 4


def test_a_closed_stdout_is_in_nobodys_way_who_does_not_write_to_it(checkpoints, tmp_path):
    done = shell(f"{EDGESKIP} export {checkpoints('llama-gqa')} {tmp_path}/b -e 2 >&- <&-")
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_a_closed_stdin_is_told_where_a_prompt_comes_from_it(bundle):
    done = shell(f"{EDGESKIP} generate {bundle} -f - <&-")
    assert done.returncode == 5
    assert done.stderr == "edgeskip: stdin: cannot be read (Bad file descriptor)\n"


def test_a_prompt_comes_through_a_pipe(bundle):
    done = shell(f"{EDGESKIP} generate {bundle} -n 3 -f <(printf 'a\\r\\nb') --json")
    assert json.loads(done.stdout)["prompt_token_ids"] == make_tokenizer().encode("a\r\nb").ids


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_the_json_is_the_same_whatever_stdout_can_spell(encoding, bundle, monkeypatch):
    arguments = ["generate", str(bundle), "-p", "caf\u00e9 \u4e2d", "-n", "40", "--json"]
    texts = [json.loads(CliRunner(charset=c).invoke(main, arguments).stdout)["text"] for c in ("utf-8", encoding)]
    assert texts[0] == texts[1]
    assert not texts[0].isascii()
    done = shell(f"PYTHONIOENCODING={encoding} {EDGESKIP} generate {bundle} -p a -n 40")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize(
    "command",
    [
        *("inspect {bundle}", "generate {bundle} -p a -n 3", "generate {bundle} -p a -n 3 --json", "doctor"),
        *("recipes list", "recipes show h100", "plan llama3.2-1b -d h100", "plan llama3.2-1b -d h100 --json"),
        *("bench {bundle} --prompts {tmp}/a.txt -k 1 -n 2 --repeats 1", "train {tmp}/x.toml -o {tmp}/out"),
        *("tune {bundle} --prompts {tmp}/a.txt -k 1 -n 2", "--help", "bench --help"),
    ],
)
def test_a_reader_that_is_gone_ends_a_command_as_it_ends_others(command, bundle, recipe, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):")
    reading, writing = os.pipe()
    os.close(reading)
    words = [*EDGESKIP.split(), *command.format(bundle=bundle, tmp=tmp_path).split()]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, "Traceback" in done.stderr) == (128 + signal.SIGPIPE, False), done.stderr


# Folders, names and disks


def test_a_current_folder_that_is_gone(bundle, tmp_path):
    (tmp_path / "gone").mkdir()
    done = shell(f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {EDGESKIP} inspect {bundle}")
    assert done.returncode == 5
    assert done.stderr == "edgeskip: current folder: is gone (No such file or directory); change into another\n"


def test_a_report_of_a_long_name_is_written(tmp_path):
    succeed("plan", "llama3.2-1b", "-d", "h100", "--json", tmp_path / ("x" * 250))
    assert [len(path.name) for path in tmp_path.iterdir()] == [250]


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("path", ["x" * 300, "/proc/self/x", "nowhere/x"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(option, path, bundle, monkeypatch):
    monkeypatch.setattr(measure, "run_bench", lambda *_: pytest.fail("measured"))
    result = run("bench", bundle, option, path)
    assert result.exit_code == 5
    assert_one_line(result.stdout, result.stderr)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["export", "{checkpoint}", "{name}", "-e", "2"], 4),
        (["export", "{name}", "{tmp}/b", "-e", "2"], 3),
        (["export", "~nobody-of-this-name/x", "{tmp}/b", "-e", "2"], 3),
        (["plan", "llama3.2-1b", "-d", "h100", "--json", "{name}"], 5),
        (["plan", "llama3.2-1b", "-d", "h100", "--calibrate", "{name}"], 5),
        (["plan", "llama3.2-1b", "-d", "{name}.toml"], 7),
        (["plan", "{name}", "-d", "h100"], 5),
        (["recipes", "copy", "h100", "{name}"], 7),
        (["recipes", "validate", "{name}.toml"], 7),
        (["train", "{name}.toml"], 7),
        (["inspect", "{name}"], 4),
        (["bench", "{bundle}", "--prompts", "{name}"], 5),
    ],
)
def test_a_name_that_is_too_long_is_one_line(command, code, bundle, checkpoints, tmp_path):
    names = {"name": tmp_path / ("x" * 300), "bundle": bundle, "checkpoint": checkpoints("llama-gqa"), "tmp": tmp_path}
    result = run(*(part.format(**names) for part in command))
    assert result.exit_code == code
    assert_one_line(result.stdout, result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def recipe(tmp_path):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "x.toml").write_text(RECIPE)
    return tmp_path / "x.toml"


@pytest.mark.parametrize("most", [1000, 100_000, 200_000])
def test_a_training_that_cannot_save_is_one_line(most, recipe, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # larger files are refused, as on a full disk
    try:
        with pytest.raises(RecipeError, match="cannot be written") as caught:
            training.train(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(caught.value)
    assert training.train(recipe, tmp_path / "out", resume=True).finished


def test_a_training_in_a_locked_folder_does_not_begin(recipe, monkeypatch):
    monkeypatch.setattr(training, "run_training", lambda *_: pytest.fail("began"))
    with pytest.raises(RecipeError, match="/proc/self: cannot be written"):
        training.train(recipe, "/proc/self")


# Memory and threads


@pytest.mark.parametrize("kilobytes", [100_000, 270_000, 300_000])
def test_little_memory_is_one_line(kilobytes, bundle):
    done = shell(f"ulimit -v {kilobytes} && {EDGESKIP} generate {bundle} -p a -n 3 --threads 1")
    if done.returncode:  # the libraries of another release may do with so much
        assert done.returncode == 6
        assert_one_line(done.stdout, done.stderr)


def test_more_threads_than_cores_are_refused(bundle):
    done = shell(f"{EDGESKIP} generate {bundle} -p a --threads 1024")
    if usable_cores() < 1024:
        assert done.returncode == 6
        assert done.stderr.startswith(f"edgeskip: threads: 1024; wanted at most {usable_cores()}")


# Terminals


def test_no_text_of_a_bundle_drives_the_terminal(bundle, tmp_path):
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    hostile = "\x1b[2J\x9b2J\u202e\ud800[/red]\n" + "x" * 1_000_000
    edit_json(folder / MANIFEST, lambda m: m.update(source=hostile, edgeskip_version=hostile))
    result = succeed("inspect", folder, color=True)
    assert not set("\x1b\x9b\u202e") & set(result.output)
    assert "\\x1b[2J\\x9b2J\\u202e\\ud800[/red] xxx" in result.stdout
    assert len(result.stdout) < 10_000
    edit_json(folder / MANIFEST, lambda m: m.update({hostile: 1}))
    result = run("inspect", folder)
    assert_one_line(result.stdout, result.stderr)
    assert len(result.stderr) < 5000


def test_a_models_text_does_not_drive_the_terminal(monkeypatch):
    from io import StringIO

    from rich.console import Console

    from edgeskip.runtime import terminal
    from edgeskip.runtime.decoding.model import Piece

    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = StringIO()
    console = terminal.console()
    console.file = shown
    assert isinstance(console, Console)
    pieces = [Piece("a\x9b31m\x1b]0;title\x07\n\tb", drafted=True), Piece("", generation=object())]
    terminal.stream(pieces, console)
    assert shown.getvalue() == "\x1b[32ma\\x9b31m\\x1b]0;title\\x07\x1b[0m\n\x1b[32m        b\x1b[0m\n"
