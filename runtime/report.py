"""What people see: streamed text, statistics, tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgeskip.runtime.bench import BenchReport, BenchRow
from edgeskip.runtime.generate import Generation, Model, Piece
from edgeskip.runtime.graphs import DIALECTS
from edgeskip.runtime.manifest import Bundle
from edgeskip.runtime.session import Memory
from edgeskip.runtime.statistics import Statistics

DRAFTED = "green"


def stream(pieces: Iterable[Piece], console: Console) -> Generation:
    """Prints text as it comes, accepted drafts in colour; returns the generation."""
    generation = None
    for piece in pieces:
        if console.is_terminal:  # the model must not drive the terminal
            console.out(piece.text.replace("\x1b", "\u241b"), style=DRAFTED if piece.drafted else None, end="")
        else:
            console.file.write(piece.text)
        console.file.flush()
        generation = piece.generation
    console.file.write("\n")
    assert generation is not None
    return generation


def print_model(model: Model, console: Console) -> None:
    """What was chosen to run the bundle, and the memory it holds."""
    weights = "[bold]synthetic weights[/bold]; " if model.bundle.manifest.synthetic else ""
    console.print(f"[dim]{weights}{escape(model.session.description)}; {_memory(model.session.memory())}[/dim]")


def _memory(memory: Memory) -> str:
    kinds = {"weights": memory.weights, "caches": memory.caches, "workspace": memory.workspace, "other": memory.other}
    return "MB: " + ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in kinds.items() if size is not None)


def print_statistics(generation: Generation, console: Console) -> None:
    """Two or three lines behind a streamed text."""
    s = generation.statistics
    rate = f"{s.tokens_per_second:.0f} tokens/s" if s.tokens_per_second else "one token"
    console.print(
        f"[dim]{s.new_tokens} tokens, {rate}, first after {s.time_to_first_token_ms:.0f} ms; "
        f"ended by {generation.stop_reason}[/dim]"
    )
    if s.acceptance_rate is not None:
        console.print(
            f"[dim]{s.tokens_per_round:.2f} tokens a round with {s.num_speculations} drafts; "
            f"acceptance {s.acceptance_rate:.0%}, match {s.match_rate:.0%}; {histogram(s)}[/dim]"
        )


def histogram(s: Statistics) -> str:
    """Rounds by accepted drafts, as bars: `0 ▂ 1 ▁ 2 ▃ 3 █`."""
    most = max(s.acceptance_histogram, default=0) or 1
    bars = " ▁▂▃▄▅▆▇█"
    return "accepted " + " ".join(f"{a}{bars[-(-n * 8 // most)]}" for a, n in enumerate(s.acceptance_histogram))


def print_bench(report: BenchReport, console: Console) -> None:
    """The tables of a bench, and what differed."""
    settings, plain = report.settings, report.rows[0]
    best = max((row for row in report.rows if row.num_speculations), key=lambda row: row.speedup, default=None)
    synthetic = ", [bold]synthetic weights[/bold]" if report.synthetic else ""
    console.print(
        f"{escape(report.source)}{synthetic}, exit layer {report.exit_layer} of {report.num_layers}; "
        f"{escape(report.backend)}; {escape(report.hardware.device)}"
    )
    speed = table("mode", "K", "tokens/s", "ms", "speedup", "accept", "match", "per round")
    for row in report.rows:
        speed.add_row(*_speed_cells(row), style="bold" if row is best else "")
    console.print(speed)
    console.print(
        f"{report.prompts} prompts, {settings.max_new_tokens} tokens each, medians of {settings.repeats} interleaved "
        f"repeats; ms a token; {plain.distinct_tokens:.0%} of tokens and {plain.distinct_4grams:.0%} of 4-grams "
        "distinct; "
        + (
            f"drafting ends below a confidence of {settings.confidence_threshold:g}\n"
            if settings.confidence_threshold
            else "K drafts always\n"
        )
    )
    console.print(
        f"An ideal plain decoder, which only reads {sum(report.weight_bytes.values()) / 1e9:.2f} GB of weights at the "
        f"{report.copy_gb_per_s:.0f} GB/s of a copy: {report.ideal_ms_per_token:.3f} ms a token"
        + (f"; the best K takes {best.ms_per_token:.3f}.\n" if best else ".\n")
    )
    _print_rounds(report, console)
    stages = table("graph", "rows", "ms", "MB", "GB/s", "of a copy")
    for stage in report.stages:
        cells = (f"{stage.ms:.3f}", f"{stage.bytes / 1e6:.1f}", f"{stage.gb_per_s:.0f}", f"{stage.share_of_copy:.0%}")
        stages.add_row(stage.graph, str(stage.rows), *cells)
    console.print("Each graph by itself, and what it has to read:")
    console.print(stages)
    console.print(_memory(report.memory_bytes) + "\n")
    for d in report.differences:
        what = "a tie, legal" if d.is_tie else "NOT a tie"
        console.print(
            f"{d.mode} K={d.num_speculations}, prompt {d.prompt}: token {d.position} is not plain decoding's; "
            f"the lower of their logits lies {d.gap:.2g} below the top: {what}"
        )
    if not report.differences:
        console.print("Every mode gave exactly the tokens of plain decoding.")


def _print_rounds(report: BenchReport, console: Console) -> None:
    """Where a round's time goes, for each K."""
    names = list(report.rows[0].stage_ms_per_round or ())
    rounds = table("K", *(f"{name} ms" for name in names), "host ms", "share", "first token ms")
    for row in report.rows:
        if row.stage_ms_per_round is not None:
            times = [*row.stage_ms_per_round.values(), row.host_ms_per_round]
            rounds.add_row(
                str(row.num_speculations),
                *(f"{ms:.3f}" for ms in times),
                f"{row.host_share:.1%}",
                f"{row.time_to_first_token_ms:.1f}",
            )
    console.print("Where a round's time goes:")
    console.print(rounds)


