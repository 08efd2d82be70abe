"""Which exit layer E and speculation length K to choose for this model, text and device, from one bundle.

    the bundle's session: plain decoding --> texts                    each call of a round, timed
                                               |                                   |
    the probe: what every layer would have drafted for them         carried to every E by the cost's fit
                                               |                                   |
                    rounds, simulated for every E and K  --------->  ms per token for every E and K

Only the texts are decoded, so no exit layer needs an export of its own. The simulation follows the runtime's loop round
by round, because no formula in the match rate alone would do: drafts are right in runs, and the threshold ends rounds
where they tend to be wrong.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.graphs.probe import Exits, Probe, check_probed
from edgeskip.recipes.plan.cost import Sample, call_ms, chains, fit_cost, graph_sizes
from edgeskip.runtime.bench.prompts import encoded_prompts
from edgeskip.runtime.bench.validity import Watch, doubts
from edgeskip.runtime.bundle.graphs import DRAFT_HEAD, GraphName, Split, check_num_speculations, single_exit
from edgeskip.runtime.bundle.manifest import Bundle, Manifest, Progress
from edgeskip.runtime.bundle.weights import read_bytes
from edgeskip.runtime.decoding.decode import drafts_that_fit
from edgeskip.runtime.decoding.model import Generation, Model
from edgeskip.runtime.decoding.rounds import Round, draft_round, speculative_round, verification_round
from edgeskip.runtime.decoding.session import MeasuredSession
from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.provenance import Provenance, provenance
from edgeskip.runtime.sampling import GREEDY

_TIMED_ROUNDS = 24  # of each length, over all prompts
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

    `calls` are those of rounds with 0 to K drafts, their rows at about `position`; around them the host takes
    `host_round_ms` for each round and `host_draft_ms` more for each draft. These are lower quartiles, since whatever
    else runs on a machine only ever adds to a time. `plain_ms_per_token` is plain decoding's wall time, for the median
    prompt.
    """

    calls: tuple[CallTime, ...]
    position: int
    host_round_ms: float
    host_draft_ms: float
    plain_ms_per_token: float


@dataclass(frozen=True)
class Text:
    """A prompt and its plain continuation, of two tokens or more.

    `speculative_ms` is what the bundle's own pair took for it, after the first token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    speculative_ms: float


@dataclass(frozen=True)
class Drafts:
    """What an exit drafts for the m tokens after a text's first: which are right, and its probability for each [m].

    `room` is the number of cache rows after the prompt.
    """

    right: npt.NDArray[np.bool_]
    confidences: npt.NDArray[np.float32]
    room: int


@dataclass(frozen=True)
class Rounds:
    """The rounds of decoding a text: `by_drafts[d]` of them made d drafts; the rest is counted as in `Statistics`.

    The last round of a text may draft beyond its end; the statistics leave that out, `by_drafts` does not.
    """

    by_drafts: tuple[int, ...]
    tokens: int
    drafted: int
    tested: int
    accepted: int


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
class TuneReport(Provenance):
    """The best pair, the bundle's `present` one, and all `pairs`.

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
    drafts = _drafts_by_exit(probed, texts, manifest)
    own, threshold = (manifest.exit_layer, manifest.num_speculations), settings.confidence_threshold or 0.0
    scale = statistics.median(
        text.speculative_ms / rounds_ms(measured, simulate([one], own[1], threshold))
        for text, one in zip(texts, drafts[own[0]], strict=True)
    )

    def pair(exit_layer: int, k: int, drafts: Sequence[Drafts], cost: Measured) -> Pair:
        rounds = simulate(drafts, k, threshold)
        ms = scale * rounds_ms(cost, rounds) / rounds.tokens
        return Pair(
            exit_layer=exit_layer,
            num_speculations=k,
            ms_per_token=ms,
            speedup=measured.plain_ms_per_token / ms,
            tokens_per_round=rounds.tokens / sum(rounds.by_drafts),
            acceptance_rate=rounds.accepted / max(rounds.drafted, 1),
            match_rate=rounds.accepted / max(rounds.tested, 1),
        )

    def pairs_of(drafts: Mapping[int, Sequence[Drafts]], measured: Measured) -> tuple[Pair, ...]:
        costs = {exit_layer: carried(measured, manifest, exit_layer) for exit_layer in drafts}
        grid = sorted(set(settings.grid))
        return tuple(pair(e, k, drafts[e], costs[e]) for e in drafts for k in grid)

    all_rows: tuple[Pair, ...] = ()
    if manifest.draft_vocabulary is not None:
        others = _drafts_by_exit(_probe(bundle, device, texts, None, progress), texts, manifest)
        all_rows = pairs_of(others, without_draft_head(measured))
    rates = [
        (f"{call.graph} over {call.rows} row{'s' * (call.rows > 1)}", size, 1e3 * size / call.ms / max(copy_rates))
        for call in measured.calls
        for size in (weights[call.graph],)
    ]
    found = doubts(rates, {"rounds": halves, "copies of memory": copy_rates}, others_share)
    if scale > BUSY:
        found += (f"rounds took {scale:.2f} times what their calls add up to",)
    pairs = pairs_of(drafts, measured)
    return TuneReport(
        **vars(head),
        prompts=len(texts),
        prompt_tokens=int(statistics.median(len(text.prompt_ids) for text in texts)),
        new_tokens=sum(len(text.token_ids) for text in texts),
        departures=sum(int((one.token_ids[-1] != t.token_ids).sum()) for one, t in zip(probed, texts, strict=True)),
        settings=settings,
        best=min(pairs, key=lambda one: one.ms_per_token),
        present=pair(*own, drafts[own[0]], carried(measured, manifest, own[0])),
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
    )


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


