"""edgeskip export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from edgeskip.exporter.quantization.choice import BITS_TEXT, FormatChoice, Method, WeightsChoice
from edgeskip.recipes.commands.options import ALL, names_of, recipe_option, rows_of
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import BLOCK_SIZES
from edgeskip.runtime.bundle.graphs import DEFAULT_SPECULATIONS
from edgeskip.runtime.commands.options import Choice, Place, exit_layers_option, first, require, say


@click.command()
@click.argument("paths", nargs=-1, type=Place(), metavar="[CHECKPOINT] [BUNDLE]")
@recipe_option
@click.option(
    "--device",
    "-d",
    "device_name",
    shell_complete=names_of("device"),
    help="Plan for this device, by name or file, and fit its memory.",
)
@exit_layers_option(
    "E: layers[:E] draft, the rest verify; of several, as 3,5, the first is the default.  [default: the recipe's]"
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(DType)),
    help="fp32 for a CPU, fp16 or bf16 for a GPU.  [default: the recipe's, the device's, or fp32]",
)
@click.option(
    "--max-length",
    type=int,
    help="Capacity in tokens, prompt included.  [default: the recipe's, the device's, or the model's, at most 2048]",
)
@click.option(
    "--num-speculations",
    "-k",
    type=int,
    help=f"The bundle's default of drafts per round.  [default: the recipe's, or {DEFAULT_SPECULATIONS}]",
)
@click.option(
    "--draft-vocabulary",
    type=Choice(ALL),
    metavar="ROWS|all",
    help="Draft from this many rows of the vocabulary alone, which is faster; the text stays the same.  [default: the "
    "recipe's, or all]",
)
@click.option(
    "--keep-token-ids",
    is_flag=True,
    help="Leave ids as they are in the checkpoint: drafts then come from the first ones, and not from frequent tokens.",
)
@click.option(
    "--weights",
    type=click.Choice(get_args(WeightsChoice)),
    help="Store the layers' matrices in 8 or 4 bits; auto chooses for each matrix.  [default: the recipe's, what suits "
    "the device, or the dtype]",
)
@click.option(
    "--bits",
    type=float,
    help=f"For auto: bits of a weight on average, scales counted.  [default: the recipe's, or {BITS_TEXT}]",
)
@click.option(
    "--head",
    type=click.Choice(get_args(FormatChoice)),
    help="The format of head and token embeddings.  [default: the recipe's, int8 with --weights, or the dtype]",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="LAYERS=FORMAT",
    help="Another format for some layers, such as 0-3=int8 or 5=dtype; can be given more than once.",
)
@click.option(
    "--block-size",
    type=click.Choice(tuple(map(str, BLOCK_SIZES))),
    help="Numbers that share a scale, in 4 bits.  [default: the recipe's, 64 for a device that runs TensorRT, else 32]",
)
@click.option(
    "--quantizer",
    type=click.Choice(get_args(Method)),
    help="How numbers and scales are found; GPTQ reads texts.  [default: the recipe's, or search]",
)
@click.option(
    "--calibration",
    type=Place(path_type=Path),
    help="A text file, or a folder of them: for auto and GPTQ, which have some built in, and to count which tokens are "
    "frequent and let drafts come from those.  [default for drafts: what ships for its tokenizer]",
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", envvar="HF_TOKEN", help="Hub access token.  [env: HF_TOKEN]")
@click.option("--offline", is_flag=True, help="Use only what is in the hub's cache.")
def export(
    paths: tuple[str, ...],
    recipe: str | None,
    device_name: str | None,
    exit_layers: tuple[int, ...] | None,
    dtype: Any,
    max_length: int | None,
    num_speculations: int | None,
    draft_vocabulary: Any,
    keep_token_ids: bool,
    weights: Any,
    head: Any,
    layers: tuple[str, ...],
    block_size: str | None,
    bits: float | None,
    quantizer: Any,
    calibration: Path | None,
    revision: str | None,
    token: str | None,
    offline: bool,
) -> None:
    """Split CHECKPOINT (a folder or a hub id) into a BUNDLE folder of ONNX graphs.

    A --recipe names the checkpoint and how to split it. BUNDLE is then named after the recipe and the device unless it
    is given; a CHECKPOINT before it takes the place of the recipe's.
    """
    if len(paths) > 2 or (recipe is None and len(paths) < 2):
        raise click.UsageError("give CHECKPOINT and BUNDLE, or --recipe")
    require("export")
    from edgeskip.exporter.bundle import ExportSettings, export_bundle
    from edgeskip.exporter.checkpoint import open_checkpoint
    from edgeskip.exporter.quantization.budget import planned_formats
    from edgeskip.exporter.quantization.choice import QuantizationChoice
    from edgeskip.exporter.quantization.plan import stored_formats
    from edgeskip.exporter.vocabulary.frequency import covered_share
    from edgeskip.recipes.deployment import checkpoint_source, load_device, load_export_recipe
    from edgeskip.recipes.plan.plan import PlanSettings, fit
    from edgeskip.recipes.plan.recommend import fitting_block_size, recommend
    from edgeskip.runtime.decoding.text import load_tokenizer
    from edgeskip.runtime.files import check_destination
    from edgeskip.runtime.printable import one_line
    from edgeskip.runtime.terminal import drafting_text, progress_bar

    def warn(line: str) -> None:
        click.echo(f"edgeskip: warning: {one_line(line)}", err=True)

    size: Any = None if block_size is None else int(block_size)
    device = None if device_name is None else load_device(device_name)
    source = paths[0] if paths else ""
    if recipe is not None:
        chosen, path = load_export_recipe(recipe)
        source = paths[0] if len(paths) == 2 else checkpoint_source(chosen, path)
        exit_layers, dtype = first(exit_layers, (chosen.exit_layer, *chosen.other_exits)), first(dtype, chosen.dtype)
        max_length = first(max_length, chosen.max_length)
        num_speculations = first(num_speculations, chosen.num_speculations)
        weights, head = first(weights, chosen.weights), first(head, chosen.head)
        layers, size = layers or chosen.layers, first(size, chosen.block_size)
        bits = first(bits, chosen.bits if weights == "auto" else None)
        quantizer = first(quantizer, chosen.quantizer)
        draft_vocabulary = rows_of(draft_vocabulary, chosen.draft_vocabulary)
        if chosen.calibration and (weights == "auto" or quantizer == "gptq" or draft_vocabulary is not None):
            calibration = first(calibration, path.parent / chosen.calibration)
    else:
        draft_vocabulary = rows_of(draft_vocabulary)
    if keep_token_ids and draft_vocabulary is None:
        raise click.UsageError("--keep-token-ids is for drafts from a part of the vocabulary: give --draft-vocabulary")
    keep_token_ids = keep_token_ids or (recipe is not None and chosen.keep_token_ids)
    if weights == "auto" or quantizer == "gptq":
        require("export --quantizer gptq")
    in_4_bits = weights == "auto" or "int4" in (weights, head) or any(one.endswith("=int4") for one in layers)
    if block_size is not None and device is None and not in_4_bits:
        raise click.UsageError("--block-size is for 4 bits: give --weights int4, or leave it out")
    if exit_layers is None:
        raise click.UsageError("give --exit-layer or --recipe")
    exit_layer, *other_exits = exit_layers
    bundle = Path(paths[-1] if paths else "-".join(Path(name).stem for name in (recipe, device_name) if name))
    check_destination(bundle)
    opened = open_checkpoint(source, revision=revision, token=token, offline=offline, warn=warn)
    if device is not None:
        wanted = PlanSettings(exit_layer, num_speculations, dtype=dtype, max_length=max_length)
        wanted = replace(wanted, draft_vocabulary=draft_vocabulary, other_exits=tuple(other_exits))
        size = first(size, fitting_block_size(opened.architecture, device))
        if not (weights or head or layers or opened.quantized_by):
            recommended = recommend(opened.architecture, device, wanted, size)
            weights = recommended.weights
            say(f"{device.name}: {recommended.reason}")
        choice = QuantizationChoice(weights=weights, head=head, layers=layers, block_size=size, bits=bits)
        formats = planned_formats(opened.architecture, first(dtype, device.dtype), choice)
        wanted = replace(wanted, formats=formats | stored_formats(opened))
        fitted, problems = fit(opened.architecture, device, wanted)
        dtype, max_length = fitted.dtype, fitted.max_length
        for problem in problems:
            say(f"{device.name}: {problem.found}; {problem.fix}")
    settings = ExportSettings(
        exit_layer,
        first(dtype, "fp32"),
        max_length,
        first(num_speculations, DEFAULT_SPECULATIONS),
        other_exits=tuple(other_exits),
        draft_vocabulary=draft_vocabulary,
        keep_token_ids=keep_token_ids,
        weights=weights,
        head=head,
        layers=layers,
        block_size=first(size, fitting_block_size(opened.architecture, device)),
        bits=bits,
        quantizer=first(quantizer, "search"),
        calibration=calibration,
    )
    with progress_bar() as progress:
        exported = export_bundle(opened, bundle, settings, progress, warn)
    size_mb = exported.manifest.weights_bytes / 1e6
    say(f"{bundle}: {size_mb:.1f} MB of weights, {drafting_text(exported.manifest)} and the rest verify.")
    if draft_vocabulary is not None:
        texts = "your texts" if calibration is not None else "texts of many kinds, as counted for this tokenizer"
        counted = f"are frequent in {texts}" if exported.manifest.renumbered else "have the first ids"
        share = covered_share(load_tokenizer(exported), draft_vocabulary)
        say(
            f"Drafts are among the {draft_vocabulary} tokens that {counted}. These are {share:.0%} of the tokens in "
            "the Python that ships as prompts; `edgeskip tune` counts in your texts."
        )
    say(f'Try it: edgeskip generate {bundle} --prompt "..."')
