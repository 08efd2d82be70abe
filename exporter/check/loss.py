"""What quantization cost: the model as the bundle stores it against its checkpoint, after each exit and the last layer.

Both are computed by transformers in fp32, so this is the loss of the weights alone, whatever a session adds to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.check.golden import Golden

Array = npt.NDArray[Any]

_ROWS = 128
"""Positions whose distributions are held at a time."""


@dataclass(frozen=True)
class ExitLoss:
    """The distributions of the next token after `exit_layer` layers, over all positions of the texts.

    Attributes:
        exit_layer: an exit layer, or the number of layers for the model itself.
        tokens: positions whose next token is known, which perplexities are over.
        original_perplexity: the checkpoint's, of the texts.
        perplexity: the bundle's.
        ratio: of the bundle's to the checkpoint's.
        kl: mean of KL(checkpoint || bundle), in nats.
        agreement: share of positions where both have the same top token.
        original_match: share of positions where the checkpoint's exit has the top token of its own last layer.
        match: the same of the bundle.
    """

    exit_layer: int
    tokens: int
    original_perplexity: float
    perplexity: float
    ratio: float
    kl: float
    agreement: float
    original_match: float
    match: float


@dataclass
class _Sums:
    """Sums over positions, of both models where there are two: the checkpoint's first."""

    positions: int
    tokens: int
    losses: Array
    kl: float
    agreeing: int
    matching: Array


def quantization_loss(golden: Golden, original: Golden, texts: Sequence[Sequence[int]]) -> tuple[ExitLoss, ...]:
    """Compares two models of one architecture on these texts, of a token or more; the last layer comes last.

    Args:
        golden: the bundle's weights.
        original: the checkpoint's.
        texts: token ids.
    """
    sums: dict[int, _Sums] = {}
    for ids in texts:
        states = [model.trace(ids).states for model in (original, golden)]
        exits = sorted(states[0].keys() - {0})
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            targets = np.asarray(ids[start + 1 : start + 1 + _ROWS], np.int64)
            tops: dict[int, Array] = {}
            for exit_layer in reversed(exits):
                both = [
                    _log_softmax(model.logits(of[exit_layer][rows]))
                    for model, of in zip((original, golden), states, strict=True)
                ]
                tops[exit_layer] = np.stack([one.argmax(1) for one in both])
                entry = sums.setdefault(exit_layer, _Sums(0, 0, np.zeros(2), 0.0, 0, np.zeros(2, int)))
                _count(entry, both, targets, tops[exit_layer], tops[exits[-1]])
    return tuple(_loss(exit_layer, sums[exit_layer]) for exit_layer in sorted(sums))


def _count(sums: _Sums, both: Sequence[Array], targets: Array, tops: Array, last: Array) -> None:
    """Adds the log probabilities [T,V] of both models, whose first positions have these next tokens."""
    known = np.arange(len(targets))
    sums.positions += len(both[0])
    sums.tokens += len(targets)
    sums.losses -= [one[known, targets].sum() for one in both]
    sums.kl += float((np.exp(both[0]) * (both[0] - both[1])).sum())
    sums.agreeing += int((tops[0] == tops[1]).sum())
    sums.matching += (tops == last).sum(1)


def _loss(exit_layer: int, sums: _Sums) -> ExitLoss:
    perplexities = np.exp(sums.losses / max(sums.tokens, 1))
    return ExitLoss(
        exit_layer=exit_layer,
        tokens=sums.tokens,
        original_perplexity=float(perplexities[0]),
        perplexity=float(perplexities[1]),
        ratio=float(perplexities[1] / perplexities[0]),
        kl=sums.kl / sums.positions,
        agreement=sums.agreeing / sums.positions,
        original_match=float(sums.matching[0] / sums.positions),
        match=float(sums.matching[1] / sums.positions),
    )


def _log_softmax(logits: Array) -> Array:
    """Of logits [T,V], in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