def _drafts_by_exit(probed: Sequence[Exits], texts: Sequence[Text], manifest: Manifest) -> dict[int, list[Drafts]]:
    """What each exit drafts for each text."""
    return {
        exit_layer: [drafts_of_exit(*one, exit_layer, manifest.max_length) for one in zip(probed, texts, strict=True)]
        for exit_layer in range(1, manifest.architecture.num_layers)
    }


def drafts_of_exit(exits: Exits, text: Text, exit_layer: int, capacity: int) -> Drafts:
    """The part of a probed text that concerns one exit layer."""
    row = exit_layer - 1
    right = exits.token_ids[row, 1:] == np.array(text.token_ids[1:])
    return Drafts(right, exits.confidences[row, 1:], capacity - len(text.prompt_ids))


def simulate(texts: Sequence[Drafts], num_speculations: int, confidence_threshold: float) -> Rounds:
    """The rounds in which these texts would be decoded, as the runtime's loop makes them.

    Rounds, tokens, tested and accepted drafts are exact. What is drafted after a confident wrong draft is not known:
    there, and beyond a text's end, the text's own confidences and certainty stand in, and only the number of drafts
    made can differ.
    """
    by_drafts = [0] * (num_speculations + 1)
    tokens = drafted = tested = accepted = 0
    for text in texts:
        left, at = len(text.right), 0
        runs = _runs(text.right, end=0)
        sure = _runs(text.confidences >= confidence_threshold, end=num_speculations)
        while left:
            k = drafts_that_fit(num_speculations, text.room - at)
            made = min(sure[at] + 1, k)
            by_drafts[made] += 1
            good = min(runs[at], made)
            if good == left:  # a stop drops the rest of its round, also from the statistics
                made = left
            new = min(good + 1, left)
            tokens, drafted, accepted = tokens + new, drafted + made, accepted + good
            tested += min(good + 1, made)
            at, left = at + new, left - new
    return Rounds(tuple(by_drafts), tokens, drafted, tested, accepted)


def _runs(flags: npt.NDArray[np.bool_], end: int) -> list[int]:
    """At each place, how many flags are set from there on without a gap; `end` more where nothing stops them."""
    runs = [end]
    for flag in reversed(flags.tolist()):
        runs.append(runs[-1] + 1 if flag else 0)
    return runs[::-1]


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
    calls = {(call.graph, call.rows): call.ms for call in measured.calls}
    split = chains({call.graph for call in measured.calls})

    def round_ms(drafts: int) -> float:
        on_device = sum(calls[call.key] for call in speculative_round(split, drafts).calls)
        return on_device + measured.host_round_ms + drafts * measured.host_draft_ms

    return sum(count * round_ms(drafts) for drafts, count in enumerate(rounds.by_drafts) if count)


