"""Texts in segments that a synthetic model's exit predicts at different rates, and how sure it is of what it drafts.

*Kinds.* Token i is of kind i mod N, and each kind has a match rate. A few coordinates of the residual stream tell the
kind of the token that a row belongs to: its embedding sets them, no layer writes them, and the head's rows give tokens
of the same kind a bias. So a text keeps to a kind until, by chance, a token of another has the largest logit, which is
as probable at any place: segments have a geometric length, whatever the prompt.

*Match rates.* In the later layers each kind has neurons of its own, whose gates read its coordinates and are closed to
the other kinds. Their outputs are damped by as much as the kind's rate wants.

*Confidence.* The largest of n normal logits has a mean probability that grows with their scale (:func:`logit_scale`).
The last norm multiplies by the scale that the surest kind needs. The exit's last MLP adds to a large number that the
first one wrote, the more the less sure a kind is. No layer and no head reads it, but the norms divide by it: a sink, as
trained models have them.
So an exit is as sure, on average, as it is right; and within a kind, drafts that lead by more are right more often.

*Depth.* As the sink outweighs the random part of a state, norms do not bring that back to a fixed size: their weights
do. A gated MLP is about quadratic, so the error of a weight would double from layer to layer. Each weight is
therefore made from what its norm is given once all before it are right (:meth:`Kinds.learn`).

V vocabulary, H hidden size, I intermediate size, E exit layer, N kinds, W coordinates of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM

MAX_KINDS = 8
_OPEN = 4.0  # what a kind's gates read of its own rows
_READ = 8.0  # the same of the neurons that write the sink, where the random part of the stream measures 1
_SINK = 2.0  # the least sink, over what the early layers write
_SUREST, _LEAST_SURE = 0.9, 0.02  # mean probabilities of drafts that are aimed at; 1 would need infinite logits
_DRAWS, _ROWS = 256, 1 << 15
_GRID = torch.linspace(-6, 14, 8001, dtype=torch.float64)


def logit_scale(probability: float, rows: int) -> float:
    """The standard deviation at which the largest of so many normal logits has this probability on average."""
    wanted = min(max(probability, _LEAST_SURE, 2 / rows), _SUREST)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_DRAWS, min(rows, _ROWS), generator=generator).sort(dim=1, descending=True).values[:, :4096]
    logits -= logits[:, :1].clone()
    low, high = 0.1, 1000.0
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        sure = float((1 / (middle * logits).exp().sum(1)).mean())
        low, high = (middle, high) if sure < wanted else (low, middle)
    return low


def bias(tokens: float, kinds: int, rows: int) -> float:
    """What a kind's logits must gain, in standard deviations, so that a text leaves it after so many tokens on average:
    with rows normal logits in all, one of another kind is then the largest once in so many times.
    """
    own = rows / kinds
    below = torch.special.log_ndtr(_GRID)
    others = (below * (rows - own)).exp()

    def leaves(gain: float) -> float:
        mine = (torch.special.log_ndtr(_GRID - gain) * own).exp()
        return float(((mine[1:] + mine[:-1]) / 2 * others.diff()).sum())

    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if leaves(middle) > 1 / tokens else (low, middle)
    return low


def layer_of(name: str) -> int:
    """The layer of a parameter by its name in transformers; -1 outside of the layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


