"""Which format of weights to choose for a device: the one that loses least of those that fit.

The dtype where it fits with room for the capacity, else int8, else int4; heads and token embeddings in int8 beside
either. Each halves what a token has to read, so a later one is faster: whoever wants that asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeskip.exporter.quantization.choice import FormatChoice, chosen_formats
from edgeskip.recipes.deployment import Device, default_block_size
from edgeskip.recipes.plan.plan import Basis, PlanSettings, make_basis
from edgeskip.runtime.bench.measure import BenchReport
from edgeskip.runtime.bundle.architecture import Architecture
from edgeskip.runtime.bundle.formats import BLOCK_SIZES, BlockSize
from edgeskip.runtime.errors import RequestError

CHOICES: tuple[FormatChoice, ...] = ("dtype", "int8", "int4")
"""In the order of what they lose."""


@dataclass(frozen=True)
class FormatPlan:
    """A model whose weights are in `weights`: a dtype, `int8` or `int4`.

    `memory` is what running takes with the whole capacity, in bytes, and `fits` whether the device has that;
    `largest_max_length` is the most tokens that fit.
    """

    weights: str
    memory: int
    fits: bool
    largest_max_length: int
    plain_ms_per_token: float


@dataclass(frozen=True)
class Recommendation:
    """The format to choose, the tensors' formats by name that follow from it, why, and all that were compared."""

    weights: FormatChoice
    formats: dict[str, str]
    reason: str
    compared: tuple[FormatPlan, ...]


def recommend(
    architecture: Architecture,
    device: Device,
    settings: PlanSettings,
    block_size: BlockSize | None = None,
    reports: Sequence[BenchReport] = (),
) -> Recommendation:
    """Compares formats on a device; what `settings` say of formats does not count.

    Args:
        architecture: the model's.
        device: where it is to run.
        settings: how it is to run.
        block_size: numbers that share a scale, in 4 bits; by default what suits device and model.
        reports: as for `make_plan`.

    Raises:
        RequestError: as `make_plan`.
    """
    compared: dict[FormatChoice, FormatPlan] = {}
    formats: dict[FormatChoice, dict[str, str]] = {}
    refused: set[str] = set()
    for choice in CHOICES:
        try:
            chosen = weights_formats(architecture, device, choice, block_size)
        except RequestError:  # rows of the model's matrices are not whole blocks
            continue
        basis = make_basis(architecture, device, replace(settings, formats=chosen), reports)
        found = {problem.found for problem in basis.problems if problem.at == "build"}
        if choice == "dtype":
            refused = found
        if found <= refused:  # else it is this format that engines cannot be built with
            compared[choice], formats[choice] = _compared(choice, basis), chosen
    best = next(
        (choice for choice, one in compared.items() if one.fits), min(compared, key=lambda one: compared[one].memory)
    )
    return Recommendation(best, formats[best], _reason(compared, best), tuple(compared.values()))


def weights_formats(
    architecture: Architecture, device: Device | None, choice: FormatChoice, block_size: BlockSize | None = None
) -> dict[str, str]:
    """The formats of all tensors, by name, with these weights and the default for head and token embeddings.

    Raises:
        RequestError: rows of the model's matrices are not whole blocks.
    """
    size = block_size or fitting_block_size(architecture, device)
    return chosen_formats(architecture, "fp16", choice, None, (), size)


def fitting_block_size(architecture: Architecture, device: Device | None) -> BlockSize:
    """The block size that suits a device, or a smaller one where the model's matrices are not whole blocks of it."""
    a, suits = architecture, default_block_size(device)
    widths = (a.hidden_size, a.intermediate_size, a.num_heads * a.head_dim)
    whole = [size for size in BLOCK_SIZES if size <= suits and all(width % size == 0 for width in widths)]
    return max(whole, default=suits)


def _compared(choice: FormatChoice, basis: Basis) -> FormatPlan:
    memory = sum(basis.memory.values())
    weights, fits = basis.dtype if choice == "dtype" else choice, memory <= basis.available
    return FormatPlan(weights, memory, fits, basis.largest_max_length, basis.plain_ms_per_token)


def _reason(compared: dict[FormatChoice, FormatPlan], best: FormatChoice) -> str:
    """The choice in a line."""
    chosen = compared[best]
    if not any(one.fits for one in compared.values()):
        tokens = chosen.largest_max_length
        return f"weights {chosen.weights}: nothing fits" + (f" with more than {tokens} tokens" if tokens else "")
    before = [one.weights for one in compared.values() if not one.fits and one.memory > chosen.memory]
    return f"weights {chosen.weights}: " + (", ".join(f"{one} does not fit" for one in before) or "it fits")
