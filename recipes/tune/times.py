"""What rounds take: the calls that were measured, and the same carried to a model that is cut after other layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from edgeskip.recipes.plan.cost import Cost, Cut, Sample, call_ms, fit_cost
from edgeskip.recipes.tune.simulation import Rounds
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.decoding.rounds import Round, given_round, hindsight_round, speculative_round
from edgeskip.runtime.drafting.drafters import Draft, Source
from edgeskip.runtime.drafting.length import slopes_of


@dataclass(frozen=True)
class CallTime:
    """A graph over `rows` tokens within a round: the lower quartile of its times."""

    graph: GraphName
    rows: int
    ms: float


@dataclass(frozen=True)
class Measured:
    """What decoding a bundle costs.

    `calls` are those of rounds with 0 to K drafts of each exit, with 1 to MAX_SPECULATIONS of the text, and of looks at
    what an exit would have drafted; their rows are at about `position`. Around them the host takes `host_round_ms` for
    each round, `host_draft_ms` more for each draft, and `host_ngram_ms` more for each round where the text may draft.
    These are lower quartiles, since whatever else runs on a machine only ever adds to a time. `plain_ms_per_token` is
    plain decoding's wall time, for the median prompt.
    """

    calls: tuple[CallTime, ...]
    position: int
    host_round_ms: float
    host_draft_ms: float
    plain_ms_per_token: float
    host_ngram_ms: float = 0.0


class RoundTimes:
    """What rounds of a bundle take.

    Args:
        measured: its calls, and the host's share.
        cut: how its graphs are chained.
    """

    def __init__(self, measured: Measured, cut: Cut) -> None:
        self._measured, self._splits = measured, cut.splits
        self._calls = {(call.graph, call.rows): call.ms for call in measured.calls}
        self.slopes = slopes_of(cut.splits.values(), {name: size.weight_bytes for name, size in cut.sizes.items()})
        """What a draft is thought to add to a round while none was measured."""
        self.round_ms = cache(self._round_ms)
        """The calls of a round with so many drafts, by their source."""

    def _round_ms(self, source: Source, drafts: int) -> float:
        if source == "ngram":
            return self._sum(given_round(next(iter(self._splits.values())), drafts))
        return self._sum(speculative_round(self._splits[source], drafts))

    def look_ms(self, exit_layer: int, rows: int) -> float:
        """A look at what an exit would have drafted for so many tokens: the host looks at each, as at a draft."""
        return self._sum(hindsight_round(self._splits[exit_layer], rows)) + rows * self._measured.host_draft_ms

    def total_ms(self, rounds: Rounds, draft: Draft = "exit") -> float:
        """All these rounds and looks, the host's share included, where this may draft."""
        at_host = self._measured.host_round_ms + (self._measured.host_ngram_ms if draft != "exit" else 0.0)
        return sum(
            count
            * (self.round_ms(source, drafts) + at_host + (source != "ngram") * drafts * self._measured.host_draft_ms)
            for (source, drafts), count in rounds.by_drafts.items()
        ) + sum(count * self.look_ms(*look) for look, count in rounds.looks.items())

    def _sum(self, round_: Round) -> float:
        return sum(self._calls[call.key] for call in round_.calls)


def fitted_cost(measured: Measured, cut: Cut) -> Cost:
    """The cost that explains the calls of a bundle best."""

    def sample(call: CallTime) -> Sample:
        size = cut.sizes[call.graph]
        return Sample(size.layers, call.rows, size.read_bytes(measured.position), call.ms)

    return fit_cost([sample(call) for call in measured.calls])


def carried(measured: Measured, cost: Cost, here: Cut, there: Cut) -> Measured:
    """What would have been measured of the model cut after other layers: the same calls, scaled by a cost that was
    fitted to them. A graph that is not here is one more of those that verify.
    """

    def like(name: GraphName) -> GraphName:
        return name if name in here.sizes else "verify"

    def moved(call: CallTime, name: GraphName) -> CallTime:
        fitted, wanted = (
            call_ms(cost, size, call.rows, measured.position) for size in (here.sizes[call.graph], there.sizes[name])
        )
        return replace(call, graph=name, ms=call.ms * wanted / fitted)

    calls = (moved(call, name) for name in there.sizes for call in measured.calls if call.graph == like(name))
    return replace(measured, calls=tuple(calls))
