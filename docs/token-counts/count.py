"""How frequent tokens are, for exports with a draft vocabulary and no texts: what edgeskip ships, and how it is made.

python docs/token-counts/count.py CLONES llama-2=tokenizer.json llama-3=tokenizer.json qwen=tokenizer.json

sources.toml, beside this file, names repositories with permissive licences, what to read of each, and the share that
each kind of text has in the counts. CLONES is a folder of clones of them, as CLONES/OWNER/NAME. Of a source, at most
4 million characters are read, from files all over it. Then it is printed which share of the tokens of other texts,
which nothing was counted in, are among the first ones by frequency and by id.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgeskip.exporter.vocabulary.frequency import FREQUENCIES, counts_of, frequency_order, levels_of, write_levels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_CHARACTERS = 4_000_000
ROWS = (8192, 16384, 32768)


def texts_of(clones: Path, source: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a source, in an order that has nothing to do with their names, up to the limit."""
    git, commit, room = ["git", "-C", clones / source["repository"]], source["commit"], MOST_CHARACTERS
    listed = subprocess.run([*git, "ls-tree", "-r", "-z", "--name-only", commit], capture_output=True, check=True)
    names = listed.stdout.decode().strip("\0").split("\0")
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in source["files"])]
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin
        assert reader.stdout
        for name in sorted(chosen, key=lambda name: hashlib.sha256(name.encode()).digest()):
            reader.stdin.write(f"{commit}:{name}\n".encode())
            reader.stdin.flush()
            _, _, size = reader.stdout.readline().split()
            data = reader.stdout.read(int(size) + 1)[:-1]  # and a line break
            text = (gzip.decompress(data) if name.endswith(".gz") else data).decode(errors="replace")
            for piece in strings_of(text) if ".jsonl" in name else [text]:
                yield piece[:room]
                room -= len(piece)
                if room <= 0:
                    return


def strings_of(lines: str) -> Iterator[str]:
    """The texts in lines of JSON, without its quotes and escapes; names of fields and single words are none."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str) and " " in value:
            yield value
        elif isinstance(value, (list, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from walk(inner)

    for line in lines.splitlines():
        yield from walk(json.loads(line))


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text, which are encoded side by side."""
    for i in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(texts[i : i + 64], add_special_tokens=False):
            yield encoding.ids


def main() -> None:
    """Counts, says what is covered, and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("clones", type=Path)
    parser.add_argument("tokenizers", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--sources", type=Path, default=Path(__file__).with_name("sources.toml"))
    parser.add_argument("--output", type=Path, default=FREQUENCIES)
    given = parser.parse_args()
    settings = tomllib.loads(given.sources.read_text(encoding="utf-8"))
    counted: dict[str, list[str]] = defaultdict(list)
    for source in settings["counted"]:
        counted[source["kind"]] += texts_of(given.clones, source)
    held_out = [(source, [*texts_of(given.clones, source)]) for source in settings["held_out"]]
    for kind, texts in counted.items():
        print(f"{kind}: {sum(map(len, texts)) / 1e6:.1f} million characters, {settings['shares'][kind]:.1%}")
    found = {}
    for name, file in (one.split("=", 1) for one in given.tokenizers):
        tokenizer = Tokenizer.from_file(file)
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        size, frequencies = len(vocab), np.zeros(len(vocab))
        for kind, texts in counted.items():
            counts = counts_of(encoded(tokenizer, texts), size)
            frequencies += settings["shares"][kind] * counts / counts.sum()
        levels = levels_of(frequencies)
        found[name] = vocab, levels
        print(f"\n{name}: {np.count_nonzero(levels)} of {size} tokens occur")
        rows = [one for one in ROWS if one < size]
        print(f"covered by the first {', '.join(map(str, rows))} rows, by frequency and by id")
        places = np.argsort(frequency_order(levels, range(size)))
        for source, texts in held_out:
            counts = counts_of(encoded(tokenizer, texts), size)
            shares = [(counts[places < one].sum() / counts.sum(), counts[:one].sum() / counts.sum()) for one in rows]
            text = ", ".join(f"{frequent:.1%} {first:.1%}" for frequent, first in shares)
            print(f"{source['repository']}, {source['kind']}: {text}", flush=True)
    write_levels(given.output, found)


if __name__ == "__main__":
    main()
