"""Whatever stands in a file from outside, a command does its work or says why not in one line: no traceback, no hang,
bounded memory, nothing half-written.

EDGESKIP_MUTATIONS sets how many are tried, EDGESKIP_SEED which; one that fails leaves its file for another look.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from edgeskip.cli import main
from edgeskip.exporter.pack import pack as write_packed
from edgeskip.recipes.reader import FOLDERS
from edgeskip.recipes.train.schema import load_recipe
from edgeskip.recipes.train.tokens import load_tokenizer, token_array
from edgeskip.recipes.train.training import read_clock, starting_model
from edgeskip.runtime.backends.cpu_session import OrtCpuSession
from edgeskip.runtime.bundle.manifest import MANIFEST, WEIGHTS, read_bundle
from edgeskip.runtime.bundle.store import FOLDER, read_engines
from edgeskip.runtime.errors import EdgeskipError
from tests.conftest import edit_json
from tests.mutations import Mutation, clear, mutated_header, mutated_json, mutated_text, mutated_toml, put_in_place_of
from tests.recipes.conftest import RECIPE, write_corpus
from tests.standin import with_engines

COUNT, SEED = int(os.environ.get("EDGESKIP_MUTATIONS", "500")), int(os.environ.get("EDGESKIP_SEED", "11"))
MOST_BYTES = 400_000_000  # that one command may take beside what the process has
MOST_SECONDS = 60  # of processor time
HANGS_SECONDS = 300  # of a command that does nothing and waits

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to watch memory")


@dataclass
class Target:
    """A file to spoil, what spoils it, the commands that read it, and the exit codes that they may end with.

    `outputs` are folders that a command may make, whole; in `bundle` the manifest keeps up with the file, so that what
    is wrong with it is found by its reader and not by its hash. What is accepted of `exact` files gives the same text.
    """

    file: Path
    mutations: tuple[Mutation, ...]
    commands: tuple[tuple[object, ...], ...]
    codes: tuple[int, ...]
    bundle: Path | None = None
    outputs: tuple[Path, ...] = ()
    exact: bool = False
    pristine: bytes = field(init=False)

    def __post_init__(self):
        self.pristine = self.file.read_bytes()


@pytest.fixture(scope="module")
def targets(bundles, checkpoints, tmp_path_factory):
    """Every file that edgeskip reads, in folders of its own."""
    root = tmp_path_factory.mktemp("mutations")
    bundle = with_engines(bundles("llama-gqa"), root / "bundle").folder
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ bos_token }}"
    checkpoint, sharded = root / "checkpoint", root / "sharded"
    for folder in (checkpoint, sharded):
        shutil.copytree(checkpoints("llama-gqa"), folder)
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "chat_template": template,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        user = {"content": "<|user|>", "lstrip": True}
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": user, "unk_token": "<s>"}))
        (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": 258}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "bos_token_id": 0}))
    _shard(sharded)
    (bundle / "chat_template.jinja").write_text(template)
    _record(bundle, "chat_template.jinja")
    for kind, name in (("model", "llama3.2-1b"), ("device", "orin-nano-8gb")):
        shutil.copy(FOLDERS[kind] / f"{name}.toml", root / f"{kind}.toml")
    write_corpus(root / "corpus")
    (root / "training.toml").write_text(RECIPE)
    (root / "prompts").mkdir()
    (root / "prompts" / "a.txt").write_text("def f(x):\n    return caf\u00e9 + \U0001f600\n")
    runner = CliRunner()
    report = root / "report.json"
    short = ("--prompts", root / "prompts", "-k", 2, "-n", 3, "--repeats", 1, "--json", report)
    assert runner.invoke(main, [str(a) for a in ("bench", bundle, "--backend", "onnxruntime", *short)]).exit_code == 0
    edit_json(report, lambda r: r.update(backend="as if of a GPU"))  # a CPU's calibrates no plan
    generate = ("generate", bundle, "-n", 3, "--backend", "onnxruntime")
    quantized = Path(shutil.copytree(bundles("llama-gqa", weights="int4").folder, root / "quantized"))
    say_quantized = ("generate", quantized, "-n", 3, "-p", "a")
    (engines,) = read_engines(read_bundle(bundle))
    packed = write_packed(read_bundle(bundle), [engines], root / "packed").folder
    add = ("cache", "add", packed)
    say, chat, inspect = (*generate, "-p", "caf\u00e9 \u4e2d"), (*generate, "--chat", "-p", "hi"), ("inspect", bundle)
    out = root / "out"
    export, pack = ("export", checkpoint, out, "-e", 2), ("pack", bundle, out)
    export_shards, plan_config = ("export", sharded, out, "-e", 2), ("plan", checkpoint, "-d", "h100")
    bench = ("bench", bundle, "--backend", "onnxruntime", "--prompts", root / "prompts", "-k", 1, "-n", 2)
    model, device, training = root / "model.toml", root / "device.toml", root / "training.toml"
    prompt = root / "prompts" / "a.txt"
    plan = ("plan", "--recipe", model, "--device", device)
    corpus = root / "corpus" / "tokenizer"
    tokens, array, clock = load_tokenizer(corpus), root / "corpus" / "train.npy", root / "clock.json"
    np.save(array, np.asarray(token_array(root / "corpus" / "train", "**/*.py", tokens, root)))
    clock.write_text(json.dumps({"step": 3, "elapsed_s": 1.5}))
    continued = Path(shutil.copytree(checkpoints("llama-gqa"), root / "continued"))
    recipe = replace(load_recipe(training), model=None, checkpoint=continued, layerskip=None)
    both, toml = (mutated_json, mutated_text), (mutated_toml, mutated_text)
    return [
        Target(bundle / MANIFEST, both, (inspect, say, pack), (4, 5), outputs=(out,)),
        Target(bundle / WEIGHTS, (mutated_header,), (say,), (4,), bundle, exact=True),
        Target(quantized / MANIFEST, both, (("inspect", quantized), say_quantized), (4, 5)),
        Target(quantized / WEIGHTS, (mutated_header,), (say_quantized,), (4,), quantized, exact=True),
        Target(bundle / "tokenizer.json", both, (say,), (4, 5), bundle),
        Target(bundle / "chat_template.jinja", (mutated_text,), (chat,), (4, 5), bundle),
        Target(engines.folder / "build.json", both, (inspect, say, pack), (4,), outputs=(out,)),
        Target(packed / FOLDER / engines.folder.name / "build.json", both, (("inspect", packed), add), (4,)),
        Target(checkpoint / "config.json", both, (export, plan_config), (1, 3, 5), outputs=(out,)),
        Target(checkpoint / "generation_config.json", both, (export,), (3,), outputs=(out,)),
        Target(checkpoint / "tokenizer_config.json", both, (export,), (3,), outputs=(out,)),
        Target(checkpoint / "tokenizer.json", both, (export,), (3,), outputs=(out,)),
        Target(checkpoint / "special_tokens_map.json", both, (export,), (3,), outputs=(out,)),
        Target(checkpoint / "added_tokens.json", both, (export,), (3,), outputs=(out,)),
        Target(checkpoint / "model.safetensors", (mutated_header,), (export,), (3,), outputs=(out,)),
        Target(sharded / "model.safetensors.index.json", both, (export_shards,), (3,), outputs=(out,)),
        Target(model, toml, (plan, ("recipes", "validate", model)), (1, 3, 5, 7)),
        Target(device, toml, (plan, ("recipes", "validate", device)), (1, 5, 7)),
        Target(training, toml, (("recipes", "validate", training), ("recipes", "show", training)), (7,)),
        Target(report, both, ((*plan, "--calibrate", report),), (1, 5)),
        Target(clock, both, ((read_clock, clock.parent),), (7,)),
        Target(array, (mutated_text,), ((token_array, root / "corpus" / "train", "**/*.py", tokens, root),), (7,)),
        Target(corpus / "tokenizer.json", both, ((load_tokenizer, corpus),), (7,)),
        Target(corpus / "tokenizer_config.json", both, ((load_tokenizer, corpus),), (7,)),
        Target(continued / "config.json", both, ((starting_model, recipe, tokens),), (7,)),
        Target(prompt, (mutated_text,), ((*generate, "-f", prompt), (*bench, "--repeats", 1)), (2, 5)),
    ]


def _shard(folder):
    """The checkpoint's weights in two files with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _record(bundle, name):
    """Puts a file's size and hash into the manifest."""
    data = (bundle / name).read_bytes()
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(bundle / MANIFEST, lambda m: m["files"].update({name: record}))


