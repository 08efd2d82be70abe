import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.conftest import make_model
from tests.recipes.conftest import RECIPE, write_corpus
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from edgeskip.recipes.train import training
from edgeskip.recipes.train.early_exit import exit_hidden_states, exit_logits, kept_samples, load_model
from edgeskip.recipes.train.schema import DataRecipe, LayerSkipRecipe, OptimizerRecipe, TrainingRecipe, load_recipe
from edgeskip.recipes.train.tokens import load_tokenizer, token_array
from edgeskip.recipes.train.training import LayerSkipTrainer, Stopwatch, Windows, rate_factor, train, training_arguments
from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.files import locked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def write_recipe(folder: Path, *changes: tuple[str, str], name: str = "x") -> Path:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def make_trainer(folder: Path, recipe: TrainingRecipe, **changes: Any) -> LayerSkipTrainer:
    tokenizer = load_tokenizer(recipe.data.folder / "tokenizer")
    torch.manual_seed(0)
    model = training.starting_model(recipe, tokenizer)
    for parameter in model.parameters():  # so that the layers make a difference
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = token_array(recipe.data.folder / "train", "**/*.py", tokenizer, folder)
    arguments = training_arguments(recipe, folder / "out")
    return LayerSkipTrainer(recipe, model, tokens, tokenizer.eos_id, Stopwatch(), args=arguments)


# The loss


