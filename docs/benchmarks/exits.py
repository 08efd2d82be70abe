"""What choosing exit and K for each round loses to the best pair known afterwards: on texts that are drawn.

python docs/benchmarks/exits.py [--texts 8] [--bundle FOLDER]

A text says of each token whether a draft of each exit there would be right: a deeper exit is right more often, and
mostly where a shallower one is; how often changes between segments, or does not. Costs are given. The choice knows
neither rates nor costs, believes at first that a draft of any exit adds 0.35 of a round, measures times that scatter by
3%, and pays for what it looks at. The best pair of exit and K is that of all texts of a kind together; the regret is
how much more time the choice takes.

With a bundle of several exits, its own texts are decoded once more in this way: what each exit would have drafted, and
how sure it would have been, is read off, and the costs are the processor time of its calls, measured one by one. The
rounds are those that `edgeskip tune` simulates. They end by the CPU's threshold, or where the choice, which weighs how
sure the exit is of each draft, has no more, against the best pair with that threshold; or never early.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import process_time_ns
from typing import Any

import numpy as np

from edgeskip.exporter.graphs.probe import Probe
from edgeskip.recipes.plan.cost import cut_model
from edgeskip.recipes.tune.simulation import Costs, Drafts, ExitDrafts, Rounds, simulate, simulate_paced
from edgeskip.recipes.tune.times import CallTime, Measured, RoundTimes
from edgeskip.recipes.tune.tune import drafts_of_text
from edgeskip.runtime.backends import cpu_session
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS
from edgeskip.runtime.decoding.rounds import distinct_calls
from edgeskip.runtime.drafting.drafters import Source
from edgeskip.runtime.load import load

LENGTHS = range(MAX_SPECULATIONS + 1)
TOKENS, SCATTER, ALIKE, BELIEVED = 1536, 0.03, 0.7, 0.35
TEXT, POSITION = 256, 256

Array = Any


@dataclass(frozen=True)
class Case:
    """A model and its texts: what a draft of each exit adds to a round and what it takes to look at one, as shares of a
    round without drafts; and the rates of each segment of texts, by exit.
    """

    slopes: Mapping[int, float]
    look: float
    segments: Sequence[Mapping[int, float]]
    length: int = TOKENS


@dataclass(frozen=True)
class Given:
    """What rounds of a case take."""

    case: Case

    @property
    def slopes(self) -> dict[Source, float]:
        """What is believed of each exit."""
        return dict.fromkeys(self.case.slopes, BELIEVED)

    def round_ms(self, source: Source, drafts: int) -> float:
        """A round with so many drafts."""
        assert source != "ngram"
        return 1 + (self.case.slopes[source] + 0.02) * drafts

    def look_ms(self, exit_layer: int, rows: int) -> float:
        """A look."""
        return self.case.look


@dataclass(frozen=True)
class Scattered:
    """The same as it is measured."""

    costs: Costs
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(99))

    @property
    def slopes(self) -> Mapping[Source, float]:
        """As before."""
        return self.costs.slopes

    def round_ms(self, source: Source, drafts: int) -> float:
        """Times that scatter."""
        return self.costs.round_ms(source, drafts) * float(np.exp(SCATTER * self.random.standard_normal()))

    def look_ms(self, exit_layer: int, rows: int) -> float:
        """As before."""
        return self.costs.look_ms(exit_layer, rows)


TWO, THREE = {3: 0.33, 5: 0.49}, {4: 0.25, 6: 0.33, 10: 0.52}
CASES: dict[str, Case] = {
    "the early exit as good": Case(TWO, 0.1, [{3: 0.84, 5: 0.85}]),
    "the late exit better": Case(TWO, 0.1, [{3: 0.4, 5: 0.85}]),
    "both at a par": Case(TWO, 0.1, [{3: 0.6, 5: 0.77}]),
    "neither pays": Case(TWO, 0.1, [{3: 0.15, 5: 0.25}]),
    "three exits, the middle one": Case(THREE, 0.2, [{4: 0.5, 6: 0.85, 10: 0.88}]),
    "three exits, the first one": Case(THREE, 0.2, [{4: 0.8, 6: 0.83, 10: 0.88}]),
    "three exits, the last one": Case(THREE, 0.2, [{4: 0.2, 6: 0.4, 10: 0.93}]),
    "segments of 256 tokens": Case(TWO, 0.1, [{3: 0.85, 5: 0.87}, {3: 0.3, 5: 0.85}, {3: 0.5, 5: 0.55}], 256),
    "segments of 96 tokens": Case(TWO, 0.1, [{3: 0.85, 5: 0.87}, {3: 0.3, 5: 0.85}, {3: 0.5, 5: 0.55}], 96),
}


def drawn_text(case: Case, random: np.random.Generator) -> Drafts:
    """A text of this kind, of exits that always draft on."""
    order = np.concatenate([random.permutation(len(case.segments)) for _ in range(-(-TOKENS // case.length))])
    which = np.repeat(order, case.length)[:TOKENS]
    alike, sure = random.random(TOKENS), np.ones(TOKENS, np.float32)
    exits = {}
    for exit_layer in case.slopes:
        rates = np.array([segment[exit_layer] for segment in case.segments])[which]
        right = np.where(random.random(TOKENS) < ALIKE, alike, random.random(TOKENS)) < rates
        exits[exit_layer] = ExitDrafts(right, sure)
    return Drafts(exits, room=2 * TOKENS)


def time_of(rounds: Rounds, costs: Costs) -> float:
    """What rounds and looks take, without scatter."""
    times = [count * costs.round_ms(*kind) for kind, count in rounds.by_drafts.items()]
    return sum(times) + sum(count * costs.look_ms(*look) for look, count in rounds.looks.items())


def regret(
    name: str, texts: Sequence[Drafts], exits: Sequence[int], costs: Costs, threshold: float, *, weighs: bool = False
) -> str:
    """The best pair, and how much slower the choice is, with the same threshold or with confidences weighed."""
    fixed = {(e, k): time_of(simulate(texts, e, k, threshold), costs) for e in exits for k in LENGTHS[:13]}
    best = min(fixed, key=lambda pair: fixed[pair])
    chosen, _ = simulate_paced(texts, exits, None if weighs else threshold, "exit", Scattered(costs))
    counts: Counter[Source] = Counter()
    for (source, drafts), count in chosen.by_drafts.items():
        counts[source if drafts else 0] += count
    shares = ", ".join(f"{e or 'plain'} {n / chosen.count:.0%}" for e, n in sorted(counts.items()))
    pair = f"E = {best[0]}, K = {best[1]}" if best[1] else "plain"
    loss, looks = time_of(chosen, costs) / fixed[best] - 1, sum(chosen.looks.values()) / chosen.count
    return f"{name:28s} {pair:16s} {loss:+6.1%}   rounds: {shares}; a look in {looks:.0%}"


def of_a_case(name: str, case: Case, texts: int) -> str:
    """The regret on drawn texts."""
    drawn = [drawn_text(case, np.random.default_rng(seed)) for seed in range(texts)]
    return regret(name, drawn, tuple(case.slopes), Given(case), 0.0)


def of_a_bundle(folder: str, prompts: int) -> list[str]:
    """The regret on a bundle's own texts, with the CPU's threshold and with none."""
    vars(cpu_session)["perf_counter_ns"] = process_time_ns  # what other programs do does not count
    with load(folder, device="cpu", threads=1) as model:
        m, session = model.bundle.manifest, model.session
        exits = (m.exit_layer, *m.other_exits)
        found = (model.complete(p, mode="autoregressive", max_new_tokens=TEXT) for p in load_prompts(None)[:prompts])
        texts = [text for text in found if len(text.token_ids) > 1]
        with Probe(model.bundle, draft_vocabulary=m.draft_vocabulary) as probe:
            probed = [probe.exits(text.prompt_token_ids, text.token_ids) for text in texts]
        cut = cut_model(m.architecture, m.dtype, m.formats, m.draft_vocabulary)(exits)
        calls = distinct_calls(cut.splits.values(), LENGTHS, m.graphs)
        times = tuple(CallTime(*call.key, session.time_call_ms(call, POSITION, 30)) for call in calls)
        threshold = session.confidence_threshold
    costs = RoundTimes(Measured(times, POSITION, 0.0, 0.0, 0.0), cut)
    drafts = [
        drafts_of_text(one, text.prompt_token_ids, text.token_ids, min(m.max_length - len(text.prompt_token_ids), TEXT))
        for text, one in zip(texts, probed, strict=True)
    ]
    ways = {f"threshold {threshold:g}": (threshold, False), "weighed": (threshold, True), "always K": (0.0, False)}
    return [regret(way, drafts, exits, costs, limit, weighs=weighs) for way, (limit, weighs) in ways.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=8, help="texts of each kind")
    parser.add_argument("--bundle", help="a bundle of several exits, in place of texts that are drawn")
    given = parser.parse_args()
    if given.bundle:
        print("\n".join(of_a_bundle(given.bundle, given.texts)))
    else:
        for kind, one in CASES.items():
            print(of_a_case(kind, one, given.texts), flush=True)
