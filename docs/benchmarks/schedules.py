"""What the shipped checkpoint loses where tokens skip layers, policy by policy: the table of docs/benchmarks.md.

python docs/benchmarks/schedules.py [--texts 24] [--passes 3]

Each text is a held-out prompt and plain decoding's continuation. A policy reads it in torch and tells every next token,
with the caches that it would have left: where a token skips a layer, that layer's cache has no row for later ones. Up
to the first token that is another, this is what it would write. Times are sessions' processor time, on one thread, so
that what else runs disturbs them little; a policy that no session has is given the time of its layers, on a line
through those that one has.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeskip
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.quantization.calibrated.calibration import read_calibration
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.recipes.train.early_exit import CausalLM, exit_hidden_states, exit_logits, load_model
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.decoding.model import Generation, Model

NEW_TOKENS, EXIT, EXITS = 128, 3, (3, 4, 6, 9)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)

# Policies

Rows = Callable[[int, Tensor, Tensor, int], Tensor]
"""Which rows [T] run a layer: by its index, the states before it [T,H], the rows that ran the one before it, and the
number of rows of the prompt.
"""


@dataclass(frozen=True)
class Policy:
    """Which layers a token runs through. If it `fills`, rows that were left out are computed when a later token goes
    through their layer, and are there for it. `run` are the settings with which a session decodes so, `exit_layer` its
    bundle's.
    """

    name: str
    rows: Rows
    fills: bool = False
    exit_layer: int = EXIT
    run: dict[str, Any] | None = None


def whole() -> Policy:
    """Every layer."""
    plain = {"mode": "autoregressive"}
    return Policy("plain decoding", lambda layer, states, rows, prompt: torch.ones_like(rows), run=plain)


def fixed_exit(exit_layer: int) -> Policy:
    """The first layers, for prompts too."""
    early = {"mode": "early-exit"}
    return Policy(
        f"exit {exit_layer}", lambda layer, states, rows, prompt: rows & (layer < exit_layer), False, exit_layer, early
    )


def evenly(count: int, layers: int) -> Policy:
    """Unified Layer Skipping (arXiv 2404.06954): always the same layers, spread evenly, the first and the last too."""
    kept = np.linspace(0, layers - 1, count).round().astype(int)
    return Policy(
        f"Unified Layer Skipping, {count} layers",
        lambda layer, states, rows, prompt: torch.full_like(rows, layer in kept),
    )


def falling(most: int, least: int, layers: int, warm_up: int | None = None) -> Policy:
    """SkipDecode (arXiv 2307.02628): fewer layers with each new token, so that no row is missing.

    The prompt runs through all. A new token runs through the first layers, so many that it is an exit, or, as in the
    paper, through `warm_up` layers and the last ones.
    """

    def rows_of(layer: int, states: Tensor, rows: Tensor, prompt: int) -> Tensor:
        new = torch.arange(len(rows)) - prompt
        budget = (most + (least - most) * (new / (NEW_TOKENS - 1)).clamp(0, 1)).round()
        if warm_up is None:
            runs = layer < budget
        else:
            runs = (budget - warm_up > layers - 1 - layer) | torch.tensor(layer < warm_up)
        return runs | (new < 0)

    name = "an exit that falls" if warm_up is None else f"SkipDecode, the first {warm_up} and the last"
    return Policy(f"{name}, {most} to {least} layers", rows_of)


Leaves = Callable[[int, Tensor], Tensor]
"""Whether a token leaves [T] before a layer, by its index and the states before it [T,H]."""


def leaving(name: str, leaves: Leaves, fills: bool, run: dict[str, Any] | None = None) -> Policy:
    """Each token leaves where something says so; the prompt does not."""

    def rows_of(layer: int, states: Tensor, rows: Tensor, prompt: int) -> Tensor:
        return rows & (~leaves(layer, states) | (torch.arange(len(rows)) < prompt))

    return Policy(name, rows_of, fills, run=run)


def confident(model: CausalLM, threshold: float, fills: bool) -> Policy:
    """Leave at the exit if it is sure; where that fills, it is the mode `early-exit` with a threshold."""

    def leaves(layer: int, states: Tensor) -> Tensor:
        if layer != EXIT:
            return torch.zeros(len(states), dtype=torch.bool)
        return logits_of(model, states).softmax(-1).amax(-1) >= threshold

    run = {"mode": "early-exit", "confidence_threshold": threshold} if fills else None
    return leaving(f"exit {EXIT} if {threshold} sure{'' if fills else ', rows missing'}", leaves, fills, run)


# SpecEE (arXiv 2504.08850): after each layer, a small network says whether to leave, by a few tokens that were
# speculated: their logits, their probabilities among themselves, and how these have changed since the layer before.
# Here the exit speculates. Leaving also takes that the layer's own token is one of them.

SPECULATED, HIDDEN, STEPS = 4, 512, 400


def features(logits: Tensor, speculated: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What the networks see [T, 3 * SPECULATED], and the probabilities, for the next layer's."""
    own = logits.gather(-1, speculated)
    among = own.softmax(-1)
    return torch.cat([own, among, among - before], -1), among