def _spoil(target, random):
    if random.random() < 0.06:  # a pipe that is named on the command line is waited for
        put_in_place_of(random, target.file, pipes=not any(target.file in command for command in target.commands))
        return
    data = random.choice(target.mutations)(random, target.pristine)
    if target.file.name in (MANIFEST, "build.json"):
        try:
            target.file.write_bytes(data)
            edit_json(target.file, lambda _: None)  # hashed anew
            return
        except (ValueError, RecursionError, AttributeError):
            pass
    target.file.write_bytes(data)
    if target.bundle:
        _record(target.bundle, target.file.name)


def _peak_bytes():
    text = Path("/proc/self/status").read_text()
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith(("VmHWM", "VmRSS"))}
    return 1024 * int(sizes["VmHWM"]), 1024 * int(sizes["VmRSS"])


def _result(command):
    """Of a command line, or of a function and its arguments, as if it were one."""
    if not callable(command[0]):
        return CliRunner().invoke(main, [str(part) for part in command], input=b"")
    error = None
    try:
        command[0](*command[1:])
    except EdgeskipError as caught:
        error = caught
    stderr = f"edgeskip: {error}\n" if error else ""
    return SimpleNamespace(
        exit_code=error.exit_code if error else 0, exception=None, stdout="", stderr=stderr, output=stderr
    )