@pytest.mark.parametrize("focus_target", ["labels", "last-layer"])
@pytest.mark.parametrize("step", [0, 1])
def test_loss_equals_one_made_by_hand_of_transformers_hidden_states(folder: Path, step: int, focus_target: Any) -> None:
    layerskip = LayerSkipRecipe(p_max=0, e_scale=0.5, rotation=2, focus={2: 0.25}, focus_target=focus_target)
    trainer = make_trainer(folder, replace(load_recipe(write_recipe(folder)), layerskip=layerskip))
    trainer.state.global_step = step
    starts = torch.tensor([0, 7, 30])
    loss = trainer.compute_loss(trainer.model, {"starts": starts})

    tokens = token_array(folder / "corpus/train", "**/*.py", load_tokenizer(folder / "corpus/tokenizer"), folder)
    ids = torch.from_numpy(np.stack([tokens[s : s + 17] for s in starts]).astype(np.int64))
    model = trainer.model.eval()
    output = model(ids[:, :-1], output_hidden_states=True)
    logits = [model.lm_head(model.model.norm(state)) for state in output.hidden_states[1:-1]] + [output.logits]
    text = [F.cross_entropy(layer.flatten(0, 1), ids[:, 1:].flatten()) for layer in logits]
    # e = (0, 0.5, 1.5, 3 + 0.5 * 3); step 0 has layers 0, 2 and 3, step 1 has 1 and 3
    by_paper = (1.5 * text[2] + 4.5 * text[3]) / 6 if step == 0 else (0.5 * text[1] + 4.5 * text[3]) / 5
    if focus_target == "labels":
        focused = text[1]
    else:
        focused = -(logits[3].softmax(-1) * logits[1].log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx((0.75 * by_paper + 0.25 * focused).item(), rel=1e-5)


def test_distilling_does_not_move_the_last_layer(folder: Path) -> None:
    layerskip = LayerSkipRecipe(p_max=0, focus={2: 0.25}, focus_target="last-layer")
    trainer = make_trainer(folder, replace(load_recipe(write_recipe(folder)), layerskip=layerskip))
    states = exit_hidden_states(trainer.model, torch.arange(12).view(2, 6))
    shared = (trainer.model.model.norm, trainer.model.lm_head)
    trainer.distillation_loss(states[1], states[-1].detach(), *shared).backward()
    layers = trainer.model.model.layers
    moved = [layer.mlp.up_proj.weight.grad is not None for layer in layers]
    assert moved == [True, True, False, False]


# Layer dropout


def test_a_dropped_layer_is_skipped_by_that_sample_alone(folder: Path) -> None:
    model = make_trainer(folder, load_recipe(write_recipe(folder))).model.eval()
    ids = torch.randint(0, 258, (2, 8))
    whole = exit_hidden_states(model, ids)
    kept = torch.ones(4, 2, dtype=torch.bool)
    kept[1, 0] = False
    states = exit_hidden_states(model, ids, kept)
    torch.testing.assert_close(states[1][0], whole[0][0], rtol=0, atol=0)
    torch.testing.assert_close(states[1][1], whole[1][1])
    assert (states[3][0] - whole[3][0]).abs().max() > 1e-3
    # The rest of the model runs on: the same as a model without that layer
    del model.model.layers[1]
    torch.testing.assert_close(states[3][0], exit_hidden_states(model, ids[:1])[2][0])


def test_samples_are_dropped_as_often_as_said() -> None:
    torch.manual_seed(0)
    dropout = torch.tensor([0.0, 0.1, 0.5, 1.0])
    kept = kept_samples(dropout, 20_000)
    assert kept.dtype == torch.bool
    torch.testing.assert_close(1 - kept.float().mean(1), dropout, atol=0.015, rtol=0)
    assert kept[0].all()
    assert not kept[3].any()
    both = (~kept[1] & ~kept[2]).float().mean()
    assert both == pytest.approx(0.05, abs=0.01)  # independent


def test_dropout_only_while_training_and_ramping_from_scratch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def remember(dropout: torch.Tensor, batch: int) -> torch.Tensor:
        seen.append(dropout.tolist())
        return kept_samples(dropout, batch)

    monkeypatch.setattr(training, "kept_samples", remember)
    trainer = make_trainer(folder, load_recipe(write_recipe(folder, ("max_steps = 6", "max_steps = 5"))))
    ids = torch.zeros(1, 4, dtype=torch.long)
    trainer.layerskip_loss(trainer.model.eval(), ids, ids)
    assert not seen
    for step in (0, 2, 4):
        trainer.state.global_step = step
        trainer.layerskip_loss(trainer.model.train(), ids, ids)
    depth = [2 ** (layer / 3) - 1 for layer in range(4)]
    assert seen[0] == [0, 0, 0, 0]
    assert seen[1] == pytest.approx([0.1 * (2**0.5 - 1) * d for d in depth])
    assert seen[2] == pytest.approx([0.1 * d for d in depth])


# Data


def test_windows_cover_the_text_and_begin_at_files_as_often_as_said() -> None:
    starts = np.array([0, 50, 333, 700, 990])
    tokens = np.zeros(1000, np.uint16)
    data = DataRecipe(Path(), context=10, file_start_share=0.0)
    windows = Windows(tokens, starts, data, seed=1, length=10**12)
    assert len(windows) == 10**12
    epochs = [[windows[epoch * windows.per_epoch + i] for i in range(windows.per_epoch)] for epoch in range(4)]
    for places in epochs:
        assert min(places) >= 0 and max(places) <= 1000 - 11  # noqa: PT018
        covered = {place + i for place in places for i in range(10)}
        assert len(covered) >= 980
    assert len({tuple(places) for places in epochs}) == 4
    assert len({tuple(sorted(places)) for places in epochs}) > 1  # another offset, not only another order
    again = Windows(tokens, starts, data, seed=1, length=10**12)
    assert [again[windows.per_epoch + i] for i in range(windows.per_epoch)] == epochs[1]

    always = Windows(tokens, starts, replace(data, file_start_share=1.0), seed=1, length=1000)
    counts = np.unique([always[i] for i in range(400)], return_counts=True)
    assert counts[0].tolist() == [0, 50, 333, 700]  # the last file is shorter than a window
    assert counts[1].tolist() == [100] * 4
    half = Windows(tokens, starts, replace(data, file_start_share=0.5), seed=1, length=10_000)
    at_file = np.mean([half[i] in (0, 50, 333, 700) for i in range(5_000)])
    assert at_file == pytest.approx(0.5, abs=0.05)


def test_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.context: 10 tokens of text; wanted at least 17"):
        Windows(np.zeros(10, np.uint16), np.array([0]), DataRecipe(Path(), context=16), seed=0, length=1)


def test_large_vocabularies_survive_the_way_to_the_device() -> None:
    for dtype, mask in ((np.uint16, 0xFFFF), (np.uint32, -1)):
        tokens = np.array([0, 1, 32767, 32768, 65535], dtype)
        assert (training.device_tokens(tokens, torch.device("cpu")).long() & mask).tolist() == tokens.tolist()


# Schedules


def test_learning_rate() -> None:
    cosine = OptimizerRecipe(learning_rate=1, warmup=0.2, final_rate=0.1)
    assert [rate_factor(cosine, t) for t in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    stable = OptimizerRecipe(learning_rate=1, schedule="warmup-stable-decay", warmup=0.1, decay=0.5, final_rate=0.2)
    assert [rate_factor(stable, t) for t in (0.05, 0.1, 0.5, 0.75, 1)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])


# Whole trainings


def test_loss_falls_and_the_folder_is_a_checkpoint(folder: Path) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 60\noutput_dtype = 'bf16'"))
    result = train(recipe, folder / "out")
    assert result.finished
    assert (result.steps, result.tokens) == (60, 60 * 4 * 16)
    log = json.loads((folder / "out/training.json").read_text())["log"]
    losses = [entry["last_layer_loss"] for entry in log if "loss" in entry]
    assert losses[0] > 5  # ln 258 = 5.55
    assert losses[-1] < 0.5 * losses[0]

    weights = load_file(folder / "out/model.safetensors")
    assert "lm_head.weight" not in weights  # tied: stored once
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    trained = load_model(folder / "out/training/checkpoint-60")
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (1, 1)
    assert loaded.config.use_cache
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=0)
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "recipe.toml", "generation_config.json"}
    assert (folder / "out/recipe.toml").read_text() == recipe.read_text()


