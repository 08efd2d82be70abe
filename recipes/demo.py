"""The demonstration: the checkpoint that ships with edgeskip, exported and decoded both ways."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.runtime.bench import BenchReport, BenchSettings, load_prompts, run_bench
from edgeskip.runtime.generate import load
from edgeskip.runtime.manifest import Progress
from edgeskip.runtime.report import stream

CHECKPOINT = Path(__file__).parent / "checkpoints" / "python-10m"
EXIT_LAYER = 4
NUM_SPECULATIONS = 4
PROMPT = '''import json
from pathlib import Path


def load_config(path):
    """Load a configuration file."""
'''


def run_demo(console: Console, keep: Path | None, threads: int, progress: Progress) -> bool:
    """Exports, decodes, compares and sums up; returns whether all tokens were the same.

    Args:
        console: where it is shown.
        keep: folder for the bundle; a temporary one if None.
        threads: of the CPU; 0 means one a core.
        progress: told of long work.
    """
    with tempfile.TemporaryDirectory(prefix="edgeskip-") as temporary:
        bundle = keep or Path(temporary) / "bundle"
        checkpoint = open_checkpoint(str(CHECKPOINT))
        layers = checkpoint.architecture.num_layers
        console.print(
            f"[bold]1. Export[/bold]  A Llama of 10 million parameters and {layers} layers, trained with LayerSkip on "
            f"Python code.\n   Its first {EXIT_LAYER} layers become the draft graph, the other {layers - EXIT_LAYER} "
            "the verify graph; the weights are stored once."
        )
        exported = export_bundle(checkpoint, bundle, ExportSettings(EXIT_LAYER, num_speculations=NUM_SPECULATIONS), progress)
        console.print(f"   {len(exported.manifest.files)} files, {exported.manifest.weights_bytes / 1e6:.0f} MB of weights.\n")
        with load(bundle, threads=threads, progress=progress) as model:
            console.print("[bold]2. Decode[/bold]  Green text was drafted by the early layers and confirmed by the others.\n")
            console.print(PROMPT, end="", style="dim", markup=False)
            stream(model.generate(PROMPT, max_new_tokens=120), console)
            console.print(f"\n[bold]3. Compare[/bold]  {model.session.description}; plain and self-speculative take turns.\n")
            report = run_bench(model, load_prompts()[:12], BenchSettings((NUM_SPECULATIONS,), 100, 3), progress=progress)
        _print_summary(report, console)
        if keep:
            console.print(f"\nThe bundle is in {keep}: edgeskip generate {keep} --prompt 'import os'", markup=False)
    return report.faults == 0


def _print_summary(report: BenchReport, console: Console) -> None:
    plain, fast = report.rows
    console.print(f"   plain decoding     {plain.tokens_per_second:6.0f} tokens/s")
    console.print(f"   self-speculative   {fast.tokens_per_second:6.0f} tokens/s   [bold]{fast.speedup:.2f} times as fast[/bold]")
    tested = 10 * (fast.match_rate or 0.0)
    console.print(
        f"\n   Each round drafts {fast.num_speculations} tokens with a third of the model and checks them with the rest in "
        f"one pass:\n   {tested:.1f} of 10 checked drafts were right, which gave {fast.tokens_per_round:.2f} tokens a round."
    )
    if report.differences:
        ties = len(report.differences) - report.faults
        console.print(f"   {report.faults} texts differ, and {ties} part at a tie between two tokens.")
    else:
        console.print(f"   All {report.prompts} texts are the same, token by token.")
