"""Whether a measurement can be trusted: what an idle machine never shows, in one place for bench, tune and plan."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from edgeskip.runtime.host import others_seconds, usable_cores

FROM_MEMORY, FROM_CACHES = 1.5, 8.0
"""How much faster than a copy a graph can read: reading alone is somewhat faster, and a processor's caches a lot."""

CACHES_BYTES = 256_000_000
"""More than caches hold."""

SPREAD = 0.2
"""Of what is measured several times, the largest over the smallest, less 1: idle machines stay well below."""

OTHERS = 0.1
"""Share of the processor that other programs may take."""


class Watch:
    """Watches what other programs take of the processor from now on.

    Args:
        device: of the session that is measured; a GPU does not wait for the processor.
    """

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self._device, self._start, self._others = device, time.monotonic(), others_seconds()

    def others_share(self) -> float:
        """Their share of the cores that this process may use, 0 to 1; 0 where it does not matter or is not told."""
        seconds = (time.monotonic() - self._start) * usable_cores()
        now = others_seconds()
        if self._device == "cuda" or seconds <= 0 or now is None or self._others is None:
            return 0.0
        return min(max((now - self._others) / seconds, 0.0), 1.0)


def doubts(
    rates: Iterable[tuple[str, int, float]], repeated: Mapping[str, Sequence[float]], others_share: float = 0.0
) -> tuple[str, ...]:
    """Why measurements cannot be trusted, each reason a phrase; none where they can.

    Args:
        rates: what a graph is called, the bytes that it reads, and its rate over that of a copy.
        repeated: what was measured several times, by what it is called.
        others_share: what other programs took of the processor.
    """
    return (*_impossible(rates), *_spread(repeated), *_disturbed(others_share))


def _impossible(rates: Iterable[tuple[str, int, float]]) -> Iterable[str]:
    beyond = [
        (share, name) for name, size, share in rates if share > (FROM_CACHES if size < CACHES_BYTES else FROM_MEMORY)
    ]
    if beyond:
        share, name = max(beyond)
        yield f"{name} read at {share:.0%} of a copy's rate, which no memory does"


def _spread(repeated: Mapping[str, Sequence[float]]) -> Iterable[str]:
    spreads = {name: max(times) / min(times) - 1 for name, times in repeated.items() if times and min(times) > 0}
    name = max(spreads, key=lambda one: spreads[one], default="")
    if name and spreads[name] > SPREAD:
        yield f"{name} differed by {spreads[name]:.0%} between repeats"


def _disturbed(others_share: float) -> Iterable[str]:
    if others_share > OTHERS:
        yield f"other programs took {others_share:.0%} of the processor"
