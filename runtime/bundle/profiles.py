"""Optimization profiles of engines: for how many rows TensorRT picks kernels.

Kernels for exactly so many rows are faster than those for a range, so where an engine does not itself write into the
caches, a call is padded to the next number of rows that there are kernels for: what the rows after its own give is not
written anywhere that is read. Caches that an engine updates have no room for such rows, so those graphs get ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeskip.runtime.bundle.architecture import Size
from edgeskip.runtime.bundle.dialects import Dialect
from edgeskip.runtime.bundle.graphs import HEAD_ROWS, GraphName
from edgeskip.runtime.bundle.layers import PARTS, files_of
from edgeskip.runtime.bundle.manifest import Manifest

EXACT_ROWS = (8, 24)
"""Rows of a round that there are kernels for, where calls are padded.

On an H100 a product of 8 rows takes as long as one of a single row, and one of 4 rows a fifth more.
"""

PROMPT_STEP = 64
"""Chunks of prompts are rounded up to a multiple of so many rows, so that kernels for a few numbers of rows, and a few
captured graphs, serve all of them.
"""


@dataclass(frozen=True)
class EngineProfile:
    """Rows T that an engine serves in one optimization profile: the fewest, those it is tuned for, the most."""

    min_rows: Size
    opt_rows: Size
    max_rows: Size


def engine_profiles(
    manifest: Manifest, dialect: Dialect, compute_capability: int
) -> dict[GraphName, tuple[EngineProfile, ...]]:
    """The engines for a GPU of this SM by graph, and the rows T that each serves: up to HEAD_ROWS in rounds, and in
    chunks of prompts longer than that. Where a session's own kernels do what rounds need, it has no engines for that;
    where layers are quantized, they do everything, and there are none at all.

    A round runs what drafts one row at a time, what verifies on all its rows, and a head that serves both in both ways;
    which graphs draft is said by all exits of the bundle. See decoding/rounds.py.
    """
    most, chunk = min(HEAD_ROWS, manifest.max_length), manifest.prefill_chunk
    rows = min(manifest.num_speculations + 1, most)
    splits = [manifest.split(exit_layer) for exit_layer in manifest.exit_layers]
    verifies = {link.graph for split in splits for link in split.verify} | {split.head.graph for split in splits}
    profiles: dict[GraphName, tuple[EngineProfile, ...]] = {}
    only_prompts = dialect.in_parts and manifest.has_products(compute_capability)
    for name, graph in files_of(manifest.graphs, dialect).items():
        if only_prompts:
            if name in PARTS and not manifest.has_quantized_layers:
                profiles[name] = _exact(*range(PROMPT_STEP, chunk, PROMPT_STEP), max(chunk, most))
            continue
        many = name in verifies or name in PARTS
        if not dialect.padded:
            decode = [EngineProfile(1, rows if many else 1, most)]
        else:
            # a head takes as long for 8 rows as for one, and a row's logits are then the same in all rounds
            exact = (*(() if graph.head else (1,)), *(EXACT_ROWS if many else EXACT_ROWS[: bool(graph.head)]))
            decode = list(_exact(*exact))
        after = decode[-1].max_rows
        if chunk > after and not graph.head:
            decode.append(EngineProfile(after + 1 if dialect.padded else 1, chunk, chunk))
        profiles[name] = tuple(decode)
    return profiles


def _exact(*rows: int) -> tuple[EngineProfile, ...]:
    return tuple(EngineProfile(n, n, n) for n in rows)
