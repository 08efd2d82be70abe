"""Is what runs what was trained? A backend's subgraphs against transformers in fp32, and greedy texts from end to end.

Every prompt is prefilled and decoded in teacher-forced calls (teacher.py); then three tokens of one prompt, which is
shorter than a chunk; then all prompts joined, decoded from the middle of the caches and up to their last row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, cast

from edgeskip.exporter.check.comparison import Bounds, Comparison, Errors, Threshold, bounds_of
from edgeskip.exporter.check.golden import Golden, GoldenText
from edgeskip.exporter.check.layers import TappedGraph, golden_taps
from edgeskip.exporter.check.loss import ExitLoss, quantization_loss
from edgeskip.exporter.check.teacher import Kind, Segment, SessionRunner, golden_outputs, split_text, tail
from edgeskip.exporter.check.weights import StoredReport, compare_weights
from edgeskip.exporter.formats import WRITERS
from edgeskip.runtime.bundle.dialects import DIALECTS
from edgeskip.runtime.bundle.graphs import GraphName
from edgeskip.runtime.bundle.manifest import Manifest, Progress
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.provenance import Provenance, provenance
from edgeskip.runtime.sampling import GREEDY

NEW_TOKENS = 48
"""Tokens of each greedy text."""
LONGEST = 4096
"""Tokens of the joined text, at most: the golden model takes it all at once."""


@dataclass(frozen=True)
class TensorReport:
    """An output of a graph in calls of one kind; of caches, the rows in use, as a text leaves them."""

    graph: GraphName
    tensor: str
    kind: Kind
    errors: Errors
    passed: bool


@dataclass(frozen=True)
class Disagreement:
    """A text's first token that is not the golden one; in mode `head`, any such token picked from golden states.

    `gap` is how far its golden logit is below the top one; null where one text ends and the other goes on.
    """

    mode: str
    prompt: int
    position: int
    gap: float | None
    is_tie: bool


@dataclass(frozen=True)
class Departure:
    """The first part of a graph that is beyond the thresholds: attention or MLP of a layer, norm or LM head.

    `seen_in` is `graph` where ONNX Runtime shows it in the bundle's file alone, `session` where only the session's
    caches show it.
    """

    graph: GraphName
    layer: int | None
    part: str
    tensor: str
    seen_in: Literal["graph", "session"]
    errors: Errors


@dataclass(frozen=True)
class CheckReport(Provenance):
    """`agreed` counts, for each way of decoding, the prompts whose text is the golden one; `prompts_cut` those longer
    than half the capacity.

    `rounded_to_8_bits` says that the session's products round what they multiply, so that the thresholds are wider.
    `departures` has an entry for each failing graph if `layers` was asked for, null where no part departs by itself.
    `stored` and `lost` compare the weights of a quantized bundle with its checkpoint, where that was given: tensor by
    tensor, unless they came quantized, and by what each exit and the last layer predict.
    """

    reference: str
    exit_layer: int
    rows_used: int
    prompts: int
    prompts_cut: int
    rounded_to_8_bits: bool
    thresholds: Threshold
    tie_gap: float
    tensors: tuple[TensorReport, ...]
    failed_graphs: tuple[GraphName, ...]
    agreed: dict[str, int]
    disagreements: tuple[Disagreement, ...]
    departures: dict[GraphName, Departure | None] | None
    stored: tuple[StoredReport, ...] | None
    lost: tuple[ExitLoss, ...] | None
    passed: bool


@dataclass(frozen=True)
class _Text:
    """Token ids and the segments that they are run in; `prompt` is its number, or the next one for joined texts."""

    prompt: int
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]


def run_check(
    model: Model,
    golden: Golden,
    prompts: Sequence[str],
    *,
    original: Golden | None = None,
    layers: bool = False,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> CheckReport:
    """Compares a loaded model, on whatever backend, with the golden one.

    Args:
        model: a bundle and its session.
        golden: the judge.
        prompts: texts; they are cut to half the caches' capacity.
        original: the checkpoint of a quantized bundle, where the golden model has the bundle's own weights.
        layers: narrow a failure to the first part that departs.
        command: the command line, for the report.
        progress: called after each text.

    Raises:
        RequestError: a prompt without tokens, or one that the tokenizer fails on.
        BackendError: a graph cannot be narrowed down here.
    """
    manifest = model.bundle.manifest
    longest = max(manifest.max_length // 2, 1)
    whole = [model.encode(prompt, most=longest + 1) for prompt in prompts]
    prompt_ids = [ids[:longest] for ids in whole]
    rounded = _rounds_to_8_bits(model)
    bounds = bounds_of(manifest.dtype, rounded=rounded)
    tie_gap = bounds.tie_gap
    runner, comparison = SessionRunner(model), Comparison()
    disagreements: list[Disagreement] = []
    ways = _ways(manifest)
    agreed: dict[str, int] = dict.fromkeys(ways, 0)
    texts: list[_Text] = []

    def look(text: _Text) -> None:
        disagreements.extend(_run_text(text, golden, runner, comparison, tie_gap))
        texts.append(text)
        progress("checking", len(texts), len(prompts) + 3)

    for index, ids in enumerate(prompt_ids):
        wanted = golden.generate(ids, min(NEW_TOKENS, manifest.max_length - len(ids)))
        look(_text(index, [*ids, *wanted.token_ids], len(ids), manifest))
        for way, settings in ways.items():
            model.forget()
            given = model.complete(ids, **settings, max_new_tokens=len(wanted.token_ids), **GREEDY.settings).token_ids
            parted = _first_difference(wanted, given)
            agreed[way] += parted is None
            if parted:
                position, gap = parted
                is_tie = gap is not None and gap < tie_gap
                disagreements.append(Disagreement(way, index, len(ids) + position, gap, is_tie))
    for text in _joined_texts(prompt_ids, manifest):
        look(text)
    tensors = tuple(
        TensorReport(graph, name, cast(Kind, kind), errors, _passes(name, errors, bounds))
        for (graph, name, kind), errors in comparison.errors.items()
    )
    failed = tuple(graph for graph in manifest.graphs if any(t.graph == graph and not t.passed for t in tensors))
    # who quantized a checkpoint may have moved scales from its matrices to its norms
    came = manifest.quantization is not None and manifest.quantization.came
    stored = None if original is None or came else tuple(compare_weights(model.bundle, original))
    departures = {graph: _departure(graph, model, golden, texts, tensors) for graph in failed} if layers else None
    return CheckReport(
        **vars(provenance(model, command)),
        reference=golden.source,
        exit_layer=model.split.exit_layer,
        rows_used=max(text.segments[-1].text.stop for text in texts),
        prompts=len(prompts),
        prompts_cut=sum(len(ids) > len(cut) for ids, cut in zip(whole, prompt_ids, strict=True)),
        rounded_to_8_bits=rounded,
        thresholds=bounds.rows,
        tie_gap=tie_gap,
        tensors=tensors,
        failed_graphs=failed,
        agreed=agreed,
        disagreements=tuple(disagreements),
        departures=departures,
        stored=stored,
        lost=None if original is None else quantization_loss(golden, original, prompt_ids),
        passed=not failed and all(d.is_tie for d in disagreements) and all(one.passed for one in stored or ()),
    )


def _ways(manifest: Manifest) -> dict[str, Any]:
    """Ways of decoding whose texts are compared, by name: plain, and with drafts from each exit."""
    speculative: dict[str, Any] = {"mode": "self-speculative", "exit_layer": None}
    others = {f"self-speculative from layer {e}": speculative | {"exit_layer": e} for e in manifest.other_exits}
    return {"autoregressive": {"mode": "autoregressive"}, "self-speculative": speculative, **others}


def _text(prompt: int, token_ids: Sequence[int], length: int, manifest: Manifest) -> _Text:
    segments = split_text(length, len(token_ids), manifest.prefill_chunk, manifest.num_speculations)
    return _Text(prompt, tuple(token_ids), tuple(segments))


def _joined_texts(prompt_ids: Sequence[list[int]], manifest: Manifest) -> Iterable[_Text]:
    """A prompt of three tokens; all prompts, decoded from the middle; and up to the last row of the caches."""
    number, behind = len(prompt_ids), tail(manifest.num_speculations)
    size = min(manifest.max_length, LONGEST)
    joined = [i for ids in prompt_ids for i in ids]
    joined = (joined * -(-size // len(joined)))[:size]
    for length in (3, size // 2, size - behind):
        length = max(min(length, size - 1), 1)
        yield _text(number, joined[: length + behind], length, manifest)


def _run_text(
    text: _Text, golden: Golden, runner: SessionRunner, comparison: Comparison, tie_gap: float
) -> Iterable[Disagreement]:
    """Compares a text's calls and the caches that it leaves; yields the tokens that the head picked differently."""
    trace, head = golden.trace(text.token_ids), runner.split.head.graph
    for segment in text.segments:
        outputs, picked = runner.run(segment, trace)
        wanted = golden_outputs(golden, trace, segment, picked, runner)
        first = segment.text.stop - len(picked)
        for graph, tensors in outputs.items():
            for name, rows in tensors.items():
                key = (graph, name, segment.kind)
                comparison.add(key, rows, wanted[graph][name], first if graph == head else segment.start)
        for row, (token, logits) in enumerate(zip(picked.tolist(), wanted[head]["logits"], strict=True)):
            if gap := float(logits.max() - logits[token]):
                yield Disagreement(head, text.prompt, first + row, gap, gap < tie_gap)
    used = text.segments[-1].text.stop
    for graph, caches in runner.caches(used):
        for name, rows in caches.items():
            comparison.add((graph, name, "cache"), rows, trace.caches[name][:used], 0)
    comparison.finish_text()