def train_predictors(model: CausalLM, texts: Sequence[Sequence[int]]) -> list[nn.Module]:
    """For each layer but the last, from the exit on: whether its token is the last layer's, as read from texts."""
    seen: list[list[Tensor]] = []
    right: list[list[Tensor]] = []
    for ids in texts:
        with torch.no_grad():
            logits = [logits_of(model, s[0]) for s in exit_hidden_states(model, torch.tensor([list(ids)]))[EXIT - 1 :]]
        speculated, among = logits[0].topk(SPECULATED).indices, torch.zeros(len(ids), SPECULATED)
        rows = []
        for one in logits[:-1]:
            row, among = features(one, speculated, among)
            rows.append(row)
        seen.append(rows)
        right.append([one.argmax(-1) == logits[-1].argmax(-1) for one in logits[:-1]])
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for layer in range(len(seen[0])):
        inputs, labels = (torch.cat([text[layer] for text in texts]) for texts in (seen, right))
        network = nn.Sequential(
            nn.BatchNorm1d(inputs.shape[1]), nn.Linear(inputs.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(STEPS):
            batch = torch.randint(len(inputs), (512,))
            loss = F.binary_cross_entropy_with_logits(network(inputs[batch])[:, 0], labels[batch].float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        made.append(network.eval())
    return made


def specee(model: CausalLM, predictors: Sequence[nn.Module], threshold: float, fills: bool) -> Policy:
    """Leave after the first layer whose predictor is so sure."""
    known: dict[str, Tensor] = {}

    def leaves(layer: int, states: Tensor) -> Tensor:
        if layer < EXIT:
            return torch.zeros(len(states), dtype=torch.bool)
        logits = logits_of(model, states)
        if layer == EXIT:
            known["tokens"], known["among"] = logits.topk(SPECULATED).indices, torch.zeros(len(states), SPECULATED)
        seen, known["among"] = features(logits, known["tokens"], known["among"])
        sure = torch.sigmoid(predictors[layer - EXIT](seen)[:, 0]) >= threshold
        return sure & (known["tokens"] == logits.argmax(-1, keepdim=True)).any(-1)

    return leaving(f"SpecEE, {threshold} sure{'' if fills else ', rows missing'}", leaves, fills)


# Quality


def logits_of(model: CausalLM, states: Tensor) -> Tensor:
    """What the head says of states [T,H]: [T,V]."""
    return exit_logits(states, model.model.norm, model.lm_head)


@torch.no_grad()
def read(model: CausalLM, ids: Sequence[int], prompt: int, policy: Policy) -> tuple[Tensor, Tensor]:
    """What a policy says of the token after each of a text's [T,V], and how many layers each has run through [T]."""
    decoder, count = model.model, len(ids)
    states = decoder.embed_tokens(torch.tensor([list(ids)]))[0]
    told, rows, layers = states, torch.ones(count, dtype=torch.bool), torch.zeros(count)
    cos, sin = decoder.rotary_emb(states, torch.arange(count)[None])
    for index, layer in enumerate(decoder.layers):
        rows = policy.rows(index, told, rows, prompt)
        run = torch.arange(count) if policy.fills else rows.nonzero()[:, 0]
        if len(run):
            output = layer(states[None, run], attention_mask=None, position_embeddings=(cos[:, run], sin[:, run]))
            states = states.index_copy(0, run, output[0])
        told, layers = torch.where(rows[:, None], states, told), layers + rows
    return logits_of(model, told), layers


@dataclass(frozen=True)
class Text:
    """A text, and the log probabilities [n,V] of each of its tokens after the prompt's, in plain decoding."""

    ids: Sequence[int]
    prompt: int
    log_probs: Tensor

    @property
    def told(self) -> slice:
        """The rows that tell new tokens."""
        return slice(self.prompt - 1, len(self.ids) - 1)


def text_of(model: CausalLM, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Text:
    """A prompt and its continuation."""
    ids = [*prompt_ids, *token_ids]
    logits, _ = read(model, ids, len(prompt_ids), whole())
    return Text(ids, len(prompt_ids), logits[len(prompt_ids) - 1 : -1].log_softmax(-1))


@dataclass(frozen=True)
class Quality:
    """Of new tokens: layers run for each; the share that is plain decoding's; the divergence of distributions in nats;
    the perplexity of plain decoding's text over that which it has in plain decoding; and tokens before the first other.
    """

    layers: float
    agreement: float
    divergence: float
    perplexity: float
    before_another: float


def quality(model: CausalLM, texts: Sequence[Text], policy: Policy) -> Quality:
    """Compares a policy with plain decoding, on plain decoding's texts. The first new token is the prompt's, which
    every policy but those that skip layers of prompts has from the whole model: it is left out.
    """
    layers, agreeing, divergences, losses, before = [], [], [], [], []
    for text in texts:
        logits, ran = read(model, text.ids, text.prompt, policy)
        ours, plain = logits[text.told][1:].log_softmax(-1), text.log_probs[1:]
        tokens = torch.tensor(text.ids[text.prompt + 1 :])
        same = ours.argmax(-1) == plain.argmax(-1)
        layers.append(ran[text.told][1:])
        agreeing.append(same.float())
        divergences.append((plain.exp() * (plain - ours)).sum(-1))
        losses.append((plain - ours).gather(-1, tokens[:, None])[:, 0])
        before.append(float(same.cumprod(0).sum()))
    means = [float(torch.cat(one).mean()) for one in (layers, agreeing, divergences, losses)]
    return Quality(means[0], means[1], means[2], float(np.exp(means[3])), float(np.mean(before)))


# Times


def times(
    models: dict[int, Model], prompts: Sequence[list[int]], runs: dict[str, tuple[int, dict[str, Any]]], passes: int
) -> tuple[dict[str, float], dict[str, list[Generation]]]:
    """Milliseconds for each token after the first, by run: an exit layer and settings; and what was generated.

    Runs take turns in any order; of each prompt, the quickest pass counts.
    """
    order, made = random.Random(0), dict[str, list[Generation]]()
    seconds: dict[tuple[str, int, int], float] = {}
    for number in range(passes):
        for place, ids in enumerate(prompts):
            for name in order.sample(list(runs), len(runs)):
                exit_layer, settings = runs[name]
                for new_tokens in (1, NEW_TOKENS):
                    models[exit_layer].forget()
                    start = process_time()
                    one = models[exit_layer].complete(ids, max_new_tokens=new_tokens, **settings)
                    key, took = (name, place, new_tokens), process_time() - start
                    seconds[key] = min(took, seconds.get(key, took))
                made.setdefault(name, []).append(one)
        print(f"pass {number + 1} of {passes}", file=sys.stderr, flush=True)
    made = {name: some[: len(prompts)] for name, some in made.items()}
    tokens = {name: sum(one.statistics.new_tokens - 1 for one in some) for name, some in made.items()}
    spent = {
        name: sum(seconds[name, place, NEW_TOKENS] - seconds[name, place, 1] for place in range(len(prompts)))
        for name in runs
    }
    return {name: 1e3 * spent[name] / tokens[name] for name in runs}, made


def layers_of(some: Sequence[Generation], layers: int) -> float:
    """Layers that were run for each new token, by rounds and drafts."""
    sums = [(s.rounds * layers + s.drafted * EXIT, s.new_tokens - 1) for s in (one.statistics for one in some)]
    return sum(run for run, _ in sums) / sum(tokens for _, tokens in sums)


def table(model: CausalLM, work: Path, texts: int, passes: int) -> Iterator[str]:
    """Measures all policies."""
    layers, checkpoint = len(model.model.layers), open_checkpoint(str(CHECKPOINT))
    for exit_layer in EXITS:
        export_bundle(checkpoint, work / f"{exit_layer}", ExportSettings(exit_layer))
    shown = [
        whole(),
        *map(fixed_exit, EXITS),
        *(evenly(count, layers) for count in (6, 8, 10)),
        *(falling(most, least, layers) for most, least in ((6, 3), (9, 3), (12, 3))),
        *(falling(most, least, layers, warm_up=EXIT) for most, least in ((9, 3), (12, 3))),
    ]
    with ExitStack() as stack:
        models = {e: stack.enter_context(edgeskip.load(work / f"{e}", device="cpu", threads=1)) for e in EXITS}
        prompts = [models[EXIT].encode(prompt) for prompt in load_prompts()[:texts]]
        predictors = train_predictors(model, read_calibration(None, models[EXIT].tokenizer, 1024).sequences)
        shown += [specee(model, predictors, sure, fills) for fills in (False, True) for sure in (0.8, 0.95)]
        shown += [confident(model, sure, fills) for fills in (False, True) for sure in THRESHOLDS]
        runs = {one.name: (one.exit_layer, one.run) for one in shown if one.run is not None}
        ms, made = times(models, prompts, {**runs, "self-speculation": (EXIT, {})}, passes)
    plain = made[whole().name]
    kept = [text_of(model, one.prompt_token_ids, one.token_ids) for one in plain if len(one.token_ids) > 1]
    line = np.polyfit([*EXITS, layers], [ms[f"exit {e}"] for e in EXITS] + [ms[whole().name]], 1)
    yield "| policy | layers per token | time, of plain | agreement | divergence | perplexity | tokens before another |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for policy in shown:
        q = quality(model, kept, policy)
        own = ms.get(policy.name, float(np.polyval(line, q.layers)))
        yield row(policy.name, own / ms[whole().name], q, "" if policy.name in ms else "about ")
    same = Quality(layers_of(made["self-speculation"], layers), 1.0, 0.0, 1.0, sum(len(t.log_probs) for t in kept))
    yield row("self-speculation", ms["self-speculation"] / ms[whole().name], same)
    took = f"{ms[whole().name]:.2f} ms per token, {line[0]:.2f} of them for each layer"
    yield f"\nPlain decoding takes {took}; {models[EXIT].session.hardware}."


def row(name: str, time: float, q: Quality, about: str = "") -> str:
    """A line of the table."""
    before = "all" if q.agreement == 1 else f"{q.before_another:.0f}"
    cells = f"{q.layers:.1f} | {about}{time:.2f} | {q.agreement:.3f} | {q.divergence:.3f} | {q.perplexity:.2f}"
    return f"| {name} | {cells} | {before} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=24, help="prompts that are continued")
    parser.add_argument("--passes", type=int, default=3, help="times that each is decoded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for told in table(load_model(CHECKPOINT), Path(folder), given.texts, given.passes):
            print(told, flush=True)
