"""The texts that a model reads while it is quantized."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tests.conftest import make_tokenizer

from edgeskip.exporter.quantization.calibrated.calibration import (
    LEAST_TOKENS,
    MOST_SEQUENCES,
    MOST_TOKENS,
    Calibration,
    read_calibration,
)
from edgeskip.runtime.errors import RequestError

TOKENIZER = make_tokenizer()  # bytes
WORDS = "".join(f"word {i} of the text\n" for i in range(20_000))


def decoded(sequence):
    return TOKENIZER.decode(list(sequence), skip_special_tokens=False)


def test_the_texts_that_ship_fill_all_sequences():
    found = read_calibration(None, TOKENIZER, 4096)
    assert len(found.sequences) == MOST_SEQUENCES
    assert found.longest == MOST_TOKENS
    assert sum(map(len, found.sequences)) > 0.9 * MOST_SEQUENCES * MOST_TOKENS
    assert len({sequence[:50] for sequence in found.sequences}) == MOST_SEQUENCES
    assert read_calibration(None, TOKENIZER, 4096) == found


def test_passages_come_evenly_from_the_whole_text_and_only_its_beginning_has_the_special_token(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    found = read_calibration(path, TOKENIZER, 4096)
    assert len(found.sequences) == MOST_SEQUENCES
    assert [sequence[0] == 0 for sequence in found.sequences] == [True] + [False] * (MOST_SEQUENCES - 1)
    places = [WORDS.index(decoded(sequence).removeprefix("<s>")) for sequence in found.sequences]
    assert places[0] == 0
    assert max(np.diff(places)) < 1.3 * min(np.diff(places))
    assert places[-1] > 0.95 * len(WORDS)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_s_files_are_texts_of_their_own(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"{i} " + WORDS[: 200 + i])
    found = read_calibration(tmp_path, TOKENIZER, 128)
    assert [decoded(sequence)[:5] for sequence in found.sequences] == ["<s>0 ", "<s>1 ", "<s>2 "]
    assert found.longest == 128  # the model's context
    whole = "".join(f"{i} " + WORDS[: 200 + i] for i in range(3))
    assert found.sha256 == hashlib.sha256(whole.encode()).hexdigest()


def test_the_tokens_that_occur():
    found = Calibration(((5, 3, 5), (9, 3)), "")
    assert found.token_ids.tolist() == [3, 5, 9]
    assert found.longest == 3


def test_fewer_and_shorter_sequences():
    many = Calibration(tuple((i, i, i) for i in range(9)), "a")
    assert many.shortened(3, 2) == Calibration(((0, 0), (4, 4), (8, 8)), "a")
    assert many.shortened(20, 20) == many


def test_what_cannot_be_calibrated_with_is_refused_in_one_line(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a" * (LEAST_TOKENS - 2))
    with pytest.raises(RequestError, match=rf"few.txt: {LEAST_TOKENS - 1} tokens; wanted at least"):
        read_calibration(few, TOKENIZER, 4096)
    with pytest.raises(RequestError, match="no such file"):
        read_calibration(tmp_path / "none", TOKENIZER, 4096)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="binary"):
        read_calibration(tmp_path / "binary", TOKENIZER, 4096)