@dataclass(frozen=True)
class _Turn:
    """One prompt decoded plainly and with the bundle's own speculation length, and rounds timed in its caches."""

    plain: Generation
    speculative: Statistics
    position: int
    times: tuple[_Times, ...]


def _measure(
    model: Model, prompt_ids: Sequence[list[int]], settings: TuneSettings, progress: Progress
) -> tuple[list[Text], Measured, list[float]]:
    """Decodes the prompts and times calls in turns, so that a device that slows down slows both."""
    session, manifest = model.session, model.bundle.manifest
    largest = min(max(*settings.grid, manifest.num_speculations), manifest.max_length - 1)
    in_situ = set(session.stage_ns or ()) == set(manifest.graphs)
    repeats = -(-_TIMED_ROUNDS // len(prompt_ids)) if in_situ else 0

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
        position = max(min(len(ids) + len(plain.token_ids) // 2, manifest.max_length - 1 - largest), 0)
        times = tuple(_times_in_rounds(session, model.split, largest, position) for _ in range(repeats))
        return _Turn(plain, speculative.statistics, position, times)

    if not in_situ:  # a device captures a round on its second run, which says nothing of decoding
        for round_ in [speculative_round(model.split, k) for k in range(largest + 1) for _ in range(3)]:
            bound = session.bind(round_)
            bound.start(0)
            bound.wait()
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
        _times_alone(session, model.split, largest, position) for _ in range(2)
    ]
    times = _by_call(laps)
    halves = [float(sum(map(_quiet, _by_call(half).values()))) for half in (laps[::2], laps[1::2])]
    order = list(manifest.graphs)
    calls = sorted(times, key=lambda key: (order.index(key[0]), key[1]))
    plain, speculative = [one.plain.statistics for one in turns], [one.speculative for one in turns]
    host_ms, drafting_ms = (_quiet(map(_host_ms, runs)) for runs in (plain, speculative))
    drafts = sum(s.drafted for s in speculative) / sum(s.rounds for s in speculative)
    texts = [Text(one.plain.prompt_token_ids, one.plain.token_ids, _wall_ms(one.speculative)) for one in turns]
    measured = Measured(
        calls=tuple(CallTime(*key, _quiet(times[key])) for key in calls),
        position=position,
        host_round_ms=host_ms,
        host_draft_ms=max(drafting_ms - host_ms, 0.0) / max(drafts, 1.0),
        plain_ms_per_token=statistics.median(_wall_ms(s) / (s.new_tokens - 1) for s in plain),
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


def _lap(session: MeasuredSession, part: Round, position: int) -> Iterator[tuple[tuple[GraphName, int], float]]:
    """Runs a part of a round in which no graph occurs twice."""
    before = session.stage_ns
    bound = session.bind(part)
    bound.start(position)
    bound.wait()
    after = session.stage_ns
    assert before is not None
    assert after is not None
    for call in part.calls:
        yield call.key, (after[call.graph] - before[call.graph]) / 1e6


def _times_alone(session: MeasuredSession, split: Split, largest: int, position: int) -> _Times:
    """Each call of these rounds by itself, for devices that hide what happens within one; there the sum is the same."""
    calls = {call.key: call for k in range(largest + 1) for call in speculative_round(split, k).calls}
    return [(key, session.time_call_ms(call, position, _REPEATS)) for key, call in calls.items()]


def _host_ms(s: Statistics) -> float:
    """Time per round outside the graphs, where the session tells it."""
    if not s.stage_ms:
        return 0.0
    return max(_wall_ms(s) - sum(s.stage_ms.values()), 0.0) / s.rounds


def _wall_ms(s: Statistics) -> float:
    """Time of all rounds."""
    return (s.ms_per_token or 0.0) * (s.new_tokens - 1)