def _rounds_to_8_bits(model: Model) -> bool:
    """Whether products round what they multiply: ONNX Runtime's own for quantized matrices do so on a CPU."""
    session, formats = model.session, model.bundle.manifest.formats.values()
    return session.device == "cpu" and any(session.dialect in WRITERS[format_].products for format_ in formats)


def _passes(name: str, errors: Errors, bounds: Bounds) -> bool:
    """Whether errors are within the bounds; no logit may be so far off that it alone could change a token."""
    return errors.within(bounds.rows) and (name != "logits" or errors.max_abs < bounds.tie_gap)


def _first_difference(wanted: GoldenText, given: Sequence[int]) -> tuple[int, float | None] | None:
    """Where two texts diverge, and how far the given token's golden logit is below the top one."""
    for i, (golden, ours) in enumerate(zip_longest(wanted.token_ids, given)):
        if golden != ours:
            if None in (golden, ours):
                return i, None
            return i, float(wanted.logits[i].max() - wanted.logits[i][ours])
    return None


def _departure(
    graph: GraphName, model: Model, golden: Golden, texts: Sequence[_Text], tensors: Sequence[TensorReport]
) -> Departure | None:
    """The first part of a graph beyond the thresholds: by its file in ONNX Runtime, else by the session's caches."""
    session = model.session
    bounds = bounds_of(model.bundle.manifest.dtype, rounded=_rounds_to_8_bits(model))
    # graphs for engines have no weights of their own, and parts of layers no attention; `standard` says the same
    dialect = "standard" if DIALECTS[session.dialect].weights == "inputs" else session.dialect
    tapped, comparison = TappedGraph(model.bundle, graph, dialect, session.device), Comparison()
    for text in texts:
        trace = golden.trace(text.token_ids, layers=True)
        contract = model.bundle.manifest.graphs[graph]
        states = trace.states[contract.first_layer]
        for segment in text.segments:
            rows = slice(segment.text.stop - 1, segment.text.stop) if contract.head else segment.text
            wanted = golden_taps(golden, trace, contract, rows)
            for name, found in tapped.run(states[rows], rows.start).items():
                comparison.add((name,), found, wanted[name], rows.start)
        comparison.finish_text()
    in_caches = {t.tensor: t.errors for t in tensors if t.graph == graph and t.kind == "cache"}
    for name, layer, part in tapped.order():
        errors = comparison.errors[(name,)]
        if not _passes(name, errors, bounds):
            return Departure(graph, layer, part, name, "graph", errors)
    for name, layer, part in tapped.order():
        if name in in_caches and not _passes(name, in_caches[name], bounds):
            return Departure(graph, layer, part, name, "session", in_caches[name])
    return None
