"""A checkpoint of a given shape with random weights whose exit agrees with the whole model at chosen rates.

Speed depends on shape and match rate alone, so it can be measured with a model that says nothing, where the weights of
a real one cannot be had.

    h_0 = embedding                      rows of length 1
    h_1 = h_0 + attention + mlp          attention about as large as the embedding, the MLP far larger
    h_l = h_(l-1) + attention + mlp      every MLP adds a variance of 1, attention less than that
    logits = head(norm(h))               with a standard deviation of 1

*Texts that do not loop.* A gated MLP with random weights sends different inputs to nearly orthogonal outputs: a text is
a walk of random jumps as long as the MLPs' inputs differ from place to place. So the first MLP must not see mostly an
average of the tokens so far, nor the later ones mostly attention. Nor may the embedding itself survive, or a tied model
repeats its input: the logit of that token gains 1 / rms(h) <= 1 standard deviations, whatever the width, while the top
one of V random logits is at sqrt(2 ln V), or 4.9 standard deviations for V = 128256.

*The match rate.* The later layers add to h_E what the exit does not see. Their output projections are scaled by a
damping in (0, 1]: at 1 they outweigh the early ones and the exit is rarely right, near 0 it nearly always is.

*A draft vocabulary.* The head's rows after the first ones are halved: no logit of theirs is then the largest, as the
top one of n random logits grows only with sqrt(2 ln n). So texts keep to the first rows, as those of a trained model
mostly do, and a draft head that knows no others drafts as well as the whole one.

*Confidence, and several match rates*, which take turns in a text, are what recipes/segments.py adds.

B prompts, T tokens, E exit layer, L layers, H hidden size, V vocabulary, N match rates.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from edgeskip.exporter.config import SYNTHETIC
from edgeskip.exporter.reference import cache_argument
from edgeskip.recipes.segments import MAX_KINDS, Kinds, bias, layer_of, logit_scale
from edgeskip.recipes.shape import Shape, load_shape
from edgeskip.recipes.train.early_exit import CausalLM
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType
from edgeskip.runtime.bundle.graphs import check_draft_vocabulary, check_exit_layer
from edgeskip.runtime.bundle.manifest import Progress
from edgeskip.runtime.bundle.tensors import EMBEDDINGS, LM_HEAD, NORM
from edgeskip.runtime.errors import BackendError, CheckpointError, RequestError
from edgeskip.runtime.files import whole_folder

GATED_RMS = 0.597  # sqrt(E[silu(x)^2]), x ~ N(0, 1): of silu(gate) * up where both measure 1
FIRST_ATTENTION = 3.0  # one value over an embedding; an average of n of them measures 1 / sqrt(n) of it
SHARP_ATTENTION, SHARPNESS = 0.6, 8.0  # with a sink: of one token in the main, so the same wherever a row stands
LATE_VARIANCE = 8.0  # that of all later layers, undamped, over that of the early ones
RARE = 0.5  # what rows of the head are multiplied with that no text shall need
STEEPNESS = 7.0  # the match rate is about exp(-STEEPNESS * damping), measured at many shapes
SMALLEST_DAMPING = 1e-3
LONGEST_SEGMENT = 1 << 20
TOLERANCE, LARGEST_ERROR = 0.01, 0.03  # errors of the match rate: what ends the search, what is refused
DISTINCT_TOKENS = 0.9
NUM_BYTES = 256
SHARD_SIZE = "4GB"
_BLOCK = 1 << 24  # numbers drawn at a time, 64 MiB in fp32


@dataclass(frozen=True)
class SyntheticSettings:
    """What is made, and how its match rate is measured.

    Args:
        exit_layer: E, where drafting would end.
        match_rates: the share of greedy tokens that the exit shall predict, 0 to 1; of several, each holds for a kind
            of segments [N].
        seed: that of weights and prompts; the same seed on another device gives other weights.
        dtype: that of the weights as stored.
        device: where they are made and measured; `auto` is CUDA where there is one. A CPU computes in fp32.
        num_prompts: B / N; their tokens are random.
        prompt_length: tokens in each.
        new_tokens: T, the tokens that the whole model then writes.
        draft_vocabulary: rows of the vocabulary that texts keep to; by default all.
        segment_tokens: the mean length of a segment, 2 or more.
        max_steps: how many dampings are tried, at most.
    """

    exit_layer: int
    match_rates: tuple[float, ...]
    seed: int = 0
    dtype: DType = "fp16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_prompts: int = 16
    prompt_length: int = 32
    new_tokens: int = 128
    max_steps: int = 12
    draft_vocabulary: int | None = None
    segment_tokens: int = 128


@dataclass(frozen=True)
class Spread:
    """How a rate varies over the prompts."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Segments:
    """The segments of one kind.

    Attributes:
        damping: that of the later layers.
        match_rate: share of their tokens that the exit picks too.
        confidence: the mean probability that the exit gives to what it picks.
    """

    damping: float
    match_rate: float
    confidence: float