def _fault(command, target):
    """What is wrong with how a command ended; nothing is, as a rule."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _peak_bytes()[1], time.process_time()
    try:
        result = _result(command)
    except BaseException as error:  # a panic in a library, or our own alarm
        return f"{type(error).__name__}: {error}", None
    taken, seconds = _peak_bytes()[0] - before, time.process_time() - start
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}", result
    lines = [line for line in result.stderr.splitlines() if not line.startswith("edgeskip: warning: ")]
    if result.exit_code not in (0, *target.codes):
        return f"exit code {result.exit_code}", result
    if result.exit_code == 2:
        return "", result  # click's own lines, of a file that it opens
    if result.exit_code > 1 and not (len(lines) >= 1 and lines[-1].startswith("edgeskip: ")):
        return "no line that says why", result
    if result.exit_code > 1 and command[:2] != ("recipes", "validate") and len(lines) != 1:
        return "more than one line", result
    if any(len(line) > 5000 for line in lines):
        return "a line without end", result
    if any(c in result.output for c in "\x1b\x9b\x07\u202e") and command[0] != "generate":
        return "something that drives a terminal", result
    if taken > MOST_BYTES:
        return f"{taken / 1e6:.0f} MB", result
    if seconds > MOST_SECONDS:
        return f"{seconds:.0f} s", result
    for folder in target.outputs:
        if folder.exists() and result.exit_code:
            return "an output in spite of an error", result
        left = [path.name for path in folder.parent.iterdir() if path.name.endswith(".edgeskip")]
        if left:
            return f"left behind: {left}", result
    return "", result


def _alarm(*_):
    raise TimeoutError(f"more than {HANGS_SECONDS} s")


@pytest.mark.timeout(max(300, COUNT))
def test_no_file_brings_a_command_down(targets, monkeypatch, tmp_path):
    random, faults, codes = Random(SEED), [], Counter()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(OrtCpuSession, "copy_bytes_per_second", lambda _: 1e10)
    previous = signal.signal(signal.SIGALRM, _alarm)
    texts = {}
    for target in targets:
        for command in target.commands:
            fault, result = _fault(command, target)
            assert (fault, result.exit_code) == ("", 0), (command, result.stderr)
            texts[command] = result.stdout
            for folder in target.outputs:
                clear(folder)
    for i in range(COUNT):
        target = targets[i % len(targets)]
        manifest = (target.bundle / MANIFEST).read_bytes() if target.bundle else b""
        _spoil(target, random)
        for command in target.commands:
            signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
            fault, result = _fault(command, target)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if target.exact and result and result.exit_code == 0 and result.stdout != texts[command]:
                fault = "another text"
            codes[target.file.name, result.exit_code if result and not fault else "fault"] += 1
            if fault:
                faults.append(f"{i} {target.file.name}, {' '.join(map(str, command))[:80]}: {fault[:300]}")
                kept = tmp_path / f"{i}-{target.file.name}"
                if target.file.is_file() and target.file.stat().st_size < 1 << 24:
                    shutil.copy(target.file, kept)
                if os.environ.get("EDGESKIP_MUTATIONS"):
                    print(faults[-1], kept)
            for folder in target.outputs:
                clear(folder)
        clear(target.file)
        target.file.write_bytes(target.pristine)
        if target.bundle:
            (target.bundle / MANIFEST).write_bytes(manifest)
    signal.signal(signal.SIGALRM, previous)
    if os.environ.get("EDGESKIP_MUTATIONS"):
        print(*sorted(codes.items(), key=str), sep="\n")
    assert faults == []
