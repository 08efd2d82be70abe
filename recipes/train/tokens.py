"""Text files as one array of token ids: each file as BOS (where the tokenizer has one), its tokens, EOS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgeskip.exporter.config import read_json
from edgeskip.exporter.tokenizer import read_checkpoint_tokenizer
from edgeskip.runtime.decoding.tokenizer import tokenizers_errors
from edgeskip.runtime.errors import CheckpointError, RecipeError
from edgeskip.runtime.files import whole_file
from edgeskip.runtime.reading import kind_of
from edgeskip.runtime.terminal import progress_bar

Array = npt.NDArray[Any]
_PART, _BATCH, _TEXTS = 1 << 19, 1 << 20, 512
"""Characters of a text, and of several texts, that are encoded at a time, which takes 300 times the memory; texts."""


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a folder, also as the text of a tokenizer.json, and the ids around a file."""

    folder: Path
    tokenizer: Tokenizer
    json: str
    bos_id: int | None
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """Rows that a table for it needs: ids may be left out, and added tokens have some."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer that transformers would load from `folder`; what BOS and EOS it does not name, config.json numbers.

    Raises:
        RecipeError: there is no tokenizer or it is not supported, or no file says which token is EOS.
    """
    try:
        path = folder / "config.json"
        config = read_json(path) if kind_of(path, CheckpointError) else {}
        read = read_checkpoint_tokenizer(folder, config)
    except CheckpointError as error:
        raise RecipeError(error.place, error.found, wanted=error.wanted, fix=error.fix) from None

    def token_id(name: str) -> int | None:
        if name in read.special_tokens:
            return read.tokenizer.token_to_id(read.special_tokens[name])
        number = config.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number  # of several, the first
        if type(number) is not int or not 0 <= number < 1 << 31:
            return None
        return number if read.tokenizer.id_to_token(number) is not None else None

    eos_id = token_id("eos_token")
    if eos_id is None:
        found = "neither eos_token in tokenizer_config.json nor eos_token_id in config.json is in the vocabulary"
        raise RecipeError(folder, found, fix="add one")
    return TextTokenizer(folder, read.tokenizer, read.json, token_id("bos_token"), eos_id)


def token_array(source: Path, files: str, tokenizer: TextTokenizer, cache_folder: Path) -> Array:
    """The tokens of a folder of text [tokens], or of the `.npy` of that name beside it; mapped, not read.

    Tokenizing is done once: the array is kept in `cache_folder`, under a name made from the tokenizer and from the
    files' names, sizes and times.

    Raises:
        RecipeError: nothing is there, or the array does not hold token ids of this vocabulary.
    """
    ready = source if source.suffix == ".npy" else source.with_name(source.name + ".npy")
    if ready.is_file():
        return _open_array(ready, tokenizer)
    try:
        paths = sorted(path for path in source.glob(files) if path.is_file())
    except (OSError, ValueError, NotImplementedError) as error:
        raise RecipeError("data.files", f"found {files!r:.60} ({error})", wanted="a pattern such as **/*.txt") from None
    if not paths:
        raise RecipeError(source, f"no files {files!r} here", wanted=f"a folder of text, or {ready.name}")
    key = hashlib.sha256(tokenizer.json.encode())
    for path in paths:
        status = path.stat()
        key.update(f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    cached = cache_folder / f"{source.name}-{key.hexdigest()[:16]}.npy"
    if not cached.is_file():
        write_tokens(paths, tokenizer, cached)
    return _open_array(cached, tokenizer)


def write_tokens(paths: list[Path], tokenizer: TextTokenizer, output: Path) -> None:
    """Tokenize text files into one array (uint16, or uint32 for a large vocabulary) in the file `output`.

    The files are put in a random, fixed order, so that neighbours in the array have nothing to do with each other.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    order = np.random.default_rng(0).permutation(len(paths))
    pieces = [np.asarray(ids, dtype) for ids in _tokenized([paths[i] for i in order], tokenizer)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as stream:
        np.save(stream, np.concatenate(pieces))


@dataclass(frozen=True)
class _Part:
    """A file's text, or a part of a long one; whether it is the first and the last of its file."""

    text: str
    first: bool
    last: bool


def _parts(path: Path) -> Iterator[_Part]:
    """A file in parts that end with a line, unless that is longer still; each cut may change a token or two."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        text, first = file.read(_PART), True
        while True:
            text += file.readline(_PART)
            following = file.read(_PART)
            yield _Part(text, first, last=not following)
            if not following:
                return
            text, first = following, False


def _batches(paths: list[Path]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    for path in paths:
        for part in _parts(path):
            batch.append(part)
            if len(batch) == _TEXTS or sum(len(one.text) for one in batch) >= _BATCH:
                yield batch
                batch = []
    yield batch


def _tokenized(paths: list[Path], tokenizer: TextTokenizer) -> Iterator[list[int]]:
    before, done = [] if tokenizer.bos_id is None else [tokenizer.bos_id], 0
    with progress_bar() as progress:
        for batch in _batches(paths):
            progress("tokenizing", done, len(paths))
            with tokenizers_errors(lambda reason: RecipeError(tokenizer.folder, f"its tokenizer fails ({reason})")):
                texts = [part.text for part in batch]
                encodings = tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for part, encoding in zip(batch, encodings, strict=True):
                yield [*(before if part.first else ()), *encoding.ids, *([tokenizer.eos_id] if part.last else ())]
            done += sum(part.last for part in batch)


def _open_array(path: Path, tokenizer: TextTokenizer) -> Array:
    try:
        tokens: Array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is a Python literal, which may fail in any way
        raise RecipeError(path, f"not a numpy array ({error})", wanted="token ids, uint16 or uint32") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not len(tokens):
        raise RecipeError(path, f"an array {tokens.dtype}{list(tokens.shape)}", wanted="token ids, uint16 or uint32")
    check_tokens(tokens, tokenizer.vocab_size, path, f"tokenize again with {tokenizer.folder}")
    return tokens


def check_tokens(tokens: Array, vocab_size: int, place: Path, fix: str) -> None:
    """Finds that a vocabulary of this size has all tokens of a text.

    Raises:
        RecipeError: it has not; `fix` says what to do.
    """
    if (highest := int(tokens.max())) >= vocab_size:
        raise RecipeError(place, f"token id {highest} is outside the vocabulary of {vocab_size}", fix=fix)


def file_starts(tokens: Array, eos_id: int) -> npt.NDArray[np.int64]:
    """Where the files begin [files]: 0 and every place after an EOS."""
    ends = np.flatnonzero(tokens == eos_id)[:-1]
    return np.concatenate([np.zeros(1, np.int64), ends + 1])


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--files", default="**/*", help="Pattern of the text files.")
def main(folder: Path, tokenizer: Path, output: Path, files: str) -> None:
    """Tokenize the text files of FOLDER with the tokenizer in the folder TOKENIZER into OUTPUT (.npy)."""
    paths = sorted(path for path in folder.glob(files) if path.is_file())
    write_tokens(paths, load_tokenizer(tokenizer), output)


if __name__ == "__main__":
    main()