@dataclass(frozen=True)
class Measurement:
    """How well the exit and the whole model agree on the whole model's own greedy texts.

    Attributes:
        match_rate: share of the tokens that the exit picks too.
        match_rate_by_prompt: the same, text by text.
        distinct_tokens: share of a text's tokens that repeat no earlier one, mean over texts.
        segments: what was measured of each kind [N].
    """

    match_rate: float
    match_rate_by_prompt: Spread
    distinct_tokens: float
    segments: tuple[Segments, ...]


@dataclass(frozen=True)
class Synthetic:
    """What config.json says under `edgeskip_synthetic`; `draft_vocabulary` is null where texts use all rows, and
    `segment_tokens` where there is one match rate.
    """

    shape: str
    seed: int
    exit_layer: int
    match_rate: float
    match_rate_by_prompt: Spread
    distinct_tokens: float
    segments: tuple[Segments, ...]
    segment_tokens: int | None = None
    draft_vocabulary: int | None = None


def synthesize(
    shape_name: str, destination: Path, settings: SyntheticSettings, progress: Progress = lambda *_: None
) -> Synthetic:
    """Makes a checkpoint folder in transformers' format.

    Args:
        shape_name: a published shape, or the path of a config.json.
        destination: the folder.
        settings: what is made.
        progress: called during long work.

    Raises:
        RequestError: a shape, exit layer or rate that cannot be had.
        CheckpointError: a config.json that is not supported, or a destination that exists or cannot be written.
        BackendError: no such device, or too little memory.
    """
    shape = load_shape(shape_name)
    _check_settings(shape, settings)
    device = _device(settings.device)
    weights = Weights(shape, settings, device)
    with whole_folder(destination, weights.stored_bytes, CheckpointError) as folder:
        _check_memory(weights, device)
        weights.draw(progress)
        measurement = find_dampings(weights, settings, progress)
        _check_measurement(shape, settings, measurement)
        made = Synthetic(
            shape.name,
            settings.seed,
            settings.exit_layer,
            **vars(measurement),
            segment_tokens=settings.segment_tokens if len(settings.match_rates) > 1 else None,
            draft_vocabulary=settings.draft_vocabulary,
        )
        _write(weights, shape, made, folder)
    return made


