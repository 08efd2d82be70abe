"""Compares what `edgeskip tune` picks with measurements of every pair, and writes the tables of docs/tuning.md.

    python docs/tuning/run.py                            seven minutes on two cores, with nothing else running
    python docs/tuning/run.py --confidence-threshold 0   the same with K drafts in every round, as on a GPU
    python docs/tuning/run.py --check                    fails where the page shows other figures than the kept reports

The shipped checkpoint is exported at every exit layer. In each pass tune runs from the bundles of three of them, then
plain decoding and every pair continue the same prompts, prompt by prompt and in a new order each time. Whatever else
runs only ever adds to a time, so each pair's time for a prompt is that of its quietest pass; and what is measured while
other processes take more than a little of the machine is measured again (on Linux).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import edgeskip
from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.demo import CHECKPOINT
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bench.validity import Watch
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.packages import RUNTIME_PACKAGES, versions
from edgeskip.runtime.provenance import hardware_names

FOLDER = Path(__file__).parent
PAGE = FOLDER.with_suffix(".md")
START, END = "<!-- run.py writes from here -->\n", "<!-- to here -->\n"
LENGTHS, NEW_TOKENS, TUNED = range(1, 9), 128, (3, 4, 6)

GROUP, DISTURBED, TRIES = 11, 0.04, 200

T = TypeVar("T")
Pair = tuple[int, int]
PLAIN: Pair = (0, 0)


def measure(work: Path, passes: int, num_prompts: int, threshold: float) -> dict[str, Any]:
    """Exports, tunes and measures."""
    checkpoint = open_checkpoint(str(CHECKPOINT))
    layers = range(1, checkpoint.architecture.num_layers)
    for e in layers:
        export_bundle(checkpoint, work / f"e{e}", ExportSettings(e))
    tuned: list[tuple[int, dict[str, Any]]] = []
    seconds: dict[Pair, list[list[float]]] = {}
    with ExitStack() as stack:
        models = {e: stack.enter_context(edgeskip.load(work / f"e{e}")) for e in layers}
        prompts = [models[1].encode(prompt) for prompt in load_prompts()[:num_prompts]]
        for number in range(passes):
            tuned += [(e, undisturbed(partial(tune, work, e, num_prompts, threshold))) for e in TUNED]
            for pair, times in sweep(models, prompts, threshold, seed=number).items():
                seconds.setdefault(pair, []).append(times)
            print(f"[{time.strftime('%H:%M:%S')}] pass {number + 1} of {passes}", flush=True)
        tokens = sum(len(complete(models[1], ids, PLAIN, threshold)[1]) - 1 for ids in prompts)
        hardware = models[1].session.hardware
    ms = {pair: 1e3 * sum(map(min, zip(*passes_, strict=True))) / tokens for pair, passes_ in seconds.items()}
    return {
        "hardware": dataclasses.asdict(hardware_names(hardware)),
        "versions": versions(RUNTIME_PACKAGES),
        "command": f"python docs/tuning/run.py --confidence-threshold {threshold:g} --passes {passes} "
        f"--num-prompts {num_prompts}",
        "confidence_threshold": threshold,
        "new_tokens": NEW_TOKENS,
        "plain_ms_per_token": ms.pop(PLAIN),
        "num_speculations": [*LENGTHS],
        "measured_ms_per_token": {e: [round(ms[e, k], 4) for k in LENGTHS] for e in layers},
        "tuned": [
            {
                "from_exit_layer": e,
                "plain_ms_per_token": report["measured"]["plain_ms_per_token"],
                "foretold_ms_per_token": {
                    e: [round(pair["ms_per_token"], 4) for pair in report["pairs"] if pair["exit_layer"] == e]
                    for e in layers
                },
            }
            for e, report in tuned
        ],
    }


def tune(work: Path, exit_layer: int, num_prompts: int, threshold: float) -> dict[str, Any]:
    """Runs `edgeskip tune` on the bundle of one exit layer, in this process."""
    path = work / "tune.json"
    ks = [argument for k in LENGTHS for argument in ("-k", str(k))]
    sizes = ["--num-prompts", str(num_prompts), "--max-new-tokens", str(NEW_TOKENS)]
    settings = [*ks, *sizes, "--confidence-threshold", str(threshold)]
    main(["tune", str(work / f"e{exit_layer}"), *settings, "--json", str(path)], standalone_mode=False)
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def sweep(models: dict[int, Model], prompts: list[list[int]], threshold: float, seed: int) -> dict[Pair, list[float]]:
    """Seconds behind the first token, by pair and prompt; plain decoding is that of one bundle."""
    order = random.Random(seed)
    runs = [PLAIN, *((e, k) for e in models for k in LENGTHS)]
    times: dict[Pair, list[float]] = {pair: [] for pair in runs}
    for ids in prompts:
        order.shuffle(runs)
        for start in range(0, len(runs), GROUP):
            for pair, seconds in undisturbed(partial(run_all, models, ids, runs[start : start + GROUP], threshold)):
                times[pair].append(seconds)
    return times


def run_all(models: dict[int, Model], ids: list[int], pairs: list[Pair], threshold: float) -> list[tuple[Pair, float]]:
    """One prompt with each of these pairs."""
    return [(pair, complete(models[pair[0] or min(models)], ids, pair, threshold)[0]) for pair in pairs]


def undisturbed(work: Callable[[], T]) -> T:
    """What the work gives, done again where other processes took more than DISTURBED of the machine's time."""
    for _ in range(TRIES):
        watch = Watch("cpu")
        result = work()
        share = watch.others_share()
        if share < DISTURBED:
            return result
        print(f"[{time.strftime('%H:%M:%S')}] others took {share:.0%} of the machine: once more", flush=True)
        time.sleep(1)
    sys.exit("the machine is not idle")