def table(first: str, *others: str) -> Table:
    """A table of a name and figures behind it."""
    made = Table(box=None, pad_edge=False, padding=(0, 1))
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def _speed_cells(row: BenchRow) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        row.mode,
        str(row.num_speculations or ""),
        f"{row.tokens_per_second:.0f}",
        f"{row.ms_per_token:.3f}",
        f"{row.speedup:.2f}x",
        share(row.acceptance_rate),
        share(row.match_rate),
        "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
    ]


def print_bundle(bundle: Bundle, console: Console) -> None:
    """What a bundle holds."""
    m, a = bundle.manifest, bundle.manifest.architecture
    console.print(
        f"[bold]{escape(str(bundle.folder))}[/bold]: {escape(m.source)}, {escape(a.model_type)}, {m.dtype}, "
        f"by edgeskip {escape(m.edgeskip_version)}"
    )
    if m.synthetic:
        console.print("[bold]synthetic[/bold]: random weights, made to measure speed; its texts mean nothing")
    console.print(
        f"{a.num_layers} layers: layers\\[:{m.exit_layer}] draft, layers\\[{m.exit_layer}:] verify; "
        f"hidden {a.hidden_size}, {a.num_heads} heads over {a.num_kv_heads} KV heads of {a.head_dim}, "
        f"vocabulary {a.vocab_size}{', tied' if a.tie_word_embeddings else ''}"
    )
    console.print(
        f"capacity {m.max_length} tokens, prompts in chunks of {m.prefill_chunk}, {m.num_speculations} drafts a round, "
        f"RoPE {a.rope.type} (theta {a.rope.theta:g}), EOS {', '.join(map(str, m.eos_token_ids)) or 'none'}"
    )
    for chain, graphs in m.chains.items():
        console.print(f"{chain} subgraph: {' -> '.join(graphs)}")
    graphs_table = Table(box=None, pad_edge=False)
    for name in ("graph", "layers", "inputs", "outputs"):
        graphs_table.add_column(name)
    for name, graph in m.table.items():
        layers = f"{graph.first_layer}-{graph.last_layer - 1}" if graph.layers else "none"
        cells = []
        for tensors in (graph.inputs, graph.outputs):
            plain = [f"{t.name} \\[{','.join(t.shape)}]" for t in tensors if not t.is_cache]
            caches = sum(t.is_cache for t in tensors)
            cells.append(", ".join(plain + ([f"{caches} caches \\[B,N,C,D]"] if caches else [])))
        graphs_table.add_row(name, layers, *cells)
    console.print(graphs_table)
    files = Table(box=None, pad_edge=False)
    files.add_column("file")
    files.add_column("MB", justify="right")
    files.add_column("sha256")
    for name, record in m.files.items():
        files.add_row(name, f"{record.bytes / 1e6:.2f}", record.sha256[:16])
    console.print(files)
    dialects = (f"{dialect} ({pattern.format('draft')}, ...)" for dialect, pattern in DIALECTS.items())
    console.print(f"dialects: {', '.join(dialects)}")
