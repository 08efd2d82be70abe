"""What should draft, from which exit layer E and how much, for this model, text and device, from one bundle.

    the bundle's session: plain decoding --> texts                    each call of a round, timed
                                               |                                   |
    the probe: what every layer would have drafted for them         carried to every E by the cost's fit
                                               |                                   |
                    rounds, simulated for every E and K  --------->  ms per token for every E and K

Only the texts are decoded, so no exit layer needs an export of its own. The simulation (simulation.py) follows the
runtime's loop round by round. What the texts themselves would have drafted, by their n-grams, needs no model at all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np

from edgeskip.exporter.graphs.probe import Exits, Probe, check_probed
from edgeskip.recipes.plan.cost import Sample, call_ms, chains, fit_cost, graph_sizes
from edgeskip.recipes.tune.simulation import Drafts, Rounds, copied_drafts, simulate, simulate_paced
from edgeskip.runtime.bench.prompts import encoded_prompts
from edgeskip.runtime.bench.validity import Watch, doubts
from edgeskip.runtime.bundle.graphs import (
    DRAFT_HEAD,
    MAX_SPECULATIONS,
    GraphName,
    Split,
    check_num_speculations,
    single_exit,
)
from edgeskip.runtime.bundle.manifest import Bundle, Manifest, Progress
from edgeskip.runtime.bundle.weights import read_bytes
from edgeskip.runtime.decoding.model import Generation, Model
from edgeskip.runtime.decoding.rounds import Round, draft_round, given_round, speculative_round, verification_round
from edgeskip.runtime.decoding.session import MeasuredSession
from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.drafting.drafters import Draft, Drafter
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.provenance import Provenance, provenance
from edgeskip.runtime.sampling import GREEDY

_TIMED_ROUNDS, _TIMED_COPIES = 24, 8  # of each length, over all prompts: with drafts of the exit, and of the text
_REPEATS = 30
_WARM_UP_TOKENS = 24

BUSY = 1.3
"""A scale beyond this is not the model's: idle machines show 1.0 to 1.1."""


@dataclass(frozen=True)
class TuneSettings:
    """Speculation lengths to choose from, new tokens per prompt at most, and when drafting ends early.

    `confidence_threshold` is that of `Model.generate`: None takes the backend's. Prompts are cut to `prompt_tokens`, if
    given.
    """

    grid: tuple[int, ...]
    max_new_tokens: int
    confidence_threshold: float | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class CallTime:
    """A graph over `rows` tokens within a round, at the bundle's exit layer: the lower quartile of its times."""

    graph: GraphName
    rows: int
    ms: float


@dataclass(frozen=True)
class Measured:
    """What decoding costs at the bundle's exit layer.

    `calls` are those of rounds with 0 to K drafts of the exit, and with 1 to MAX_SPECULATIONS of the text; their rows
    are at about `position`. Around them the host takes `host_round_ms` for each round, `host_draft_ms` more for each
    draft, and `host_ngram_ms` more for each round where the text may draft. These are lower quartiles, since whatever
    else runs on a machine only ever adds to a time. `plain_ms_per_token` is plain decoding's wall time, for the median
    prompt.
    """

    calls: tuple[CallTime, ...]
    position: int
    host_round_ms: float
    host_draft_ms: float
    plain_ms_per_token: float
    host_ngram_ms: float = 0.0


