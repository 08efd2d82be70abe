"""A campaign of kills: a command in a process of its own, ended before its n-th open, rename or removal of a file.

It is killed at every point, or at so many drawn by a seed. `kill` is SIGKILL, which leaves nobody to clean up: the
destination must be whole, old or absent, and the next run must succeed and leave no hidden file. `interrupt` is Ctrl-C,
once more at each point that follows: nothing hidden may be left at once. test_kills.py has the commands.

Processes are forked from one that has imported what they need. Python's audit events tell of opens, renames and
removals.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = {
    "open",
    *(f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod")),
}


@dataclass(frozen=True)
class Campaign:
    """A command to be killed in a copy of a folder.

    Args:
        command: its arguments; {root} is the folder.
        check: finds in the folder after a kill that what the command writes is whole, old or absent.
        again: the next run's arguments, by the folder.
        final: finds that all is there after the next run.
        imports: modules that the command needs.
        patch: called in the process before the command.
        ways: of ending it.
    """

    command: tuple[str, ...]
    check: Callable[[Path], None]
    again: Callable[[Path], tuple[str, ...]]
    final: Callable[[Path], None]
    imports: tuple[str, ...] = ()
    patch: Callable[[], None] = lambda: None
    ways: tuple[str, ...] = ("kill", "interrupt")


@dataclass(frozen=True)
class Figures:
    """Points at which a run can be killed, kills done by signal, and what was wrong."""

    points: int
    kills: dict[str, int]
    failures: list[str]


def run(campaign: Campaign, template: Path, points: int | None, seed: int) -> Figures:
    """Kills the command at `points` of its points, or at all."""
    place = template.with_name(f"{template.name}-run")
    total = int(_forked(campaign, _copied(template, place), campaign.command, None, "count")[1])
    campaign.final(place)
    random_ = random.Random(seed)
    failures: list[str] = []
    kills = dict.fromkeys(campaign.ways, 0)
    for way in campaign.ways:
        every = range(1, total + 1)
        for point in every if points is None or points >= total else sorted(random_.sample(every, points)):
            root = _copied(template, place)
            try:
                kills[way] += _kill(campaign, root, point, way)
            except Exception:
                failures.append(f"{way} at {point} of {total}: {traceback.format_exc(limit=-3)}\n{_listing(root)}")
    shutil.rmtree(place)
    return Figures(total, kills, failures)


def _kill(campaign: Campaign, root: Path, point: int, way: str) -> bool:
    """Whether the run was ended before its own end: it can be shorter than the one that was counted."""
    status, output = _forked(campaign, root, campaign.command, point, way)
    assert status in (0, -signal.SIGKILL if way == "kill" else 130), f"exit {status}: {output}"
    if way == "interrupt":
        assert hidden(root) == [], "hidden files after an interrupt"
    ended = status != 0
    campaign.check(root)
    again = campaign.again(root)
    status, output = _forked(campaign, root, again, None, "plain")
    assert status == 0, f"the next run: exit {status}: {output}"
    campaign.final(root)
    assert hidden(root) == [], "hidden files after the next run"
    return ended


def hidden(root: Path) -> list[str]:
    """What a user would not see."""
    return [str(path.relative_to(root)) for path in root.rglob(".*")]


def _copied(template: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    return place


def _listing(root: Path) -> str:
    return "\n".join(f"  {path.relative_to(root)}" for path in sorted(root.rglob("*")))


def _forked(campaign: Campaign, root: Path, command: tuple[str, ...], point: int | None, way: str) -> tuple[int, str]:
    """Runs a command in a child; gives its exit status, -9 for SIGKILL, and its output or the number of points."""
    report = root.with_name(f"{root.name}.out")
    pid = os.fork()
    if pid == 0:
        try:
            _child(campaign, root, command, point, way, report)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), report.read_text(errors="replace")


def _child(campaign: Campaign, root: Path, command: tuple[str, ...], point: int | None, way: str, report: Path) -> None:
    output = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    (root / "tmp").mkdir(exist_ok=True)
    os.environ.update(XDG_CACHE_HOME=str(root / "cache"), TMPDIR=str(root / "tmp"), HOME=str(root / "home"))
    tempfile.tempdir = None
    os.chdir(root)
    campaign.patch()
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        paths = args[: 1 + (event == "os.rename")] if event in EVENTS else ()
        if not any((root / os.fsdecode(path)).is_relative_to(root) for path in paths if _is_path(path)):
            return
        seen += 1
        if point is not None and way == "kill" and seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if point is not None and way == "interrupt" and seen >= point:
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(watch)
    from edgeskip.cli import main

    try:
        main([argument.format(root=root) for argument in command])
    except SystemExit as caught:
        code = caught.code if isinstance(caught.code, int) else int(caught.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    if way == "count":
        report.write_text(f"{seen}")
    os._exit(code)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def main() -> None:
    """Runs a campaign of test_kills.py on a folder and prints its figures as JSON: NAME FOLDER POINTS SEED."""
    from tests import test_kills

    campaign, folder = test_kills.CAMPAIGNS[sys.argv[1]], Path(sys.argv[2])
    points, seed = (int(argument) for argument in sys.argv[3:])
    for module in campaign.imports:
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
    os.environ["XDG_CACHE_HOME"] = os.devnull  # so that checks read all of a file
    start = time.monotonic()
    found = run(campaign, folder, points or None, seed)
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"points": found.points, "kills": found.kills, "failures": found.failures, "seconds": seconds}))


if __name__ == "__main__":
    main()
