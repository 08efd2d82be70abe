"""What is exported, and for which device: export recipes (recipes/*.toml) and devices (recipes/devices/*.toml).

They are separate, so that any model combines with any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from edgeskip.exporter.quantization.choice import FormatChoice, LayersChoice, Method, WeightsChoice
from edgeskip.recipes.reader import FOLDERS, Share, find_file, read_recipe
from edgeskip.recipes.shape import Shape, load_shape
from edgeskip.runtime.backends.choice import Backend
from edgeskip.runtime.bundle.architecture import MOST_SIZE, Size
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import BlockSize
from edgeskip.runtime.bundle.graphs import DEFAULT_SPECULATIONS, LEAST_DRAFT_VOCABULARY, MAX_SPECULATIONS
from edgeskip.runtime.bundle.manifest import MANIFEST
from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.structure import Pattern, Range

Capacity = Annotated[int, Range(2, MOST_SIZE)]
Microseconds = Annotated[float, Range(0, 1e9)]
Amount = Annotated[float, Range(1e-3, 1e6)]
Part = Annotated[float, Range(0.01, 1)]
Version = Annotated[str, Pattern(r"\d{1,9}(\.\d{1,9}){0,9}", "a version, such as 10.3")]

MODELS, DEVICES = FOLDERS["model"], FOLDERS["device"]
CHECKPOINTS = MODELS / "checkpoints"


@dataclass(frozen=True)
class ExportRecipe:
    """A checkpoint and how to split it.

    Attributes:
        checkpoint: a hub id, a folder (relative to the recipe), or a checkpoint that ships with edgeskip.
        exit_layer: E; layers[:E] draft.
        other_exits: further exit layers, from which the bundle can draft too.
        source: where exit layer and speculation length come from.
        num_speculations: K, drafts per round.
        shape: the published shape that stands for its config.json where the checkpoint is not at hand.
        dtype: that of weights, activations and caches; by default the device's.
        max_length: cache capacity in tokens; by default the device's.
        weights: the format of the layers' matrices, or `auto` for each by itself; by default what `edgeskip plan`
            recommends for the device, and else the dtype.
        head: that of the head and the token embeddings; by default int8 where `weights` are quantized, and else the
            dtype.
        layers: formats of single layers or ranges, such as `0-3=int8`.
        block_size: numbers that share a scale, in 4 bits; by default what suits the device.
        bits: of a weight on average, for `auto`.
        quantizer: how numbers and scales are found.
        calibration: a file or folder of texts (relative to the recipe), for `auto`, `gptq` and `draft_vocabulary`.
        draft_vocabulary: rows of the vocabulary that drafts come from; by default all.
        keep_token_ids: whether these are the first ids, and not the frequent tokens.
        match_rates: exit layer -> share of the greedy tokens that this exit predicts.
    """

    checkpoint: str
    exit_layer: Size
    source: str
    num_speculations: Annotated[int, Range(1, MAX_SPECULATIONS)] = DEFAULT_SPECULATIONS
    shape: str | None = None
    dtype: DType | None = None
    max_length: Capacity | None = None
    weights: WeightsChoice | None = None
    head: FormatChoice | None = None
    layers: tuple[LayersChoice, ...] = ()
    block_size: BlockSize | None = None
    bits: Annotated[float, Range(1, 16)] | None = None
    quantizer: Method = "search"
    calibration: str | None = None
    draft_vocabulary: Annotated[int, Range(LEAST_DRAFT_VOCABULARY, MOST_SIZE)] | None = None
    keep_token_ids: bool = False
    other_exits: tuple[Size, ...] = ()
    match_rates: Mapping[int, Share] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.checkpoint.strip() or "\0" in self.checkpoint:
            raise RecipeError("checkpoint", f"found {self.checkpoint!r}", wanted="a hub id, a folder or a name")
        if self.bits is not None and self.weights != "auto":
            raise RecipeError("bits", f"found {self.bits:g}", wanted='weights = "auto"')
        read = self.weights == "auto" or self.quantizer == "gptq" or self.draft_vocabulary is not None
        if self.calibration is not None and not (read and self.calibration.strip()):
            wanted = 'a file or folder of texts, beside weights = "auto", quantizer = "gptq" or draft_vocabulary'
            raise RecipeError("calibration", f"found {self.calibration!r:.60}", wanted=wanted)
        if any(exit_layer < 1 for exit_layer in self.match_rates):
            raise RecipeError("match_rates", f"found exit layer {min(self.match_rates)}", wanted="at least 1")


@dataclass(frozen=True)
class Kernels:
    """How close calls come to the device's limits; `plan/cost.py` has the formula.

    The defaults are an H100's, fitted to docs/benchmarks (docs/planning.md). On slower devices, reading the weights
    takes longer and the rest matters less.

    Attributes:
        call_us: for each call of a graph, whatever is in it.
        layer_us: for each decoder layer, apart from its products.
        launch_us: for each kernel of a layer where all of them are ours, as in engines of the `layers` dialect; in
            place of `layer_us`.
        several_us: what is added to that where there is more than one row.
        row_us: for each row after the first, per layer.
        copy_share: rate at which products read weights, over that of a copy.
        flops_share: share of `fp16_tflops` that products of many rows reach.
    """

    call_us: Microseconds = 13.1
    layer_us: Microseconds = 35.5
    launch_us: Microseconds = 1.5
    several_us: Microseconds = 5.2
    row_us: Microseconds = 0.32
    copy_share: Part = 0.92
    flops_share: Part = 0.5


@dataclass(frozen=True)
class Device:
    """A machine to run on. Sizes are in GB of 10^9 bytes.

    Attributes:
        name: what its maker calls it.
        compute_capability: SM, 87 for 8.7.
        memory_gb: as the system or the driver shows it.
        reserved_gb: the part that the system and the driver keep before edgeskip starts.
        shared_memory: CPU and GPU share it, as on a Jetson.
        bandwidth_gb_per_s: according to its data sheet.
        copy_share: the share of it that a copy reaches, bytes read plus bytes written.
        fp16_tflops: dense, on tensor cores.
        dtype: the one to export in.
        max_length: cache capacity in tokens, where the recipe gives none.
        backends: those that serve it, the preferred one first.
        tensorrt: version of the system's TensorRT.
        jetpacks: JetPack version -> its TensorRT.
        sources: where each figure comes from.
        kernels: how close calls come to these limits.
    """

    name: str
    compute_capability: Annotated[int, Range(50, 200)]
    memory_gb: Amount
    reserved_gb: Annotated[float, Range(0)]
    bandwidth_gb_per_s: Amount
    fp16_tflops: Amount
    backends: tuple[Backend, ...]
    copy_share: Part = 0.85
    shared_memory: bool = False
    dtype: DType = "fp16"
    max_length: Capacity = 2048
    tensorrt: Version | None = None
    jetpacks: Mapping[str, Version] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self) -> None:
        if not self.backends:
            raise RecipeError("backends", "found none", wanted="at least one")
        if self.reserved_gb >= self.memory_gb:
            raise RecipeError(
                "reserved_gb", f"found {self.reserved_gb}", wanted=f"less than memory_gb {self.memory_gb}"
            )


def load_export_recipe(name: str) -> tuple[ExportRecipe, Path]:
    """An export recipe by name or path, and its file.

    Raises:
        RecipeError: there is none, or it is malformed.
    """
    path = find_file(name, (MODELS,), "recipe")
    return read_recipe(path, ExportRecipe), path


def load_device(name: str) -> Device:
    """A device by name or path.

    Raises:
        RecipeError: there is none, or it is malformed.
    """
    return read_recipe(find_file(name, (DEVICES,), "device"), Device)


def default_block_size(device: Device | None) -> BlockSize:
    """Numbers that share a scale in 4 bits: few for ONNX Runtime, and the fewest that TensorRT is fast with."""
    return 32 if device is None or device.backends[0] == "onnxruntime" else 64


def checkpoint_source(recipe: ExportRecipe, path: Path) -> str:
    """What to open: the recipe's checkpoint as a folder where there is such a folder, else as a hub id.

    A bundle may have the name of the checkpoint that it was exported from.
    """
    for folder in (path.parent / recipe.checkpoint, CHECKPOINTS / recipe.checkpoint):
        if folder.is_dir() and not (folder / MANIFEST).exists():
            return str(folder)
    return recipe.checkpoint


def recipe_shape(recipe: ExportRecipe, path: Path) -> Shape:
    """The recipe's model less its weights: its published shape, else the config.json of its checkpoint.

    Raises:
        RequestError, CheckpointError: as `load_shape`.
    """
    return load_shape(recipe.shape or checkpoint_source(recipe, path))
