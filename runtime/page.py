"""A bench report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import ChainableUndefined, Environment

from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.plots import PLAIN, bench_plots, best_row, figure, rows_of, size, undrawn_rows


def bench_page(report: Mapping[str, Any]) -> str:
    """The page of a report in its JSON form; what the report lacks is left out.

    Raises:
        BackendError: matplotlib is missing.
    """
    try:
        plots = bench_plots(report)
    except ImportError as error:
        raise BackendError("bench page", f"no plots ({error})", fix='pip install "edgeskip[plots]"') from None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=ChainableUndefined)
    environment.filters |= {"figure": _figure, "share": _share, "size": size}
    source = (resources.files("edgeskip.runtime") / "bench.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        plots=plots,
        plain=next((row for row in rows_of(report) if row["mode"] == PLAIN), None),
        best=best_row(report),
        undrawn=undrawn_rows(report),
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else figure(value)


def _share(value: float | None) -> str:
    """A share in percent; a count stays one."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}"
