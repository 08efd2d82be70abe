"""How far a runner is from the golden one: errors of every tensor, gathered over calls, and their bounds.

Polygraphy pairs the two runs and gives the largest and the mean absolute error. Its cosine is that of a whole tensor,
where a few long rows hide all the others, and it has no ratio of norms. Both are computed here, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bench.measure import TIE_GAP
from edgeskip.runtime.bundle.dtypes import DType

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Threshold:
    """The largest 1 - cosine and |norm ratio - 1| allowed, in the mean over rows and in any one row.

    The mean tells a small fault in all rows from rounding; the bound for a single row finds one wrong row among many.
    """

    cosine_loss: float
    norm_loss: float
    row_cosine_loss: float
    row_norm_loss: float


THRESHOLDS: dict[DType, Threshold] = {
    "fp32": Threshold(1e-8, 1e-4, 1e-6, 1e-3),
    "fp16": Threshold(5e-5, 2e-3, 5e-3, 0.03),
    "bf16": Threshold(3e-3, 1e-2, 5e-2, 0.15),
}
"""By the bundle's dtype; docs/DESIGN.md has what was measured."""


@dataclass(frozen=True)
class Bounds:
    """What errors are held to: those of every row, and the largest error of a logit, which is also the gap of a tie."""

    rows: Threshold
    tie_gap: float


ROUNDED = Bounds(Threshold(3e-3, 1e-2, 5e-2, 0.15), 1.5)
"""Where products round what they multiply to 8 bits, whatever the dtype."""


def bounds_of(dtype: DType, *, rounded: bool) -> Bounds:
    """The bounds of a session in this dtype, whose products round what they multiply to 8 bits or do not."""
    return ROUNDED if rounded else Bounds(THRESHOLDS[dtype], TIE_GAP[dtype])


@dataclass(frozen=True)
class Errors:
    """A tensor over some calls; each row is one position.

    `cosine` and `norm_ratio` (ours over golden) are means over rows, `row_cosine` is the lowest of any row,
    `row_norm_ratio` the one farthest from 1; `worst_row` is the position of the row farthest off, and `distance` how
    far off it is, relative to its length. NaN and Inf are counted, and taken as 0 in everything else.
    """

    rows: int
    values: int
    max_abs: float
    mean_abs: float
    cosine: float
    norm_ratio: float
    row_cosine: float
    row_norm_ratio: float
    worst_row: int
    distance: float
    nans: int
    infs: int

    def within(self, threshold: Threshold) -> bool:
        """Whether all errors are."""
        return (
            not self.nans
            and not self.infs
            and 1 - self.cosine <= threshold.cosine_loss
            and abs(self.norm_ratio - 1) <= threshold.norm_loss
            and 1 - self.row_cosine <= threshold.row_cosine_loss
            and abs(self.row_norm_ratio - 1) <= threshold.row_norm_loss
        )

    def __add__(self, other: Errors) -> Errors:
        def mean(name: str, weight: str) -> float:
            ours, theirs = getattr(self, weight), getattr(other, weight)
            return float((getattr(self, name) * ours + getattr(other, name) * theirs) / (ours + theirs))

        worst = max(self, other, key=lambda e: e.distance)
        return Errors(
            rows=self.rows + other.rows,
            values=self.values + other.values,
            max_abs=max(self.max_abs, other.max_abs),
            mean_abs=mean("mean_abs", "values"),
            cosine=mean("cosine", "rows"),
            norm_ratio=mean("norm_ratio", "rows"),
            row_cosine=min(self.row_cosine, other.row_cosine),
            row_norm_ratio=max(self.row_norm_ratio, other.row_norm_ratio, key=lambda ratio: abs(ratio - 1)),
            worst_row=worst.worst_row,
            distance=worst.distance,
            nans=self.nans + other.nans,
            infs=self.infs + other.infs,
        )


Key = tuple[str, ...]
"""Names a tensor: its graph, itself, and whatever else distinguishes it."""


class Comparison:
    """Rows of two runners, collected call by call and compared one text at a time."""

    def __init__(self) -> None:
        self.errors: dict[Key, Errors] = {}
        self._rows: dict[Key, list[tuple[Array, Array, Array]]] = {}

    def add(self, key: Key, ours: Array, golden: Array, first_row: int) -> None:
        """Takes rows [rows, values], the first of which is at position `first_row`."""
        self._rows.setdefault(key, []).append((ours, golden, first_row + np.arange(len(ours))))

    def finish_text(self) -> None:
        """Compares what was taken and adds it to `errors`."""
        rows = {key: [np.concatenate(part) for part in zip(*taken, strict=True)] for key, taken in self._rows.items()}
        self._rows.clear()
        finite = {key: np.nan_to_num(ours, nan=0.0, posinf=0.0, neginf=0.0) for key, (ours, _, _) in rows.items()}
        absolute = _absolute(finite, {key: golden for key, (_, golden, _) in rows.items()})
        for key, (ours, golden, positions) in rows.items():
            cosines, ratios, distances = _by_row(finite[key], golden)
            nans, infs = np.isnan(ours), np.isinf(ours)
            distances[(nans | infs).any(1)] = np.finfo(np.float32).max
            found = Errors(
                rows=len(ours),
                values=ours.size,
                max_abs=absolute[key][0],
                mean_abs=absolute[key][1],
                cosine=float(cosines.mean()),
                norm_ratio=float(ratios.mean()),
                row_cosine=float(cosines.min()),
                row_norm_ratio=float(ratios[np.abs(ratios - 1).argmax()]),
                worst_row=int(positions[distances.argmax()]),
                distance=float(distances.max()),
                nans=int(nans.sum()),
                infs=int(infs.sum()),
            )
            self.errors[key] = self.errors[key] + found if key in self.errors else found


def _absolute(ours: Mapping[Key, Array], golden: Mapping[Key, Array]) -> dict[Key, tuple[float, float]]:
    """The largest and the mean absolute error of each tensor, by Polygraphy."""
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    runs = RunResults()
    for runner, rows in (("backend", ours), ("golden", golden)):
        outputs = {" ".join(key): values for key, values in rows.items()}
        runs.append((runner, [IterationResult(outputs, runner_name=runner)]))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        (compared,) = Comparator.compare_accuracy(runs, compare_func=SimpleCompareFunc(check_error_stat="max"))
    ((matches,),) = compared.values()
    return {key: (matches[" ".join(key)].max_absdiff, matches[" ".join(key)].mean_absdiff) for key in ours}


def _by_row(ours: Array, golden: Array) -> tuple[Array, Array, Array]:
    """Cosine, ratio of norms and relative distance of each row, [rows]; a row of zeros matches only zeros."""
    ours, golden = ours.astype(np.float64), golden.astype(np.float64)
    length, wanted = np.linalg.norm(ours, axis=1), np.linalg.norm(golden, axis=1)
    zero = ((length == 0) & (wanted == 0)).astype(np.float64)
    cosines = np.divide((ours * golden).sum(1), length * wanted, out=zero.copy(), where=(length > 0) & (wanted > 0))
    ratios = np.divide(length, wanted, out=zero, where=wanted > 0)
    distances = np.linalg.norm(ours - golden, axis=1) / np.maximum(wanted, np.finfo(np.float32).tiny)
    return np.minimum(cosines, 1.0), ratios, distances