def complete(model: Model, ids: list[int], pair: Pair, threshold: float) -> tuple[float, tuple[int, ...]]:
    """Decodes a prompt, plainly where K is 0: seconds behind the first token, and the tokens."""
    mode = "self-speculative" if pair[1] else "autoregressive"
    drafting = {"num_speculations": pair[1], "confidence_threshold": threshold} if pair[1] else {}
    generation = model.complete(ids, mode=mode, max_new_tokens=NEW_TOKENS, **drafting)
    s = generation.statistics
    return (s.ms_per_token or 0.0) * (s.new_tokens - 1) / 1e3, generation.token_ids


def tables(report: dict[str, Any]) -> Iterator[str]:
    """The generated part of the page, line by line."""
    measured = _by_pair(report, report["measured_ms_per_token"])
    best = min(measured, key=lambda pair: measured[pair])
    ks = report["num_speculations"]
    plain = report["plain_ms_per_token"]
    threshold = report["confidence_threshold"]
    yield "### " + (f"Drafting ends below a confidence of {threshold:g}" if threshold else "Always K drafts")
    yield ""
    yield (
        f"Every pair measured, ms per token; plain decoding takes {plain:.3f}. {report['hardware']['device']}, ONNX "
        f"Runtime {report['versions']['onnxruntime']}, fp32, {report['new_tokens']} new tokens per prompt: "
        f"`{report['command']}`."
    )
    yield ""
    yield "| exit layer | " + " | ".join(f"K = {k}" for k in ks) + " |"
    yield "|---:|" + "---:|" * len(ks)
    for e in sorted({e for e, _ in measured}):
        cells = (f"**{measured[e, k]:.3f}**" if (e, k) == best else f"{measured[e, k]:.3f}" for k in ks)
        yield f"| {e} | " + " | ".join(cells) + " |"
    yield ""
    yield (
        f"What tune picked. *Regret* is the picked pair's measured time over that of the best, E = {best[0]} "
        f"K = {best[1]}, less one. *Off* is how far a predicted speedup over plain decoding is from the measured one: "
        "the median and the largest over all pairs."
    )
    yield ""
    yield "| bundle's E | picked | predicted ms | measured ms | regret | off, median | off, largest |"
    yield "|---:|---|---:|---:|---:|---:|---:|"
    for one in sorted(report["tuned"], key=lambda one: one["from_exit_layer"]):
        foretold = _by_pair(report, one["foretold_ms_per_token"])
        picked = min(foretold, key=lambda pair: foretold[pair])
        scale = one["plain_ms_per_token"] / plain
        off = [abs(measured[pair] * scale / ms - 1) for pair, ms in foretold.items()]
        yield (
            f"| {one['from_exit_layer']} | E = {picked[0]} K = {picked[1]} | {foretold[picked]:.3f} "
            f"| {measured[picked]:.3f} | {measured[picked] / measured[best] - 1:.1%} "
            f"| {median(off):.1%} | {max(off):.1%} |"
        )


def _by_pair(report: dict[str, Any], table: dict[str, list[float]]) -> dict[Pair, float]:
    return {(int(e), k): ms for e, row in table.items() for k, ms in zip(report["num_speculations"], row, strict=True)}


def page() -> str:
    """The page with its tables as the kept reports have them."""
    reports = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json")))
    head, rest = PAGE.read_text(encoding="utf-8").split(START)
    return (
        head
        + START
        + "\n"
        + "\n".join(line for report in reports for line in (*tables(report), ""))
        + "\n"
        + END
        + rest.split(END)[1]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        if page() != PAGE.read_text(encoding="utf-8"):
            sys.exit(f"{PAGE}: not what the reports say; run python docs/tuning/run.py")
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = measure(Path(folder), given.passes, given.num_prompts, given.confidence_threshold)
        report = FOLDER / f"{CHECKPOINT.name}-{given.confidence_threshold:g}.json"
        report.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(), encoding="utf-8")