@dataclass(frozen=True)
class Text:
    """A prompt and its plain continuation, of two tokens or more.

    `speculative_ms` is what the bundle's own pair took for it, after the first token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    speculative_ms: float


@dataclass(frozen=True)
class Pair:
    """An exit layer and a speculation length, and what decoding with them costs; `speedup` is over plain decoding."""

    exit_layer: int
    num_speculations: int
    ms_per_token: float
    speedup: float
    tokens_per_round: float
    acceptance_rate: float
    match_rate: float


@dataclass(frozen=True)
class Drafting(Pair):
    """What drafts (`--draft`), with the pair that is fastest with it; K is 0 where it is chosen for each round (`-k
    auto`). `ngram_share` is the share of rounds whose drafts the text had; where it alone drafts, E says nothing.
    """

    draft: Draft
    ngram_share: float


@dataclass(frozen=True)
class TuneReport(Provenance):
    """The best pair, the bundle's `present` one, and all `pairs`, which draft at their exit alone. `drafting` compares
    that with n-grams and with both, each with a fixed K and, but for the exit, with one chosen for each round.

    `match_rates` are the shares of the texts' tokens that an exit layer drafts right. `prompt_tokens` is a median,
    `new_tokens` a sum; of these tokens, `departures` are not what the probe's last layer gives: they are ties, which
    rounding decides. Rounds take `scale` times what their calls and the host add up to, as they did for the median
    text, decoded whole with the present pair. `tensor_formats` has those of the bundle's quantized tensors, by name,
    and `quantizer` the method that found their numbers. If drafts come from `draft_vocabulary` rows of the vocabulary
    alone, `covered` is the share of the texts' tokens that are among them, which no exit drafts more of right, and
    `best_of_all_rows` the best pair without such a head.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    departures: int
    settings: TuneSettings
    best: Pair
    present: Pair
    match_rates: dict[int, float]
    pairs: tuple[Pair, ...]
    scale: float
    measured: Measured
    valid: bool = True
    doubts: tuple[str, ...] = ()
    tensor_formats: dict[str, str] = field(default_factory=dict)
    quantizer: str | None = None
    draft_vocabulary: int | None = None
    covered: float | None = None
    best_of_all_rows: Pair | None = None
    drafting: tuple[Drafting, ...] = ()

    @property
    def fastest(self) -> Drafting:
        """What should draft."""
        return min(self.drafting, key=lambda one: one.ms_per_token)


