"""A tiny corpus and recipe for the tests of training and evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.conftest import make_tokenizer

from edgeskip.recipes.train.tokens import TextTokenizer, load_tokenizer

RECIPE = """
[data]
folder = "corpus"
context = 16
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
max_position_embeddings = 64
[layerskip]
p_max = 0.1
rotation = 2
[optimizer]
learning_rate = 1e-2
[run]
batch_size = 4
max_steps = 6
log_steps = 2
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model gains nothing from a second thread, and loses much where another process holds the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokenizer(folder: Path) -> TextTokenizer:
    """The tests' tokenizer, bytes as tokens, in a folder of its own."""
    folder.mkdir(parents=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(folder)


def write_corpus(folder: Path) -> Path:
    """A corpus of 24 + 6 little files, with tokenizer."""
    for split, numbers in (("train", range(24)), ("heldout", range(24, 30))):
        for number in numbers:
            path = folder / split / f"package{number % 3}" / f"module{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"def function{number}(value):\n    return value + {number}\n" * 2)
    write_tokenizer(folder / "tokenizer")
    return folder
