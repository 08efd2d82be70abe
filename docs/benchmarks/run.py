"""Measures what docs/benchmarks.md shows, for one published shape at several match rates; needs a GPU.

    python docs/benchmarks/run.py llama3.2-1b --exit-layer 4 --compare 0.8

Every step is an `edgeskip` command, printed before it runs; they share one process only to import once. Weights are
synthetic, so nothing is downloaded. Checkpoint and bundle are written into `--work` and removed behind each rate:
give a folder in memory (/dev/shm) where there is room for twice the weights.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

from edgeskip.cli import main

CAPACITY, PROMPT_TOKENS, NEW_TOKENS = 512, 384, 128
RATES = (0.6, 0.7, 0.8, 0.9)


def run(*arguments: object) -> None:
    """One edgeskip command."""
    sys.argv = ["edgeskip", *map(str, arguments)]
    print(f"[{time.strftime('%H:%M:%S')}] {shlex.join(sys.argv)}", flush=True)
    try:
        main(sys.argv[1:], standalone_mode=False)
    except SystemExit as stopped:  # tokens that differ: the report says which
        print(f"exit code {stopped.code}", flush=True)


def measure(shape: str, exit_layer: int, rate: float, grid: list[int], compare: bool, work: Path, output: Path) -> None:
    """Makes a model of this shape and match rate, measures it, and removes it."""
    checkpoint, bundle = work / f"{shape}-{rate}", work / f"{shape}-{rate}-bundle"
    try:
        run("synth", shape, checkpoint, "--exit-layer", exit_layer, "--match-rate", rate)
        _free_torch_memory()
        run("export", checkpoint, bundle, "--exit-layer", exit_layer, "--dtype", "fp16", "--max-length", CAPACITY)
        speculations = [argument for k in grid for argument in ("-k", k)]
        others = ["--compare", "transformers"] if compare else []
        sizes = ["--prompt-tokens", PROMPT_TOKENS, "--max-new-tokens", NEW_TOKENS, "--num-prompts", 4]
        run("bench", bundle, *speculations, *sizes, *others, "--json", output / f"{shape}-{rate}.json")
        _free_torch_memory()
    finally:
        for folder in (checkpoint, bundle):
            shutil.rmtree(folder, ignore_errors=True)


def _free_torch_memory() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--exit-layer", type=int, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--compare", type=float, nargs="*", default=(), help="rates at which transformers runs too")
    parser.add_argument("--grid", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for one in given.rates:
        measure(given.shape, given.exit_layer, one, given.grid, one in given.compare, given.work, given.output)
