"""The documentation: links lead somewhere, paths in pages and sources exist, every option is described."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from itertools import product
from pathlib import Path

import click
import pytest

from edgeskip.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
SOURCES = sorted(
    path
    for folder in ("runtime", "exporter", "recipes", "docs")
    for suffix in ("py", "toml", "jinja")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
    if path.name != "sources.toml"  # whose paths are those of other repositories
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])(?:\.ci|docs|exporter|recipes|runtime|src|tests)/[\w{*][\w./*{},-]*[\w}]")
"""A path from the top of the repository, braces and stars among it."""


def prose(page):
    """A page's text less its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def alternatives(path):
    """`a/{b,c}.py` -> a/b.py, a/c.py."""
    parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", path)]
    return ["".join(parts) for parts in product(*parts)]


def missing(path):
    return not any(ROOT.glob(path.rstrip("/"))) if "*" in path else not (ROOT / path).exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `runtime/a.py`.", ["runtime/a.py"]),
        ("runtime/{bundle,decoding}/x and docs/*.md", ["runtime/{bundle,decoding}/x", "docs/*.md"]),
        ("https://github.com/x/docs/a.md and my/docs/b.md", []),
    ],
)
def test_paths_are_found_in_a_text(text, found):
    assert PATH.findall(text) == found
    assert alternatives("runtime/{bundle,decoding}/x") == ["runtime/bundle/x", "runtime/decoding/x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=lambda file: str(file.relative_to(ROOT)))
def test_paths_that_are_named_exist(file):
    named = PATH.findall(file.read_text(encoding="utf-8"))
    assert [path for one in named for path in alternatives(one) if missing(path)] == []


def commands(command, *names):
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from commands(sub, *names, name)
    else:
        yield names, command


@pytest.mark.parametrize("verb", VERBS)
def test_the_usage_page_describes_every_option(verb):
    usage = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    options = {
        option
        for _, command in commands(getattr(import_module(VERBS[verb]), verb))
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert {option for option in options if not re.search(rf"{option}\b", usage)} == set()
    assert f"| `{verb}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_of_the_docs_is_in_their_index():
    index = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - index == {"README.md"}


def test_the_drawing_is_well_formed():
    from xml.etree import ElementTree

    for drawing in (ROOT / "docs").glob("*.svg"):
        assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_git_has_every_page():
    """A page that is not added is a broken link for everybody else."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    assert {str(page.relative_to(ROOT)) for page in PAGES} <= set(listed.stdout.split())