def tune(
    open_model: Callable[[], Model],
    prompts: Sequence[str],
    settings: TuneSettings,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> TuneReport:
    """Measures a bundle on its device, closes it, probes its layers, and weighs every pair.

    Args:
        open_model: loads the bundle; its exit layer does not matter.
        prompts: texts to continue.
        settings: what to choose from.
        command: kept in the report.
        progress: called as the work goes on.

    Raises:
        RequestError: a setting that cannot be served, or prompts that are too long or give no text.
        BackendError: ONNX Runtime is missing, or cannot run the probe.
    """
    for k in settings.grid:
        check_num_speculations(k)
    with open_model() as model:
        bundle, session, manifest = model.bundle, model.session, model.bundle.manifest
        if manifest.graphs != single_exit(manifest.architecture, manifest.exit_layer, manifest.draft_vocabulary):
            raise RequestError(bundle.folder, "has several exits", wanted="a bundle with one to measure")
        device, head = session.device, provenance(model, command)
        check_probed(bundle, device)
        if settings.confidence_threshold is None:
            settings = replace(settings, confidence_threshold=session.confidence_threshold)
        prompt_ids = encoded_prompts(model, prompts, settings.prompt_tokens, settings.max_new_tokens)
        watch, copy_rates = Watch(session.device), [session.copy_bytes_per_second()]
        texts, measured, halves = _measure(model, prompt_ids, settings, progress)
        copy_rates.append(session.copy_bytes_per_second())
        others_share, weights = watch.others_share(), read_bytes(bundle)
    probed = _probe(bundle, device, texts, manifest.draft_vocabulary, progress)
    drafts = _drafts_by_exit(probed, texts, manifest, settings.max_new_tokens)
    own, threshold = (manifest.exit_layer, manifest.num_speculations), settings.confidence_threshold or 0.0
    scale = statistics.median(
        text.speculative_ms / rounds_ms(measured, simulate([one], own[1], threshold))
        for text, one in zip(texts, drafts[own[0]], strict=True)
    )

    grid = sorted(set(settings.grid))
    weighing = _Weighing(_costs(measured, manifest), scale, threshold, measured.plain_ms_per_token)
    all_rows: tuple[Pair, ...] = ()
    if manifest.draft_vocabulary is not None:
        probed_whole = _probe(bundle, device, texts, None, progress)
        others = _drafts_by_exit(probed_whole, texts, manifest, settings.max_new_tokens)
        without = replace(weighing, costs=_costs(without_draft_head(measured), manifest))
        all_rows = without.pairs(others, grid)
    rates = [
        (f"{call.graph} over {call.rows} row{'s' * (call.rows > 1)}", size, 1e3 * size / call.ms / max(copy_rates))
        for call in measured.calls
        for size in (weights[call.graph],)
    ]
    found = doubts(rates, {"rounds": halves, "copies of memory": copy_rates}, others_share)
    if scale > BUSY:
        found += (f"rounds took {scale:.2f} times what their calls add up to",)
    pairs = weighing.pairs(drafts, grid)
    best = min(pairs, key=lambda one: one.ms_per_token)
    return TuneReport(
        **vars(head),
        prompts=len(texts),
        prompt_tokens=int(statistics.median(len(text.prompt_ids) for text in texts)),
        new_tokens=sum(len(text.token_ids) for text in texts),
        departures=sum(int((one.token_ids[-1] != t.token_ids).sum()) for one, t in zip(probed, texts, strict=True)),
        settings=settings,
        best=best,
        present=weighing.pair(*own, drafts[own[0]]),
        match_rates={e: float(np.concatenate([d.right for d in kept]).mean()) for e, kept in drafts.items()},
        pairs=pairs,
        scale=scale,
        measured=measured,
        valid=not found,
        doubts=found,
        tensor_formats=dict(manifest.formats),
        quantizer=manifest.quantization.method if manifest.quantization else None,
        draft_vocabulary=manifest.draft_vocabulary,
        covered=_covered(manifest, texts),
        best_of_all_rows=min(all_rows, key=lambda one: one.ms_per_token, default=None),
        drafting=tuple(_compared(weighing, drafts, grid, own[0], best)),
    )


@dataclass(frozen=True)
class _Weighing:
    """What rounds cost at each exit layer, for whatever is weighed; as in `TuneReport`."""

    costs: Mapping[int, Measured]
    scale: float
    threshold: float
    plain_ms_per_token: float

    def pairs(self, drafts: Mapping[int, Sequence[Drafts]], grid: Sequence[int]) -> tuple[Pair, ...]:
        """Every exit layer with every K."""
        return tuple(self.pair(exit_layer, k, drafts[exit_layer]) for exit_layer in drafts for k in grid)

    def pair(self, exit_layer: int, k: int, drafts: Sequence[Drafts]) -> Pair:
        """What drafts of the exit alone give."""
        return self._of(exit_layer, k, simulate(drafts, k, self.threshold))

    def drafting(self, draft: Draft, exit_layer: int, k: int, drafts: Sequence[Drafts]) -> Drafting:
        """What drafts of the exit, of the text or of both give."""
        rounds, choosing_ms = (
            (simulate(drafts, k, self.threshold, draft), 0.0)
            if k
            else simulate_paced(drafts, self.threshold, draft, calls_ms(self.costs[exit_layer]))
        )
        pair, share = self._of(exit_layer, k, rounds, choosing_ms), sum(rounds.by_ngram) / rounds.count
        return Drafting(**vars(pair), draft=draft, ngram_share=share)

    def _of(self, exit_layer: int, k: int, rounds: Rounds, choosing_ms: float = 0.0) -> Pair:
        ms = self.scale * (rounds_ms(self.costs[exit_layer], rounds) + rounds.count * choosing_ms) / rounds.tokens
        return Pair(
            exit_layer=exit_layer,
            num_speculations=k,
            ms_per_token=ms,
            speedup=self.plain_ms_per_token / ms,
            tokens_per_round=rounds.tokens / rounds.count,
            acceptance_rate=rounds.accepted / max(rounds.drafted, 1),
            match_rate=rounds.accepted / max(rounds.tested, 1),
        )


def _compared(
    weighing: _Weighing, drafts: Mapping[int, Sequence[Drafts]], grid: Sequence[int], own: int, best: Pair
) -> Iterator[Drafting]:
    """The best pair of the exit; then the best of n-grams, which need no exit, and of both, and each with `-k auto`."""
    yield weighing.drafting("exit", best.exit_layer, best.num_speculations, drafts[best.exit_layer])
    exits: dict[Draft, Iterable[int]] = {"ngram": (own,), "auto": drafts}
    for draft, layers in exits.items():
        found = (weighing.drafting(draft, e, k, drafts[e]) for e in layers for k in grid)
        yield (fixed := min(found, key=lambda one: one.ms_per_token))
        yield weighing.drafting(draft, fixed.exit_layer, 0, drafts[fixed.exit_layer])


def _costs(measured: Measured, manifest: Manifest) -> dict[int, Measured]:
    """What would have been measured at each exit layer."""
    return {e: carried(measured, manifest, e) for e in range(1, manifest.architecture.num_layers)}


def _covered(manifest: Manifest, texts: Sequence[Text]) -> float | None:
    """The share of the texts' tokens, their first ones left out, that drafts can be."""
    if manifest.draft_vocabulary is None:
        return None
    token_ids = np.concatenate([text.token_ids[1:] for text in texts])
    return float((token_ids < manifest.draft_vocabulary).mean())


def _probe(
    bundle: Bundle,
    device: Literal["cpu", "cuda"],
    texts: Sequence[Text],
    draft_vocabulary: int | None,
    progress: Progress,
) -> list[Exits]:
    found = []
    with Probe(bundle, device, draft_vocabulary) as probe:
        for done, text in enumerate(texts):
            progress("probing", done, len(texts))
            found.append(probe.exits(text.prompt_ids, text.token_ids))
    progress("probing", len(texts), len(texts))
    return found


def _drafts_by_exit(
    probed: Sequence[Exits], texts: Sequence[Text], manifest: Manifest, max_new_tokens: int
) -> dict[int, list[Drafts]]:
    """What each exit drafts for each text, beside what the text does."""
    copied = [copied_drafts(text.prompt_ids, text.token_ids) for text in texts]
    rooms = [min(manifest.max_length - len(text.prompt_ids), max_new_tokens) for text in texts]
    return {
        exit_layer: [
            replace(drafts_of_exit(exits, text, exit_layer, room), copied=copies)
            for exits, text, room, copies in zip(probed, texts, rooms, copied, strict=True)
        ]
        for exit_layer in range(1, manifest.architecture.num_layers)
    }


def drafts_of_exit(exits: Exits, text: Text, exit_layer: int, room: int) -> Drafts:
    """The part of a probed text that concerns one exit layer; `room` as in `Drafts`."""
    row = exit_layer - 1
    right = exits.token_ids[row, 1:] == np.array(text.token_ids[1:])
    return Drafts(right, exits.confidences[row, 1:], room)


def carried(measured: Measured, manifest: Manifest, exit_layer: int) -> Measured:
    """What would have been measured at another exit layer: the same calls, scaled by a cost that was fitted to them."""
    a, dtype = manifest.architecture, manifest.dtype
    here, there = (
        graph_sizes(a, layer, dtype, manifest.formats, manifest.draft_vocabulary)
        for layer in (manifest.exit_layer, exit_layer)
    )

    def sample(call: CallTime) -> Sample:
        size = here[call.graph]
        return Sample(size.layers, call.rows, size.read_bytes(measured.position), call.ms)

    cost = fit_cost([sample(call) for call in measured.calls])

    def moved(call: CallTime) -> CallTime:
        fitted, wanted = (call_ms(cost, sizes[call.graph], call.rows, measured.position) for sizes in (here, there))
        return replace(call, ms=call.ms * wanted / fitted)

    return replace(measured, calls=tuple(map(moved, measured.calls)))


def without_draft_head(measured: Measured) -> Measured:
    """What would have been measured if the head over all rows drafted too."""
    return replace(measured, calls=tuple(call for call in measured.calls if call.graph != DRAFT_HEAD))


def rounds_ms(measured: Measured, rounds: Rounds) -> float:
    """Time of all these rounds, the host's share included."""
    calls = calls_ms(measured)
    host_ms = measured.host_round_ms + (measured.host_ngram_ms if rounds.by_ngram else 0.0)
    at_exit = sum(
        count * (calls("exit", drafts) + drafts * measured.host_draft_ms)
        for drafts, count in enumerate(rounds.by_drafts)
        if count
    )
    copied = sum(count * calls("ngram", drafts) for drafts, count in enumerate(rounds.by_ngram) if count)
    return at_exit + copied + rounds.count * host_ms


def calls_ms(measured: Measured) -> Callable[[Drafter, int], float]:
    """What the calls of a round take, in ms, by what drafts and how many drafts there are."""
    calls = {(call.graph, call.rows): call.ms for call in measured.calls}
    split = chains({call.graph for call in measured.calls})
    rounds: dict[Drafter, Callable[[Split, int], Round]] = {"exit": speculative_round, "ngram": given_round}

    @cache
    def ms(drafter: Drafter, drafts: int) -> float:
        return sum(calls[call.key] for call in rounds[drafter](split, drafts).calls)

    return ms


@dataclass(frozen=True)
class _Turn:
    """One prompt decoded plainly and with the bundle's own speculation length, at the exit and by n-grams, and rounds
    timed in its caches.
    """

    plain: Generation
    speculative: Statistics
    copying: Statistics
    position: int
    times: tuple[_Times, ...]
    copy_times: tuple[_Times, ...]


def _measure(
    model: Model, prompt_ids: Sequence[list[int]], settings: TuneSettings, progress: Progress
) -> tuple[list[Text], Measured, list[float]]:
    """Decodes the prompts and times calls in turns, so that a device that slows down slows both."""
    session, manifest = model.session, model.bundle.manifest
    largest = min(max(*settings.grid, manifest.num_speculations), manifest.max_length - 1)
    longest = min(MAX_SPECULATIONS, manifest.max_length - 1)
    in_situ = set(session.stage_ns or ()) == set(manifest.graphs)
    repeats, copy_repeats = (-(-n // len(prompt_ids)) if in_situ else 0 for n in (_TIMED_ROUNDS, _TIMED_COPIES))

    def turn(ids: list[int], max_new_tokens: int) -> _Turn:
        model.forget()
        plain = model.complete(ids, mode="autoregressive", max_new_tokens=max_new_tokens, **GREEDY.settings)
        model.forget()
        speculative = model.complete(
            ids,
            confidence_threshold=settings.confidence_threshold,
            max_new_tokens=max_new_tokens,
            **GREEDY.settings,
        )
        model.forget()
        copying = model.complete(
            ids,
            draft="ngram",
            num_speculations=manifest.num_speculations,
            max_new_tokens=max_new_tokens,
            **GREEDY.settings,
        )
        position = max(min(len(ids) + len(plain.token_ids) // 2, manifest.max_length - 1 - longest), 0)
        times = tuple(_times_in_rounds(session, model.split, largest, position) for _ in range(repeats))
        copies = tuple(_times_of_copies(session, model.split, longest, position) for _ in range(copy_repeats))
        return _Turn(plain, speculative.statistics, copying.statistics, position, times, copies)

    if not in_situ:  # a device captures a round on its second run, which says nothing of decoding
        rounds = [speculative_round(model.split, k) for k in range(largest + 1)]
        rounds += [given_round(model.split, k) for k in range(1, min(manifest.num_speculations, longest) + 1)]
        for round_ in [one for one in rounds for _ in range(3)]:
            _run(session, round_, 0)
    turn(prompt_ids[0], min(settings.max_new_tokens, _WARM_UP_TOKENS))
    turns = []
    for done, ids in enumerate(prompt_ids):
        progress("measuring", done, len(prompt_ids))
        turns.append(turn(ids, settings.max_new_tokens))
    progress("measuring", len(prompt_ids), len(prompt_ids))
    turns = [one for one in turns if len(one.plain.token_ids) > 1]
    if not turns:
        raise RequestError("prompts", "the model ends after the first token of each", wanted="one that it continues")
    position = int(statistics.median(one.position for one in turns))
    laps = [t for one in turns for t in one.times] or [
        _times_alone(session, model.split, (largest, longest), position) for _ in range(2)
    ]
    times = _by_call([*laps, *(t for one in turns for t in one.copy_times)])
    halves = [float(sum(map(_quiet, _by_call(half).values()))) for half in (laps[::2], laps[1::2])]
    order = list(manifest.graphs)
    calls = sorted(times, key=lambda key: (order.index(key[0]), key[1]))
    plain, speculative = [one.plain.statistics for one in turns], [one.speculative for one in turns]
    copying = [one.copying for one in turns]
    host_ms, drafting_ms, copying_ms = (_quiet(map(_host_ms, runs)) for runs in (plain, speculative, copying))
    drafts = sum(s.drafted for s in speculative) / sum(s.rounds for s in speculative)
    texts = [Text(one.plain.prompt_token_ids, one.plain.token_ids, _wall_ms(one.speculative)) for one in turns]
    measured = Measured(
        calls=tuple(CallTime(*key, _quiet(times[key])) for key in calls),
        position=position,
        host_round_ms=host_ms,
        host_draft_ms=max(drafting_ms - host_ms, 0.0) / max(drafts, 1.0),
        plain_ms_per_token=statistics.median(_wall_ms(s) / (s.new_tokens - 1) for s in plain),
        host_ngram_ms=max(copying_ms - host_ms, 0.0),
    )
    return texts, measured, halves


def _by_call(laps: Iterable[_Times]) -> dict[tuple[GraphName, int], list[float]]:
    """All times of each call."""
    times: dict[tuple[GraphName, int], list[float]] = defaultdict(list)
    for timed in laps:
        for key, ms in timed:
            times[key].append(ms)
    return times


def _quiet(times: Iterable[float]) -> float:
    """The lower quartile."""
    return float(np.quantile(list(times), 0.25))


_Times = Sequence[tuple[tuple[GraphName, int], float]]
"""Calls by graph and rows, and ms."""


def _times_in_rounds(session: MeasuredSession, split: Split, largest: int, position: int) -> _Times:
    """Every call of a round for each K from 0 to `largest`, timed by the session's clock of its graphs.

    A graph that runs alone in a loop finds its weights in the processor's caches; here it finds what a round leaves.
    """
    times: list[tuple[tuple[GraphName, int], float]] = []
    for k in range(largest + 1):
        for part in (*(draft_round(split, row) for row in range(k)), verification_round(split, k)):
            times += _lap(session, part, position)
        session.carry(0)
    return times


def _times_of_copies(session: MeasuredSession, split: Split, longest: int, position: int) -> _Times:
    """The same for drafts of the text, from 1 to `longest`."""
    return [timed for k in range(1, longest + 1) for timed in _lap(session, given_round(split, k), position)]


def _lap(session: MeasuredSession, part: Round, position: int) -> Iterator[tuple[tuple[GraphName, int], float]]:
    """Runs a part of a round in which no graph occurs twice."""
    before = session.stage_ns
    _run(session, part, position)
    after = session.stage_ns
    assert before is not None
    assert after is not None
    for call in part.calls:
        yield call.key, (after[call.graph] - before[call.graph]) / 1e6


def _run(session: MeasuredSession, round_: Round, position: int) -> None:
    """Runs a round on whatever the workspace holds."""
    bound = session.bind(round_)
    bound.start(position, dict.fromkeys(round_.row_inputs, np.zeros(round_.rows, np.int64)))
    bound.wait()


def _times_alone(session: MeasuredSession, split: Split, lengths: tuple[int, int], position: int) -> _Times:
    """Each call of these rounds by itself, for devices that hide what happens within one; there the sum is the same."""
    largest, longest = lengths
    rounds = [given_round(split, k) for k in range(1, longest + 1)]
    rounds += [speculative_round(split, k) for k in range(largest + 1)]
    calls = {call.key: call for round_ in rounds for call in round_.calls}
    return [(key, session.time_call_ms(call, position, _REPEATS)) for key, call in calls.items()]


def _host_ms(s: Statistics) -> float:
    """Time per round outside the graphs, where the session tells it."""
    if not s.stage_ms:
        return 0.0
    return max(_wall_ms(s) - sum(s.stage_ms.values()), 0.0) / s.rounds


def _wall_ms(s: Statistics) -> float:
    """Time of all rounds."""
    return (s.ms_per_token or 0.0) * (s.new_tokens - 1)
