"""Writes the tables of docs/benchmarks.md from the reports beside this file.

python docs/benchmarks/tables.py          writes them
python docs/benchmarks/tables.py --check  fails where the page shows other figures than the reports
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.with_suffix(".md")
START, END = "<!-- tables.py writes from here -->\n", "<!-- to here -->\n"


def reports() -> list[dict[str, Any]]:
    """The kept reports, by shape and match rate."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    return sorted(found, key=lambda report: (sum(report["weight_bytes"].values()), report["source"]))


def tables() -> Iterator[str]:
    """The generated part of the page, line by line."""
    for shape, group in groupby(reports(), key=_shape):
        of_shape = list(group)
        first = of_shape[0]
        yield f"### {shape}, E = {first['exit_layer']} of {first['num_layers']}, {first['dtype']}"
        yield ""
        yield from _speeds(of_shape)
        yield ""
        yield from _stages(of_shape[-1])
        yield ""


def _shape(report: dict[str, Any]) -> str:
    return str(report["source"]).rsplit("-", 1)[0]


def _speeds(of_shape: list[dict[str, Any]]) -> Iterator[str]:
    yield "| match | ideal plain ms | plain ms | best K | self-spec. ms | speedup | of ideal | tokens/round | host |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for report in of_shape:
        plain, *others = report["rows"]
        best = min((row for row in others if row["num_speculations"]), key=lambda row: row["ms_per_token"])
        ideal = report["ideal_ms_per_token"]
        host = max(row["host_share"] for row in others if row["num_speculations"])
        yield (
            f"| {best['match_rate']:.2f} | {ideal:.2f} | {plain['ms_per_token']:.2f} | {best['num_speculations']} "
            f"| **{best['ms_per_token']:.2f}** | {plain['ms_per_token'] / best['ms_per_token']:.2f}x "
            f"| {best['ms_per_token'] / ideal:.2f} | {best['tokens_per_round']:.2f} | {host:.1%} |"
        )
    for report in of_shape:
        rows = [row for row in report["rows"] if row["mode"].startswith("transformers")]
        if rows:
            took = ", ".join(f"{row['mode']} {row['ms_per_token']:.1f} ms" for row in rows)
            yield ""
            yield f"In the same run as {report['source']}: {took}."


def _stages(report: dict[str, Any]) -> Iterator[str]:
    yield f"Each graph by itself ({report['source']}, a copy at {report['copy_gb_per_s']:.0f} GB/s):"
    yield ""
    yield "| graph | rows | ms | MB to read | GB/s | of a copy |"
    yield "|---|---:|---:|---:|---:|---:|"
    for stage in report["stages"]:
        yield (
            f"| {stage['graph']} | {stage['rows']} | {stage['ms']:.3f} | {stage['bytes'] / 1e6:.0f} "
            f"| {stage['gb_per_s']:.0f} | {stage['share_of_copy']:.0%} |"
        )
    kinds = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in report["memory_bytes"].items())
    yield ""
    yield f"Device memory in MB: {kinds}."


def page() -> str:
    """The page with its tables as the reports have them."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(START)
    return head + START + "\n" + "\n".join(tables()) + END + rest.split(END)[1]


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif made != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE}: not what the reports say; run python docs/benchmarks/tables.py")
