import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from tests.recipes.conftest import RECIPE, write_corpus

from edgeskip.recipes.train import evaluation
from edgeskip.recipes.train.early_exit import load_model
from edgeskip.recipes.train.evaluation import EvaluationSettings, distinct_4grams, evaluate_exits
from edgeskip.recipes.train.schema import load_recipe
from edgeskip.recipes.train.tokens import TextTokenizer, load_tokenizer, token_array
from edgeskip.recipes.train.training import starting_model, write_model
from edgeskip.runtime.errors import RecipeError

SETTINGS = EvaluationSettings(context=16, num_prompts=4, prompt_length=8, continuation_length=12, batch_size=3)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, TextTokenizer]:
    """A checkpoint with random weights, in a folder beside its corpus."""
    write_corpus(tmp_path / "corpus")
    (tmp_path / "x.toml").write_text(RECIPE)
    tokenizer = load_tokenizer(tmp_path / "corpus/tokenizer")
    torch.manual_seed(0)
    model = starting_model(load_recipe(tmp_path / "x.toml"), tokenizer)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    (tmp_path / "model").mkdir()
    write_model(model, tokenizer, torch.float32, tmp_path / "model", {})
    return tmp_path, tokenizer


def test_every_exit_equals_transformers_with_that_many_layers(made: tuple[Path, TextTokenizer]) -> None:
    folder, tokenizer = made
    tokens = token_array(folder / "corpus/heldout", "**/*", tokenizer, folder)
    result = evaluate_exits(load_model(folder / "model"), tokens, tokenizer, SETTINGS)
    assert [row.exit_layer for row in result.exits] == [1, 2, 3, 4]

    count = len(tokens) // 17
    ids = torch.from_numpy(tokens[: count * 17].astype(np.int64)).view(count, 17)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.bos_id, -100)
    counted = labels != -100
    assert result.num_tokens == int(counted.sum())
    whole = load_model(folder / "model")
    with torch.no_grad():
        last = whole(ids[:, :-1]).logits.argmax(-1)
        for row in result.exits:
            early = load_model(folder / "model")
            del early.model.layers[row.exit_layer :]
            early.config.num_hidden_layers = row.exit_layer
            logits = early(ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            top = logits.argmax(-1)
            assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
            assert row.accuracy == pytest.approx((top == labels)[counted].float().mean().item())
            assert row.agreement == pytest.approx((top == last)[counted].float().mean().item())
    assert result.exits[-1].agreement == 1
    assert result.exits[0].agreement < 1

    # Greedy continuations, by generate with nothing of ours
    starts = [0, *(np.flatnonzero(tokens == tokenizer.eos_id)[:-1] + 1)][:4]
    matched = total = 0
    early = load_model(folder / "model")
    del early.model.layers[1:]
    early.config.num_hidden_layers = 1
    for start in starts:
        prompt = torch.from_numpy(tokens[start : start + 8].astype(np.int64))[None]
        text = whole.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=1)
        with torch.no_grad():
            matched += int((early(text[:, :-1]).logits.argmax(-1)[:, 7:] == text[:, 8:]).sum())
        total += text.shape[1] - 8
    assert result.num_continued_tokens == total
    assert result.exits[0].greedy_match == pytest.approx(matched / total)
    assert result.exits[-1].greedy_match == 1


def test_text_after_the_end_does_not_count(made: tuple[Path, TextTokenizer]) -> None:
    folder, _ = made
    model = load_model(folder / "model")
    prompts = torch.randint(2, 258, (4, 8))
    whole = model.generate(prompts, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=1)[:, 8:]
    end = int(whole[0, 5])  # let this token be the end of text
    texts = evaluation.greedy_continuations(model, prompts, end, SETTINGS)[:, 8:]
    for text, row in zip(texts.tolist(), whole.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else 12
        assert text == row[:length] + [-100] * (12 - length)


def test_distinct_4grams() -> None:
    assert distinct_4grams([[1, 2, 3, 4, 5, 6]]) == 1
    assert distinct_4grams([[7] * 13]) == pytest.approx(0.1)
    assert distinct_4grams([[1, 2, 3, 4, 5], [7] * 5 + [-100] * 8]) == pytest.approx(0.75)


def test_command_line(made: tuple[Path, TextTokenizer]) -> None:
    folder, _ = made
    (folder / "corpus/heldout/long.py").write_text("value = 1\n" * 40)
    arguments = ["model", "corpus/heldout", "--context", "16", "--prompts", "2", "--output", "result.json"]
    paths = [str(folder / a) if "/" in a or a in ("model", "result.json") else a for a in arguments]
    output = CliRunner().invoke(evaluation.main, paths, catch_exceptions=False).output.splitlines()
    assert output[0] == "| exit layer | perplexity | accuracy | agreement | greedy match |"
    result = json.loads((folder / "result.json").read_text())
    assert output[2].startswith(f"| 1 | {result['exits'][0]['perplexity']:.2f} |")
    assert len(result["exits"]) == 4


def test_too_little_text_is_named(made: tuple[Path, TextTokenizer]) -> None:
    folder, tokenizer = made
    model = load_model(folder / "model")
    with pytest.raises(RecipeError, match="heldout: 10 tokens of text; wanted at least 17"):
        evaluate_exits(model, np.zeros(10, np.uint16), tokenizer, SETTINGS)
    with pytest.raises(RecipeError, match="heldout: no file is long enough for a prompt; wanted more than 20 tokens"):
        evaluate_exits(model, np.tile(np.array([0, 5, 1], np.uint16), 10), tokenizer, SETTINGS)
