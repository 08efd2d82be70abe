"""How tokens are picked: which heads of a bundle do it, and how a host draws them from logits.

Picking is part of a head's graph, so that drafting never waits for the host. A picker on the host's side only says
what that graph needs to know about a row, from the row's position alone. So draft and target pick alike, and the text
depends neither on the exit layer nor on the speculation length.

Draws keep to the same rule. The token at a position is the one with the largest logit / temperature + g, where g is
Gumbel noise that depends on the seed, the position and the token alone. That draws from the softmax (Gumbel-max), and
as draft and target have the same noise, a draft is right wherever both find the same token (Daliri, Musco, Suresh
2024). So the same seed gives the same text, drafts or not.

Every backend computes the same bits. The noise comes from a counter-based generator (Salmon et al. 2011), and what
follows is built from additions, products, divisions and shifts that IEEE 754 or integers define exactly, each rounded
by itself: sample.cu has the same functions. Probabilities are added up as integers, so in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.decoding.rounds import Picks
from edgeskip.runtime.grammar.masks import TokenMask
from edgeskip.runtime.sampling import Sampling

Array = npt.NDArray[Any]


class Picker(Protocol):
    """A way of picking tokens.

    `name` is that of the heads' pickers in the manifest; `row_inputs` returns, for rows at positions first ..
    first+rows, an int64 array [rows] for each input that such a head has besides the states.
    """

    @property
    def name(self) -> str:
        """The name of the heads that pick in this way."""
        ...

    def row_inputs(self, first: int, rows: int) -> Mapping[str, Array]:
        """What the heads are told about these rows."""
        ...


class Greedy:
    """The token with the largest logit."""

    name = "greedy"

    def row_inputs(self, first: int, rows: int) -> Mapping[str, Array]:
        """Nothing."""
        return {}


GREEDY = Greedy()


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the logarithm of the probability that the model itself gave it (at temperature 1, without penalties and
    filters), and the most probable tokens in its place with theirs, the most probable one first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Array, token_id: int, count: int) -> TokenLogprob:
    """The logarithms of probabilities that logits [V] give a token and so many of the most probable ones."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    total = math.log(np.exp(wide).sum())
    best = np.argpartition(wide, -count)[-count:] if 0 < count < len(wide) else np.arange(len(wide) if count else 0)
    best = best[np.lexsort((best, -wide[best]))]
    return TokenLogprob(token_id, float(wide[token_id]) - total, tuple((int(t), float(wide[t]) - total) for t in best))


def picks_of(sampling: Sampling, mask: TokenMask | None) -> Picks:
    """What picks a text's tokens: no more than its sampling and its mask need."""
    if sampling.has_penalties or mask is not None:
        return "history"
    return "draws" if sampling.is_drawn else "heads"


class HostSampler:
    """Picks tokens on the host, as `sampling` says, for one text after another.

    With penalties or a mask, it must know the tokens at all positions up to that of a row: those of the prompt are
    given, and each pick adds the one at its position.

    Args:
        sampling: how to pick, with its seed.
        prompt_ids: the prompt's tokens, from position 0.
        capacity: C, rows of the caches.
        mask: says which tokens may be picked, if not all. Where these logits have none of those, as those of a draft
            head with few tokens may, any may be.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], capacity: int, mask: TokenMask | None = None
    ) -> None:
        self._sampling, self._prompt, self._mask = sampling, len(prompt_ids), mask
        self._tokens = np.zeros(max(capacity, self._prompt) + 1, np.int64)
        self._tokens[: self._prompt] = prompt_ids

    def pick(self, logits: Array, position: int) -> int:
        """The token at `position`, from the logits [V] of the row before it.

        Where the largest logit is not finite, it is the first such token, and the loop will say so.
        """
        self._tokens[position] = token = self._picked(lambda: logits, position)
        return token

    def pick_again(self, logits: Array, position: int) -> int:
        """The token that `pick` would have picked at a position of the text, which stays as it is."""
        return self._picked(lambda: logits, position)

    def pick_rows(
        self, read: Callable[[int], Array], own: Array, first: int, drafts: Sequence[int] | Array
    ) -> Iterator[tuple[int, int]]:
        """The tokens of rows, by the row's number, at positions from `first` on. Each follows the drafts before it and
        takes the place of its own; the first that is not the draft is the last, as rows after it follow another one.

        Args:
            read: gives the logits [V] of a row, by its number.
            own: those with the largest logit of each row, which a head has picked: where one of them is what is wanted,
                its logits are not read.
            first: the position of the first row's token.
            drafts: the tokens that rows from the second on follow.
        """
        for row, largest in enumerate(own):
            position = first + row
            self._tokens[position] = token = self._picked(partial(read, row), position, int(largest))
            yield row, token
            if row < len(drafts) and token != drafts[row]:
                return

    def _picked(self, read: Callable[[], Array], position: int, own: int | None = None) -> int:
        s, allowed = self._sampling, None
        if self._mask is not None:
            allowed = self._mask.allowed(self._tokens[self._prompt : position])
        if own is not None and s.is_greedy and (allowed is None or allowed[own]):
            return own
        logits = read().astype(np.float32, copy=False)
        if s.has_penalties:
            logits = penalized(s, logits, self._tokens[:position], self._prompt)
        logits = _masked(logits, allowed)
        largest = int(logits.argmax())
        if not s.is_drawn or not math.isfinite(logits[largest]):
            return largest
        tokens, scaled = candidates(s, logits)
        if len(tokens) == 1:
            return int(tokens[0])
        bits = uniform_bits(s.seed or 0, position, int(tokens[-1]) + 1)
        return int(tokens[drawn(scaled, bits if len(tokens) == len(bits) else bits[tokens])])


def _masked(logits: Array, allowed: Array | None) -> Array:
    """Logits [V] with those of tokens that are not allowed at minus infinity, unless that leaves none."""
    if allowed is None or not (allowed := allowed[: len(logits)]).any():
        return logits
    return np.where(allowed, logits, np.float32(-np.inf))


def penalized(sampling: Sampling, logits: Array, token_ids: Array, prompt: int) -> Array:
    """Logits [V] in fp32 with the penalties of the tokens before them, of which the first `prompt` are the prompt's."""
    logits, vocabulary = logits.copy(), len(logits)
    seen = np.unique(token_ids[token_ids < vocabulary])  # a draft head may know fewer tokens
    kept, penalty = logits[seen], np.float32(sampling.repetition_penalty)
    logits[seen] = np.where(kept > 0, kept / penalty, kept * penalty)
    new, times = np.unique(token_ids[prompt:], return_counts=True)
    new, times = new[new < vocabulary], times[new < vocabulary].astype(np.float32)
    logits[new] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    return logits