class Weights:
    """A model whose weights are a function of seed, name and dampings. Any can be drawn again, so none is kept twice.

    Attributes:
        model: in transformers, on the device; undamped once it has been drawn.
        stored_bytes: its size in the dtype it is stored in.
        computed_bytes: its size in the dtype it is run in, fp32 on a CPU.
    """

    def __init__(self, shape: Shape, settings: SyntheticSettings, device: torch.device) -> None:
        self.settings, self.device, self.architecture = settings, device, shape.architecture
        self.dtype = getattr(torch, NUMBER_TYPES[settings.dtype].torch)
        inert = ("model_type", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
        config = AutoConfig.for_model(
            shape.architecture.model_type,
            **{key: value for key, value in shape.config.items() if key not in inert},
            **dict.fromkeys(inert[3:]),
        )
        compute = torch.float32 if device.type == "cpu" else self.dtype
        with torch.device("meta"):
            made: CausalLM = AutoModelForCausalLM.from_config(config, dtype=compute)  # type: ignore[no-untyped-call]
        self.model = made.eval()
        rates, a = settings.match_rates, shape.architecture
        rows = settings.draft_vocabulary or a.vocab_size
        self._scales = [logit_scale(rate, rows // len(rates)) for rate in rates]
        self._kinds: Kinds | None = None
        if len(rates) > 1:
            gain = bias(settings.segment_tokens, len(rates), rows)
            self._kinds = Kinds(self._scales, gain, LATE_VARIANCE, a.hidden_size, settings.exit_layer)
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        self.stored_bytes, self.computed_bytes = numbers * self.dtype.itemsize, numbers * compute.itemsize

    def draw(self, progress: Progress = lambda *_: None) -> None:
        """Makes all weights, on the device."""
        decoder = self.model.model
        self.model.to_empty(device=self.device)
        self.model.tie_weights()
        decoder.rotary_emb = type(decoder.rotary_emb)(self.model.config).to(self.device)  # has no parameters
        done, guesses = 0, [_Search(rate).damping for rate in self.settings.match_rates]
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            self._draw(index, name, parameter)
            self._write(name, parameter, guesses)
            done += parameter.numel() * self.dtype.itemsize
            progress("drawing weights", done, self.stored_bytes)
        if self._kinds is not None:
            self._settle(self._kinds, guesses)

    @torch.inference_mode()
    def _settle(self, kinds: Kinds, dampings: Sequence[float]) -> None:
        """Measures what the early layers make of tokens, which is also what kinds go by, until that is settled."""
        settings, length = self.settings, self.settings.prompt_length
        token_ids = random_tokens(settings, self.architecture.vocab_size, length + settings.new_tokens).to(self.device)

        def learn(name: str, norm: nn.Module, inputs: tuple[Tensor]) -> None:
            kinds.learn(name, inputs[0][:, length:], token_ids[:, length:])
            self._write(name, norm.get_parameter("weight"), dampings)  # so what later layers are given is as it will be

        hooks = [
            module.register_forward_pre_hook(partial(learn, f"{name}.weight"))
            for name, module in self.model.named_modules()
            if name.endswith("layernorm") and layer_of(name) <= settings.exit_layer
        ]
        for _ in range(3):
            self.model.model(token_ids)
            for name, parameter in self.model.named_parameters():
                if not self._is_late(name):
                    self._write(name, parameter, dampings)
        for hook in hooks:
            hook.remove()

    def damp(self, dampings: Sequence[float]) -> None:
        """Draws the output projections of the later layers again, times the dampings [N]: errors do not add up."""
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            if self._is_late(name):
                self._draw(index, name, parameter)
            self._write(name, parameter, dampings)

    @property
    def _head(self) -> str:
        return EMBEDDINGS if self.architecture.tie_word_embeddings else LM_HEAD

    def _is_late(self, name: str) -> bool:
        return layer_of(name) >= self.settings.exit_layer and _is_output(name)

    def _deviation(self, name: str, fan_in: int) -> float:
        """Standard deviation of a matrix's numbers, undamped: 1 / sqrt(fan-in) but for this module's formulas."""
        layers, exit_layer = self.architecture.num_layers, self.settings.exit_layer
        deviation = 1 / math.sqrt(fan_in)
        if "down_proj" in name and not (self._kinds and self._is_late(name)):
            deviation /= GATED_RMS
        if "o_proj" in name and layer_of(name) == 0:
            attention = FIRST_ATTENTION if self._kinds is None else SHARP_ATTENTION
            deviation *= attention / math.sqrt(self.architecture.hidden_size)  # as an embedding's numbers
        if "q_proj" in name and layer_of(name) == 0 and self._kinds is not None:
            deviation *= SHARPNESS
        if self._is_late(name):
            deviation *= math.sqrt(LATE_VARIANCE * exit_layer / (layers - exit_layer))
        return deviation

    @torch.no_grad()
    def _draw(self, index: int, name: str, parameter: Tensor) -> None:
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # the others are norms
            return
        generator = torch.Generator(self.device).manual_seed(self.settings.seed << 16 | index)
        deviation = self._deviation(name, parameter.shape[1])
        for part in torch.split(parameter.view(-1), _BLOCK):
            numbers = torch.randn(part.shape, generator=generator, device=self.device)
            part.copy_(numbers.mul_(deviation))
        if self.settings.draft_vocabulary is not None and name == self._head:
            parameter[self.settings.draft_vocabulary :] *= RARE

    @torch.no_grad()
    def _write(self, name: str, parameter: Tensor, dampings: Sequence[float]) -> None:
        if self._kinds is not None:
            self._kinds.write(name, parameter, dampings)
        elif name == NORM:
            parameter.fill_(self._scales[0])
        elif self._is_late(name):
            parameter *= dampings[0]
        if parameter.dtype != self.dtype:  # is rounded to what is stored
            parameter.copy_(parameter.to(self.dtype))


def _is_output(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def random_tokens(settings: SyntheticSettings, vocab_size: int, length: int) -> Tensor:
    """Tokens [B, length] of those that texts keep to."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.num_prompts * len(settings.match_rates), length)
    return torch.randint(settings.draft_vocabulary or vocab_size, size, generator=generator)


@torch.inference_mode()
def measure(
    model: CausalLM,
    settings: SyntheticSettings,
    dampings: Sequence[float],
    progress: Callable[[int], None] = lambda _: None,
) -> Measurement:
    """Continues random prompts greedily and asks the exit at each token too, with the same caches as in drafting.

    `progress` is told how many tokens of each prompt are done.
    """
    decoder = model.model
    prompts = random_tokens(settings, model.config.vocab_size, settings.prompt_length)
    token_ids, cache = prompts.to(model.device), DynamicCache()
    read, picks, chances = [], [], []
    for done in range(settings.new_tokens):
        out = decoder(token_ids, use_cache=True, output_hidden_states=True, **cache_argument(decoder, cache))
        exit_state = decoder.norm(out.hidden_states[settings.exit_layer][:, -1])
        states = torch.stack([exit_state, out.last_hidden_state[:, -1]])  # [2, B, H]; the last is normed already
        logits = model.lm_head(states)
        read.append(token_ids[:, -1])
        picks.append(logits.argmax(-1))
        chances.append(logits[0].float().softmax(-1).amax(-1))
        token_ids = picks[-1][1][:, None]
        progress(done + 1)
    exits, texts = torch.stack(picks, dim=-1).cpu()  # [B, T] each
    matched, sure = (exits == texts).double(), torch.stack(chances, dim=-1).cpu().double()
    kinds, by_prompt = torch.stack(read, dim=-1).cpu() % len(dampings), matched.mean(-1)
    return Measurement(
        match_rate=float(matched.mean()),
        match_rate_by_prompt=Spread(float(by_prompt.min()), float(by_prompt.quantile(0.5)), float(by_prompt.max())),
        distinct_tokens=sum(len(text.unique()) for text in texts) / texts.numel(),
        segments=tuple(
            Segments(damping, float(matched[kinds == kind].mean()), float(sure[kinds == kind].mean()))
            for kind, damping in enumerate(dampings)
        ),
    )


class _Search:
    """Looks for the damping at which a match rate is nearest to what is wanted.

    The next damping is read off exp(-c * damping) through the last measurement; where that leads out of the interval
    that is left, it is that interval's geometric mean.
    """

    def __init__(self, wanted: float) -> None:
        self._wanted, self._low, self._high = wanted, SMALLEST_DAMPING, 1.0
        self.damping = min(max(_exponent(wanted) / STEEPNESS, self._low), self._high)
        self._tries: list[tuple[float, float]] = []
        self.ended = False

    @property
    def best(self) -> float:
        """The damping of the best try."""
        return min(self._tries)[1]

    def note(self, match_rate: float) -> None:
        """Learns of the match rate at the damping, and chooses the next one; goes back to the best one at the end."""
        if self.ended:
            return
        error, damping = abs(match_rate - self._wanted), self.damping
        self._tries.append((error, damping))
        self._low, self._high = (damping, self._high) if match_rate > self._wanted else (self._low, damping)
        if error <= TOLERANCE or self._high < 1.01 * self._low:
            self.damping, self.ended = self.best, True
            return
        damping *= _exponent(self._wanted) / _exponent(match_rate)
        self.damping = damping if self._low < damping < self._high else math.sqrt(self._low * self._high)


def find_dampings(weights: Weights, settings: SyntheticSettings, progress: Progress = lambda *_: None) -> Measurement:
    """Damps the later layers so that match rates are nearest to what is wanted; returns what was measured then.

    Every try has its own texts, so rates jitter by about 0.01.
    """
    total = (settings.max_steps + 1) * settings.new_tokens

    def at(dampings: Sequence[float], step: int) -> Measurement:
        weights.damp(dampings)
        before = step * settings.new_tokens
        return measure(weights.model, settings, dampings, lambda n: progress("finding the damping", before + n, total))

    def worst_error(found: Measurement) -> float:
        pairs = zip(found.segments, settings.match_rates, strict=True)
        return max(abs(segments.match_rate - wanted) for segments, wanted in pairs)

    searches, tries = [_Search(rate) for rate in settings.match_rates], list[Measurement]()
    while len(tries) < settings.max_steps and not all(search.ended for search in searches):
        tries.append(at([search.damping for search in searches], len(tries)))
        for search, segments in zip(searches, tries[-1].segments, strict=True):
            search.note(segments.match_rate)
    best = [search.best for search in searches]
    if best != [segments.damping for segments in tries[-1].segments]:
        tries.append(at(best, len(tries)))
    found = min(tries, key=worst_error)  # which the best dampings together need not be
    if found is not tries[-1]:
        weights.damp([segments.damping for segments in found.segments])
    progress("finding the damping", total, total)
    return found


def _exponent(match_rate: float) -> float:
    return -math.log(min(max(match_rate, 1e-3), 1 - 1e-3))


# Bad input


def _check_settings(shape: Shape, settings: SyntheticSettings) -> None:
    a, tokens = shape.architecture, settings.prompt_length + settings.new_tokens
    check_exit_layer(settings.exit_layer, a.num_layers)
    check_draft_vocabulary(settings.draft_vocabulary, a.vocab_size)
    for rate in settings.match_rates:
        if not 0 <= rate <= 1:
            raise RequestError("match rate", f"{rate:g}", wanted="0 to 1")
    if not 1 <= len(settings.match_rates) <= MAX_KINDS:
        raise RequestError("match rates", f"{len(settings.match_rates)} of them", wanted=f"1 to {MAX_KINDS}")
    if not 2 <= settings.segment_tokens <= LONGEST_SEGMENT:
        raise RequestError("tokens of a segment", f"{settings.segment_tokens}", wanted=f"2 to {LONGEST_SEGMENT}")
    if not 0 <= settings.seed < 1 << 31:
        raise RequestError("seed", f"{settings.seed}", wanted=f"0 to {(1 << 31) - 1}")
    if a.vocab_size < NUM_BYTES:
        raise RequestError(f"shape {shape.name}", f"{a.vocab_size} tokens", wanted=f"{NUM_BYTES} or more")
    if a.max_position_embeddings < tokens:
        found = f"a context of {a.max_position_embeddings}"
        raise RequestError(f"shape {shape.name}", found, wanted=f"{tokens} or more, to measure the match rate")


def _device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise BackendError("--device cuda", "no CUDA device, or a torch without CUDA", fix="use --device cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def _check_memory(weights: Weights, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if free < weights.computed_bytes:
        raise BackendError(
            f"device {device.type}",
            f"{free / 1e9:.0f} GB of memory",
            wanted=f"{weights.computed_bytes / 1e9:.0f} GB for the weights",
            fix="use a larger machine or a smaller shape",
        )


def _is_judged(a: Architecture, settings: SyntheticSettings) -> bool:
    """Whether texts of random tokens hardly ever repeat and random states of this width are nearly orthogonal.

    The figures of smaller shapes, which are good for tests only, are recorded and never refused.
    """
    return (settings.draft_vocabulary or a.vocab_size) >= 100 * settings.new_tokens and a.hidden_size >= 512


def _check_measurement(shape: Shape, settings: SyntheticSettings, measured: Measurement) -> None:
    place = f"shape {shape.name} at exit layer {settings.exit_layer}"
    if any(math.isnan(segments.confidence) and segments.match_rate == 1 for segments in measured.segments):
        raise RequestError(place, f"numbers overflow in {settings.dtype}", fix="use --dtype bf16")
    if not _is_judged(shape.architecture, settings):
        return
    rates = list(zip(settings.match_rates, measured.segments, strict=True))
    for wanted, segments in rates:
        if not abs(segments.match_rate - wanted) <= LARGEST_ERROR:
            found = f"the nearest match rate is {segments.match_rate:.3f}, at a damping of {segments.damping:.3g}"
            others = [f"{other.match_rate:.3f} for {rate:g}" for rate, other in rates if other is not segments]
            if others:
                place += f", segments of match rate {wanted:g}"
                found += f" (the others are {' and '.join(others)})"
            raise RequestError(place, found, wanted=f"{wanted:g}", fix="give another rate or seed")
    if measured.distinct_tokens < DISTINCT_TOKENS:
        found = f"its texts loop: {measured.distinct_tokens:.0%} of their tokens are distinct"
        raise RequestError(place, found, wanted=f"{DISTINCT_TOKENS:.0%}", fix="give another seed")


# The folder

_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None, "eos_token": None, "pad_token": None}
"""No special tokens: transformers' class for Qwen would add some that the model has not."""


def _write(weights: Weights, shape: Shape, made: Synthetic, folder: Path) -> None:
    model = weights.model.to(weights.dtype)
    setattr(model.config, SYNTHETIC, asdict(made))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    byte_tokenizer(shape.architecture.vocab_size).save(str(folder / "tokenizer.json"))
    texts = {
        "generation_config.json": json.dumps({"eos_token_id": None}) + "\n",
        "tokenizer_config.json": json.dumps(_TOKENIZER) + "\n",
        "README.md": _readme(made),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Id b < 256 is the byte b, so that any text takes one token per byte; any other id i reads ` i`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [c for c in alphabet if ord(c) < NUM_BYTES]  # ByteLevel writes these bytes as themselves,
    shifted = iter(sorted(set(alphabet) - set(printable)))  # the others, in order, by characters from 256 on
    vocab = {chr(b) if chr(b) in printable else next(shifted): b for b in range(NUM_BYTES)}
    vocab |= {f"\u0120{i}": i for i in range(NUM_BYTES, vocab_size)}  # U+0120 is its space
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _readme(made: Synthetic) -> str:
    spread = made.match_rate_by_prompt
    exit_layer, rows = made.exit_layer, made.draft_vocabulary
    dampings = " and ".join(f"{segments.damping:.4g}" for segments in made.segments)
    turns = ""
    if made.segment_tokens is not None:
        rates = " and ".join(f"{segments.match_rate:.1%}" for segments in made.segments)
        turns = f"\nThese rates take turns in a text, for {made.segment_tokens} tokens on average: {rates}."
    kept = f", all of them among the first {rows} of the vocabulary" if rows else ""
    return f"""# Synthetic weights of the shape {made.shape}

**This is not a language model.** Its weights are random (seed {made.seed}), made by `edgeskip synth` to measure speed,
and its texts mean nothing. No weight of any published model is in it.

The output projections of the layers from {exit_layer} on are damped by {dampings},
so that exit layer {exit_layer} predicts {made.match_rate:.1%} of the tokens that the whole model writes greedily
({spread.min:.1%} to {spread.max:.1%} by prompt, median {spread.median:.1%}).{turns}
{made.distinct_tokens:.1%} of the tokens of a text are distinct{kept}.
There is no EOS: texts run to the length asked for. The tokenizer takes one token per byte; other token ids read as
their numbers.
The exit is about as sure of its drafts, on average, as they are right.
"""
