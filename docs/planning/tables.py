"""Writes the tables of docs/planning.md: every recipe on every device, and what was planned against what was measured.

    python docs/planning/tables.py

For the second, `edgeskip plan` is calibrated on the reports of a 1B in docs/benchmarks/ alone, and judged by those of a
7B and an 8B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgeskip.exporter.quantization.choice import FormatChoice
from edgeskip.recipes.deployment import DEVICES, MODELS, Device, load_device, load_export_recipe, recipe_shape
from edgeskip.recipes.plan.plan import Plan, PlanSettings, make_plan
from edgeskip.recipes.plan.recommend import recommend, weights_formats
from edgeskip.recipes.shape import load_shape
from edgeskip.runtime.bench.measure import BenchReport, read_report
from edgeskip.runtime.bundle.architecture import Architecture

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
START, END = "<!-- tables.py writes {} from here -->\n", "<!-- to here -->\n"
CALIBRATED_ON = "llama3.2-1b"
MATCH_RATE, COVERED = 0.8, 0.95
"""At the recipe's exit, and the share of that where drafts come from part of the vocabulary (docs/token-counts)."""


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


def comparison_table(rows: list[Row]) -> str:
    """A line a report: planned over measured."""
    columns = list(dict.fromkeys(row.what for row in rows))
    lines = [f"| report | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for report in dict.fromkeys(row.report for row in rows):
        errors = {row.what: f"{row.error:+.1%}" for row in rows if row.report == report}
        lines.append(f"| {report} | {' | '.join(errors.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def pairs_table() -> str:
    """A line for each recipe, a column for each device: ms per token, plain and at the best K, after the format where
    it is not the dtype, or why not.
    """
    devices = sorted((load_device(path.stem) for path in DEVICES.glob("*.toml")), key=lambda d: (d.memory_gb, d.name))
    lines = [f"| | {' | '.join(device.name for device in devices)} |", f"|---|{'---:|' * len(devices)}"]
    for path in sorted(MODELS.glob("*.toml")):
        recipe, _ = load_export_recipe(path.stem)
        architecture = recipe_shape(recipe, path).architecture
        rate = MATCH_RATE * (COVERED if recipe.draft_vocabulary else 1)
        settings = PlanSettings(recipe.exit_layer, match_rates={recipe.exit_layer: (rate,)}, position=512)
        settings = replace(settings, draft_vocabulary=recipe.draft_vocabulary)
        cells = (_cell(architecture, device, settings, recipe.weights) for device in devices)
        lines.append(f"| {path.stem}, E = {recipe.exit_layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(architecture: Architecture, device: Device, settings: PlanSettings, weights: FormatChoice | None) -> str:
    weights = weights or recommend(architecture, device, settings).weights
    settings = replace(settings, formats=weights_formats(architecture, device, weights))
    plan = make_plan("", architecture, device, settings)
    if not plan.largest_max_length:
        return "no room"
    notes = []
    if plan.largest_max_length < plan.max_length:
        notes.append(f"{plan.largest_max_length} tokens")
        plan = make_plan("", architecture, device, replace(settings, max_length=plan.largest_max_length))
    notes += ["swap"] * (not plan.works)
    best = min(speed.ms_per_token for speed in plan.speeds if speed.ms_per_token is not None)
    name = "" if weights == "dtype" else f"{weights}: "
    return f"{name}{plan.plain_ms_per_token:.3g} / {best:.3g}" + (f" ({', '.join(notes)})" if notes else "")


def page(text: str) -> str:
    """The page with the tables in their places."""
    for name, table in (("pairs", pairs_table()), ("errors", comparison_table(compare()))):
        before, rest = text.split(START.format(name))
        text = before + START.format(name) + "\n" + table + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(comparison_table(compare()), end="")
