"""The package where the file system has no symbolic links, so that Git wrote text files in their place."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pydoc
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

import edgeskip
import edgeskip.runtime
from edgeskip.runtime.decoding.model import GenerationSettings
from edgeskip.runtime.errors import EdgeskipError
from edgeskip.runtime.sampling import SamplingSettings

ROOT = Path(edgeskip.runtime.__file__).resolve().parents[1]


def test_help_lists_all_that_there_is():
    text = pydoc.plain(pydoc.render_doc(edgeskip))
    listed = edgeskip.__doc__.splitlines()
    for name in set(edgeskip.__all__) - {"__version__"}:
        assert any(line.startswith(f"{name} ") for line in listed)
        assert f"    {name}(" in text or f"class {name}(" in text


def test_a_clone_without_links_reads_the_folders_at_its_top(tmp_path):
    package = tmp_path / "src" / "edgeskip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(Path(edgeskip.__file__).read_text())
    for name in ("runtime", "exporter", "recipes", "cli.py"):
        (package / name).write_text(f"../../{name}")
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        "from edgeskip.cli import main; main(['recipes', 'list'], standalone_mode=False)\n"
        "import edgeskip, edgeskip.exporter.config; print(edgeskip.load.__module__, edgeskip.exporter.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "orin-nano-8gb" in run.stdout
    assert run.stdout.splitlines()[-1] == f"edgeskip.runtime.load {tmp_path / 'exporter' / '__init__.py'}"


ARRAYS = (np.array([3]), np.array([3, 5]), np.array([]), np.array([["a", "b"]]))
WRONG = (None, True, -1, 1 << 70, 0.5, math.nan, "", "nope", b"x", [], ["x"], {"a": 1}, np.int64(3), *ARRAYS)
WRONG = (*WRONG, re.match("", ""), np.int64)
FURTHER = "grammar", "draft", "exit_layer", "other"
SETTINGS = (*GenerationSettings.__annotations__, *SamplingSettings.__annotations__, *FURTHER)


def takers(model, folder):
    """What takes a value of each name, as a function of name and value."""
    few, greeting = {"max_new_tokens": 2}, [{"role": "user", "content": "Hi"}]
    chat = edgeskip.Chat(model, **few)

    def loaded(name, value):
        edgeskip.load(**{"bundle": model.bundle.folder, "device": "cpu", name: value}).close()

    def remembered(name, value):
        setattr(model.held if name == "most_saved_bytes" else model, name, value)
        for start in (20, 60):
            model.complete([*range(start, start + 30)], **few)

    def filed(name, value):
        getattr(chat, name)(folder / value if isinstance(value, str) else value)

    return {
        loaded: ("bundle", "backend", "device", "threads", "dialect", "exit_layer", "progress"),
        remembered: ("draft", "exit_layer", "sampling", "most_saved_bytes"),
        filed: ("save", "load"),
        (lambda _, value: edgeskip.add_engines(value)): ("bundle",),
        (lambda _, value: edgeskip.Model(value, value)): ("bundle",),
        (lambda name, value: model.complete(**{"prompt": [5], **few, name: value})): ("prompt", *SETTINGS),
        (lambda name, value: model.score(**{"prompt": [5, 6], name: value})): ("prompt", "logprobs"),
        (lambda name, value: model.encode(**{"prompt": greeting, name: value})): ("prompt", "most", "tools"),
        (lambda name, value: edgeskip.Chat(**{"model": model, name: value})): (
            "model",
            "system",
            "messages",
            *SETTINGS,
        ),
        (lambda _, value: chat.ask(value)): ("text",),
        (lambda name, value: getattr(edgeskip.Grammar, name)(value)): ("from_json_schema", "from_regex", "from_lark"),
        (lambda name, value: edgeskip.Grammar(**{"kind": "regex", "source": "a", name: value})): ("kind", "source"),
        (lambda name, value: edgeskip.Sampling(**{name: value})): tuple(SamplingSettings.__annotations__),
    }


def outcome(take, name, value):
    """What it raises, if anything."""
    try:
        take(name, value)
    except Exception as error:
        return error


def test_a_value_of_a_wrong_type_is_told_in_one_line(chat_bundles, tmp_path):
    with edgeskip.load(chat_bundles(192).folder, device="cpu") as model:
        before = model.draft, model.exit_layer, model.sampling
        for take, names in takers(model, tmp_path).items():
            for name in names:
                refused = [error for error in map(partial(outcome, take, name), WRONG) if error]
                model.draft, model.exit_layer, model.sampling = before
                assert refused, name
                assert not [e for e in refused if not isinstance(e, EdgeskipError) or "\n" in str(e)], name


def test_numbers_and_texts_of_numpy_are_settings_like_python_s(bundles):
    settings = {
        "mode": "self-speculative",
        "num_speculations": 2,
        "confidence_threshold": 0.25,
        "max_new_tokens": 3,
        "stop": ["\n"],
        "logprobs": 1,
        "draft": "exit",
        "exit_layer": 2,
        "temperature": 0.5,
        "top_k": 9,
        "seed": 3,
    }
    arrays = {name: np.array(value) for name, value in settings.items()}
    where = {"backend": "onnxruntime", "device": "cpu", "threads": 1, "dialect": "cpu", "exit_layer": 2}
    with edgeskip.load(
        bundles("llama-gqa").folder, **{name: np.array(value) for name, value in where.items()}
    ) as model:
        made = []
        for given in (settings, arrays, {name: array[()] for name, array in arrays.items()}):
            made.append(dataclasses.asdict(model.complete([5, 6], **given)) | {"statistics": None})
        assert made[0] == made[1] == made[2]
        assert json.dumps(made[0]) == json.dumps(made[1]) == json.dumps(made[2])
        assert model.score([5, 6], logprobs=np.int64(2)) == model.score([5, 6], logprobs=2)
        assert model.encode("ab", most=np.int64(1)) == model.encode("ab", most=1)
