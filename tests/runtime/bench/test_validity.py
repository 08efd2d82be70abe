"""What an idle machine never shows is found, and what it shows is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeskip.runtime.bench import validity
from edgeskip.runtime.bench.measure import check_report, read_report
from edgeskip.runtime.bench.validity import Watch, doubts
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.host import others_seconds

LIMITS = {name: getattr(validity, name) for name in ("FROM_MEMORY", "FROM_CACHES", "SPREAD", "OTHERS")}
KEPT = sorted((Path(__file__).parents[3] / "docs" / "benchmarks").glob("*.json"))


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    """Those that other tests are run without."""
    for name, limit in LIMITS.items():
        monkeypatch.setattr(validity, name, limit)


@pytest.mark.parametrize(
    ("rates", "repeated", "others_share", "found"),
    [
        ([("draft", 10**9, 0.95), ("head", 10**9, 1.4)], {"plain decoding": [1.0, 1.15]}, 0.09, []),
        ([("draft", 10**9, 1.6)], {}, 0.0, ["draft read at 160% of a copy's rate, which no memory does"]),
        ([("draft", 10**7, 7.0)], {}, 0.0, []),  # a processor's caches hold it
        ([("draft", 10**7, 18.67), ("head", 10**7, 9.0)], {}, 0.0, ["draft read at 1867% of a copy's rate"]),
        ([], {"plain": [1.0, 1.1], "K = 2": [2.0, 2.5, 2.1]}, 0.0, ["K = 2 differed by 25% between repeats"]),
        ([], {"plain": [1.0]}, 0.0, []),
        ([], {"plain": [0.0, 0.0], "none": []}, 0.0, []),
        ([], {}, 0.43, ["other programs took 43% of the processor"]),
        ([("draft", 10**9, 2.0)], {"plain": [1.0, 2.0]}, 1.0, ["draft read at 200%", "plain differed by 100%", "100%"]),
    ],
)
def test_what_no_idle_machine_shows(rates, repeated, others_share, found):
    said = doubts(rates, repeated, others_share)
    assert len(said) == len(found)
    assert all(part in one for part, one in zip(found, said, strict=True))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_kept_reports_are_valid(path):
    check_report(read_report(path), path)


def test_processor_time_of_others_is_that_of_this_processs_cores(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal guest guest_nice
    lines = [
        f"cpu{core} {ticks} {2 * ticks} {3 * ticks} 99 99 {4 * ticks} {5 * ticks} {6 * ticks} 9 9" for core in (0, 1)
    ]
    (tmp_path / "proc/stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5", "ctxt 1", ""]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    monkeypatch.setattr("edgeskip.runtime.host.time.process_time", lambda: 0.5)
    assert others_seconds(tmp_path) == 20.5
    (tmp_path / "proc/stat").write_text("cpu1 1 2\n")
    assert others_seconds(tmp_path) is None
    assert others_seconds(tmp_path / "nowhere") is None


def test_a_watch_gives_the_share_of_the_time_since(monkeypatch):
    times, others = iter([100.0, 110.0, 200.0, 210.0, 300.0, 310.0]), iter([7.0, 13.0])
    monkeypatch.setattr(validity, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(validity, "others_seconds", lambda: next(others))
    monkeypatch.setattr(validity, "usable_cores", lambda: 2)
    assert Watch("cpu").others_share() == 0.3
    monkeypatch.setattr(validity, "others_seconds", lambda: None)
    assert Watch("cpu").others_share() == 0.0
    seconds = iter([0.0, 10.0])
    monkeypatch.setattr(validity, "others_seconds", lambda: next(seconds))
    assert Watch("cuda").others_share() == 0.0  # a GPU does not wait for the processor


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_another_program_is_seen_and_our_own_work_is_not():
    before = others_seconds()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert others_seconds() - before > 0.4


def test_a_report_that_says_that_it_is_not_valid_is_refused():
    from dataclasses import replace

    report = replace(read_report(KEPT[0]), valid=False, doubts=("other programs took 43% of the processor",))
    with pytest.raises(
        RequestError, match=r"x: not a valid measurement: other programs took 43% .*; run `edgeskip bench` again"
    ):
        check_report(report, "x")
    stages = tuple(replace(stage, share_of_copy=18.67) for stage in report.stages)
    with pytest.raises(RequestError, match="read at 1867% of a copy's rate"):
        check_report(replace(read_report(KEPT[0]), stages=stages), "x")
