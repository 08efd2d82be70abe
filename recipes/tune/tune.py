"""What should draft, from which exit layer E and how much, for this model, text and device, from one bundle.

    the bundle's session: plain decoding --> texts                    each call of a round, timed
                                               |                                   |
    the probe: what every layer would have drafted for them         carried to every E by the cost's fit
                                               |                                   |
                    rounds, simulated for every E and K  --------->  ms per token for every E and K

Only the texts are decoded, so no exit layer needs an export of its own, nor do several together. The simulation
(simulation.py) follows the runtime's loop round by round, with its own code where exit and K are chosen. What the texts
themselves would have drafted, by their n-grams, needs no model at all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal, TypeVar

import numpy as np

from edgeskip.exporter.graphs.probe import Exits, Probe, check_probed
from edgeskip.recipes.plan.cost import Cut, cut_model
from edgeskip.recipes.tune.simulation import Drafts, ExitDrafts, Rounds, copied_drafts, simulate, simulate_paced
from edgeskip.recipes.tune.times import CallTime, Measured, RoundTimes, carried, fitted_cost
from edgeskip.runtime.bench.prompts import encoded_prompts
from edgeskip.runtime.bench.validity import Watch, doubts
from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS, GraphName, Split, check_num_speculations
from edgeskip.runtime.bundle.manifest import Bundle, Manifest, Progress
from edgeskip.runtime.bundle.weights import read_bytes
from edgeskip.runtime.decoding.model import Generation, Model
from edgeskip.runtime.decoding.rounds import Round, draft_round, given_round, speculative_round, verification_round
from edgeskip.runtime.decoding.session import MeasuredSession
from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.drafting.drafters import Draft
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.provenance import Provenance, provenance
from edgeskip.runtime.sampling import GREEDY

_TIMED_ROUNDS, _TIMED_COPIES = 24, 8  # of each length, over all prompts: with drafts of the exit, and of the text
_REPEATS = 30
_WARM_UP_TOKENS = 24

BUSY = 1.3
"""A scale beyond this is not the model's: idle machines show 1.0 to 1.1."""


WORTH = 1.02
"""How much faster several exits have to be than one: times that are carried to others are off by 1 to 2%."""


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
    """What drafts (`--draft`) in a bundle with these exits, the default one first. E and K are 0 where they are chosen
    for each round (`-e auto`, `-k auto`); where the text alone drafts, E says nothing. `ngram_share` is the share of
    rounds whose drafts the text had, and `exit_shares` that of those with drafts of each exit.
    """

    draft: Draft
    ngram_share: float
    exit_layers: tuple[int, ...]
    exit_shares: dict[int, float]

    @property
    def chooses_exit(self) -> bool:
        """Whether each round has its own."""
        return len(self.exit_layers) > 1


@dataclass(frozen=True)
class TuneReport(Provenance):
    """The best pair, the bundle's `present` one, and all `pairs`, which draft at their exit alone and as in a bundle
    without others. `drafting` compares that with exits and lengths chosen for each round, with n-grams, and with both;
    the `fastest`, by `fastest_of`, says what to export and what should draft. `here` has the best pair of each exit as
    in this bundle, if it has several.

    `exit_layers` are the bundle's, the default one first. `match_rates` are the shares of the texts' tokens that an
    exit layer drafts right. `prompt_tokens` is a median, `new_tokens` a sum; of these tokens, `departures` are not what
    the probe's last layer gives: they are ties, which rounding decides. Rounds take `scale` times what their calls and
    the host add up to, as they did for the median text, decoded whole with the present pair. `tensor_formats` has those
    of the bundle's quantized tensors, by name, and `quantizer` the method that found their numbers, null where layers
    came quantized. If drafts come from `draft_vocabulary` rows of the vocabulary alone, `covered` is the share of the
    texts' tokens that are among them, which no exit drafts more of right, and `best_of_all_rows` the best pair without
    such a head.
    """

    exit_layers: tuple[int, ...]
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
    drafting: tuple[Drafting, ...]
    fastest: Drafting
    here: tuple[Pair, ...] = ()
    valid: bool = True
    doubts: tuple[str, ...] = ()
    tensor_formats: dict[str, str] = field(default_factory=dict)
    quantizer: str | None = None
    draft_vocabulary: int | None = None
    covered: float | None = None
    best_of_all_rows: Pair | None = None

    @property
    def alone(self) -> Drafting:
        """The best that drafts of one exit give."""
        return _best_pair(one for one in self.drafting if one.draft == "exit" and not one.chooses_exit)

    @property
    def together(self) -> Drafting | None:
        """The best that several exits give, if the model can have several."""
        chosen = [one for one in self.drafting if one.draft == "exit" and one.chooses_exit]
        return _best_pair(chosen) if chosen else None


