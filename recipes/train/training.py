"""Train or continue a model with LayerSkip, on transformers' Trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from edgeskip.recipes.train.early_exit import (
    CausalLM,
    distillation_loss,
    exit_hidden_states,
    exit_loss,
    kept_samples,
    load_model,
    run_layer,
)
from edgeskip.recipes.train.layerskip import (
    distillation_weights,
    dropout_by_layer,
    dropout_ramp,
    loss_weights,
)
from edgeskip.recipes.train.schema import DataRecipe, OptimizerRecipe, TrainingRecipe, check_focus, load_recipe
from edgeskip.recipes.train.tokens import Array, TextTokenizer, check_tokens, file_starts, load_tokenizer, token_array
from edgeskip.runtime.bundle.architecture import MODEL_TYPES, MOST_LAYERS, Size
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES
from edgeskip.runtime.errors import RecipeError, reason
from edgeskip.runtime.files import (
    InUseError,
    cache_folder,
    locked,
    open_plain,
    scratch_folder,
    sha256_of,
    sync,
    sync_tree,
    write_file,
)
from edgeskip.runtime.reading import read_json
from edgeskip.runtime.structure import Range, structure
from edgeskip.runtime.terminal import console, shown

# Files of a checkpoint that travel with its weights.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "LICENSE*"),
)
CLOCK = "clock.json"  # the last file of a checkpoint, and the first that goes
KEPT_CHECKPOINTS = 2
_NO_LIMIT = 10**9  # steps, where only time is limited


@dataclass(frozen=True)
class _Clock:
    """What clock.json says; `files` are the hashes of the checkpoint's other files by name."""

    step: Size
    elapsed_s: Annotated[float, Range(0)]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `train` did.

    Attributes:
        output: the folder of the model, which is there only when `finished`.
        finished: False where it stopped before the recipe's end; `resume` continues.
        steps: optimizer steps since the recipe's beginning.
        tokens: tokens seen since then.
        minutes: minutes of training since then.
    """

    output: Path
    finished: bool
    steps: int
    tokens: int
    minutes: float


# Data


class Windows(Dataset[int]):
    """A list, as long as the training, of the places where training sequences begin in the token array.

    It goes through the array epoch after epoch. Each epoch cuts the array into sequences at a new offset, puts them in
    a new order, and replaces a share of them with sequences that begin where a file begins, taking the files in turn.
    Item i depends on the seed and i alone, so a resumed training sees what it would have seen.
    """

    def __init__(self, tokens: Array, starts: Array, data: DataRecipe, seed: int, length: int) -> None:
        self.span = data.context + 1  # one more for the last label
        self.last_start = len(tokens) - self.span
        if self.last_start < 0:
            raise RecipeError("data.context", f"{len(tokens)} tokens of text", wanted=f"at least {self.span}")
        self.starts = starts[starts <= self.last_start]
        self.context, self.share = data.context, data.file_start_share
        self.seed, self.length = seed, length
        self.per_epoch = max(1, self.last_start // self.context)
        self.places = lru_cache(maxsize=1)(self._places)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.per_epoch)
        return int(self.places(epoch)[place])

    def _places(self, epoch: int) -> Array:
        """The places of one epoch [per_epoch]."""
        random = np.random.default_rng((self.seed, epoch))
        offset = random.integers(min(self.context, self.last_start + 1))
        places: Array = offset + self.context * random.permutation(self.per_epoch)
        at_file = random.random(self.per_epoch) < self.share
        files = np.random.default_rng(self.seed).permutation(self.starts)
        turn = epoch * round(self.share * self.per_epoch) + np.arange(at_file.sum())
        places[at_file] = files[turn % len(files)]
        return places


def device_tokens(tokens: Array, device: torch.device) -> Tensor:
    """The token array on the device, in half the bytes where it is uint16: as int16 of the same bits [tokens]."""
    bits = tokens.view(np.int16 if tokens.dtype == np.uint16 else np.int32)
    return torch.from_numpy(np.array(bits)).to(device)


# The trainer


class Stopwatch:
    """Seconds of training, across resumes; stopped while the decoder is compiled and while files are written."""

    def __init__(self, before_s: float = 0.0) -> None:
        self._sum_s = before_s
        self._since: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds so far."""
        return self._sum_s + (0.0 if self._since is None else time.monotonic() - self._since)

    def start(self) -> None:
        """Count from now on."""
        if self._since is None:
            self._since = time.monotonic()

    def stop(self, device: torch.device) -> None:
        """Stop counting, once the device has done what it was given."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._sum_s, self._since = self.elapsed_s, None


class LayerSkipTrainer(Trainer):
    """transformers' Trainer with LayerSkip's forward pass and loss, and schedules that follow `progress`.

    It never waits for the device between two lines of the log: batches are cut on the device, and weights
    and probabilities are numbers on the host.
    """

    def __init__(
        self, recipe: TrainingRecipe, model: CausalLM, tokens: Array, eos_id: int, watch: Stopwatch, **kwargs: Any
    ) -> None:
        run = recipe.run
        total = (run.max_steps or _NO_LIMIT) * run.batch_size * run.gradient_accumulation
        self.windows = Windows(tokens, file_starts(tokens, eos_id), recipe.data, run.seed, total)
        super().__init__(model=model, train_dataset=self.windows, **kwargs)
        self.model_accepts_loss_kwargs = False  # the mean over a batch is divided by the accumulation steps
        self.recipe, self.watch = recipe, watch
        device = self.args.device
        self.tokens = device_tokens(tokens, device)
        self.token_mask = 0xFFFF if tokens.dtype == np.uint16 else -1
        self.span = torch.arange(self.windows.span, device=device)
        layers = len(model.model.layers)
        self.dropout = torch.tensor([dropout_by_layer(layer, layers) for layer in range(layers)], device=device)
        self.last_layer_loss = torch.zeros((), device=device)  # summed since the last line of the log
        self.losses_summed = 0
        compiled: Callable[[Any], Any] = torch.compile if run.compile else lambda function: function
        self.run_layer, self.exit_loss = compiled(run_layer), compiled(exit_loss)
        self.distillation_loss = compiled(distillation_loss)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of places in the order of the list, which is random already."""
        loader: DataLoader[Any] = DataLoader(
            self.windows,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=lambda starts: {"starts": torch.tensor(starts)},
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def progress(self, step: int) -> float:
        """How far the training has come at this step and moment, 0 to 1: in steps or in time, whichever is further."""
        run = self.recipe.run
        by_steps = step / max(1, run.max_steps - 1) if run.max_steps else 0.0
        by_time = self.watch.elapsed_s / (60 * run.max_minutes) if run.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def compute_loss(
        self, model: CausalLM, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The LayerSkip loss of the sequences that begin at inputs["starts"] [B]."""
        sequences = self.tokens[inputs["starts"][:, None] + self.span].long() & self.token_mask  # [B, T+1]
        bf16 = self.recipe.run.precision == "bf16"
        with torch.autocast(sequences.device.type, torch.bfloat16, enabled=bf16):
            loss = self.layerskip_loss(model, sequences[:, :-1], sequences[:, 1:])
        return (loss, {}) if return_outputs else loss

    def layerskip_loss(self, model: CausalLM, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Sum over the layers of weight times loss, for token ids and labels [B, T]."""
        recipe, layers, step = self.recipe.layerskip, len(model.model.layers), self.state.global_step
        progress = self.progress(step)
        kept = None
        if model.training and recipe and recipe.p_max > 0:
            ramp = dropout_ramp(progress, from_scratch=self.recipe.model is not None)
            kept = kept_samples(ramp * recipe.p_max * self.dropout, len(token_ids))
        states = exit_hidden_states(model, token_ids, kept, self.run_layer)
        shared = (model.model.norm, model.lm_head)
        loss = torch.zeros((), device=token_ids.device)
        for layer, weight in loss_weights(recipe, layers, step, progress).items():
            text_loss = self.exit_loss(states[layer], labels, *shared)
            loss = loss + weight * text_loss
            if layer == layers - 1:
                self.last_layer_loss += text_loss.detach()
                self.losses_summed += 1
        for layer, weight in distillation_weights(recipe).items():
            loss = loss + weight * self.distillation_loss(states[layer], states[-1].detach(), *shared)
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rate as a function of progress."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(
                optimizer, lambda step: rate_factor(self.recipe.optimizer, self.progress(step))
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, *args: Any, **settings: Any) -> None:
        with _saving(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _continuing(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _continuing(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the time and the last layer's loss (what the total means changes as exits rotate)."""
        if self.losses_summed:
            logs["last_layer_loss"] = self.last_layer_loss.item() / self.losses_summed
            self.last_layer_loss.zero_()
            self.losses_summed = 0
        logs["minutes"] = self.watch.elapsed_s / 60
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RecipeError("optimizer.learning_rate", f"the loss has become {logs['loss']}", fix="lower the rate")


def rate_factor(recipe: OptimizerRecipe, progress: float) -> float:
    """The learning rate at a progress of 0 to 1, as a share of its peak."""
    if progress < recipe.warmup:
        return progress / recipe.warmup
    if recipe.schedule == "cosine":
        falling = (progress - recipe.warmup) / (1 - recipe.warmup) if recipe.warmup < 1 else 0.0
        falling = (1 - math.cos(math.pi * falling)) / 2
    else:
        falling = max(0.0, progress - (1 - recipe.decay)) / recipe.decay if recipe.decay else 0.0
    return 1 - (1 - recipe.final_rate) * falling


class Limits(TrainerCallback):
    """Ends the training at its limits of steps and time, and writes checkpoints along the way and at the end."""

    def __init__(self, recipe: TrainingRecipe, watch: Stopwatch, stop_at: float | None) -> None:
        self.recipe, self.watch, self.stop_at = recipe, watch, stop_at
        self.saved_at_s, self.first_step = watch.elapsed_s, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where this call began."""
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at step and time."""
        if state.global_step == self.first_step + 1:  # the step that compiled is over
            self.watch.stop(args.device)
            self.watch.start()
        run, step, elapsed_s = self.recipe.run, state.global_step, self.watch.elapsed_s
        end = is_over(self.recipe, step, elapsed_s)
        end = end or (self.stop_at is not None and time.monotonic() >= self.stop_at)
        due = run.checkpoint_steps is not None and step % run.checkpoint_steps == 0
        due |= run.checkpoint_minutes is not None and elapsed_s - self.saved_at_s >= 60 * run.checkpoint_minutes
        if end or due:
            control.should_training_stop = control.should_training_stop or end
            control.should_save = control.should_log = True
            self.watch.stop(args.device)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint with the clock; one without it is not resumed from. Only then do older ones go."""
        self.saved_at_s = self.watch.elapsed_s
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        with _saving(folder):
            sync_tree(checkpoint)
            files = {path.name: sha256 for path in sorted(checkpoint.iterdir()) if (sha256 := _hash(path))}
            clock = _Clock(state.global_step, self.saved_at_s, files)
            write_file(checkpoint / CLOCK, json.dumps(asdict(clock)))
        remove_others(folder)
        if not control.should_training_stop:
            self.watch.start()


class Lines(TrainerCallback):
    """A line on the console for each entry of the log."""

    def __init__(self, recipe: TrainingRecipe, watch: Stopwatch) -> None:
        self.recipe, self.watch, self.console = recipe, watch, console()
        self.step, self.elapsed_s = 0, watch.elapsed_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here, less the first step, which the stopwatch leaves out."""
        self.step = state.global_step + 1

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print loss, rate and speed."""
        logs, step, elapsed_s, run = kwargs["logs"], state.global_step, self.watch.elapsed_s, self.recipe.run
        if "loss" not in logs or step <= self.step:
            return
        rate = (step - self.step) * tokens_per_step(self.recipe) / (elapsed_s - self.elapsed_s)
        steps = f"{step}/{run.max_steps}" if run.max_steps else f"{step}"
        minutes = f"{elapsed_s / 60:.2f}" + (f"/{run.max_minutes:g}" if run.max_minutes else "")
        self.console.print(
            f"step {steps}  {minutes} min  loss {logs['loss']:.4f}  last layer {logs['last_layer_loss']:.4f}  "
            f"lr {logs['learning_rate']:.2e}  {rate:,.0f} tokens/s"
        )
        self.step, self.elapsed_s = step, elapsed_s


# The stages


def train(
    recipe_path: str | Path,
    output: str | Path | None = None,
    resume: bool = False,
    stop_after_minutes: float | None = None,
    data: str | Path | None = None,
) -> TrainingResult:
    """Train as the recipe says and write the model to `output`.

    Args:
        recipe_path: the recipe, TOML.
        output: folder of the finished model; "runs/<name of the recipe>" if None. Checkpoints are in
            `output`/training, and the tokenized text is beside `output`, so that trainings share it.
        resume: continue from the latest checkpoint in `output`, if there is one.
        stop_after_minutes: write a checkpoint and stop this many minutes after the call; `resume` continues.
        data: the corpus folder, in place of the recipe's.

    Raises:
        RecipeError: the recipe, the data or the output folder cannot be used, or another training uses the folder.
    """
    stop_at = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
    recipe_path = Path(recipe_path)
    recipe = load_recipe(recipe_path)
    if data is not None:
        recipe = replace(recipe, data=replace(recipe.data, folder=Path(data)))
    output = Path(output or Path("runs") / recipe_path.stem)
    with _own_output(output), _own_kernels():
        return _train(recipe_path, recipe, output, resume, stop_at)


@contextmanager
def _own_output(output: Path) -> Iterator[None]:
    """Makes the output folder where it is not there, and keeps it for this training."""
    with ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output))
            tempfile.TemporaryFile(dir=output).close()  # else it is found when there is something to save
        except InUseError:
            fix = "wait for it, or choose another output folder"
            raise RecipeError(output, "another training is running in it", fix=fix) from None
        except OSError as error:
            fix = "choose another output folder"
            raise RecipeError(output, f"cannot be written ({reason(error)})", fix=fix) from None
        try:
            yield
        finally:
            with suppress(OSError):  # nothing came of it
                output.rmdir()


@contextmanager
def _saving(output: Path) -> Iterator[None]:
    """Whatever torch, safetensors and the system raise where they cannot write becomes one line.

    Raises:
        RecipeError: they cannot.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(output).free
        found = f"{free / 1e6:.1f} MB free on the disk" if free < 1e6 else f"cannot be written ({reason(error)})"
        fix = "make room; --resume continues from the last whole checkpoint, where there is one"
        raise RecipeError(output, found, fix=fix) from None


@contextmanager
def _continuing(checkpoint: str | None) -> Iterator[None]:
    """Whatever transformers raises where a checkpoint's files are those of another model becomes one line.

    Raises:
        RecipeError: they are.
    """
    try:
        yield
    except Exception as error:
        fix = "give the recipe that it was begun with, or choose another output folder"
        raise RecipeError(checkpoint, f"does not fit the recipe ({error})", fix=fix) from error


@contextmanager
def _own_kernels() -> Iterator[None]:
    """Has torch keep what it compiles, and runs, where nobody else can write, unless the user has said where.

    By itself it takes a folder of a known name among the system's temporary files, and sets the variable to it.
    """
    name, own = "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_")
    with ExitStack() as stack:
        if os.environ.get(name, own).startswith(own):
            folder = cache_folder("inductor") or stack.enter_context(scratch_folder("inductor"))
            os.environ[name] = str(folder)
        yield


def _train(
    recipe_path: Path, recipe: TrainingRecipe, output: Path, resume: bool, stop_at: float | None
) -> TrainingResult:
    folder = output / "training"
    checkpoint = latest_checkpoint(folder)
    if checkpoint and not resume:
        raise RecipeError(output, "holds an earlier training", fix="resume it, or choose another output folder")
    if not checkpoint and (output / "config.json").exists():
        raise RecipeError(output, "holds a finished model", fix="choose another output folder")
    checkpoint = checkpoint and sound_checkpoint(folder)
    remove_others(folder)
    tokenizer = load_tokenizer(recipe.checkpoint or recipe.data.folder / recipe.data.tokenizer)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    if checkpoint is None or not is_over(recipe, *read_clock(checkpoint)):
        with _saving(output):
            tokens = token_array(recipe.data.folder / recipe.data.train, recipe.data.files, tokenizer, output.parent)
        run_training(recipe, tokenizer, tokens, folder, checkpoint, stop_at)
        checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None  # a training ends with one
    step, elapsed_s = read_clock(checkpoint)
    result = TrainingResult(
        output,
        finished=is_over(recipe, step, elapsed_s),
        steps=step,
        tokens=step * tokens_per_step(recipe),
        minutes=elapsed_s / 60,
    )
    if result.finished:
        model = load_model(checkpoint)
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise RecipeError(recipe_path, "the weights are no longer finite", fix="lower optimizer.learning_rate")
        log = read_json(checkpoint / "trainer_state.json", RecipeError)["log_history"]
        summary = {"steps": step, "tokens": result.tokens, "minutes": result.minutes, "log": log}
        notes = {
            "recipe.toml": recipe_path.read_text(encoding="utf-8"),
            "training.json": json.dumps(summary, indent=1),
        }
        with _saving(output):
            write_model(model, tokenizer, getattr(torch, NUMBER_TYPES[recipe.run.output_dtype].torch), output, notes)
    return result


def run_training(
    recipe: TrainingRecipe,
    tokenizer: TextTokenizer,
    tokens: Array,
    folder: Path,
    checkpoint: Path | None,
    stop_at: float | None,
) -> None:
    """Train on `tokens` from the beginning or from a `checkpoint`; leave checkpoints in `folder`, one at the end.

    It ends early when time.monotonic() reaches `stop_at`.
    """
    set_seed(recipe.run.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where it is not bf16
    watch = Stopwatch(read_clock(checkpoint)[1] if checkpoint else 0.0)
    model = starting_model(recipe, tokenizer)
    check_tokens(tokens, model.config.vocab_size, recipe.data.folder, "give the model more rows, or leave it out")
    trainer = LayerSkipTrainer(
        recipe,
        model,
        tokens,
        tokenizer.eos_id,
        watch,
        args=training_arguments(recipe, folder),
        callbacks=[Limits(recipe, watch, stop_at), Lines(recipe, watch)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def starting_model(recipe: TrainingRecipe, tokenizer: TextTokenizer) -> CausalLM:
    """The model that the training begins with, in fp32: newly initialized, or the checkpoint to be continued.

    Raises:
        RecipeError: there is no checkpoint, or its architecture or size does not fit the recipe.
    """
    if recipe.model:
        config = LlamaConfig(
            **asdict(recipe.model),
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
        config._attn_implementation = "sdpa"
        _check_size(asdict(recipe.model) | {"vocab_size": tokenizer.vocab_size}, "model")
        return LlamaForCausalLM(config)
    assert recipe.checkpoint is not None  # the recipe has one of the two
    path = recipe.checkpoint / "config.json"
    config = read_json(path, RecipeError, fix="give the folder of a Llama-family model")
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        found = f"model_type {config.get('model_type')!r}" if isinstance(config, dict) else f"{path.name} is no table"
        raise RecipeError(recipe.checkpoint, found, wanted=" or ".join(MODEL_TYPES))
    _check_size(config, path)
    try:
        model = load_model(recipe.checkpoint)
    except Exception as error:  # transformers takes a config's word, and fails wherever that leads
        raise RecipeError(recipe.checkpoint, f"transformers cannot load it ({error})") from error
    longest = min(model.config.max_position_embeddings, getattr(model.config, "sliding_window", None) or _NO_LIMIT)
    if recipe.data.context > longest:
        raise RecipeError("data.context", f"found {recipe.data.context}", wanted=f"at most the model's {longest}")
    if recipe.layerskip:
        check_focus(recipe.layerskip, model.config.num_hidden_layers)
    return model


def _check_size(config: Mapping[str, Any], place: object) -> None:
    """Refuses a model whose matrices alone, in fp32, are more than the machine's memory, by the numbers of its config.

    Raises:
        RecipeError: it is too large.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    for name in names:  # transformers has large ones by default
        if type(config.get(name)) is not int or config[name] < 1:
            raise RecipeError(place, f"{name} is {config.get(name)!r:.60}", wanted="a whole number from 1")
    layers, hidden, ffn, vocab = (config[name] for name in names)
    wanted = 4 * (layers * hidden * (2 * hidden + 3 * ffn) + vocab * hidden)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > total or layers > MOST_LAYERS:
        found = f"a model of {layers} layers and {wanted / 1e9:.3g} GB"
        raise RecipeError(place, found, wanted=f"at most {MOST_LAYERS} layers and {total / 1e9:.0f} GB")


def training_arguments(recipe: TrainingRecipe, folder: Path) -> TrainingArguments:
    """The recipe in transformers' terms; checkpoints, autocast and the schedule are left to the trainer here."""
    run, optimizer = recipe.run, recipe.optimizer
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.max_steps or _NO_LIMIT,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.gradient_clip,
        optim="adamw_torch_fused",
        seed=run.seed,
        save_strategy="no",  # when, and how many are kept, is for `Limits`
        logging_steps=run.log_steps,
        logging_nan_inf_filter=False,  # it waits for the device at every step
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # or each batch waits for the last step
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # transformers would wrap the model in DataParallel
    return arguments


def write_model(
    model: CausalLM, tokenizer: TextTokenizer, dtype: torch.dtype, output: Path, notes: dict[str, str]
) -> None:
    """Write the model as a checkpoint of its own: one weights file, configuration, tokenizer, and `notes` (texts).

    config.json comes last, so a folder that has it is whole.
    """
    partial = output / "training" / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True  # the trainer switches it off
    model.to(dtype).save_pretrained(partial, max_shard_size="1000GB")
    for pattern in COMPANIONS:
        for path in tokenizer.folder.glob(pattern):
            shutil.copyfile(path, partial / path.name)
    for name, text in notes.items():
        (partial / name).write_text(text, encoding="utf-8")
    sync_tree(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        path.chmod(0o644)  # safetensors writes 0600
        path.replace(output / path.name)
    partial.rmdir()
    sync(output)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        with suppress(RecipeError):
            found.append((read_clock(checkpoint)[0], checkpoint))
    return [checkpoint for _, checkpoint in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(reversed(whole_checkpoints(folder)), None)


def sound_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint in `folder` whose files are as they were written; newer ones are removed.

    Raises:
        RecipeError: there is none.
    """
    spoiled: dict[Path, str] = {}
    for checkpoint in reversed(whole_checkpoints(folder)):
        wanted = _read_clock(checkpoint).files
        changed = [name for name in wanted if wanted[name] != _hash(checkpoint / name)]
        if not changed:
            for one, name in spoiled.items():
                console(stderr=True).print(
                    shown(f"{one / name}: not what was written; going back to {checkpoint.name}")
                )
                remove_checkpoint(one)
            return checkpoint
        spoiled[checkpoint] = changed[0]
    checkpoint, name = next(iter(spoiled.items()))
    raise RecipeError(checkpoint / name, "is not what was written", fix=f"remove {folder} to begin anew")


def _hash(path: Path) -> str | None:
    """The hash of a checkpoint's file; None if it cannot be read."""
    try:
        with open_plain(path) as file:
            return sha256_of(file)
    except (OSError, ValueError):
        return None


def remove_others(folder: Path) -> None:
    """Remove checkpoints that are not complete, which a kill left, and those before the last ones."""
    kept = whole_checkpoints(folder)[-KEPT_CHECKPOINTS:]
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint not in kept:
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, which a kill on the way leaves as an incomplete one."""
    (checkpoint / CLOCK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def read_clock(checkpoint: Path) -> tuple[int, float]:
    """Steps and seconds of training up to this checkpoint.

    Raises:
        RecipeError: it has no clock, or a damaged one, so it is not complete.
    """
    clock = _read_clock(checkpoint)
    return clock.step, clock.elapsed_s


def _read_clock(checkpoint: Path) -> _Clock:
    path = checkpoint / CLOCK
    return structure(_Clock, read_json(path, RecipeError), path, RecipeError)


def is_over(recipe: TrainingRecipe, step: int, elapsed_s: float) -> bool:
    """Whether the recipe's training ends here."""
    run = recipe.run
    return step >= (run.max_steps or _NO_LIMIT) or (run.max_minutes is not None and elapsed_s >= 60 * run.max_minutes)


def tokens_per_step(recipe: TrainingRecipe) -> int:
    """Tokens in an optimizer step."""
    return recipe.run.batch_size * recipe.run.gradient_accumulation * recipe.data.context