def test_a_resumed_training_ends_where_an_unbroken_one_does(folder: Path) -> None:
    recipe = write_recipe(
        folder, ("p_max = 0.1", "p_max = 0.5"), ("max_steps = 6", "max_steps = 6\ngradient_accumulation = 2")
    )
    train(recipe, folder / "whole")
    first = train(recipe, folder / "parts", stop_after_minutes=0)
    assert (first.finished, first.steps) == (False, 1)
    assert not (folder / "parts/config.json").exists()
    with pytest.raises(RecipeError, match="parts: holds an earlier training; resume it"):
        train(recipe, folder / "parts")
    assert train(recipe, folder / "parts", resume=True).finished
    whole, parts = (load_file(folder / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)
    # Nothing is left to do, and the model is written again
    (folder / "parts/config.json").unlink()
    assert train(recipe, folder / "parts", resume=True).steps == 6
    assert (folder / "parts/config.json").exists()


def test_checkpoints_are_written_and_only_the_last_two_kept(folder: Path) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 6\ncheckpoint_steps = 2"))
    train(recipe, folder / "out")
    assert {path.name for path in (folder / "out/training").iterdir()} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("clock", [None, "", "{}", '{"step": 6}', '{"step": 6, "elapsed_s": NaN}', "[" * 10**5, "\xff"])
def test_a_checkpoint_that_was_cut_off_stands_in_nobodys_way(folder: Path, clock: str | None) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 6\ncheckpoint_steps = 2"))
    for step in (4, 6):
        (folder / f"out/training/checkpoint-{step}").mkdir(parents=True)
    (folder / "out/training/checkpoint-4/clock.json").write_text('{"step": 4, "elapsed_s": 1.5}')
    if clock is not None:
        (folder / "out/training/checkpoint-6/clock.json").write_text(clock, encoding="latin-1")
    assert training.latest_checkpoint(folder / "out/training") == folder / "out/training/checkpoint-4"
    assert training.read_clock(folder / "out/training/checkpoint-4") == (4, 1.5)
    with pytest.raises(RecipeError, match="out: holds an earlier training; resume it"):
        train(recipe, folder / "out")


def test_what_a_kill_left_of_checkpoints_goes_even_where_the_training_is_over(folder: Path) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 6\ncheckpoint_steps = 2"))
    train(recipe, folder / "out")
    (folder / "out/config.json").unlink()
    (folder / "out/training/checkpoint-5").mkdir()
    shutil.copytree(folder / "out/training/checkpoint-4", folder / "out/training/checkpoint-2")
    (folder / "out/training/checkpoint-2/clock.json").write_text('{"step": 2, "elapsed_s": 1}')
    assert train(recipe, folder / "out", resume=True).finished
    assert {path.name for path in (folder / "out/training").iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_a_damaged_clock_ends_no_resume_and_nothing_is_left_of_it(folder: Path) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 6\ncheckpoint_steps = 2"))
    train(recipe, folder / "out", stop_after_minutes=0)
    (folder / "out/training/checkpoint-9").mkdir()
    (folder / "out/training/checkpoint-9/clock.json").touch()
    assert train(recipe, folder / "out", resume=True).steps == 6
    assert {path.name for path in (folder / "out/training").iterdir()} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_spoiled_checkpoint_is_passed_over_and_the_training_ends_the_same(
    name: str, how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers begins with a new optimizer, without a word, where a checkpoint has lost its own."""
    recipe = write_recipe(folder, ("max_steps = 6", "max_steps = 6\ncheckpoint_steps = 2"))
    train(recipe, folder / "out")
    wanted = (folder / "out/model.safetensors").read_bytes()
    for path in (folder / "out").iterdir():
        if path.is_file():
            path.unlink()  # as if it had ended before it was done
    path = folder / "out/training/checkpoint-6" / name
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(data[:-1] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    capsys.readouterr()
    assert train(recipe, folder / "out", resume=True).steps == 6
    assert capsys.readouterr().err == f"{path}: not what was written; going back to checkpoint-4\n"
    assert (folder / "out/model.safetensors").read_bytes() == wanted


def test_a_training_of_spoiled_checkpoints_alone_does_not_go_on(folder: Path) -> None:
    recipe = write_recipe(folder)
    train(recipe, folder / "out", stop_after_minutes=0)
    path = folder / "out/training/checkpoint-1/optimizer.pt"
    path.write_bytes(b"")
    message = f"{path}: is not what was written; remove {path.parents[1]} to begin anew"
    with pytest.raises(RecipeError, match=re.escape(message)):
        train(recipe, folder / "out", resume=True)
    assert path.exists()


@pytest.mark.parametrize(
    "changes", [("hidden_size = 32", "hidden_size = 64"), ("num_hidden_layers = 4", "num_hidden_layers = 6")]
)
def test_a_checkpoint_of_another_model_is_not_continued(changes: tuple[str, str], folder: Path) -> None:
    train(write_recipe(folder), folder / "out", stop_after_minutes=0)
    with pytest.raises(RecipeError, match=r"checkpoint-1: does not fit the recipe .*; give the recipe that") as caught:
        train(write_recipe(folder, changes), folder / "out", resume=True)
    assert "\n" not in str(caught.value)


def test_the_second_training_of_a_folder_is_told(folder: Path) -> None:
    recipe = write_recipe(folder)
    (folder / "out").mkdir()
    message = "out: another training is running in it; wait for it"
    with locked(folder / "out"), pytest.raises(RecipeError, match=message):
        train(recipe, folder / "out")


def test_a_training_that_cannot_begin_leaves_no_folder(folder: Path) -> None:
    recipe = write_recipe(folder, ('folder = "corpus"', 'folder = "nowhere"'))
    with pytest.raises(RecipeError):
        train(recipe, folder / "out")
    assert not (folder / "out").exists()
    (folder / "file").touch()
    with pytest.raises(RecipeError, match="out: cannot be written"):
        train(write_recipe(folder), folder / "file" / "out")


@pytest.mark.parametrize("given", [None, "{tmp}/torchinductor_somebody", "theirs"])
def test_compiled_kernels_are_kept_in_the_users_cache(
    given: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where there is none, in a folder that nobody knows; never in torch's own, which anybody could have made."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    seen: list[Path] = []
    monkeypatch.setattr(training, "_train", lambda *_: seen.append(Path(os.environ[name])))
    (folder / "file").touch()
    for cache in ("cache", "file/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / cache))
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given.format(tmp=tempfile.gettempdir()))
        train(write_recipe(folder), folder / "out")
    if given == "theirs":
        assert seen == [Path("theirs")] * 2
        return
    kept, scratch = seen
    assert kept == folder / "cache/edgeskip/inductor"
    assert re.fullmatch(r"\.inductor\.[0-9a-f]{8}\.edgeskip", scratch.name)
    assert not scratch.exists()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock for training on which every step takes 0.1 s."""
    clock = SimpleNamespace(now=0.0)
    compute_loss = LayerSkipTrainer.compute_loss

    def step(*args: Any, **kwargs: Any) -> Any:
        clock.now += 0.1
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(LayerSkipTrainer, "compute_loss", step)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_time_is_kept_across_resumes(folder: Path, clock: SimpleNamespace) -> None:
    recipe = write_recipe(folder, ("max_steps = 6", "max_minutes = 0.02"))
    first = train(recipe, folder / "out", stop_after_minutes=0.0075)
    assert (first.finished, first.steps) == (False, 5)
    assert first.minutes * 60 == pytest.approx(0.4)  # the first step of each call compiles and does not count
    result = train(recipe, folder / "out", resume=True)
    assert (result.finished, result.steps) == (True, 14)
    assert result.minutes * 60 == pytest.approx(1.2)
    log = [e for e in json.loads((folder / "out/training.json").read_text())["log"] if "loss" in e]
    assert [entry["minutes"] * 60 for entry in log] == pytest.approx([0.1, 0.3, 0.4, 0.4, 0.6, 0.8, 1.0, 1.2])

    def rate(elapsed_s: float) -> float:
        return rate_factor(OptimizerRecipe(learning_rate=1), elapsed_s / 1.2) * 1e-2

    for entry in log:  # what the step was made with, or the next will be, as transformers' release has it
        seconds = entry["minutes"] * 60
        assert pytest.approx(entry["learning_rate"]) in (rate(seconds - 0.1), rate(seconds))
    assert log[-1]["learning_rate"] < log[3]["learning_rate"] / 2


def test_continuing_a_folder(folder: Path) -> None:
    train(write_recipe(folder, ("max_steps = 6", "max_steps = 60")), folder / "base")
    model = RECIPE[RECIPE.index("[model]") : RECIPE.index("[layerskip]")]
    recipe = write_recipe(
        folder,
        (model, ""),
        ("\n[data]", '\ncheckpoint = "base"\n[data]'),
        ("rotation = 2", 'curriculum = "gradual"'),
        ("learning_rate = 1e-2", "learning_rate = 1e-4"),
    )
    assert train(recipe, folder / "more").finished

    def first_loss(name: str, at: int) -> float:
        return float(json.loads((folder / name / "training.json").read_text())["log"][at]["last_layer_loss"])

    assert first_loss("more", 0) < first_loss("base", 0) / 2
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "more"))
    assert before.keys() == after.keys()
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-2
    assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("variant", ["llama-mha", "llama-llama3-rope", "mistral", "qwen2", "qwen3"])
def test_every_family_runs_as_in_transformers(variant: str) -> None:
    model = make_model(variant)
    ids = torch.randint(0, 300, (2, 24))
    with torch.no_grad():
        states = exit_hidden_states(model, ids)
        torch.testing.assert_close(exit_logits(states[-1], model.model.norm, model.lm_head), model(ids).logits)


def test_a_text_with_tokens_that_the_model_has_no_row_for_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(folder)
    model = training.starting_model(load_recipe(path), load_tokenizer(folder / "corpus/tokenizer"))
    model.resize_token_embeddings(70, mean_resizing=False)
    monkeypatch.setattr(training, "starting_model", lambda *_: model)
    with pytest.raises(RecipeError, match=r"corpus: token id \d+ is outside the vocabulary of 70; give the model more"):
        train(path, folder / "out")


def test_a_finished_model_is_not_overwritten(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/config.json").write_text("{}")
    with pytest.raises(RecipeError, match="out: holds a finished model; choose another output folder"):
        train(write_recipe(folder), folder / "out", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"base: model_type 'mamba'; wanted llama or mistral or qwen2 or qwen3"),
        ({"hidden_size": None}, r"config\.json: hidden_size is None; wanted a whole number from 1"),
        ({"num_hidden_layers": 5}, r"base: transformers cannot load it \(it lacks model\.layers\.4\.\S+ and 8 more\)"),
        ({"max_position_embeddings": 8}, r"data\.context: found 16; wanted at most the model's 8"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    recipe = load_recipe(write_recipe(folder))
    tokenizer = load_tokenizer(folder / "corpus/tokenizer")
    base = training.starting_model(recipe, tokenizer)
    base.save_pretrained(folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | change))
    with pytest.raises(RecipeError, match=message):
        training.starting_model(replace(recipe, model=None, checkpoint=folder / "base"), tokenizer)


def test_damaged_checkpoints_are_refused(folder: Path) -> None:
    recipe = load_recipe(write_recipe(folder))
    tokenizer = load_tokenizer(folder / "corpus/tokenizer")
    training.starting_model(recipe, tokenizer).save_pretrained(folder / "base")
    continued = replace(recipe, model=None, checkpoint=folder / "base")
    weights = folder / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RecipeError, match=r"base: .*(?i:header)"):
        training.starting_model(continued, tokenizer)
    weights.unlink()
    with pytest.raises(RecipeError, match=r"base: .*model\.safetensors"):
        training.starting_model(continued, tokenizer)
    with pytest.raises(RecipeError, match=r"corpus/config\.json: no such file; give the folder of a Llama"):
        training.starting_model(replace(continued, checkpoint=folder / "corpus"), tokenizer)


def test_a_loss_that_is_no_number_ends_the_training(folder: Path) -> None:
    recipe = write_recipe(folder, ("learning_rate = 1e-2", "learning_rate = 1e30"))
    with pytest.raises(RecipeError, match=r"optimizer\.learning_rate: the loss has become nan; lower the rate"):
        train(recipe, folder / "out")


# Dynamo looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_once_for_all_layers_and_exits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=counter))
    torch._dynamo.reset()
    recipe = write_recipe(
        folder,
        ("rotation = 2", 'rotation = 3\nfocus = { 2 = 0.2 }\nfocus_target = "last-layer"'),
        ("max_steps = 6", 'max_steps = 6\ncompile = true\nprecision = "bf16"'),
    )
    train(recipe, folder / "out")
    assert counter.frame_count == 3  # the layer, the loss with the text, the loss with the last layer
    assert exit_logits(torch.zeros(1, 1, 2), torch.nn.Identity(), torch.nn.Identity()).dtype == torch.float32
