"""A report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import ChainableUndefined, Environment, FunctionLoader

from edgeskip.runtime.bench.plots import PLAIN, bench_plots, best_row, figure, rows_of, size, undrawn_rows
from edgeskip.runtime.errors import BackendError


def bench_page(report: Mapping[str, Any]) -> str:
    """The page of a report, given in its JSON form; what the report lacks is left out.

    Raises:
        BackendError: matplotlib is missing.
    """
    try:
        plots = bench_plots(report)
    except ImportError as error:
        raise no_plots("bench page", error) from None
    return render(
        "bench.html.jinja",
        report=report,
        plots=plots,
        plain=next((row for row in rows_of(report) if row["mode"] == PLAIN), None),
        best=best_row(report),
        undrawn=undrawn_rows(report),
    )


def render(template: str, **values: object) -> str:
    """A page from one of this folder's templates; what a report lacks is left out."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,
        loader=FunctionLoader(lambda name: (resources.files(__package__) / name).read_text(encoding="utf-8")),
    )
    environment.filters |= {"figure": _figure, "share": _share, "size": size}
    return environment.get_template(template).render(values)


def no_plots(page: str, error: ImportError) -> BackendError:
    """What to say where matplotlib is missing."""
    return BackendError(page, f"no plots ({error})", fix='pip install "edgeskip[plots]"')


def _figure(value: float | None) -> str:
    return "–" if value is None else figure(value)


def _share(value: float | None) -> str:
    """A share in percent; a count stays one."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}"
