"""Compares what `edgeskip plan` foretells of a 7B and an 8B, calibrated on a 1B alone, with what was measured.

    python docs/planning/compare.py

Reads the reports in docs/benchmarks/ and writes the table into docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeskip.recipes.deployment import load_device
from edgeskip.recipes.planning import Plan, PlanSettings, make_plan
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.bench import BenchReport, read_report

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
START, END = "<!-- compare.py writes from here -->\n", "<!-- to here -->\n"
CALIBRATED_ON = "llama3.2-1b"


@dataclass(frozen=True)
class Row:
    """One figure of one report: planned and measured, in ms or bytes."""

    report: str
    what: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Relative, with its sign."""
        return self.planned / self.measured - 1


def compare() -> list[Row]:
    """Every round time and the memory of every report that is not of the model calibrated on."""
    reports = {path.stem: read_report(path) for path in sorted((HERE.parent / "benchmarks").glob("*.json"))}
    known = [report for name, report in reports.items() if name.startswith(CALIBRATED_ON)]
    return [row for name, r in reports.items() if r not in known for row in _rows(name, r, _plan(name, r, known))]


def _plan(name: str, report: BenchReport, known: list[BenchReport]) -> Plan:
    shape = name.rpartition("-")[0]
    settings = PlanSettings(
        report.exit_layer,
        max_length=report.max_length,
        backend="onnxruntime",
        position=report.prompt_tokens + report.settings.max_new_tokens // 2,
    )
    return make_plan(shape, load_shape(shape).architecture, load_device("h100"), settings, known)


def _rows(name: str, report: BenchReport, plan: Plan) -> Iterator[Row]:
    rounds = {speed.num_speculations: speed.round_ms for speed in plan.speeds}
    for row in report.rows:
        if row.stage_ms_per_round is not None and row.host_ms_per_round is not None:
            measured = sum(row.stage_ms_per_round.values()) + row.host_ms_per_round
            yield Row(name, f"K = {row.num_speculations}", rounds[row.num_speculations], measured)
    memory = report.memory_bytes
    held = memory.weights + memory.caches + memory.workspace + (memory.other or 0)
    planned = sum(size for kind, size in plan.memory.items() if kind != "CUDA context")  # made before the bench counts
    yield Row(name, "memory", planned, held)


def table(rows: list[Row]) -> str:
    """The page's table: a line a report."""
    columns = list(dict.fromkeys(row.what for row in rows))
    lines = [f"| report | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for report in dict.fromkeys(row.report for row in rows):
        errors = {row.what: f"{row.error:+.1%}" for row in rows if row.report == report}
        lines.append(f"| {report} | {' | '.join(errors.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def page(text: str, rows: list[Row]) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    return before + START + "\n" + table(rows) + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), compare()), encoding="utf-8")
    print(table(compare()), end="")
