import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.recipes.conftest import write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edgeskip.recipes.train import tokens as tokens_module
from edgeskip.recipes.train.tokens import check_tokens, file_starts, load_tokenizer, token_array, write_tokens
from edgeskip.runtime.errors import RecipeError


def test_files_are_packed_between_bos_and_eos(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    texts = ["def f(): pass\n", "größer = 1\n", ""]
    for number, text in enumerate(texts):
        (tmp_path / "text" / str(number)).mkdir(parents=True)
        (tmp_path / "text" / str(number) / "a.py").write_text(text, encoding="utf-8")
    (tmp_path / "text" / "notes.md").write_text("not this one")
    tokens = token_array(tmp_path / "text", "**/*.py", tokenizer, tmp_path)
    assert tokens.dtype == np.uint16
    starts = file_starts(tokens, tokenizer.eos_id)
    files = np.split(tokens, starts[1:])
    assert {(file[0], file[-1]) for file in files} == {(tokenizer.bos_id, tokenizer.eos_id)}
    assert sorted(tokenizer.tokenizer.decode(file[1:-1].tolist()) for file in files) == sorted(texts)


def test_a_long_text_is_encoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding takes 300 times the memory of the text."""
    monkeypatch.setattr(tokens_module, "_PART", 8)
    monkeypatch.setattr(tokens_module, "_BATCH", 20)
    tokenizer, encoded = write_tokenizer(tmp_path / "tokenizer"), []

    class Watched:
        get_vocab = tokenizer.tokenizer.get_vocab

        def encode_batch_fast(self, texts: list[str], **settings: Any) -> Any:
            encoded.append([len(text) for text in texts])
            return tokenizer.tokenizer.encode_batch_fast(texts, **settings)

    texts = ["größer\r\nals\r" * 9, "", "x" * 100, "12345678", "é" * 9 + "\n"]
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text.encode())
    paths = [tmp_path / str(number) for number in range(len(texts))]
    write_tokens(paths, replace(tokenizer, tokenizer=Watched()), tmp_path / "out.npy")  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(len(texts))
    wanted = [[*tokenizer.tokenizer.encode(texts[i]).ids, 1] for i in order]
    assert np.load(tmp_path / "out.npy").tolist() == [token for ids in wanted for token in ids]
    assert max(size for sizes in encoded for size in sizes) <= 2 * 8
    assert max(map(sum, encoded)) < 20 + 2 * 8


def test_tokenizing_is_done_once_and_again_where_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    text = tmp_path / "text" / "a.txt"
    text.parent.mkdir()
    text.write_text("one")
    written: list[Path] = []
    monkeypatch.setattr(
        tokens_module,
        "write_tokens",
        lambda paths, tokenizer, output: (written.append(output), write_tokens(paths, tokenizer, output)),
    )
    first = token_array(text.parent, "*", tokenizer, tmp_path)
    assert np.array_equal(first, token_array(text.parent, "*", tokenizer, tmp_path))
    assert len(written) == 1
    text.write_text("two")
    os.utime(text, ns=(1, 1))
    assert not np.array_equal(first, token_array(text.parent, "*", tokenizer, tmp_path))
    assert len(set(written)) == 2


def test_an_array_in_place_of_the_folder(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    np.save(tmp_path / "train.npy", np.array([0, 5, 6, 1], np.uint16))
    assert token_array(tmp_path / "train", "*", tokenizer, tmp_path).tolist() == [0, 5, 6, 1]
    np.save(tmp_path / "train.npy", np.array([0, 5000, 6, 1], np.uint16))
    with pytest.raises(RecipeError, match=r"train\.npy: token id 5000 is outside the vocabulary of 258"):
        token_array(tmp_path / "train", "*", tokenizer, tmp_path)
    np.save(tmp_path / "train.npy", np.zeros((2, 2)))
    with pytest.raises(RecipeError, match=r"train\.npy: an array float64\[2, 2\]; wanted token ids"):
        token_array(tmp_path / "train", "*", tokenizer, tmp_path)


def test_tokens_that_a_model_has_no_row_for(tmp_path: Path) -> None:
    """Each file ends with EOS, so its id is among them; a token that only the tokenizer has does no harm."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 258
    check_tokens(np.array([0, 5, 1]), 6, tmp_path, "")
    with pytest.raises(RecipeError, match="token id 5 is outside the vocabulary of 5; do this"):
        check_tokens(np.array([0, 5, 1]), 5, tmp_path, "do this")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r": no tokenizer\.json; save it again"):
        load_tokenizer(tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(RecipeError, match=r"train: no files '\*\.py' here; wanted a folder of text, or train\.npy"):
        token_array(tmp_path / "train", "*.py", tokenizer, tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(RecipeError, match=r"tokenizer: neither eos_token in tokenizer_config\.json nor eos_token_id"):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("names", "numbers", "eos_id"),
    [
        ({"eos_token": "</s>"}, {"eos_token_id": 7}, 1),
        ({"eos_token": {"content": "</s>", "__type": "AddedToken"}}, None, 1),
        ({"eos_token": None}, {"eos_token_id": 7}, 7),
        (None, {"eos_token_id": 7}, 7),
        (None, {"eos_token_id": [9, 7]}, 9),
        (None, {"eos_token_id": 258}, None),
        (None, {"eos_token_id": []}, None),
        (None, {"eos_token_id": True}, None),
        ({"eos_token": "</s>"}, None, 1),
        (None, None, None),
    ],
)
def test_eos_is_named_by_the_tokenizer_or_numbered_by_the_config(
    names: Any, numbers: Any, eos_id: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    for name, table in (("tokenizer_config.json", names), ("config.json", numbers)):
        (folder / name).unlink(missing_ok=True)
        if table is not None:
            (folder / name).write_text(json.dumps(table))
    if eos_id is None:
        with pytest.raises(RecipeError, match="in the vocabulary; add one"):
            load_tokenizer(folder)
    else:
        assert load_tokenizer(folder).eos_id == eos_id


def test_the_tokenizer_is_the_one_that_transformers_loads_and_text_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(3)
    stored.enable_padding(length=9)
    stored.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|user|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"<|user|>one\r\ntwo")
    tokens = token_array(tmp_path / "text", "*", load_tokenizer(folder), tmp_path)
    judge = AutoTokenizer.from_pretrained(folder)
    assert tokens.tolist() == [*judge("<|user|>one\r\ntwo").input_ids, 1]
