"""The command line: what it prints where, and the exit code and the one line of every error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.pack import pack
from edgeskip.runtime import terminal
from edgeskip.runtime.backends.engines import library as trt
from edgeskip.runtime.bench import validity
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.manifest import MANIFEST
from edgeskip.runtime.bundle.store import read_engines
from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.printable import printable
from tests.conftest import edit_json
from tests.standin import VERSION, HostDevice, StandInTensorRT, with_engines

VERBS = (
    *(
        "bench",
        "build",
        "cache",
        "chat",
        "check",
        "demo",
        "doctor",
        "export",
        "generate",
        "inspect",
        "pack",
        "plan",
        "push",
        "recipes",
        "serve",
        "synth",
    ),
    *("train", "tune"),
)
MODES = ("self-speculative", "autoregressive", "early-exit")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(*arguments, **settings):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **settings)


def succeed(*arguments, **settings):
    result = run(*arguments, **settings)
    assert result.exception is None, result.stderr
    assert result.exit_code == 0
    return result


def assert_one_line(stdout, stderr):
    assert stdout == ""
    assert stderr.startswith("edgeskip: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")


def process(*arguments, **settings):
    command = [sys.executable, "-m", "edgeskip.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.fixture
def bundle(bundles):
    return bundles("llama-gqa", exit_layer=3).folder


@pytest.fixture
def spoiled(bundle, tmp_path):
    """A copy of the bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def texts(tmp_path):
    """Two short prompts for a bench."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "a.txt").write_text("def f(x):")
    (folder / "b.txt").write_text("import os")
    return folder


def test_version():
    assert succeed("--version").stdout == f"edgeskip, version {edgeskip.__version__}\n"


def test_help_names_every_verb_and_the_exit_codes():
    text = " ".join(succeed("--help").stdout.split())
    assert set(main.list_commands(None)) == set(VERBS)
    assert all(f" {verb} " in text for verb in VERBS)
    for code in ("2 wrong command line", "3 checkpoint", "4 bundle", "5 request", "6 backend", "7 recipe"):
        assert code in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb):
    for flag in ("-h", "--help"):
        text = succeed(verb, flag).stdout
        assert text.startswith(f"Usage: main {verb}")
        options = [option for option in main.get_command(None, verb).params if option.param_type_name == "option"]
        assert all(max(option.opts, key=len) in text for option in options)


def test_generate_prints_the_text_on_stdout_and_the_statistics_on_stderr(bundle):
    with edgeskip.load(bundle) as model:
        wanted = model.complete("def f(x):", max_new_tokens=20)
    result = succeed("generate", bundle, "--prompt", "def f(x):", "--max-new-tokens", 20)
    assert result.stdout == wanted.text + "\n"
    assert re.match(r"ONNX Runtime \S+, CPU, cpu dialect, fp32; MB: weights 0.7, caches 0.1", result.stderr)
    assert re.search(r"\n20 tokens, \d+ tokens/s, first after \d+ ms; ended by max_new_tokens\n", result.stderr)
    assert re.search(r"tokens per round with at most 4 drafts; acceptance \d+%, match \d+%; accepted 0", result.stderr)
    longest = len(wanted.statistics.by_drafter["exit"].rounds_by_length) - 1
    accepted = result.stderr.rpartition("; accepted ")[2].splitlines()[0]
    assert re.findall(r"\d+", accepted) == [str(n) for n in range(longest + 1)]


def test_draws_are_shown_with_their_seed_and_can_be_drawn_again(bundle):
    asked = ("generate", bundle, "--prompt", "def f(x):", "-n", 20, "--temperature", 0.7, "--top-p", 0.9)
    first = succeed(*asked)
    seed = re.search(r"\ndrawn with temperature 0.7, top_p 0.9, seed (\d+)\n", first.stderr)[1]
    assert succeed(*asked, "--seed", seed).stdout == first.stdout
    made = json.loads(succeed(*asked, "--seed", seed, "--logprobs", 2, "--json").stdout)
    assert made["text"] + "\n" == first.stdout
    assert made["sampling"]["seed"] == int(seed)
    assert [len(one["top"]) for one in made["logprobs"]] == [2] * len(made["token_ids"])
    assert "the next token is the most probable one" in succeed("inspect", bundle).stdout


def test_the_prompt_can_come_from_a_file_or_from_stdin(bundle, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve: 日本\n", encoding="utf-8")
    wanted = succeed("generate", bundle, "--prompt", "naïve: 日本\n", "-n", 12).stdout
    assert succeed("generate", bundle, "--prompt-file", tmp_path / "prompt.txt", "-n", 12).stdout == wanted
    assert succeed("generate", bundle, "--prompt-file", "-", "-n", 12, input="naïve: 日本\n").stdout == wanted


@pytest.mark.parametrize("text", ["a = 1\r\nb = 2\r\n", "a\rb", "\ufeffa\n"])
def test_a_prompt_is_taken_as_it_is(text, bundle, tmp_path):
    with edgeskip.load(bundle) as model:
        wanted = model.encode(text)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "one.txt").write_bytes(text.encode())
    for source, settings in ((tmp_path / "prompts" / "one.txt", {}), ("-", {"input": text.encode()})):
        made = succeed("generate", bundle, "--prompt-file", source, "-n", 1, "--json", **settings)
        assert json.loads(made.stdout)["prompt_token_ids"] == wanted
    assert load_prompts(tmp_path / "prompts") == [text]


def test_a_piped_prompt_in_a_process_of_its_own(bundle):
    wanted = succeed("generate", bundle, "--prompt", "a b c", "-n", 8).stdout
    piped = process("generate", bundle, "--prompt-file", "-", "-n", 8, input="a b c")
    assert (piped.returncode, piped.stdout) == (0, wanted)


@pytest.mark.parametrize(
    "prompt",
    [[], ["--prompt", "a", "--prompt-file", "-"], ["--prompt-file", "nowhere.txt"], ["--prompt", "a", "--mode", "x"]],
)
def test_a_wrong_command_line_is_told_with_the_usage(prompt, bundle):
    result = run("generate", bundle, *prompt, input="a")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: main generate")


def test_json_is_one_object_with_the_documented_keys(bundle):
    with edgeskip.load(bundle) as model:
        wanted = model.complete("def f(x):", num_speculations=3, max_new_tokens=20)
    result = succeed("generate", bundle, "-p", "def f(x):", "-k", 3, "-n", 20, "--json")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    made = json.loads(result.stdout)
    assert set(made) == {"prompt_token_ids", "token_ids", "text", "stop_reason", "statistics", "sampling", "logprobs"}
    assert made["prompt_token_ids"] == [0, *(model.tokenizer.token_to_id(c) for c in "defĠf(x):")]
    assert made["token_ids"] == list(wanted.token_ids)
    assert (made["text"], made["stop_reason"]) == (wanted.text, "max_new_tokens")
    statistics = made["statistics"]
    assert set(statistics) == {field.name for field in dataclasses.fields(Statistics)}
    assert {"rounds", "acceptance_rate", "match_rate", "tokens_per_round", "acceptance_histogram"} <= set(statistics)
    assert {"tokens_per_second", "time_to_first_token_ms", "latency_ms", "stage_ms"} <= set(statistics)
    assert statistics["new_tokens"] == 20
    assert sum(statistics["acceptance_histogram"]) == statistics["rounds"]
    assert statistics["acceptance_rate"] == statistics["accepted"] / statistics["drafted"]
    assert statistics["match_rate"] == statistics["accepted"] / statistics["tested"]
    assert set(statistics["stage_ms"]) == {"draft", "verify", "head"}
    assert set(statistics["latency_ms"]) == {"p50", "p90", "p99"}


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "", "-p", "a"],
        ["generate", "{bundle}", "-p", "a", "--json", ""],
        ["generate", "{bundle}", "-p", "a", "--json-schema", ""],
        ["push", "{bundle}", "x/y", "--report", ""],
        ["bench", "{bundle}", "--prompts", ""],
        ["export", "", "b", "-e", "1"],
        ["export", "c", "", "-e", "1"],
        ["export", "c", "b", "--calibration", ""],
        ["plan", "", "-d", "h100"],
        ["check", "{bundle}", "--reference", ""],
        ["pack", "{bundle}", ""],
        ["tune", "{bundle}", "--recipe", ""],
        ["synth", "", "c", "-e", "1", "--match-rate", "1"],
        ["synth", "llama3.2-1b", "", "-e", "1", "--match-rate", "1"],
    ],
)
def test_an_empty_path_is_not_the_current_folder(words, bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    result = run(*(word.format(bundle=bundle) for word in words))
    assert result.exit_code == 2
    assert "it is empty" in result.stderr


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, bundle):
    with edgeskip.load(bundle) as model:
        plain = model.complete("a", mode="autoregressive", max_new_tokens=20)
    made = json.loads(succeed("generate", bundle, "-p", "a", "--mode", mode, "-n", 20, "--json").stdout)
    assert made["statistics"]["mode"] == mode
    assert (made["token_ids"] == list(plain.token_ids)) == (mode != "early-exit")
    assert (made["statistics"]["acceptance_rate"] is None) == (mode != "self-speculative")
    assert (made["statistics"]["stage_ms"]["verify"] == 0) == (mode == "early-exit")


def test_early_exit_with_a_threshold_says_what_the_exit_decided(bundle, tmp_path):
    report = tmp_path / "report.json"
    how = ["--mode", "early-exit", "--confidence-threshold", 0.01, "-n", 20]
    told = succeed("generate", bundle, "-p", "a", *how, "--json", report).stderr
    statistics = json.loads(report.read_text())["statistics"]
    assert 0 < statistics["trusted"] < statistics["new_tokens"]
    assert f"{statistics['trusted']} tokens by the exit alone, the others by the whole model in" in told


@pytest.mark.parametrize("threshold", [0, 0.5, 1])
def test_the_confidence_threshold_changes_no_token(threshold, bundle):
    plain = succeed("generate", bundle, "-p", "a", "--mode", "autoregressive", "-n", 30).stdout
    assert succeed("generate", bundle, "-p", "a", "--confidence-threshold", threshold, "-n", 30).stdout == plain


def test_a_text_keeps_to_a_schema_or_a_regular_expression(bundles, tmp_path):
    bundle, schema = bundles("llama-gqa").folder, tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["one", {"two": 2}]}))
    assert json.loads(succeed("generate", bundle, "-p", "a", "--json-schema", schema).stdout) in ("one", {"two": 2})
    date = succeed("generate", bundle, "-p", "a", "--regex", "[0-9]{4}-[0-9]{2}").stdout.strip()
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", date)
    assert run("generate", bundle, "-p", "a", "--regex", "a", "--json-schema", schema).exit_code == 2


def test_stop_strings_end_the_text(bundle):
    whole = succeed("generate", bundle, "-p", "a", "-n", 30).stdout
    late, early = whole[12:14], whole[6:8]
    made = json.loads(succeed("generate", bundle, "-p", "a", "--stop", late, "--stop", early, "--json").stdout)
    assert made["stop_reason"] == "stop_string"
    assert made["text"] == whole[: min(whole.index(late), whole.index(early))]


def test_a_chat_goes_through_the_template_of_the_bundle(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("llama-gqa"), tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    succeed("export", folder, tmp_path / "bundle", "-e", 2)
    chat = succeed("generate", tmp_path / "bundle", "--chat", "-p", "hi", "-n", 4, "--json").stdout
    plain = succeed("generate", tmp_path / "bundle", "-p", "<user>hi", "-n", 4, "--json").stdout
    assert [0, *json.loads(chat)["prompt_token_ids"]] == json.loads(plain)["prompt_token_ids"]


def test_on_a_terminal_accepted_drafts_are_green_and_the_text_is_the_same(bundle, monkeypatch):
    plain = succeed("generate", bundle, "-p", "a", "-n", 40).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = succeed("generate", bundle, "-p", "a", "-n", 40, color=True).stdout
    assert "\x1b[32m" in coloured
    assert ANSI.sub("", coloured) == printable(plain)


def test_inspect_shows_the_split(bundle):
    text = succeed("inspect", bundle).stdout
    for part in (
        "layers[:3] draft, layers[3:] verify",
        "draft subgraph: draft -> head",
        "verify subgraph: verify -> head",
    ):
        assert part in text
    assert "6 caches" in text
    assert "2 caches" in text
    assert "capacity 96 tokens" in text
    for path in bundle.iterdir():
        assert path.name == MANIFEST or path.name in text


def test_inspect_shows_what_is_quantized(bundles, checkpoints, tmp_path):
    options = ("-e", 2, "--weights", "int4", "--layers", "0-1=int8", "--layers", "3=dtype", "--dtype", "fp16")
    succeed("export", checkpoints("llama-gqa"), tmp_path / "b", *options)
    lines = succeed("inspect", tmp_path / "b").stdout.splitlines()
    weights = [128 * 64, 64 * 64, 192 * 64, 64 * 96]  # qkv, o, gate and up, down
    table = 2 * 300 * 64
    rows = [128, 64, 192, 64]
    size = sum(2 * (w + 2 * n) + w / 2 + 2 * w / 32 + 2 * w for w, n in zip(weights, rows, strict=True))
    size += table + 2 * 2 * 300
    bits = 8 * size / (4 * sum(weights) + table)
    wanted = (
        f"weights int8, head int8, layers 2 int4-32, layers 3 fp16; {size / 1e6:.1f} MB, {bits:.2f} bits per weight"
    )
    assert f"quantized by search: {wanted}" in lines
    fused = "ort (draft.ort.onnx, ...), cpu (draft.cpu.onnx, ...)"
    assert f"dialects: standard (draft.onnx, ...), {fused}, layers (first.layers.onnx, ...)" in lines
    assert "no engines are needed, as its layers are quantized" in lines
    succeed("export", checkpoints("llama-gqa"), tmp_path / "c", "-e", 2, "--head", "int8")
    of_head = succeed("inspect", tmp_path / "c").stdout
    assert "engines can be built from layers only, as its weights are quantized" in of_head
    assert not [
        line for line in succeed("inspect", bundles("llama-gqa").folder).stdout.splitlines() if "bits per" in line
    ]


def test_an_export_in_blocks_that_do_not_divide_is_refused_before_anything_is_written(checkpoints, tmp_path):
    result = run("export", checkpoints("llama-gqa"), tmp_path / "b", "-e", 2, "--weights", "int4", "--block-size", 64)
    assert result.exit_code == 5
    assert result.stderr == (
        "edgeskip: model.layers.0.mlp.down_proj.weight: 96 columns, which blocks of 64 do not divide; "
        "give --block-size 32 or int8\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("formats", [[], ["--weights", "int8"]])
def test_blocks_where_nothing_is_in_4_bits_are_refused(formats, checkpoints, tmp_path):
    result = run("export", checkpoints("llama-gqa"), tmp_path / "b", "-e", 2, "--block-size", 32, *formats)
    assert result.exit_code == 2
    assert "--block-size is for 4 bits: give --weights int4, or leave it out" in result.stderr
    succeed("export", checkpoints("llama-gqa"), tmp_path / "c", "-e", 2, "--block-size", 32, "--layers", "0=int4")


def test_a_dialect_that_a_quantized_bundle_lacks_is_refused(bundles):
    bundle = bundles("llama-gqa", weights="int8").folder
    result = run("check", bundle, "--backend", "onnxruntime", "--device", "cpu", "--dialect", "primitive")
    assert result.exit_code == 4
    found = "no graphs of the primitive dialect, as its weights are quantized; wanted standard or ort or cpu"
    assert result.stderr == f"edgeskip: {bundle}: {found}\n"


def test_inspect_prints_the_manifest_as_json(bundle):
    assert succeed("inspect", bundle, "--json").stdout == (bundle / MANIFEST).read_text()


def test_bench_writes_its_report_as_json(bundle, texts, tmp_path):
    result = succeed(
        "bench",
        bundle,
        "--prompts",
        texts,
        "-k",
        1,
        "-k",
        3,
        "-n",
        8,
        "--repeats",
        2,
        "--json",
        tmp_path / "report.json",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert [(row["mode"], row["num_speculations"]) for row in rows] == [
        ("autoregressive", 0),
        ("self-speculative", 1),
        ("self-speculative", 3),
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["speedup"] == pytest.approx(rows[0]["ms_per_token"] / row["ms_per_token"])
        assert 0 < row["distinct_4grams"] <= 1
        assert row["time_to_first_token_ms"] > 0
    for row in rows[1:]:
        assert 0 <= row["acceptance_rate"] <= row["match_rate"] <= 1
    assert rows[0]["acceptance_rate"] is rows[0]["match_rate"] is None
    assert report["faults"] == 0
    assert (report["valid"], report["doubts"]) == (True, [])
    assert (report["prompts"], report["settings"]["max_new_tokens"], report["settings"]["repeats"]) == (2, 8, 2)
    assert "Every mode gave exactly the tokens of plain decoding." in result.stdout
    assert result.stdout.count("self-speculative") == 2
    assert "…" not in result.stdout  # cut off by the width that a pipe does not have


def test_bench_says_when_the_machine_was_not_idle(bundle, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(validity, "SPREAD", -1.0)
    command = ("bench", bundle, "--prompts", texts, "-k", 2, "-n", 4, "--repeats", 2)
    result = succeed(*command, "--json", tmp_path / "report.json", "--html", tmp_path / "page.html")
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["valid"]
    (doubt,) = report["doubts"]
    assert "between repeats" in doubt
    assert f"Not a valid measurement: {doubt}." in result.stdout
    assert f"Not a valid measurement: {doubt}." in (tmp_path / "page.html").read_text()
    calibrated = run("plan", "llama3-8b", "-d", "h100", "--calibrate", tmp_path / "report.json")
    assert calibrated.exit_code == 5
    assert f"report.json: not a valid measurement: {doubt}; run" in calibrated.stderr


def test_bench_keeps_stdout_for_the_json(bundle, texts):
    result = succeed(
        "bench", bundle, "--prompts", texts, "--num-prompts", 1, "-k", 2, "-n", 4, "--repeats", 1, "--json", "-"
    )
    assert json.loads(result.stdout)["prompts"] == 1
    assert "tokens/s" in result.stderr


def test_bench_against_transformers_finds_the_same_tokens(bundle, texts):
    result = succeed(
        "bench",
        bundle,
        "--prompts",
        texts,
        "-k",
        2,
        "-n",
        12,
        "--repeats",
        1,
        "--compare",
        "transformers",
        "--json",
        "-",
    )
    report = json.loads(result.stdout)
    assert [row["mode"] for row in report["rows"][2:]] == ["transformers", "transformers early exit"]
    assert [d for d in report["differences"] if not d["is_tie"]] == []
    assert len({row["distinct_4grams"] for row in report["rows"]}) == 1


def test_bench_that_finds_a_wrong_token_exits_with_1(bundle, texts, monkeypatch):
    from edgeskip.runtime.decoding import model

    right = model.Model.complete

    def wrong(self, prompt, **settings):
        made = right(self, prompt, **settings)
        if settings.get("mode") != "self-speculative":
            return made
        return dataclasses.replace(made, token_ids=(*made.token_ids[:-1], 2 + made.token_ids[-1] % 2))

    monkeypatch.setattr(model.Model, "complete", wrong)
    result = run("bench", bundle, "--prompts", texts, "-k", 2, "-n", 8, "--repeats", 1)
    assert result.exit_code == 1
    assert "token 7 is not plain decoding's" in result.stdout
    assert "NOT a tie" in result.stdout


def test_export_says_what_it_made_and_how_to_try_it(checkpoints, tmp_path):
    result = succeed(
        "export",
        checkpoints("llama-gqa"),
        tmp_path / "b",
        "--exit-layer",
        1,
        "--max-length",
        40,
        "--num-speculations",
        2,
    )
    assert result.stdout == ""
    assert "layers[:1] draft" in result.stderr
    assert f"edgeskip generate {tmp_path / 'b'}" in result.stderr
    manifest = json.loads(succeed("inspect", tmp_path / "b", "--json").stdout)
    assert [manifest[key] for key in ("exit_layer", "max_length", "num_speculations", "dtype")] == [1, 40, 2, "fp32"]
    made = json.loads(succeed("generate", tmp_path / "b", "-p", "a", "-n", 3, "--json").stdout)
    assert made["statistics"]["num_speculations"] == 2


def test_a_bundle_of_several_exits_through_the_verbs(checkpoints, texts, tmp_path):
    bundle = tmp_path / "b"
    for exits, message in {
        "3,3": "exit layer: 3 twice; wanted each exit layer once",
        "1,4": "exit layer: 4; wanted 1 to 3",
        "1;3": "'1;3' is no list of whole numbers, such as 4 or 3,5",
    }.items():
        refused = run("export", checkpoints("llama-gqa"), bundle, "-e", exits)
        assert refused.exit_code
        assert message in refused.stderr
    drafting = "layers[:3] (where asked for, layers[:1]) draft"
    assert drafting in succeed("export", checkpoints("llama-gqa"), bundle, "-e", "3,1").stderr
    shown = succeed("inspect", bundle).stdout
    assert drafting in shown
    assert "draft subgraph after layer 3: draft -> middle_1_3 -> head" in shown
    ways = [], ["-e", 3], ["-e", 1], ["-e", "auto"], ["--mode", "autoregressive"]
    made = [succeed("generate", bundle, "-p", "a", "-n", 20, *words).stdout for words in ways]
    assert len(set(made)) == 1
    fixes = {2: "export with this exit layer", 0: "a model of 4 layers can be cut after 1 to 3"}
    verbs = ("generate", "-p", "a"), ("chat",), ("serve", "--port", 0), ("bench", "--prompts", texts, "-n", 8)
    for exit_layer, fix in fixes.items():
        for verb, *options in verbs:
            refused = run(verb, bundle, *options, "-e", exit_layer)
            assert refused.exit_code == 5
            assert_one_line(refused.stdout, refused.stderr)
            assert f"exit layer: {exit_layer}; wanted 1, 3: the bundle is cut there; {fix}" in refused.stderr
    plan = json.loads(succeed("plan", bundle, "-d", "h100", "--dtype", "fp16", "--json").stdout)
    assert (plan["exit_layer"], plan["other_exits"]) == (3, [1])
    assert drafting in succeed("export", checkpoints("llama-gqa"), tmp_path / "c", "-e", 3, "-e", 1).stderr
    grid = ["-e", "3,1", "-e", "auto", "-k", 2, "-k", 3, "-n", 8, "--repeats", 1]
    bench = succeed("bench", bundle, "--prompts", texts, *grid, "--json")
    report = json.loads(bench.stdout)
    found = [(row["exit_layer"], row["num_speculations"]) for row in report["rows"]]
    assert found == [(None, 0), (3, 2), (3, 3), (1, 2), (1, 3), (None, 16)]
    table = succeed("bench", bundle, "--prompts", texts, "-e", "auto", "-n", 8, "--repeats", 1).stdout
    assert "E = auto, K = auto, from the first rounds of a text to the last: K " in table
    assert re.search(r"\nadaptive +auto +auto +\d", table)
    assert re.search(r"\nauto +auto +exit \d +\d", table)
    assert {stage["graph"] for stage in report["stages"]} == {"draft", "middle_1_3", "verify", "head"}


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_a_speculation_length_is_a_number_or_auto(verb, bundle):
    result = run(verb, bundle, "-k", "Auto")
    assert result.exit_code == 2
    assert "'Auto' is neither a whole number nor auto" in result.stderr


def test_options_that_would_do_nothing_are_refused(bundle):
    for words, message in {
        ("bench", bundle, "-e", "auto", "-k", 3): "-k with a number is for an exit: give one, as --exit-layer 3,auto",
        ("plan", bundle, "-d", "h100", "--block-size", 32): "--block-size is for 4 bits: give --weights int4",
        ("check", bundle, "--dialect", "layers"): "'layers' is not one of 'standard', 'ort', 'cpu', 'standard-inputs'",
    }.items():
        result = run(*words)
        assert result.exit_code == 2
        assert message in result.stderr


def test_bench_measures_each_exit_and_length_once(bundle, texts):
    twice = "-e", "3,3", "-k", 2, "-k", 2
    report = succeed("bench", bundle, "--prompts", texts, "-n", 4, *twice, "--repeats", 1, "--json").stdout
    assert [(row["exit_layer"], row["num_speculations"]) for row in json.loads(report)["rows"]] == [(None, 0), (3, 2)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "{tmp}/nowhere", "{tmp}/b", "-e", "2"], 3, "nowhere: no such folder"),
        (["export", "{checkpoint}", "{tmp}/b", "-e", "2", "--revision", "x"], 3, "a folder, which has no revision 'x'"),
        (["export", "{tmp}", "{tmp}/b", "-e", "2"], 3, "config.json: no such file"),
        (["export", "{checkpoint}", "{bundle}", "-e", "2"], 4, "already exists"),
        (["export", "{checkpoint}", "{tmp}/b", "-e", "4"], 5, "exit layer: 4; wanted 1 to 3"),
        (["export", "{checkpoint}", "{tmp}/b", "-e", "2", "--max-length", "97"], 5, "max length: 97; wanted 2 to 96"),
        (["generate", "{tmp}/nowhere", "-p", "a"], 4, "no such folder"),
        (["generate", "{tmp}", "-p", "a"], 4, "no manifest.json, so not a bundle"),
        (["generate", "{bundle}", "-p", ""], 5, "prompt: empty"),
        (["generate", "{bundle}", "-p", "{long}"], 5, "prompt: 101 tokens; wanted at most 96"),
        (["generate", "{bundle}", "-p", "a", "-n", "0"], 5, "max new tokens: 0; wanted a whole number from 1"),
        (["generate", "{bundle}", "-p", "a", "-k", "17"], 5, "num speculations: 17; wanted 1 to 16"),
        (["generate", "{bundle}", "-p", "a", "--stop", ""], 5, "stop: an empty text"),
        (["generate", "{bundle}", "-p", "a", "--chat"], 5, "no chat template"),
        (["generate", "{bundle}", "-f", "{bundle}/weights.safetensors"], 5, "not UTF-8 text"),
        (["generate", "{bf16}", "-p", "a"], 6, "in bf16, which ONNX Runtime does not compute on a CPU"),
        (["bench", "{tmp}/nowhere"], 4, "no such folder"),
        (["bench", "{bundle}", "--prompts", "{tmp}/nowhere"], 5, "nowhere: no such file; give a text file or a folder"),
        (["bench", "{bundle}", "--prompts", "{tmp}"], 5, "no text in it"),
        (["bench", "{bundle}", "-k", "0"], 5, "num speculations: 0; wanted 1 to 16"),
        (["bench", "{bundle}", "-n", "90"], 5, "prompts: one of"),
        (
            ["bench", "{bundle}", "--prompts", "{text}", "-n", "2", "-k", "1", "--json", "{tmp}/no/x"],
            5,
            "cannot be written",
        ),
        (["inspect", "{tmp}/nowhere"], 4, "no such folder"),
        (["train", "{tmp}/nowhere.toml"], 7, "nowhere.toml: no such file"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(arguments, code, message, bundle, bundles, checkpoints, tmp_path):
    names = {
        "tmp": tmp_path / "empty",
        "bundle": bundle,
        "bf16": bundles("llama-gqa", dtype="bf16").folder,
        "checkpoint": checkpoints("llama-gqa"),
        "text": tmp_path / "text",
        "long": "x" * 100,
    }
    names["tmp"].mkdir()
    names["text"].write_text("a text")
    result = run(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == code
    assert_one_line(result.stdout, result.stderr)
    assert message in result.stderr
    assert list(names["tmp"].iterdir()) == []


def test_an_error_in_a_process_of_its_own(tmp_path):
    out = process("generate", tmp_path / "nowhere", "--prompt", "a")
    assert out.returncode == 4
    assert_one_line(out.stdout, out.stderr)


def test_a_damaged_bundle_is_told_before_anything_is_printed(spoiled):
    data = bytearray((spoiled / "draft.ort.onnx").read_bytes())
    data[100] ^= 1
    (spoiled / "draft.ort.onnx").write_bytes(data)
    result = run("generate", spoiled, "-p", "a")
    assert result.exit_code == 4
    assert_one_line(result.stdout, result.stderr)
    assert "draft.ort.onnx: sha256 is" in result.stderr


@pytest.mark.parametrize(
    ("verb", "module", "extra"),
    [
        (["export", "{checkpoint}", "{tmp}/b", "-e", "2"], "onnx_ir", "export"),
        (["export", "{checkpoint}", "{tmp}/b", "-e", "2"], "safetensors", "export"),
        (["train", "recipe.toml"], "torch", "train"),
        (["train", "recipe.toml"], "accelerate", "train"),
        (["demo"], "onnxscript", "demo"),
        (["demo"], "onnxruntime", "demo"),
        (["generate", "{bundle}", "-p", "a"], "onnxruntime", "cpu"),
        (["bench", "{bundle}", "--prompts", "{text}", "-n", "2"], "onnxruntime", "cpu"),
        (["bench", "{bundle}", "--prompts", "{text}", "--compare", "transformers"], "torch", "train,export"),
        (["bench", "{bundle}", "--prompts", "{text}", "--compare", "transformers"], "ml_dtypes", "train,export"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    verb, module, extra, bundle, checkpoints, tmp_path, monkeypatch
):
    (tmp_path / "text").write_text("a text")
    names = {"bundle": bundle, "checkpoint": checkpoints("llama-gqa"), "tmp": tmp_path, "text": tmp_path / "text"}
    monkeypatch.setitem(sys.modules, module, None)  # neither found nor importable
    result = run(*(argument.format(**names) for argument in verb))
    assert result.exit_code == 6
    assert_one_line(result.stdout, result.stderr)
    assert module in result.stderr
    assert f'pip install "edgeskip[{extra}]"' in result.stderr
    assert not (tmp_path / "b").exists()


def test_a_bug_keeps_its_traceback(bundle, monkeypatch):
    from edgeskip.runtime.bundle import manifest

    def fail(_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(manifest, "read_bundle", fail)
    assert isinstance(run("inspect", bundle).exception, ZeroDivisionError)


def test_an_interrupt_is_one_line(bundle, monkeypatch):
    from edgeskip.runtime.decoding import model

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "decode", interrupt)
    result = run("generate", bundle, "-p", "a")
    assert result.exit_code == 130
    assert result.stderr == "edgeskip: interrupted\n"


def test_a_bundle_whose_default_is_one_draft(spoiled):
    edit_json(spoiled / MANIFEST, lambda m: m.update(num_speculations=1))
    made = json.loads(succeed("generate", spoiled, "-p", "a", "-n", 9, "--json").stdout)
    assert np.size(made["statistics"]["acceptance_histogram"]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_stdout_is_one_line(bundle):
    command = [sys.executable, "-m", "edgeskip.cli", "inspect", str(bundle)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (5, "edgeskip: stdout: cannot be written (No space left on device)\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_report_goes_into_a_pipe_and_not_in_its_place(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "edgeskip.cli", "plan", "llama3.2-1b", "-d", "h100", "--json", str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        assert json.loads(pipe.read_text())["num_layers"] == 16
        assert process.wait() == 0
    assert pipe.is_fifo()


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(bundle, texts, tmp_path):
    (tmp_path / "old.json").write_text("kept")
    for option in (f"--html={tmp_path}", f"--json={tmp_path / 'none' / 'x.json'}"):
        result = run("bench", bundle, "--prompts", texts, "-k", 2, "-n", 8, option)
        assert result.exit_code == 5
        assert "cannot be written (" in result.stderr
        assert result.stdout == ""
    same = tmp_path / "old.json"
    result = run("bench", bundle, "--prompts", texts, "-k", 2, "-n", 8, "--html", same, "--json", same)
    assert (result.exit_code, same.read_text()) == (5, "kept")


SMALL = ("-n", 6, "-k", 2)
REPORTS = {
    "generate": ("{bundle}", "-p", "a", *SMALL),
    "bench": ("{bundle}", "--prompts", "{texts}", "--repeats", 1, *SMALL),
    "tune": ("{bundle}", "--prompts", "{texts}", *SMALL),
    "check": ("{bundle}", "--prompts", "{texts}", "--num-prompts", 1),
    "inspect": ("{bundle}",),
    "plan": ("llama3.2-1b", "-d", "h100"),
    "doctor": (),
}


@pytest.mark.parametrize("verb", REPORTS)
def test_json_alone_is_stdout_and_with_a_file_goes_there(verb, bundle, texts, tmp_path):
    arguments = [str(one).format(bundle=bundle, texts=texts) for one in REPORTS[verb]]
    file = tmp_path / "report.json"
    shown = succeed(verb, *arguments, "--json", file).stdout
    assert shown
    assert not shown.startswith("{")
    kept = json.loads(file.read_text())
    for alone in (["--json"], ["--json", "-"]):
        printed = succeed(verb, *arguments, *alone).stdout
        assert json.loads(printed).keys() == kept.keys()
    first = (
        succeed(verb, "--json", *arguments) if arguments[:1] == [str(bundle)] else succeed(verb, *arguments, "--json")
    )
    assert json.loads(first.stdout).keys() == kept.keys()  # a folder after --json is the bundle


def test_html_alone_is_stdout(bundle, texts):
    result = succeed("bench", "--html", bundle, "--prompts", texts, "--repeats", 1, *SMALL)
    assert result.stdout.startswith("<!DOCTYPE html>")
    assert "tokens/s" in result.stderr


def test_a_file_after_json_is_never_taken_for_the_bundle(bundle, tmp_path):
    result = run("inspect", "--json", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "Missing argument 'BUNDLE'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def complete(*words, shell="bash"):
    environment = os.environ | {"_EDGESKIP_COMPLETE": f"{shell}_complete", "COMP_CWORD": str(len(words))}
    command = [sys.executable, "-c", "from edgeskip.cli import main; main(prog_name='edgeskip')"]
    environment["COMP_WORDS"] = " ".join(["edgeskip", *words])
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    return out.stdout.split()


def test_a_shell_completes_verbs_options_bundles_and_names():
    assert complete("") == [f"plain,{verb}" for verb in main.list_commands(None)]
    assert complete("ge") == ["plain,generate"]
    assert complete("generate", "") == ["dir,"]
    assert complete("generate", "b", "--mo") == ["plain,--mode"]
    assert complete("generate", "b", "--mode", "early") == ["plain,early-exit"]
    assert "plain,orin-nano-8gb" in complete("plan", "--device", "orin")
    assert "plain,llama3-8b" in complete("export", "--recipe", "")
    assert "plain,orin-nano-8gb" in complete("recipes", "show", "orin")


def test_progress_is_a_line_from_time_to_time_where_there_is_no_terminal(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "INTERVAL_S", 0.0)
    lines = succeed("export", checkpoints("llama-gqa"), tmp_path / "b", "-e", 2).stderr.splitlines()
    assert lines[-3] == "writing weights: 100%"
    seconds = iter([0.0, 9.0, 11.0, 11.0, 20.0, 22.0, 22.0])
    monkeypatch.setattr(terminal, "INTERVAL_S", 10.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    console = terminal.console()
    with console.capture() as capture:
        update = terminal._progress_lines(console)
        for done in range(1, 5):
            update("measuring [1]", done, 4)
    assert capture.get() == "measuring [1]: 50%\nmeasuring [1]: 100%\n"


def test_a_reader_that_ends_early_is_no_error(bundle):
    """As `edgeskip generate ... | head -c 1`: exit code 141 = 128 + SIGPIPE, and not a word."""
    for arguments in (["generate", bundle, "-p", "a", "-n", 60], ["inspect", bundle], ["recipes", "list"]):
        command = [sys.executable, "-m", "edgeskip.cli", *map(str, arguments)]
        reading, writing = os.pipe()
        os.close(reading)
        out = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (out.returncode, out.stderr) == (141, "")


def test_an_interrupt_in_the_middle_of_a_line_has_a_line_of_its_own(bundle, monkeypatch):
    from edgeskip.runtime.decoding import model

    right = model.Model.generate

    def interrupted(self, *arguments, **settings):
        pieces = right(self, *arguments, **settings)
        yield next(piece for piece in pieces if piece.text)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.Model, "generate", interrupted)
    result = run("generate", bundle, "-p", "a")
    assert result.exit_code == 130
    assert result.stdout.endswith("\n")
    assert result.stdout.strip()
    assert result.output.endswith("\nedgeskip: interrupted\n")


def test_inspect_shows_engines_and_what_is_wrong_with_them(bundles, tmp_path):
    whole = with_engines(bundles("llama-gqa", exit_layer=3), tmp_path / "whole")
    (engines,) = read_engines(whole)
    text = succeed("inspect", whole.folder).stdout
    size = sum(path.stat().st_size for path in engines.folder.glob("*.engine")) / 1e6
    line = f"engines: tensorrt {VERSION}, SM 87, standard, fp32, {size:.2f} MB; "
    assert f"{line}not for this machine: " in text
    for dialect in ("standard (draft.onnx", "ort (draft.ort.onnx", "layers (first.layers.onnx"):
        assert f"{dialect}, ...)" in text
    packed = pack(whole, [engines], tmp_path / "packed").folder
    text = succeed("inspect", packed).stdout
    came = f"{line}came with the bundle, and are not loaded unless added: edgeskip cache add {packed}"
    assert [line in text for line in (f"{line}not for this machine", came)] == [True, True]
    engines.path("draft").unlink()
    text = succeed("inspect", whole.folder).stdout
    assert re.search(r"engines: of no use: .*draft.engine: no such file", text)
    shutil.rmtree(engines.folder)
    text = succeed("inspect", packed).stdout
    assert [line in text for line in (f"{line}not for this machine", came)] == [False, True]
    next(packed.rglob("head.engine")).unlink()
    assert re.search(r"engines: of no use: .*head.engine: no such file", succeed("inspect", packed).stdout)
    text = succeed("inspect", whole.folder).stdout
    assert "engines: none" in text
    assert "engines can be built from standard with TensorRT 10.15 or later, layers with TensorRT 10.3 or later" in text


def test_inspect_says_which_engines_fit(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeskip.runtime.backends.device.CudaDevice", lambda: nullcontext(HostDevice()))
    monkeypatch.setattr(trt, "import_tensorrt", lambda backend: StandInTensorRT(rtx=backend.endswith("rtx")))
    bundle = with_engines(bundles("llama-gqa"), tmp_path / "b")
    with_engines(bundle, bundle.folder, sm=86)
    text = succeed("inspect", bundle.folder).stdout
    assert re.search(r"SM 87, .* they fit this machine", text)
    assert re.search(r"SM 86, .* not for this machine: built for SM 86, this GPU is SM 87", text)


def test_a_bundle_of_the_recipes_name_is_no_checkpoint(tmp_path, monkeypatch):
    """`edgeskip export --recipe python-10m` writes such a bundle, and a tuned recipe beside it names its checkpoint."""
    monkeypatch.chdir(tmp_path)
    succeed("export", "--recipe", "python-10m", "--max-length", 64)
    (tmp_path / "tuned.toml").write_text('checkpoint = "python-10m"\nexit_layer = 2\nsource = "tune"\n')
    succeed("export", "--recipe", "tuned.toml", "b", "--max-length", 64)
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["exit_layer"] == 2


def test_a_bundle_is_planned_as_it_was_exported(bundles):
    bundle = bundles("llama-gqa", exit_layer=3, num_speculations=6, dtype="bf16", max_length=64)
    plan = json.loads(succeed("plan", bundle.folder, "-d", "h100", "--json").stdout)
    own = {"exit_layer": 3, "num_speculations": 6, "dtype": "bf16", "max_length": 64, "model": bundle.folder.name}
    assert own.items() <= plan.items()
    other = ("--exit-layer", 2, "-k", 1, "--dtype", "fp16", "--max-length", 32)
    plan = json.loads(succeed("plan", bundle.folder, "-d", "h100", *other, "--json").stdout)
    assert {"exit_layer": 2, "num_speculations": 1, "dtype": "fp16", "max_length": 32}.items() <= plan.items()


def test_complete_takes_what_generate_takes():
    ours, theirs = (inspect.signature(getattr(edgeskip.Model, name)).parameters for name in ("complete", "generate"))
    assert list(ours.values()) == list(theirs.values())
