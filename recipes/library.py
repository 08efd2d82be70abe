"""The recipes of every kind that ship with edgeskip, and what must hold for each beyond its form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from edgeskip.exporter.quantization.budget import planned_formats
from edgeskip.exporter.quantization.choice import QuantizationChoice
from edgeskip.recipes.deployment import DEVICES, Device, ExportRecipe, checkpoint_source, load_device, recipe_shape
from edgeskip.recipes.plan.plan import PlanSettings
from edgeskip.recipes.plan.recommend import recommend
from edgeskip.recipes.reader import FOLDERS, Kind, find_file, read_recipe, read_table
from edgeskip.recipes.train.schema import TrainingRecipe
from edgeskip.runtime.bundle.graphs import check_draft_vocabulary, check_exit_layers, check_max_length
from edgeskip.runtime.errors import EdgeskipError, RecipeError, RequestError

_CLASSES: dict[Kind, type[Any]] = {"model": ExportRecipe, "device": Device, "training": TrainingRecipe}


@dataclass(frozen=True)
class Shipped:
    """A recipe that ships with edgeskip; `title` is the first sentence of its comment."""

    kind: Kind
    name: str
    path: Path
    title: str


def shipped_recipes() -> Iterator[Shipped]:
    """All of them, by kind and name."""
    for kind, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.toml")):
            lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
            comment = " ".join(line.lstrip("# ") for line in lines)
            yield Shipped(kind, path.stem, path, comment.partition(". ")[0].removesuffix("."))


def recipe_file(name: str) -> Path:
    """The file of a recipe of any kind: a path, a name, or `kind/name` where two kinds have it.

    Raises:
        RecipeError: there is none.
    """
    kind, _, rest = name.partition("/")
    for known, folder in FOLDERS.items():
        if kind == known and rest:
            return find_file(rest, (folder,), "recipe")
    return find_file(name, FOLDERS.values(), "recipe")


def formats_by_device(path: Path) -> Iterator[tuple[str, str]]:
    """Each device that ships with edgeskip and the format of weights that is recommended for it, in a line; none for
    recipes that name a format, and for those of no published shape.

    Raises:
        EdgeskipError: the recipe is malformed.
    """
    if "checkpoint" not in read_table(path):
        return
    recipe = read_recipe(path, ExportRecipe)
    if recipe.weights or recipe.head or recipe.layers or not recipe.shape:
        return
    architecture = recipe_shape(recipe, path).architecture
    settings = PlanSettings(recipe.exit_layer, dtype=recipe.dtype, max_length=recipe.max_length)
    for file in sorted(DEVICES.glob("*.toml")):
        yield file.stem, recommend(architecture, load_device(file.stem), settings, recipe.block_size).reason


def validate(path: Path) -> Kind:
    """Reads a recipe of any kind and checks all that can be told from the file alone; its keys tell its kind.

    Raises:
        RecipeError: it is malformed, names a shape that is not there, or an exit layer, a length or a format that its
            model cannot have.
    """
    table = read_table(path)
    kind: Kind = "training" if "run" in table else "device" if "bandwidth_gb_per_s" in table else "model"
    recipe = read_recipe(path, _CLASSES[kind])
    if isinstance(recipe, ExportRecipe) and (recipe.shape or Path(checkpoint_source(recipe, path)).is_dir()):
        try:
            architecture = recipe_shape(recipe, path).architecture
            layers = architecture.num_layers
            choice = QuantizationChoice(
                weights=recipe.weights,
                head=recipe.head,
                layers=recipe.layers,
                block_size=recipe.block_size or 32,
                bits=recipe.bits,
            )
            planned_formats(architecture, recipe.dtype or "fp16", choice)
            check_draft_vocabulary(recipe.draft_vocabulary, architecture.vocab_size)
            if recipe.max_length is not None:
                check_max_length(recipe.max_length, architecture.max_position_embeddings)
        except EdgeskipError as error:
            raise RecipeError(f"{path}: {error.place}", error.found, wanted=error.wanted, fix=error.fix) from None
        exits = (recipe.exit_layer, *recipe.other_exits)
        named = (
            ("exit_layer", exits[:1]),
            ("other_exits", exits),
            *(("match_rates", (e,)) for e in recipe.match_rates),
        )
        for key, exit_layers in named:
            try:
                check_exit_layers(exit_layers, layers)
            except RequestError as error:
                found = f"found exit layer {error.found}"
                raise RecipeError(f"{path}: {key}", found, wanted=error.wanted) from None
    return kind
