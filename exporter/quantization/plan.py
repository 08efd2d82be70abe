"""What is quantized in a bundle and how, from what was asked for and what the checkpoint is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edgeskip.exporter.checkpoint import Checkpoint, TensorReader
from edgeskip.exporter.index import Warn
from edgeskip.exporter.quantization.budget import bits_of, check_is_auto, matrices_to_choose, wider_matrices
from edgeskip.exporter.quantization.calibrated.calibration import Calibration, read_calibration
from edgeskip.exporter.quantization.choice import QuantizationChoice, chosen_formats, free_layers
from edgeskip.exporter.quantization.layouts import ORIGINAL, QuantizedTensor
from edgeskip.exporter.quantization.quantizer import Quantizer, Search
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import is_quantized
from edgeskip.runtime.bundle.manifest import Progress, Quantization, formats_problem
from edgeskip.runtime.bundle.tensors import TensorRecord, bundle_tensors
from edgeskip.runtime.errors import CheckpointError, RequestError


@dataclass(frozen=True)
class QuantizationPlan:
    """The formats of the tensors that are not stored in the dtype, by name; what finds their numbers; and what the
    manifest says of it.
    """

    formats: dict[str, str]
    quantizer: Quantizer
    record: Quantization | None


def plan_quantization(
    checkpoint: Checkpoint,
    choice: QuantizationChoice,
    dtype: DType,
    exit_layers: tuple[int, ...],
    progress: Progress = lambda *_: None,
    warn: Warn = lambda _: None,
) -> QuantizationPlan:
    """Decides on formats and on what finds the numbers, and measures matrices where that is asked for.

    Args:
        checkpoint: what is exported.
        choice: what was asked for.
        dtype: the bundle's.
        exit_layers: those that it can draft from.
        progress: told of measuring and, later, of quantizing.
        warn: gets a line where `auto` has no room to choose.

    Raises:
        RequestError: formats, layers or bits that the model cannot have, another format for what comes quantized, or
            what does not go together.
        CheckpointError: matrices that come quantized in ways that do not go together.
    """
    architecture = checkpoint.architecture
    calibration = _calibration(checkpoint, choice)
    stored = stored_formats(checkpoint)
    formats = chosen_formats(architecture, dtype, choice.weights, choice.head, choice.layers, choice.block_size)
    formats |= choice.formats
    free = set() if choice.weights == "dtype" else free_layers(architecture, choice.layers)
    tensors = bundle_tensors(architecture, 0, dtype)
    _check_as_stored(formats, stored, free, tensors)
    formats |= stored
    if problem := formats_problem(formats, tensors, dtype):
        raise RequestError("formats", problem)
    if choice.weights == "auto" and calibration is not None:
        wider = _wider(checkpoint, choice, formats, dtype, calibration, exit_layers, progress)
        formats |= wider
        if not wider:
            scales = f"with its scales in {dtype}, one in 4 takes as much"
            warn(f"{bits_of(choice, dtype):g} bits have room for no matrix in 8 bits: {scales}; give more --bits")
    quantizer: Quantizer = Search()
    if choice.quantizer == "gptq" and calibration is not None:
        if not formats:
            raise RequestError("gptq", "nothing is quantized", fix="choose a format of weights or head")
        from edgeskip.exporter.quantization.calibrated.gptq import Gptq  # late, as it imports torch

        quantizer = Gptq(calibration, exit_layers, progress)
    ways = [checkpoint.quantized_by if stored else None, quantizer.method if formats.keys() - stored.keys() else None]
    record = Quantization(" and ".join(filter(None, ways)), None, calibration.sha256 if calibration else None)
    return QuantizationPlan(formats, quantizer, record if is_quantized(formats.values()) else None)


def asks_for_texts(choice: QuantizationChoice) -> str | None:
    """What reads texts, if anything does."""
    return "auto" if choice.weights == "auto" else "gptq" if choice.quantizer == "gptq" else None


def _calibration(checkpoint: Checkpoint, choice: QuantizationChoice) -> Calibration | None:
    """The texts, where something asks for them."""
    asked = asks_for_texts(choice)
    check_is_auto(choice)
    if asked is None:
        if choice.calibration is not None:
            fix = "leave them out, or say what reads them: --quantizer gptq, --weights auto or --draft-vocabulary"
            raise RequestError(choice.calibration, "texts for a search, which asks for none", fix=fix)
        return None
    if checkpoint.quantized_by is not None:
        raise RequestError(asked, f"for weights that come quantized by {checkpoint.quantized_by}", fix=ORIGINAL)
    context = checkpoint.architecture.max_position_embeddings
    return read_calibration(choice.calibration, checkpoint.tokenizer.tokenizer, context)


def stored_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """The formats of a bundle's tensors that a checkpoint has quantized, by name.

    Raises:
        CheckpointError: matrices that the bundle has as one are in different formats.
    """
    found: dict[str, str] = {}
    for record in bundle_tensors(checkpoint.architecture, 0, "").values():
        sources = [checkpoint.tensors[name] for name, _ in record.sources if name in checkpoint.tensors]
        formats = sorted({one.dtype for one in sources})
        if any(isinstance(one, QuantizedTensor) for one in sources):
            if len(formats) > 1:
                mixed = f"{' and '.join(one.name for one in sources)} are in {' and '.join(formats)}"
                wanted = "one format, as they are multiplied as one"
                raise CheckpointError(sources[0].file, mixed, wanted=wanted, fix=ORIGINAL)
            found[record.name] = formats[0]
    return found


def _check_as_stored(
    formats: Mapping[str, str], stored: Mapping[str, str], free: Collection[int], tensors: Mapping[str, TensorRecord]
) -> None:
    """Refuses other formats for what comes quantized.

    Args:
        formats: those that were asked for, by name.
        stored: those that the checkpoint has.
        free: the layers for which nothing by itself was asked.
        tensors: the bundle's.

    Raises:
        RequestError: another format was asked for.
    """
    for name, format_ in stored.items():
        layer = tensors[name].layer
        asked = name in formats or (layer is not None and layer not in free)
        if asked and formats.get(name) != format_:
            wanted = formats.get(name, "the dtype")
            fix = "ask for no format of it, or give the checkpoint that this one was made from"
            raise RequestError(name, f"{wanted} is asked for, and the checkpoint has it in {format_}", fix=fix)


def _wider(
    checkpoint: Checkpoint,
    choice: QuantizationChoice,
    formats: Mapping[str, str],
    dtype: DType,
    calibration: Calibration,
    exit_layers: tuple[int, ...],
    progress: Progress,
) -> dict[str, str]:
    """The matrices that `auto` gives 8 bits, by what 4 bits do to them."""
    from edgeskip.exporter.quantization.calibrated import allocation  # late, as they import torch
    from edgeskip.exporter.quantization.calibrated.decoder import Decoder

    matrices, names = matrices_to_choose(checkpoint.architecture, dtype, choice, formats)
    few = calibration.shortened(allocation.MOST_SEQUENCES, allocation.MOST_TOKENS)
    with TensorReader(checkpoint) as reader:
        tensors = bundle_tensors(checkpoint.architecture, 0, dtype, formats)
        effects = allocation.matrix_effects(Decoder(reader, tensors, dtype, few, exit_layers), names, progress)
    return wider_matrices(matrices, effects, bits_of(choice, dtype), dtype)