def tune(
    open_model: Callable[[], Model],
    prompts: Sequence[str],
    settings: TuneSettings,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> TuneReport:
    """Measures a bundle on its device, closes it, probes its layers, and weighs every pair.

    Args:
        open_model: loads the bundle; its exit layers do not matter.
        prompts: texts to continue.
        settings: what to choose from.
        command: kept in the report.
        progress: called as the work goes on.

    Raises:
        RequestError: a setting that cannot be served, or prompts that are too long or give no text.
        BackendError: ONNX Runtime is missing, or cannot run the probe.
    """
    for k in settings.grid:
        check_num_speculations(k, " or 'auto'")
    with open_model() as model:
        bundle, session, manifest = model.bundle, model.session, model.bundle.manifest
        device, head = session.device, provenance(model, command)
        check_probed(bundle, device)
        weighs = settings.confidence_threshold is None and bool(session.confidence_threshold)
        if settings.confidence_threshold is None:
            settings = replace(settings, confidence_threshold=session.confidence_threshold)
        prompt_ids = encoded_prompts(model, prompts, settings.prompt_tokens, settings.max_new_tokens)
        watch, copy_rates = Watch(session.device), [session.copy_bytes_per_second()]
        texts, measured, halves = _measure(model, prompt_ids, settings, progress)
        copy_rates.append(session.copy_bytes_per_second())
        others_share, weights, waits = watch.others_share(), read_bytes(bundle), not session.is_asynchronous
    probed = _probe(bundle, device, texts, manifest.draft_vocabulary, progress)
    drafts = _drafts(probed, texts, manifest, settings.max_new_tokens)
    cut, own = _cut_model(manifest, manifest.draft_vocabulary), (manifest.exit_layer, *manifest.other_exits)
    k, threshold = manifest.num_speculations, settings.confidence_threshold or 0.0
    weighing = _Weighing(measured, cut(own), cut, 1.0, threshold, None if weighs else threshold, waits)
    scale = statistics.median(
        text.speculative_ms / (len(text.token_ids) - 1) / weighing.pair([one], own, own[0], k).ms_per_token
        for text, one in zip(texts, drafts, strict=True)
    )
    weighing, grid = replace(weighing, scale=scale), sorted(set(settings.grid))
    all_rows: tuple[Pair, ...] = ()
    if manifest.draft_vocabulary is not None:
        probed_whole = _probe(bundle, device, texts, None, progress)
        others = _drafts(probed_whole, texts, manifest, settings.max_new_tokens)
        all_rows = replace(weighing, cut=_cut_model(manifest, None)).pairs(others, grid)
    rates = [
        (f"{call.graph} over {call.rows} row{'s' * (call.rows > 1)}", size, 1e3 * size / call.ms / max(copy_rates))
        for call in measured.calls
        for size in (weights[call.graph],)
    ]
    found = doubts(rates, {"rounds": halves, "copies of memory": copy_rates}, others_share)
    if scale > BUSY:
        found += (f"rounds took {scale:.2f} times what their calls add up to",)
    pairs = weighing.pairs(drafts, grid)
    best = _best_pair(pairs)
    compared = tuple(_compared(weighing, drafts, grid, own, best))
    return TuneReport(
        **vars(head),
        exit_layers=own,
        prompts=len(texts),
        prompt_tokens=int(statistics.median(len(text.prompt_ids) for text in texts)),
        new_tokens=sum(len(text.token_ids) for text in texts),
        departures=sum(int((one.token_ids[-1] != t.token_ids).sum()) for one, t in zip(probed, texts, strict=True)),
        settings=settings,
        best=best,
        present=weighing.pair(drafts, own, own[0], k),
        match_rates={e: float(np.concatenate([one.exits[e].right for one in drafts]).mean()) for e in drafts[0].exits},
        pairs=pairs,
        scale=scale,
        measured=measured,
        valid=not found,
        doubts=found,
        tensor_formats=dict(manifest.formats),
        quantizer=manifest.quantization.method if manifest.quantization and not manifest.quantization.came else None,
        draft_vocabulary=manifest.draft_vocabulary,
        covered=_covered(manifest, texts),
        best_of_all_rows=_best_pair(all_rows) if all_rows else None,
        drafting=compared,
        fastest=fastest_of(compared),
        here=tuple(_best_pair(weighing.pair(drafts, own, e, k) for k in grid) for e in own if len(own) > 1),
    )


def _ms_per_token(pair: Pair) -> float:
    return pair.ms_per_token


_P = TypeVar("_P", bound=Pair)


def _best_pair(pairs: Iterable[_P]) -> _P:
    return min(pairs, key=_ms_per_token)


def fastest_of(drafting: Sequence[Drafting]) -> Drafting:
    """The fastest of what was compared; several exits only where they are worth it."""
    fastest, simplest = _best_pair(drafting), _best_pair(one for one in drafting if not one.chooses_exit)
    return fastest if WORTH * fastest.ms_per_token < simplest.ms_per_token else simplest


def _cut_model(manifest: Manifest, draft_vocabulary: int | None) -> Callable[[Sequence[int]], Cut]:
    return cut_model(manifest.architecture, manifest.dtype, manifest.formats, draft_vocabulary)


@dataclass(frozen=True)
class _Weighing:
    """What decoding costs with whatever exits a bundle has, by what was `measured` of the one that is cut as `here`.
    `cut` cuts it otherwise; the rest is as in `TuneReport`. Some devices work while the next round is chosen. Where K
    is chosen, rounds have a threshold of their own, or None: each draft's confidence is weighed.
    """

    measured: Measured
    here: Cut
    cut: Callable[[Sequence[int]], Cut]
    scale: float
    threshold: float
    threshold_of_choice: float | None
    waits_for_choice: bool

    @cached_property
    def times(self) -> Callable[[tuple[int, ...]], RoundTimes]:
        """What rounds take in a bundle with these exits."""
        cost = fitted_cost(self.measured, self.here)

        def times(exit_layers: tuple[int, ...]) -> RoundTimes:
            there = self.cut(exit_layers)
            return RoundTimes(carried(self.measured, cost, self.here, there), there)

        return cache(times)

    def pairs(self, drafts: Sequence[Drafts], grid: Sequence[int]) -> tuple[Pair, ...]:
        """Every exit layer with every K, as in bundles with one exit."""
        return tuple(self.pair(drafts, (exit_layer,), exit_layer, k) for exit_layer in drafts[0].exits for k in grid)

    def pair(self, drafts: Sequence[Drafts], exit_layers: tuple[int, ...], exit_layer: int, k: int) -> Pair:
        """What drafts of one exit alone give."""
        rounds = simulate(drafts, exit_layer, k, self.threshold)
        return self._of(exit_layer, k, rounds, self.times(exit_layers).total_ms(rounds))

    def drafting(
        self, drafts: Sequence[Drafts], draft: Draft, exit_layers: tuple[int, ...], exit_layer: int = 0, k: int = 0
    ) -> Drafting:
        """What drafts of exits, of the text or of both give; an exit layer and a K of 0 are chosen for each round."""
        times, choosing_ms = self.times(exit_layers), 0.0
        if k:
            rounds = simulate(drafts, exit_layer, k, self.threshold, draft)
        else:
            choice = (exit_layer,) if exit_layer else exit_layers
            rounds, choosing_ms = simulate_paced(drafts, choice, self.threshold_of_choice, draft, times)
        total_ms = times.total_ms(rounds, draft) + rounds.count * choosing_ms * self.waits_for_choice
        return Drafting(
            **vars(self._of(exit_layer, k, rounds, total_ms)),
            draft=draft,
            ngram_share=rounds.share("ngram"),
            exit_layers=exit_layers,
            exit_shares={e: share for e in exit_layers if (share := rounds.share(e))},
        )

    def _of(self, exit_layer: int, k: int, rounds: Rounds, total_ms: float) -> Pair:
        ms = self.scale * total_ms / rounds.tokens
        return Pair(
            exit_layer=exit_layer,
            num_speculations=k,
            ms_per_token=ms,
            speedup=self.measured.plain_ms_per_token / ms,
            tokens_per_round=rounds.tokens / rounds.count,
            acceptance_rate=rounds.accepted / max(rounds.drafted, 1),
            match_rate=rounds.accepted / max(rounds.tested, 1),
        )


def _compared(
    weighing: _Weighing, drafts: Sequence[Drafts], grid: Sequence[int], own: tuple[int, ...], best: Pair
) -> Iterator[Drafting]:
    """The best exit; exits that are chosen for each round, the best of these and the bundle's own; the best of n-grams,
    which need no exit; and of both. Each with a fixed K and with `-k auto`, which a choice of exits always has.
    """
    yield weighing.drafting(drafts, "exit", (best.exit_layer,), best.exit_layer, best.num_speculations)
    yield weighing.drafting(drafts, "exit", (best.exit_layer,), best.exit_layer)
    own_set = tuple(sorted(own, key=lambda e: (e != best.exit_layer, e)))
    sets: set[tuple[int, ...]] = {own_set, *((best.exit_layer, e) for e in drafts[0].exits)}
    chosen = [weighing.drafting(drafts, "exit", some) for some in sorted(sets) if len(set(some)) > 1]
    together = _best_pair(chosen) if chosen else None
    yield from [one for one in chosen if one is together or one.exit_layers == own_set]
    exits: dict[Draft, Iterable[int]] = {"ngram": own[:1], "auto": drafts[0].exits}
    for draft, layers in exits.items():
        yield (fixed := _best_pair(weighing.drafting(drafts, draft, (e,), e, k) for e in layers for k in grid))
        yield weighing.drafting(drafts, draft, fixed.exit_layers, fixed.exit_layer)
    if together is not None:
        yield weighing.drafting(drafts, "auto", together.exit_layers)


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


def _drafts(probed: Sequence[Exits], texts: Sequence[Text], manifest: Manifest, max_new_tokens: int) -> list[Drafts]:
    """What would have drafted each text: every exit, and the text itself."""
    rooms = [min(manifest.max_length - len(text.prompt_ids), max_new_tokens) for text in texts]
    return [
        drafts_of_text(exits, text.prompt_ids, text.token_ids, room)
        for exits, text, room in zip(probed, texts, rooms, strict=True)
    ]


def drafts_of_text(exits: Exits, prompt_ids: Sequence[int], token_ids: Sequence[int], room: int) -> Drafts:
    """What would have drafted a probed text: every exit, and the text itself; `room` as in `Drafts`."""
    rows = zip(exits.token_ids[:-1, 1:], exits.confidences[:-1, 1:], strict=True)
    of_exits = {e: ExitDrafts(drafts == token_ids[1:], confidences) for e, (drafts, confidences) in enumerate(rows, 1)}
    return Drafts(of_exits, room, copied_drafts(prompt_ids, token_ids))


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
    splits = [manifest.split(e) for e in (manifest.exit_layer, *manifest.other_exits)]

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
        times = tuple(_times_in_rounds(session, splits, largest, position) for _ in range(repeats))
        copies = tuple(_times_of_copies(session, model.split, longest, position) for _ in range(copy_repeats))
        return _Turn(plain, speculative.statistics, copying.statistics, position, times, copies)

    if not in_situ:  # a device captures a round on its second run, which says nothing of decoding
        rounds = [speculative_round(split, k) for split in splits for k in range(largest + 1)]
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
        _times_alone(session, splits, (largest, longest), position) for _ in range(2)
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


def _times_in_rounds(session: MeasuredSession, splits: Sequence[Split], largest: int, position: int) -> _Times:
    """Every call of a round of each exit for each K from 0 to `largest`, timed by the session's clock of its graphs.

    A graph that runs alone in a loop finds its weights in the processor's caches; here it finds what a round leaves.
    """
    times: list[tuple[tuple[GraphName, int], float]] = []
    for split in splits:
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


def _times_alone(session: MeasuredSession, splits: Sequence[Split], lengths: tuple[int, int], position: int) -> _Times:
    """Each call of these rounds by itself, for devices that hide what happens within one; there the sum is the same."""
    largest, longest = lengths
    rounds = [given_round(splits[0], k) for k in range(1, longest + 1)]
    rounds += [speculative_round(split, k) for split in splits for k in range(largest + 1)]
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
