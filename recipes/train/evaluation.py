"""How good each exit of a model is, on text that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from edgeskip.recipes.train.early_exit import CausalLM, exit_hidden_states, exit_logits, load_model
from edgeskip.recipes.train.tokens import Array, TextTokenizer, file_starts, load_tokenizer, token_array
from edgeskip.runtime.decoding.statistics import distinct_4grams
from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.files import write_file


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is evaluated.

    Attributes:
        context: tokens in a sequence.
        max_sequences: sequences of held-out text, spread evenly over it.
        num_prompts: held-out files that are continued.
        prompt_length: the first tokens of such a file.
        continuation_length: tokens that the full model then writes.
        batch_size: sequences at a time.
    """

    context: int = 1024
    max_sequences: int = 256
    num_prompts: int = 64
    prompt_length: int = 64
    continuation_length: int = 128
    batch_size: int = 16


@dataclass(frozen=True)
class ExitEvaluation:
    """One exit: layers[:exit_layer], then the shared norm and head.

    Attributes:
        perplexity: of held-out text.
        accuracy: share of held-out tokens that are the exit's top token.
        agreement: share of held-out positions where the exit's top token is the last layer's.
        greedy_match: share of the positions of the full model's greedy continuations where the exit's top token
            is the last layer's.
    """

    exit_layer: int
    perplexity: float
    accuracy: float
    agreement: float
    greedy_match: float


@dataclass(frozen=True)
class Evaluation:
    """All exits of a model.

    Attributes:
        exits: one each for E = 1 .. L; the last is the model itself.
        num_tokens: held-out tokens predicted.
        num_continued_tokens: tokens in the greedy continuations.
        distinct_4grams: the mean share of their 4-grams that are not repetitions. Small models
            loop, and a loop is easy to match.
        text_distinct_4grams: the same for the text that really follows the prompts.
    """

    exits: tuple[ExitEvaluation, ...]
    num_tokens: int
    num_continued_tokens: int
    distinct_4grams: float
    text_distinct_4grams: float

    def markdown(self) -> str:
        """The table for a model card."""
        rows = [
            "| exit layer | perplexity | accuracy | agreement | greedy match |",
            "|---:|---:|---:|---:|---:|",
        ]
        rows += [
            f"| {row.exit_layer} | {row.perplexity:.2f} | {row.accuracy:.3f} | {row.agreement:.3f} "
            f"| {row.greedy_match:.3f} |"
            for row in self.exits
        ]
        return "\n".join(
            [
                *rows,
                "",
                f"Perplexity, accuracy and agreement with the last layer: {self.num_tokens:,} held-out tokens. "
                f"Greedy match: {self.num_continued_tokens:,} tokens of greedy continuations, "
                f"{self.distinct_4grams:.2f} of whose 4-grams are distinct "
                f"({self.text_distinct_4grams:.2f} in the text itself).",
            ]
        )


def evaluate_exits(
    model: CausalLM, tokens: Array, tokenizer: TextTokenizer, settings: EvaluationSettings = EvaluationSettings()
) -> Evaluation:
    """Evaluate every exit of `model` on held-out `tokens` [tokens], on the model's device.

    Raises:
        RecipeError: the text is shorter than a sequence, or no file is longer than prompt and continuation.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        real = _teacher_forced(model, sequences(tokens, settings), tokenizer.bos_id, settings)
        prompts, text = file_beginnings(tokens, tokenizer.eos_id, settings)
        continued = greedy_continuations(model, prompts, tokenizer.eos_id, settings)
        generated = _teacher_forced(model, continued, tokenizer.bos_id, settings, first=settings.prompt_length)
    model.train(was_training)
    rows = zip(real.loss, real.correct, real.agreeing, generated.agreeing, strict=True)
    return Evaluation(
        exits=tuple(
            ExitEvaluation(exit_layer, float(np.exp(loss)), correct, agreeing, match)
            for exit_layer, (loss, correct, agreeing, match) in enumerate(rows, start=1)
        ),
        num_tokens=real.count,
        num_continued_tokens=generated.count,
        distinct_4grams=distinct_4grams(
            [row[row != _IGNORED].tolist() for row in continued[:, settings.prompt_length :]]
        ),
        text_distinct_4grams=distinct_4grams(text.tolist()),
    )


# What is evaluated: sequences of token ids, padded with _IGNORED at the end

_IGNORED = -100  # cross_entropy's own


def sequences(tokens: Array, settings: EvaluationSettings) -> Tensor:
    """Sequences of context + 1 tokens that do not overlap, spread over the text [S, T+1] int64."""
    span = settings.context + 1
    count = len(tokens) // span
    if not count:
        raise RecipeError("heldout", f"{len(tokens)} tokens of text", wanted=f"at least {span}")
    chosen = np.unique(np.linspace(0, count - 1, min(count, settings.max_sequences)).round().astype(int))
    return torch.from_numpy(np.stack([tokens[i * span : (i + 1) * span] for i in chosen]).astype(np.int64))


def file_beginnings(tokens: Array, eos_id: int, settings: EvaluationSettings) -> tuple[Tensor, Tensor]:
    """Prompts [P, prompt_length] and the text that follows them [P, continuation_length], from the longer files."""
    span = settings.prompt_length + settings.continuation_length
    starts = file_starts(tokens, eos_id)
    lengths = np.diff(np.append(starts, len(tokens)))
    starts = starts[lengths > span][: settings.num_prompts]
    if not len(starts):
        raise RecipeError("heldout", "no file is long enough for a prompt", wanted=f"more than {span} tokens")
    files = torch.from_numpy(np.stack([tokens[start : start + span] for start in starts]).astype(np.int64))
    return files[:, : settings.prompt_length], files[:, settings.prompt_length :]


def greedy_continuations(model: CausalLM, prompts: Tensor, eos_id: int, settings: EvaluationSettings) -> Tensor:
    """Prompts with the full model's greedy continuations [P, T]; what follows an EOS is marked as ignored."""
    batches = []
    for batch in torch.split(prompts, settings.batch_size):
        batch = batch.to(model.device)
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=settings.continuation_length,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            use_cache=True,
        )
        batches.append(
            F.pad(output, (0, prompts.shape[1] + settings.continuation_length - output.shape[1]), value=eos_id)
        )
    continued = torch.cat(batches)
    ended = (continued[:, prompts.shape[1] :] == eos_id).cumsum(1) > 0
    ended = F.pad(ended[:, :-1], (prompts.shape[1] + 1, 0))  # the first EOS itself is a prediction
    return continued.masked_fill(ended, _IGNORED).cpu()


