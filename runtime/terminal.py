"""What people see of a model: streamed text, statistics, tables."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table

from edgeskip.runtime.bundle.formats import FORMATS
from edgeskip.runtime.bundle.layers import files_of

if TYPE_CHECKING:
    from edgeskip.runtime.bundle.dtypes import DType
    from edgeskip.runtime.bundle.manifest import Bundle, Manifest, Progress
    from edgeskip.runtime.bundle.tensors import TensorRecord
    from edgeskip.runtime.decoding.model import Generation, Model, Piece
    from edgeskip.runtime.decoding.session import Memory
    from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.printable import one_line, printable

_MOST_COLUMNS = 1000

DRAFTED = "green"


def stream(pieces: Iterable[Piece], console: Console) -> Generation:
    """Prints text as it comes, accepted drafts in colour; returns the generation."""
    generation = print_pieces(pieces, console)
    assert generation is not None
    return generation


def print_pieces(pieces: Iterable[Piece], console: Console) -> Generation | None:
    """As `stream`, of pieces that may end early: then there is no generation."""
    generation, begun = None, False
    try:
        for piece in pieces:
            if console.is_terminal:  # the model must not drive the terminal
                console.out(printable(piece.text), style=DRAFTED if piece.drafted else None, end="")
            else:
                console.file.write(piece.text)
            console.file.flush()
            generation, begun = piece.generation, True
    finally:
        if begun:  # what is said of an interrupt or an error has a line of its own
            console.file.write("\n")
            console.file.flush()
    return generation


def print_model(model: Model, console: Console) -> None:
    """What was chosen to run the bundle, and the memory that it holds."""
    weights = "[bold]synthetic weights[/bold]; " if model.bundle.manifest.synthetic else ""
    console.print(f"[dim]{weights}{shown(model.session.description)}; {memory_sizes(model.session.memory())}[/dim]")


def memory_sizes(memory: Memory) -> str:
    """Bytes by kind, in MB."""
    kinds = {"weights": memory.weights, "caches": memory.caches, "workspace": memory.workspace, "other": memory.other}
    return "MB: " + ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in kinds.items() if size is not None)


def print_statistics(generation: Generation, console: Console) -> None:
    """Two or three lines after a streamed text."""
    s = generation.statistics
    rate = f"{s.tokens_per_second:.0f} tokens/s" if s.tokens_per_second else "one token"
    console.print(
        f"[dim]{s.new_tokens} tokens, {rate}, first after {s.time_to_first_token_ms:.0f} ms; "
        f"ended by {generation.stop_reason}[/dim]"
    )
    if not generation.sampling.is_greedy:
        console.print(f"[dim]drawn with {generation.sampling}[/dim]")
    if s.mode == "early-exit" and s.num_speculations:
        console.print(
            f"[dim]{s.trusted} tokens by the exit alone, the others by the whole model in {s.rounds} rounds[/dim]"
        )
    elif s.acceptance_rate is not None:
        console.print(
            f"[dim]{s.tokens_per_round:.2f} tokens per round with at most {s.num_speculations} drafts; "
            f"acceptance {s.acceptance_rate:.0%}, match {s.match_rate:.0%}; {histogram(s)}[/dim]"
        )
    if len(s.by_exit) > 1:
        parts = [f"{e} {one.accepted} of {one.drafted} in {one.rounds} rounds" for e, one in s.by_exit.items()]
        console.print(f"[dim]accepted drafts by exit: {', '.join(parts)}[/dim]")
    if set(s.by_drafter) - {"exit"}:
        parts = [f"{name} {one.accepted} of {one.drafted} in {one.rounds} rounds" for name, one in s.by_drafter.items()]
        console.print(f"[dim]accepted drafts by what made them: {', '.join(parts)}[/dim]")


def histogram(s: Statistics) -> str:
    """Rounds by accepted drafts, up to as many as any round had, as bars: `0 ▂ 1 ▁ 2 ▃ 3 █`."""
    longest = max((len(one.rounds_by_length) for one in s.by_drafter.values()), default=1)
    rounds = s.acceptance_histogram[:longest]
    most, bars = max(rounds, default=0) or 1, " ▁▂▃▄▅▆▇█"
    return "accepted " + " ".join(f"{a}{bars[-(-n * 8 // most)]}" for a, n in enumerate(rounds))


def table(first: str, *others: str) -> Table:
    """A table of names, each followed by figures."""
    made = Table(box=None, pad_edge=False, padding=(0, 1))
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def drafting_text(manifest: Manifest) -> str:
    """The layers that draft, as in `layers[:3] (where asked for, layers[:5]) draft`."""
    others = " or ".join(f"layers[:{one}]" for one in manifest.other_exits)
    return f"layers[:{manifest.exit_layer}]{f' (where asked for, {others})' if others else ''} draft"


def print_bundle(bundle: Bundle, console: Console) -> None:
    """What a bundle holds."""
    m, a = bundle.manifest, bundle.manifest.architecture
    console.print(
        f"[bold]{shown(bundle.folder)}[/bold]: {shown(m.source)}, {shown(a.model_type)}, {m.dtype}, "
        f"by edgeskip {shown(m.edgeskip_version)}"
    )
    if m.synthetic:
        console.print("[bold]synthetic[/bold]: random weights, made to measure speed; its texts mean nothing")
    console.print(
        f"{a.num_layers} layers: {shown(drafting_text(m))}, layers\\[{m.exit_layer}:] verify; "
        f"hidden {a.hidden_size}, {a.num_heads} heads over {a.num_kv_heads} KV heads of {a.head_dim}, "
        f"vocabulary {a.vocab_size}{', tied' if a.tie_word_embeddings else ''}"
    )
    console.print(
        f"capacity {m.max_length} tokens, prompts in chunks of {m.prefill_chunk}, {m.num_speculations} drafts per "
        f"round, RoPE {a.rope.type} (theta {a.rope.theta:g}), EOS "
        f"{shown(', '.join(map(str, m.eos_token_ids)) or 'none')}"
    )
    if m.renumbered:
        console.print("token ids are numbered by how frequent tokens are, and not those of the checkpoint")
    picks = "the most probable one" if m.sampling.is_greedy else f"drawn with {m.sampling}"
    console.print(f"the next token is {picks}, unless you say otherwise")
    for exit_layer, chains in m.chains.items():
        for chain, graphs in chains.items():
            after = f" after layer {exit_layer}" if len(m.chains) > 1 else ""
            console.print(f"{chain} subgraph{after}: {' -> '.join(graphs)}")
    graphs_table = Table(box=None, pad_edge=False)
    for name in ("graph", "of", "inputs", "outputs"):
        graphs_table.add_column(name)
    for name, graph in m.graphs.items():
        layers = f"layers {graph.first_layer}-{graph.last_layer - 1}"
        if graph.head:
            layers = f"{graph.head.vocabulary} tokens, {graph.head.picker}"
        cells = []
        for tensors in (graph.inputs, graph.outputs):
            plain = [f"{t.name} \\[{','.join(t.shape)}]" for t in tensors if not t.is_cache]
            caches = sum(t.is_cache for t in tensors)
            cells.append(", ".join(plain + ([f"{caches} caches \\[B,N,C,D]"] if caches else [])))
        graphs_table.add_row(name, layers, *cells)
    console.print(graphs_table)
    if m.quantization is not None:
        console.print(shown(f"quantized by {m.quantization.method}: {formats_text(m.tensors, m.dtype)}"))
    files = Table(box=None, pad_edge=False)
    files.add_column("file")
    files.add_column("MB", justify="right")
    files.add_column("sha256")
    for name, record in m.files.items():
        files.add_row(name, f"{record.bytes / 1e6:.2f}", record.sha256[:16])
    console.print(files)
    dialects = {
        name: dialect.file.format(next(iter(files_of(m.graphs, dialect)))) for name, dialect in m.dialects.items()
    }
    console.print(f"dialects: {', '.join(f'{name} ({first}, ...)' for name, first in dialects.items())}")


def bytes_text(formats: Mapping[str, int]) -> str:
    """Bytes of weights by their format, for people."""
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in formats.items())


def formats_text(tensors: Mapping[str, TensorRecord], dtype: DType) -> str:
    """Which matrices are stored in which format (`weights int4-32, head int8, layers 0-3 int8`), their bytes, and the
    bits that a weight takes with its share of the scales.
    """
    matrices = [tensor for tensor in tensors.values() if tensor.is_matrix]
    by_layer: dict[int | None, list[str]] = {}
    for tensor in matrices:
        by_layer.setdefault(tensor.layer, []).append(tensor.format)
    tables = by_layer.pop(None)
    layers = {layer: " and ".join(sorted({*formats})) for layer, formats in by_layer.items() if layer is not None}
    weights, _ = Counter(layers.values()).most_common(1)[0]
    others: dict[str, list[int]] = {}
    for layer, formats in layers.items():
        if formats != weights:
            others.setdefault(formats, []).append(layer)
    texts = [f"weights {weights}", f"head {' and '.join(sorted({*tables}))}"]
    texts += [f"layers {_ranges(chosen)} {formats}" for formats, chosen in others.items()]
    size = sum(FORMATS[tensor.format].bytes(tensor.shape, dtype) for tensor in matrices)
    bits = 8 * size / sum(math.prod(tensor.shape) for tensor in matrices)
    return f"{', '.join(texts)}; {size / 1e6:.1f} MB, {bits:.2f} bits per weight"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def console(*, stderr: bool = False) -> Console:
    """Where people read: standard output, or standard error."""
    made = _Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = _WIDTH
    return made


_WIDTH = 240
"""Of what is no terminal, so that no table is cut off."""


class _Console(Console):
    """A console that only its own styles can drive: characters in texts from outside that would are spelled out."""

    def on_broken_pipe(self) -> None:
        """Leaves it to the command line, where rich would end the program."""
        raise

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Table):  # figures are not cut where lines are short
            options = options or self.options
            needs = Measurement.get(self, options.update(max_width=_MOST_COLUMNS), renderable)
            least = needs.maximum if all(column.no_wrap for column in renderable.columns) else needs.minimum
            options = options.update(width=max(options.max_width, least))
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def shown(text: object) -> str:
    """A text from outside for a console's markup: as it is, on one line, of bounded length."""
    return escape(one_line(text))


INTERVAL_S = 10.0
"""Between two lines of progress."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on a terminal's stderr, gone when done; elsewhere, as in a log, a line from time to time."""
    console = _Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _progress_lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


def _progress_lines(console: Console) -> Progress:
    """Says what is done and how far it is, once an interval."""
    said = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() >= said + INTERVAL_S:
            said = time.monotonic()
            console.print(f"{what}: {done / max(total, 1):.0%}", markup=False, soft_wrap=True)

    return update
