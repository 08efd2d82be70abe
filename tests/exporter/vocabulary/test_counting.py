"""The script that counts what ships (docs/token-counts)."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from edgeskip.recipes.demo import CHECKPOINT

SCRIPT = Path(__file__).parents[3] / "docs/token-counts/count.py"
TOKENIZER = CHECKPOINT / "tokenizer.json"
SOURCES = """
[shares]
prose = 0.75
code = 0.25

[[counted]]
repository = "owner/name"
commit = "HEAD"
licence = "MIT"
kind = "prose"
files = ["*.md", "*.jsonl.gz"]

[[counted]]
repository = "owner/name"
commit = "HEAD"
licence = "MIT"
kind = "code"
files = ["src/*.py"]

[[held_out]]
repository = "owner/name"
commit = "HEAD"
licence = "MIT"
kind = "rest"
files = ["*.txt"]
"""


def test_each_kind_of_text_has_its_share(tmp_path):
    clone = tmp_path / "owner/name"
    said = [{"text": "two words", "inner": ["three more words", 1, "label"]}]
    files = {
        "a.md": b"# A title\n",
        "docs/b.md": b"more of it\n",
        "c.jsonl.gz": gzip.compress("\n".join(map(json.dumps, said)).encode()),
        "src/d.py": b"def f(x):\n    return x\n",
        "e.py": b"raise NotImplementedError",
        "f.txt": b"held out",
    }
    for name, data in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(data)
    git = ["git", "-C", clone, "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "sources.toml").write_text(SOURCES)
    command = [sys.executable, SCRIPT, tmp_path, f"own={TOKENIZER}", "--sources", tmp_path / "sources.toml"]
    out = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "owner/name, rest: " in out.stdout

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    frequencies = np.zeros(tokenizer.get_vocab_size(with_added_tokens=False))
    prose, code = ["# A title\n", "more of it\n", "two words", "three more words"], ["def f(x):\n    return x\n"]
    kinds = {0.75: prose, 0.25: code}
    for share, texts in kinds.items():
        ids = [id_ for text in texts for id_ in tokenizer.encode(text, add_special_tokens=False).ids]
        for id_, count in Counter(ids).items():
            frequencies[id_] += share * count / len(ids)
    seen = frequencies > 0
    ((name, levels),) = load_file(tmp_path / "out").items()
    assert name.startswith("own:")
    levels = levels.astype(float)
    assert (levels > 0).tolist() == seen.tolist()
    np.testing.assert_allclose(2 ** ((levels[seen] - 255) / 8), frequencies[seen], rtol=0.05)
