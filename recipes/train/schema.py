"""The training recipe: what `edgeskip train` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from edgeskip.recipes.reader import Positive, PositiveInt, Share, read_recipe
from edgeskip.runtime.bundle.architecture import MOST_LAYERS, MOST_SIZE, Context, Size
from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.structure import Range

BatchSize = Annotated[int, Range(1, 1 << 16)]


@dataclass(frozen=True)
class ModelRecipe:
    """A Llama to train from scratch; the names are those of config.json. The tokenizer sets the vocabulary."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Range(2, MOST_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Context
    rope_theta: Positive = 10_000.0
    rms_norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise RecipeError(
                "num_key_value_heads",
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} evenly",
                wanted="a divisor of num_attention_heads",
            )
        if self.head_dim % 2:
            raise RecipeError("head_dim", f"found {self.head_dim}", wanted="an even number, for rotary embedding")


@dataclass(frozen=True)
class DataRecipe:
    """Text to learn from.

    Attributes:
        folder: the corpus; the three names below are inside it.
        train: a folder of text files, or `<name>.npy`, an array of tokens made from one.
        heldout: the same, of files that are never trained on.
        tokenizer: a folder with tokenizer.json, and tokenizer_config.json or config.json to say which token is EOS. A
            model that is continued has its own.
        files: the pattern of the text files.
        context: tokens in a sequence.
        file_start_share: the share of sequences that begin where a file begins; the others are cut anywhere.
    """

    folder: Path
    train: str = "train"
    heldout: str = "heldout"
    tokenizer: str = "tokenizer"
    files: str = "**/*"
    context: Annotated[int, Range(2, MOST_SIZE)] = 1024
    file_start_share: Share = 0.5


@dataclass(frozen=True)
class LayerSkipRecipe:
    """Layer dropout and early-exit loss (LayerSkip, arXiv 2404.16710); `layerskip.py` has the formulas.

    Attributes:
        p_max: dropout probability of the last layer.
        e_scale: how much the losses of early layers weigh.
        curriculum: which layers have a loss at a step.
        rotation: R of the rotational curriculum: every R-th layer at a step.
        focus: exit layer E (layers[:E]) -> share of the loss given to this exit at every step. Not in the paper.
        focus_target: what the exits in focus learn: the text, or the prediction of the last layer.
    """

    p_max: Share = 0.1
    e_scale: Share = 1.0
    curriculum: Literal["rotational", "gradual"] = "rotational"
    rotation: PositiveInt = 4
    focus: Mapping[int, Share] = field(default_factory=dict)
    focus_target: Literal["labels", "last-layer"] = "labels"

    def __post_init__(self) -> None:
        if sum(self.focus.values()) >= 1:
            raise RecipeError("focus", f"the shares add up to {sum(self.focus.values())}", wanted="less than 1")
        if any(exit_layer < 1 for exit_layer in self.focus):
            raise RecipeError("focus", f"found exit layer {min(self.focus)}", wanted="at least 1")


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW and its learning rate; periods are shares of the whole training.

    Attributes:
        learning_rate: its peak.
        schedule: after the warm-up, a half cosine, or a constant rate and then a linear decay.
        warmup: share of the training in which the rate rises from 0.
        decay: share of the training in which it falls at the end (warmup-stable-decay only).
        final_rate: the rate at the end, as a share of the peak.
        gradient_clip: the largest norm of the gradient; 0 does not clip.
    """

    learning_rate: Positive
    schedule: Literal["cosine", "warmup-stable-decay"] = "cosine"
    warmup: Share = 0.02
    decay: Share = 0.2
    final_rate: Share = 0.0
    weight_decay: Annotated[float, Range(0)] = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    gradient_clip: Annotated[float, Range(0)] = 1.0

    def __post_init__(self) -> None:
        if self.schedule == "warmup-stable-decay" and self.warmup + self.decay > 1:
            raise RecipeError("decay", f"warmup and decay add up to {self.warmup + self.decay}", wanted="at most 1")


@dataclass(frozen=True)
class RunRecipe:
    """How long and how fast.

    Attributes:
        max_steps: optimizer steps, at most.
        max_minutes: minutes of training, at most; compiling and saving are not counted. The schedules follow
            whichever of the two limits is nearer.
        batch_size: sequences in a forward pass.
        gradient_accumulation: forward passes in a step.
        precision: of the arithmetic; weights and optimizer are fp32 while training, and sums of the loss are always.
        compile: compile the decoder layer and the loss.
        checkpoint_minutes: minutes between checkpoints.
        checkpoint_steps: steps between checkpoints.
        log_steps: steps between two lines of the log.
        output_dtype: of the finished model's weights.
    """

    batch_size: BatchSize
    max_steps: PositiveInt | None = None
    max_minutes: Positive | None = None
    gradient_accumulation: BatchSize = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: Annotated[int, Range(0, (1 << 32) - 1)] = 0
    checkpoint_minutes: Positive | None = None
    checkpoint_steps: PositiveInt | None = None
    log_steps: PositiveInt = 50
    output_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise RecipeError("max_steps", "no end is set", wanted="max_steps, max_minutes or both")


@dataclass(frozen=True)
class TrainingRecipe:
    """A whole training; exactly one of `model` (from scratch) and `checkpoint` (a folder to continue) is given.

    Attributes:
        layerskip: absent for an ordinary training, made to compare with.
    """

    data: DataRecipe
    optimizer: OptimizerRecipe
    run: RunRecipe
    model: ModelRecipe | None = None
    checkpoint: Path | None = None
    layerskip: LayerSkipRecipe | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.checkpoint is None):
            found = "neither a model nor a checkpoint" if self.model is None else "a model and a checkpoint"
            raise RecipeError("", found, wanted="a [model] table or `checkpoint`, the folder to continue")
        if self.model is None:
            return
        if self.data.context > self.model.max_position_embeddings:
            raise RecipeError(
                "data.context",
                f"found {self.data.context}",
                wanted=f"at most max_position_embeddings = {self.model.max_position_embeddings}",
            )
        if self.layerskip:
            check_focus(self.layerskip, self.model.num_hidden_layers)


def check_focus(layerskip: LayerSkipRecipe, num_layers: int) -> None:
    """Raise RecipeError where an exit in focus is not an early one of a model of `num_layers`."""
    for exit_layer in layerskip.focus:
        if exit_layer >= num_layers:
            raise RecipeError(
                "layerskip.focus",
                f"found exit layer {exit_layer}",
                wanted=f"1 to {num_layers - 1}, of {num_layers} layers",
            )


def load_recipe(path: str | Path) -> TrainingRecipe:
    """The training recipe in the TOML file at `path`."""
    return read_recipe(path, TrainingRecipe)