@dataclass
class Kinds:
    """Writes kinds into random weights, in place.

    Args:
        scales: each kind's standard deviation of the logits [N].
        bias: what a kind's logits gain, in standard deviations.
        late_variance: that of all later layers, undamped, over that of the early ones.
        hidden_size: H.
        exit_layer: E.

    Attributes:
        early_rms: the rms of what the early layers write, at the exit.
    """

    scales: Sequence[float]
    bias: float
    late_variance: float
    hidden_size: int
    exit_layer: int

    def __post_init__(self) -> None:
        self._width = max(1, self.hidden_size // 64)
        self._least = _SINK * math.sqrt(self.exit_layer * self.hidden_size)
        self._rms: dict[str, float] = {}  # of the random part, by norm
        self._before: list[float] = []  # the sink that the last layer found
        self.early_rms = math.sqrt(self.exit_layer)
        self._gains = {layer: [self._least / 2 / _READ**2] * len(self.scales) for layer in (0, self.exit_layer - 1)}

    @property
    def _coordinate(self) -> int:
        """That of the sink, behind those of the kinds."""
        return len(self.scales) * self._width

    def _sinks(self, layer: int) -> list[float]:
        """What the sink shall be after an early layer [N]; at the exit, an rms is inverse to the scale of logits."""
        if layer < self.exit_layer - 1:
            return [self._least / 2] * len(self.scales)
        early = self.early_rms**2 * self.hidden_size
        length = math.sqrt(self._least**2 + early)
        return [math.sqrt((length * max(self.scales) / scale) ** 2 - early) for scale in self.scales]

    def learn(self, name: str, states: Tensor, token_ids: Tensor) -> None:
        """Learns what an early norm, or the first one after the exit, is given: states [B,T,H] of these tokens [B,T].

        To be called for each in turn, by the name of its weight in transformers.
        """
        random = states[..., self._coordinate + 1 :].float()
        self._rms[name] = math.sqrt(float(random.square().mean()))
        if not name.endswith("input_layernorm.weight"):
            return
        layer = layer_of(name)
        if layer == self.exit_layer:
            self.early_rms = self._rms[name]
        kinds, column = token_ids % len(self.scales), states[..., self._coordinate].float()
        found = [float(column[kinds == kind].mean()) for kind in range(len(self.scales))]
        if layer - 1 in self._gains:
            gains, wanted = self._gains[layer - 1], self._sinks(layer - 1)
            for kind, before in enumerate(self._before):
                gains[kind] *= (wanted[kind] - before) / (found[kind] - before)
        self._before = found

    def write(self, name: str, parameter: Tensor, dampings: Sequence[float]) -> None:
        """Writes into a parameter, by its name in transformers; into later layers' output projections as drawn."""
        layer = layer_of(name)
        matrix = name.removesuffix(".weight").rpartition(".")[2]
        if name in (EMBEDDINGS, LM_HEAD):
            self._write_tokens(parameter, dampings)
        elif name == NORM or matrix.endswith("layernorm"):
            self._write_norm(name, parameter, dampings)
        elif layer >= self.exit_layer:
            self._write_late(matrix, parameter, dampings)
        if matrix in ("o_proj", "down_proj") and parameter.dim() == 2:
            parameter[: self._coordinate + 1] = 0
        if layer in self._gains and parameter.dim() == 2:
            self._write_sink(layer, matrix, parameter, dampings)

    def _carry(self, damping: float) -> float:
        """The length of a kind in an embedding and in a row of the head: its square over the rms of a state is the bias
        of a logit, whose deviation is that of the random part of the state over the same rms.
        """
        late = self.late_variance * self.exit_layer * damping**2
        return math.sqrt(self.bias * math.sqrt(self.early_rms**2 + late))

    def _read(self, rows: Tensor, kind: int, damping: float, wanted: float) -> None:
        """Makes rows of a matrix read of a kind's rows this much times its embeddings' share in them."""
        rows.zero_()
        own = slice(kind * self._width, (kind + 1) * self._width)
        rows[:, own] = wanted / (self._carry(damping) * math.sqrt(self._width))

    def _write_tokens(self, table: Tensor, dampings: Sequence[float]) -> None:
        table[:, : self._coordinate + 1] = 0
        longest = max(map(self._carry, dampings))
        for kind, carry in enumerate(map(self._carry, dampings)):
            own = slice(kind * self._width, (kind + 1) * self._width)
            table[kind :: len(dampings), own] = carry / math.sqrt(self._width)
            table[kind :: len(dampings), self._coordinate] = math.sqrt(longest**2 - carry**2)  # all are as long

    def _write_norm(self, name: str, weight: Tensor, dampings: Sequence[float]) -> None:
        """Makes the random part measure 1, as if the least sink, and before that the kinds, were not there."""
        layer = layer_of(name)
        length, rms = self._least, self.early_rms
        if 0 <= layer < self.exit_layer:
            length = self._least / 2 if layer else max(map(self._carry, dampings))
            rms = self._rms.get(name, math.sqrt(layer or 1 / self.hidden_size))
        weight.fill_(math.sqrt(length**2 / self.hidden_size + rms**2) / rms)
        if layer == 0:
            weight[: self._coordinate] *= rms
        weight[self._coordinate] = 0
        if layer < 0:
            weight *= max(self.scales)

    def _write_late(self, matrix: str, parameter: Tensor, dampings: Sequence[float]) -> None:
        if matrix == "o_proj":
            parameter *= min(dampings)
        for kind, damping in enumerate(dampings):
            spread = self.scales[kind] / max(self.scales)  # of the random part, that the sink leaves
            size = parameter.shape[1] if matrix == "down_proj" else len(parameter)
            own = self._neurons(kind, size)
            if matrix == "gate_proj":
                self._read(parameter[own], kind, damping, _OPEN * self.early_rms / spread)
            elif matrix == "down_proj":  # what was read of the random part is as small as the sink makes that
                parameter[:, own] *= damping * math.sqrt(size / (own.stop - own.start)) / _OPEN / spread

    def _neurons(self, kind: int, size: int) -> slice:
        """Those of a kind, of so many: whole blocks, as a block of quantized numbers has one scale."""
        block = 128 if size >= 512 * len(self.scales) else 32 if size >= 128 * len(self.scales) else 1
        start, stop = (round(size * k / len(self.scales) / block) * block for k in (kind, kind + 1))
        return slice(start, stop if kind + 1 < len(self.scales) else size)

    def _write_sink(self, layer: int, matrix: str, parameter: Tensor, dampings: Sequence[float]) -> None:
        for kind, damping in enumerate(dampings):
            if matrix in ("gate_proj", "up_proj"):
                self._read(parameter[kind : kind + 1], kind, damping, _READ)
            elif matrix == "down_proj":
                parameter[:, kind] = 0
                parameter[self._coordinate, kind] = self._gains[layer][kind]