def candidates(sampling: Sampling, logits: Array) -> tuple[Array, Array]:
    """The tokens that the filters keep, in order, and (logits - the largest) / temperature of each, both [n].

    A filter keeps all tokens above a bound, so equally probable ones share their fate.

    Args:
        sampling: temperature and filters.
        logits: [V] in fp32, the largest of them finite.
    """
    s, size = sampling, len(logits)
    top, temperature = logits.max(), np.float32(s.temperature)
    tokens = np.arange(size)
    if 0 < s.top_k < size:
        tokens = np.flatnonzero(logits >= np.partition(logits, size - s.top_k)[size - s.top_k])
    kept = logits[tokens]
    possible = kept > -np.inf
    if np.count_nonzero(possible) < size // 4:  # a mask leaves few; the others could be left in, but would take time
        tokens, kept = tokens[possible], kept[possible]
    scaled = (kept - top) / temperature
    if s.top_p < 1:
        inside = kept >= _nucleus_bound(kept, weights(scaled), s.top_p)
        tokens, scaled = tokens[inside], scaled[inside]
    if s.min_p > 0:
        likely = scaled >= least_scaled(s.min_p)
        tokens, scaled = tokens[likely], scaled[likely]
    return tokens, scaled


def distribution(sampling: Sampling, logits: Array) -> Array:
    """The probabilities [V] that tokens are drawn with, in fp64, from logits [V] without penalties."""
    tokens, scaled = candidates(sampling, logits)
    weights, probabilities = np.exp(scaled.astype(np.float64)), np.zeros(len(logits))
    probabilities[tokens] = weights / weights.sum()
    return probabilities


def draw_gap(sampling: Sampling, logits: Array, position: int, token_ids: Sequence[int]) -> float:
    """How far rounding must move logits [V] to draw each of these tokens at a position: to make its sum of logit and
    noise the largest, or to carry one of them past the bound of a filter.
    """
    tokens, scaled = candidates(sampling, logits)
    sums = np.full(len(logits), -np.inf)
    sums[tokens] = scaled + gumbel(uniform_bits(sampling.seed or 0, position, len(logits))[tokens])
    gap = float(sums.max() - sums[list(token_ids)].min()) * sampling.temperature
    if not sampling.has_filters:
        return gap
    return min(gap, float(np.abs(logits[list(token_ids)] - logits[tokens].min()).min()))


def least_scaled(min_p: float) -> np.float32:
    """The smallest (logit - the largest) / temperature that min_p keeps: the logarithm of a ratio of probabilities."""
    return np.float32(math.log(min_p)) if min_p else np.float32(-np.inf)