# Scores


@dataclass(frozen=True)
class _Scores:
    """Means over `count` positions, one for each exit."""

    loss: list[float]
    correct: list[float]
    agreeing: list[float]
    count: int


def _teacher_forced(
    model: CausalLM, token_ids: Tensor, bos_id: int | None, settings: EvaluationSettings, first: int = 1
) -> _Scores:
    """Predict the tokens of `token_ids` [S, T+1] from place `first` on, each from the true ones before it.

    A BOS is not predicted: it only says that another file begins in the packed text.
    """
    sums = torch.zeros(3, len(model.model.layers), dtype=torch.float64, device=model.device)
    count = 0
    for batch in torch.split(token_ids, settings.batch_size):
        labels = batch[:, 1:].clone()
        labels[:, : first - 1] = _IGNORED
        if bos_id is not None:
            labels[labels == bos_id] = _IGNORED
        counted = labels.flatten() != _IGNORED
        count += int(counted.sum())
        sums += torch.stack(list(_exit_sums(model, batch[:, :-1].clamp(min=0), labels)), dim=1)
    loss, correct, agreeing = (sums / count).tolist()
    return _Scores(loss, correct, agreeing, count)


def _exit_sums(model: CausalLM, token_ids: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """For each exit, sums over the labelled positions [3]: loss, correct, agreeing with the last layer."""
    states = exit_hidden_states(model, token_ids.to(model.device))
    labels = labels.to(model.device)
    counted = labels != _IGNORED
    last = exit_logits(states[-1], model.model.norm, model.lm_head).argmax(-1)
    for state in states:
        logits = exit_logits(state, model.model.norm, model.lm_head)
        top = logits.argmax(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        yield torch.stack([loss, ((top == labels) & counted).sum(), ((top == last) & counted).sum()]).double()


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("heldout", type=click.Path(path_type=Path))
@click.option("--files", default="**/*", help="Pattern of the text files in HELDOUT.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the result here, as JSON.")
@click.option("--context", default=1024, help="Tokens in a sequence.")
@click.option("--max-sequences", default=256, help="Sequences of held-out text.")
@click.option("--prompts", default=64, help="Held-out files that are continued.")
@click.option("--batch-size", default=16, help="Sequences at a time.")
def main(
    checkpoint: Path,
    heldout: Path,
    files: str,
    output: Path | None,
    context: int,
    max_sequences: int,
    prompts: int,
    batch_size: int,
) -> None:
    """Evaluate each exit of the model in CHECKPOINT on HELDOUT, a folder of text or its array of tokens (.npy)."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(checkpoint)
    tokens = token_array(heldout, files, tokenizer, checkpoint.parent)
    model = load_model(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = EvaluationSettings(
        context=context, max_sequences=max_sequences, num_prompts=prompts, batch_size=batch_size
    )
    evaluation = evaluate_exits(model, tokens, tokenizer, settings)
    if output:
        write_file(output, json.dumps(asdict(evaluation), indent=2) + "\n")
    print(evaluation.markdown())


if __name__ == "__main__":
    main()
