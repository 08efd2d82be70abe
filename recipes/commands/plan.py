"""edgeskip plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from edgeskip.exporter.quantization.choice import BITS_TEXT, FormatChoice, WeightsChoice
from edgeskip.recipes.commands.options import ALL, names_of, recipe_option, rows_of
from edgeskip.runtime.backends.choice import Backend
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import BLOCK_SIZES
from edgeskip.runtime.commands.options import Choice, Place, exit_layers_option, first, json_option
from edgeskip.runtime.commands.reports import check_writable, on_stdout, write_json


@click.command()
@click.argument("model", required=False, type=Place())
@recipe_option
@click.option(
    "--device",
    "-d",
    "device_name",
    shell_complete=names_of("device"),
    required=True,
    help="A device, by name or file; `edgeskip recipes list` shows them.",
)
@exit_layers_option(
    "E; of several, as 3,5, the first is the default.  [default: the recipe's, or a quarter of the layers]"
)
@click.option(
    "--num-speculations",
    "-k",
    type=Choice(),
    help="K; auto says what choosing it by the text could bring.  [default: the best if the match rate is known, else "
    "the recipe's]",
)
@click.option(
    "--match-rate",
    "match_rates",
    multiple=True,
    metavar="[E=]A[,A...]",
    help="Share of greedy tokens that the exit predicts, or that exit layer E does; of several kinds of text, as "
    "0.9,0.3, that of each. Can be given more than once.",
)
@click.option(
    "--ngrams",
    metavar="[S=]A",
    help="Drafts that the text has (--draft ngram): the share A of them that is right, if S of the rounds have any.",
)
@click.option("--backend", type=click.Choice(get_args(Backend)), help="[default: the device's first]")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="[default: the recipe's or the device's]")
@click.option(
    "--weights",
    type=click.Choice(get_args(WeightsChoice)),
    help="The format of the layers' matrices.  [default: the recipe's or the bundle's, else the least loss that fits]",
)
@click.option(
    "--bits", type=float, help=f"For auto: bits of a weight on average.  [default: the recipe's, or {BITS_TEXT}]"
)
@click.option("--head", type=click.Choice(get_args(FormatChoice)), help="That of head and token embeddings.")
@click.option("--layers", multiple=True, metavar="LAYERS=FORMAT", help="Another format for some layers, as 0-3=int8.")
@click.option(
    "--block-size", type=click.Choice(tuple(map(str, BLOCK_SIZES))), help="Numbers that share a scale, in 4 bits."
)
@click.option(
    "--draft-vocabulary",
    type=Choice(ALL),
    metavar="ROWS|all",
    help="Rows of the vocabulary that drafts come from.  [default: the recipe's or the bundle's, else all]",
)
@click.option("--max-length", type=int, help="Capacity in tokens.  [default: the recipe's or the device's]")
@click.option("--jetpack", help="The Jetson's JetPack, such as 6 or 6.2.  [default: the newest]")
@click.option("--position", type=click.IntRange(0), help="Tokens in the caches when a round is timed.")
@click.option(
    "--calibrate",
    "reports",
    multiple=True,
    type=Place(path_type=Path),
    help="What `edgeskip bench --json` wrote on this device, for any model; can be given more than once.",
)
@json_option
def plan(
    model: str | None,
    recipe: str | None,
    device_name: str,
    exit_layers: tuple[int, ...] | None,
    num_speculations: Any,
    match_rates: tuple[str, ...],
    ngrams: str | None,
    backend: Any,
    dtype: Any,
    weights: Any,
    bits: float | None,
    head: Any,
    layers: tuple[str, ...],
    block_size: str | None,
    draft_vocabulary: Any,
    max_length: int | None,
    jetpack: str | None,
    position: int | None,
    reports: tuple[Path, ...],
    json_path: Path | None,
) -> None:
    """Predict whether a model fits a device and how fast it will be there, without its weights.

    MODEL is a checkpoint folder, a hub id, a config.json, a published shape, or a bundle, which is planned as it was
    exported; or give --recipe. The exit code is 1 if it will not work.
    """
    if (model is None) == (recipe is None):
        raise click.UsageError("give a MODEL or --recipe")
    from edgeskip.exporter.quantization.budget import planned_formats
    from edgeskip.exporter.quantization.choice import QuantizationChoice
    from edgeskip.recipes.deployment import load_device, load_export_recipe, recipe_shape
    from edgeskip.recipes.plan.plan import PlanSettings, make_plan, parse_match_rates, parse_ngrams
    from edgeskip.recipes.plan.recommend import fitting_block_size, recommend
    from edgeskip.recipes.plan.report import print_plan
    from edgeskip.recipes.shape import Shape, load_shape
    from edgeskip.runtime.bench.measure import check_report, read_report
    from edgeskip.runtime.bundle.manifest import MANIFEST, read_bundle
    from edgeskip.runtime.terminal import console

    check_writable(json_path)
    device = load_device(device_name)
    known: dict[int, tuple[float, ...]] = {}
    own_num_speculations: int | None = None
    own_draft_vocabulary: int | None = None
    size: Any = None if block_size is None else int(block_size)
    formats: dict[str, str] | None = None
    if recipe is not None:
        chosen, path = load_export_recipe(recipe)
        shape, known = recipe_shape(chosen, path), {e: (rate,) for e, rate in chosen.match_rates.items()}
        exit_layers, dtype = first(exit_layers, (chosen.exit_layer, *chosen.other_exits)), first(dtype, chosen.dtype)
        max_length, own_num_speculations = first(max_length, chosen.max_length), chosen.num_speculations
        weights, head = first(weights, chosen.weights), first(head, chosen.head)
        layers, size = layers or chosen.layers, first(size, chosen.block_size)
        bits = first(bits, chosen.bits if weights == "auto" else None)
        own_draft_vocabulary = chosen.draft_vocabulary
    elif model is not None and (Path(model) / MANIFEST).is_file():
        manifest = read_bundle(model).manifest
        shape = Shape(Path(model).absolute().name, {}, manifest.architecture)
        exit_layers, dtype = (
            first(exit_layers, (manifest.exit_layer, *manifest.other_exits)),
            first(dtype, manifest.dtype),
        )
        max_length, own_num_speculations = first(max_length, manifest.max_length), manifest.num_speculations
        formats, own_draft_vocabulary = manifest.formats, manifest.draft_vocabulary
    else:
        shape = load_shape(str(model))
        exit_layers = first(exit_layers, (max(shape.architecture.num_layers // 4, 1),))
    exit_layer, *other_exits = exit_layers
    known |= parse_match_rates(match_rates, exit_layer)
    if exit_layer not in known:
        num_speculations = first(num_speculations, own_num_speculations)
    settings = PlanSettings(exit_layer, num_speculations, known, backend, dtype, max_length, jetpack, position)
    settings = replace(
        settings,
        draft_vocabulary=rows_of(draft_vocabulary, own_draft_vocabulary),
        other_exits=tuple(other_exits),
        ngrams=None if ngrams is None else parse_ngrams(ngrams),
    )
    measured = [read_report(path) for path in reports]
    for report, path in zip(measured, reports, strict=True):
        check_report(report, path)
    a, out = shape.architecture, console(stderr=on_stdout(json_path))
    recommended = None
    if weights or head or layers or bits is not None:
        size = first(size, fitting_block_size(a, device))
        choice = QuantizationChoice(weights=weights, head=head, layers=layers, block_size=size, bits=bits)
        formats = planned_formats(a, first(dtype, device.dtype), choice)
    elif formats is None:
        recommended = recommend(a, device, settings, size, measured)
        formats = recommended.formats
    elif block_size is not None:
        raise click.UsageError("--block-size is for 4 bits: give --weights int4, or leave it out")
    made = make_plan(recipe or shape.name, a, device, replace(settings, formats=formats), measured)
    made = replace(made, recommended=recommended)
    print_plan(made, out)
    write_json(json_path, made)
    if not made.works:
        raise SystemExit(1)
