"""Every command that a page or a recipe shows can be given, and the plans that they show work."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgeskip.cli import main
from edgeskip.recipes.reader import FOLDERS, find_file

ROOT = Path(__file__).parents[1]
FILES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(path for kind in ("md", "toml") for path in (ROOT / "recipes").rglob(f"*.{kind}")),
]
SHOWN = re.compile(r"^(?:#\s{2,}|\s{4})(?:.*(?:&&|\|)\s*)?edgeskip (?P<rest>.+)$", re.MULTILINE)
STANDINS = {"OWNER/NAME": "BUNDLE", "E": "4", "K": "4", "A": "0.8"}  # for the letters of the pages


def shown():
    """Where a command is shown, and what follows `edgeskip` in it."""
    for file in FILES:
        for match in SHOWN.finditer(file.read_text(encoding="utf-8")):
            words = [STANDINS.get(word, word) for word in shlex.split(match["rest"], comments=True)]
            end = next((i for i, word in enumerate(words) if word in ("|", "&&", ">")), len(words))
            yield str(file.relative_to(ROOT)), words[:end]


COMMANDS = [pytest.param(*one, id=f"{one[0]}: {shlex.join(one[1])}") for one in shown()]


def test_commands_are_found():
    files = {one.values[0] for one in COMMANDS}
    assert {
        "README.md",
        "docs/usage.md",
        "docs/jetson.md",
        "recipes/devices/thor.toml",
        "recipes/llama3-8b.toml",
    } <= files


@pytest.mark.parametrize(("file", "words"), COMMANDS)
def test_a_command_that_is_shown_can_be_given(file, words):
    command, arguments = main, words
    with click.Context(main, **main.context_settings) as context:
        while isinstance(command, click.Group):
            name, *arguments = arguments
            command = command.get_command(context, name)
            assert command is not None, name
        with command.make_context(name, list(arguments), parent=context) as made:  # which closes what it opens
            given = made.params
    kinds = {
        "recipe": FOLDERS.values() if words[0] == "recipes" else [FOLDERS["model"]],
        "device_name": [FOLDERS["device"]],
    }
    for parameter, folders in kinds.items():
        named = given.get(parameter)
        if named and not str(named).endswith(".toml"):
            assert find_file(named, folders, parameter).exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_extra_that_is_shown_is_one(file):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"[\"'](?:\.|edgeskip)\[([a-z,]+)\]", file.read_text(encoding="utf-8"))
    assert {extra for one in named for extra in one.split(",")} <= set(extras)


@pytest.mark.parametrize(
    "words", [one.values[1] for one in COMMANDS if one.values[1][0] == "plan" and "CHECKPOINT" not in one.values[1]]
)
def test_a_plan_that_is_shown_works(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-device.toml").write_text('extends = "h100"\n')  # what docs/planning.md has one write
    (tmp_path / "bench.json").write_bytes((ROOT / "docs" / "benchmarks" / "llama3.2-1b-0.8.json").read_bytes())
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