def _nucleus_bound(logits: Array, weights: Array, top_p: float) -> Any:
    """The smallest logit that top_p keeps: those above it weigh less than this share of all."""
    total = int(weights.sum())
    limit = top_p * float(total)
    least = (float(total) - limit) / len(weights)  # all that weigh less do not make up the rest together
    chosen = np.flatnonzero(weights >= int(least))
    order = chosen[np.argsort(-logits[chosen], kind="stable")]
    before = np.concatenate([[0], np.cumsum(weights[order])[:-1]]).astype(np.float64)
    count = max(int(np.searchsorted(before, limit)), 1)
    return logits[order[count - 1]]


_ROOT_HALF = np.int32(0x3F3504F3)
"""The bits of sqrt(1/2) in fp32."""

_LOG2_E, _LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.1219444005469058e-4)
"""ln 2 as one number, and as the sum of two, of which the first has few bits: its small multiples are exact."""

_CACHED = 1 << 14
"""Numbers that are worked on at a time, so that a core's cache holds them."""

_LEAST_WEIGHED = np.float32(-40)
"""Below it, nothing is left of a weight."""


def weights(scaled: Array) -> Array:
    """Exponentials of numbers up to 0, in fp32, as whole multiples of 2**-40, rounded down: int64.

    exp(x) = 2**n exp(r) with |r| <= ln(2)/2, and exp(r) by its series up to r**7/7!.
    """
    parts = [scaled[start : start + _CACHED] for start in range(0, len(scaled), _CACHED)]
    return np.concatenate([_weights_of(part) for part in parts])


def _weights_of(scaled: Array) -> Array:
    x = np.maximum(scaled, _LEAST_WEIGHED)
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
    y = np.full_like(r, 1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        y *= r
        y += np.float32(factor)
    whole = (y * np.float32(1 << 24)).astype(np.int32).astype(np.int64) << 16  # exact: y has 24 bits, and is below 2
    return whole >> (-n).astype(np.int32)


def uniform_bits(seed: int, position: int, count: int) -> Array:
    """32 bits for each of the first tokens at a position: uint32 [count].

    They come from Philox4x64-10 with the seed as its key. A block of 256 bits is that of eight tokens, in order and low
    halves first; its counter is (1 + token // 8, position, 0, 0), as NumPy counts up before it draws.
    """
    words = np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(-(-count // 8) * 4)
    return words.astype("<u8", copy=False).view(np.uint32)[:count]


def gumbel(bits: Array) -> Array:
    """Standard Gumbel noise, -log(-log(u)) with u = (bits + 1/2) / 2**32: fp32 in -3.13 to 22.88.

    The 32 bits end it there, where one token in 10**10 would have more; rounding moves it by less than 2e-6.
    """
    return -_log(_exponential(bits))


_NEAR = -4.0

_MANY = 2048
"""Tokens from which on it pays to leave out those that cannot win."""


def drawn(scaled: Array, bits: Array) -> int:
    """The index of the largest sum of scaled logits and the noise of these bits, both [n]: the first of equal ones.

    Of many tokens, those far below the top need large noise, and so large bits, to beat what those near it have: for
    all but a few, no logarithm has to be taken.
    """
    if len(scaled) <= _MANY:
        return int((scaled + gumbel(bits)).argmax())
    near = scaled > _NEAR
    best = float((scaled[near] + gumbel(bits[near])).max())
    least = math.exp(-math.exp(-(best - _NEAR - 0.001))) - 1e-6  # less than what it takes
    chosen = np.flatnonzero(near | (bits >= np.uint32(max(least, 0) * 0xFFFFFFFF)))
    return int(chosen[(scaled[chosen] + gumbel(bits[chosen])).argmax()])


def _exponential(bits: Array) -> Array:
    """-log(u) of uniform 32-bit numbers; where u is near 1, of 1 - u, which is just as fine as u near 0."""
    near_1 = bits >= np.uint32(0xB504F334)  # u above sqrt(1/2)
    u = (np.where(near_1, ~bits, bits).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    exponent, rest = _split(u)
    return -_log_of(np.where(near_1, np.float32(0), exponent), np.where(near_1, -u, rest))


def _log(x: Array) -> Array:
    """The natural logarithm of normal numbers in fp32."""
    return _log_of(*_split(x))


def _split(x: Array) -> tuple[Array, Array]:
    """The e and f of x = 2**e (1 + f), with 1 + f from sqrt(1/2) to sqrt(2)."""
    bits = x.view(np.int32)
    exponent = (bits - _ROOT_HALF) >> 23
    return exponent.astype(np.float32), (bits - (exponent << 23)).view(np.float32) - np.float32(1)


def _log_of(exponent: Array, rest: Array) -> Array:
    """log(2**e (1 + f)) = e log 2 + 2 artanh(s), s = f / (2 + f), by the series of artanh up to s**9."""
    s = rest / (rest + np.float32(2))
    z = s * s
    y = np.full_like(z, 1 / 9)
    for factor in (1 / 7, 1 / 5, 1 / 3):
        y *= z
        y += np.float32(factor)
    s += s
    return exponent * _LN_2 + (s + s * (z * y))
