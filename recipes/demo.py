"""The demonstration: the checkpoint that ships with edgeskip, exported and decoded both ways."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bench.measure import BenchReport, BenchSettings, run_bench
from edgeskip.runtime.bench.prompts import load_prompts
from edgeskip.runtime.bundle.manifest import Progress
from edgeskip.runtime.files import scratch_folder
from edgeskip.runtime.load import load
from edgeskip.runtime.terminal import stream

CHECKPOINT = Path(__file__).parent / "checkpoints" / "python-10m"
EXIT_LAYER = 3
NUM_SPECULATIONS = 4
PROMPT = '''import json
from pathlib import Path


def load_config(path):
    """Load a configuration file."""
'''


def run_demo(console: Console, keep: Path | None, threads: int, progress: Progress) -> bool:
    """Exports, decodes, compares and sums up; returns whether all tokens were the same.

    Args:
        console: where to print.
        keep: folder for the bundle; a temporary one if None.
        threads: CPU threads; 0 means one per core.
        progress: called during long work.
    """
    with scratch_folder("demo") as scratch:
        bundle = keep or scratch / "bundle"
        checkpoint = open_checkpoint(str(CHECKPOINT))
        late = checkpoint.architecture.num_layers - EXIT_LAYER
        console.print(
            f"[bold]1. Export[/bold]  A Llama of 10 million parameters, trained with LayerSkip on Python code.\n"
            f"   Its first {EXIT_LAYER} layers become the draft graph, the other {late} the verify graph; both end in\n"
            "   the same head, and every weight is stored once."
        )
        settings = ExportSettings(EXIT_LAYER, num_speculations=NUM_SPECULATIONS)
        manifest = export_bundle(checkpoint, bundle, settings, progress).manifest
        console.print(f"   {len(manifest.files)} files, {manifest.weights_bytes / 1e6:.0f} MB of weights.\n")
        with load(bundle, threads=threads, progress=progress) as model:
            console.print("[bold]2. Decode[/bold]  On a terminal, green text was drafted by the early layers.\n")
            console.print(PROMPT, end="", style="dim", markup=False)
            stream(model.generate(PROMPT, max_new_tokens=120), console)
            prompts = load_prompts()
            console.print(
                f"\n[bold]3. Compare[/bold]  Plain and self-speculative take turns on {len(prompts)} prompts."
            )
            report = run_bench(model, prompts, BenchSettings((NUM_SPECULATIONS,), 128, 2), progress=progress)
        _print_summary(report, console)
        if keep:
            console.print(f"\nThe bundle is in {keep}: edgeskip generate {keep} --prompt 'import os'", markup=False)
    return report.faults == 0


def _print_summary(report: BenchReport, console: Console) -> None:
    plain, fast = report.rows
    right = 10 * (fast.match_rate or 0.0)
    console.print(
        f"   {report.backend}\n\n"
        f"   plain decoding     {plain.tokens_per_second:6.0f} tokens/s\n"
        f"   self-speculative   {fast.tokens_per_second:6.0f} tokens/s   "
        f"[bold]{fast.speedup:.2f} times as fast[/bold]\n\n"
        f"   The early layers draft, the others check all drafts in one pass: {right:.1f} of 10 checked drafts were\n"
        f"   right, and a round gave {fast.tokens_per_round:.2f} tokens where plain decoding gives 1."
    )
    if report.differences:
        ties = len(report.differences) - report.faults
        console.print(f"   {ties} texts diverge at a tie between two tokens; {report.faults} differ otherwise.")
    else:
        console.print(f"   All {report.prompts} texts are the same, token by token.")
