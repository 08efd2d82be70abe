"""The command line: one click command a verb, thin. Heavy imports wait until their verb runs."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

import edgeskip
from edgeskip.runtime.architecture import DType
from edgeskip.runtime.backends import BACKENDS, DEVICES, Backend
from edgeskip.runtime.engines import ENGINE_BACKENDS
from edgeskip.runtime.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    EdgeskipError,
    RecipeError,
    RequestError,
)
from edgeskip.runtime.graphs import DEFAULT_SPECULATIONS, DIALECTS, MAX_SPECULATIONS
from edgeskip.runtime.packages import NEEDS, missing_modules
from edgeskip.runtime.rounds import MODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from edgeskip.runtime.bench import Contestant
    from edgeskip.runtime.manifest import Progress

EXIT_CODES = (
    "Exit codes: 0 done, 1 tokens differ, or a check fails, 2 wrong command line, 3 checkpoint, "
    "4 bundle, 5 request, 6 backend, 7 recipe, 130 interrupted, 143 ended by the system."
)


class _Group(click.Group):
    """Prints what the user can mend as one line, with its exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        for name in ("SIGTERM", "SIGHUP"):
            if number := getattr(signal, name, None):
                signal.signal(number, lambda caught, _: sys.exit(128 + caught))  # so that `finally` cleans up
        try:
            return super().invoke(ctx)
        except EdgeskipError as error:
            click.echo(f"edgeskip: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left has nowhere to go
            click.echo("edgeskip: stdout: cannot be written (no space left)", err=True)
            ctx.exit(RequestError.exit_code)
        except KeyboardInterrupt:
            click.echo("edgeskip: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeskip.__version__, prog_name="edgeskip")
def main() -> None:
    """LayerSkip models on the edge: split, export and decode self-speculatively from one set of weights."""


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
threshold_option = click.option(
    "--confidence-threshold",
    type=click.FloatRange(0, 1),
    help="A draft less probable than this is the last of its round; 0 always drafts K.  [default: the backend's]",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="auto: TensorRT engines that fit this machine, else ONNX Runtime.",
)
device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="ONNX Runtime's; auto: the GPU where there is one.",
)
threads_option = click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: one a core.")
max_new_tokens_option = click.option(
    "--max-new-tokens", "-n", type=int, default=128, show_default=True, help="Tokens a prompt, from 2."
)
num_prompts_option = click.option("--num-prompts", type=click.IntRange(1), help="Use only the first so many prompts.")
prompt_tokens_option = click.option("--prompt-tokens", type=click.IntRange(1), help="Cut prompts to so many tokens.")
json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the report here; - is stdout."
)
html_option = click.option(
    "--html", "html_path", type=click.Path(path_type=Path), help="Write a page with plots here; - is stdout."
)
recipe_option = click.option(
    "--recipe", "-r", help="A model recipe, by name or file; `edgeskip recipes list` shows them."
)
prompts_option = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text file a prompt, or a folder of them.  [default: built in]",
)


@main.command()
@click.argument("paths", nargs=-1, metavar="[CHECKPOINT] [BUNDLE]")
@recipe_option
@click.option("--device", "-d", "device_name", help="Plan for this device, by name or file, and fit its memory.")
@click.option("--exit-layer", "-e", type=int, help="E: layers[:E] draft, the rest verify.  [default: the recipe's]")
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
    help=f"Default drafts a round.  [default: the recipe's, or {DEFAULT_SPECULATIONS}]",
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", envvar="HF_TOKEN", help="Hub access token.  [env: HF_TOKEN]")
@click.option("--offline", is_flag=True, help="Use only what the hub's cache holds.")
def export(
    paths: tuple[str, ...],
    recipe: str | None,
    device_name: str | None,
    exit_layer: int | None,
    dtype: Any,
    max_length: int | None,
    num_speculations: int | None,
    revision: str | None,
    token: str | None,
    offline: bool,
) -> None:
    """Split CHECKPOINT (a folder or a hub id) into a BUNDLE folder of ONNX graphs.

    A --recipe names the checkpoint and how to split it. BUNDLE is then called after recipe and device unless it is
    given; a CHECKPOINT before it takes the place of the recipe's.
    """
    if len(paths) > 2 or (recipe is None and len(paths) < 2):
        raise click.UsageError("give CHECKPOINT and BUNDLE, or --recipe")
    _require("export")
    from edgeskip.exporter.bundle import ExportSettings, export_bundle
    from edgeskip.exporter.checkpoint import open_checkpoint
    from edgeskip.exporter.folder import check_destination
    from edgeskip.recipes.deployment import checkpoint_source, load_device, load_export_recipe
    from edgeskip.recipes.planning import PlanSettings, fit

    device = None if device_name is None else load_device(device_name)
    source = paths[0] if paths else ""
    if recipe is not None:
        chosen, path = load_export_recipe(recipe)
        source = paths[0] if len(paths) == 2 else checkpoint_source(chosen, path)
        exit_layer, dtype = _first(exit_layer, chosen.exit_layer), _first(dtype, chosen.dtype)
        max_length = _first(max_length, chosen.max_length)
        num_speculations = _first(num_speculations, chosen.num_speculations)
    if exit_layer is None:
        raise click.UsageError("give --exit-layer or --recipe")
    bundle = Path(paths[-1] if paths else "-".join(Path(name).stem for name in (recipe, device_name) if name))
    check_destination(bundle)
    opened = open_checkpoint(source, revision=revision, token=token, offline=offline)
    if device is not None:
        wanted = PlanSettings(exit_layer, num_speculations, dtype=dtype, max_length=max_length)
        fitted, problems = fit(opened.architecture, device, wanted)
        dtype, max_length = fitted.dtype, fitted.max_length
        for problem in problems:
            click.echo(f"{device.name}: {problem.found}; {problem.fix}", err=True)
    settings = ExportSettings(
        exit_layer, _first(dtype, "fp32"), max_length, _first(num_speculations, DEFAULT_SPECULATIONS)
    )
    with _progress() as progress:
        exported = export_bundle(opened, bundle, settings, progress)
    weights = exported.manifest.weights_bytes / 1e6
    click.echo(f"{bundle}: {weights:.1f} MB of weights, layers[:{exit_layer}] draft and the rest verify.", err=True)
    click.echo(f'Try it: edgeskip generate {bundle} --prompt "..."', err=True)


@main.command()
@click.argument("model", required=False)
@recipe_option
@click.option("--device", "-d", "device_name", required=True, help="A device, by name or file.")
@click.option("--exit-layer", "-e", type=int, help="E.  [default: the recipe's, or a quarter of the layers]")
@click.option(
    "--num-speculations",
    "-k",
    type=click.IntRange(1, MAX_SPECULATIONS),
    help="K.  [default: the best at a match rate that is known, else the recipe's]",
)
@click.option(
    "--match-rate",
    "match_rates",
    multiple=True,
    metavar="[E=]A",
    help="Share of greedy tokens that the exit predicts; with E=, that of exit layer E; more than once for more.",
)
@click.option("--backend", type=click.Choice(get_args(Backend)), help="[default: the device's first]")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="[default: the recipe's or the device's]")
@click.option("--max-length", type=int, help="Capacity in tokens.  [default: the recipe's or the device's]")
@click.option("--jetpack", help="The Jetson's JetPack.  [default: the newest]")
@click.option("--position", type=click.IntRange(0), help="Tokens in the caches when a round is timed.")
@click.option(
    "--calibrate",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `edgeskip bench --json` wrote on this device, of any model; more than once for more.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the plan here; - is stdout.")
def plan(
    model: str | None,
    recipe: str | None,
    device_name: str,
    exit_layer: int | None,
    num_speculations: int | None,
    match_rates: tuple[str, ...],
    backend: Any,
    dtype: Any,
    max_length: int | None,
    jetpack: str | None,
    position: int | None,
    reports: tuple[Path, ...],
    json_path: Path | None,
) -> None:
    """Foretell whether a model fits a device and how fast it is there, without its weights.

    MODEL is a checkpoint folder, a hub id, a config.json or a published shape; or give --recipe. The exit code is 1
    where it will not work.
    """
    if (model is None) == (recipe is None):
        raise click.UsageError("give a MODEL or --recipe")
    from edgeskip.recipes.deployment import load_device, load_export_recipe, recipe_shape
    from edgeskip.recipes.planning import PlanSettings, make_plan, parse_match_rates
    from edgeskip.recipes.planning_report import print_plan
    from edgeskip.recipes.shape import load_shape
    from edgeskip.runtime.bench import read_report

    _check_writable(json_path)
    device = load_device(device_name)
    known: dict[int, float] = {}
    if recipe is not None:
        chosen, path = load_export_recipe(recipe)
        shape, known = recipe_shape(chosen, path), dict(chosen.match_rates)
        exit_layer, dtype = _first(exit_layer, chosen.exit_layer), _first(dtype, chosen.dtype)
        max_length = _first(max_length, chosen.max_length)
    else:
        shape = load_shape(str(model))
        exit_layer = _first(exit_layer, max(shape.architecture.num_layers // 4, 1))
    known |= parse_match_rates(match_rates, exit_layer)
    if recipe is not None and exit_layer not in known:
        num_speculations = _first(num_speculations, chosen.num_speculations)
    settings = PlanSettings(exit_layer, num_speculations, known, backend, dtype, max_length, jetpack, position)
    made = make_plan(recipe or shape.name, shape.architecture, device, settings, [read_report(p) for p in reports])
    print_plan(made, _console(stderr=str(json_path) == "-"))
    if json_path is not None:
        _write_text(json_path, json.dumps(dataclasses.asdict(made), indent=2) + "\n")
    if not made.works:
        raise SystemExit(1)


@main.command()
@bundle_argument
@click.option(
    "--backend",
    type=click.Choice(ENGINE_BACKENDS),
    required=True,
    help="tensorrt builds on the device that runs it, Jetsons among them; tensorrt-rtx also for another machine.",
)
@click.option(
    "--sm",
    "compute_capabilities",
    multiple=True,
    type=int,
    help="Build for GPUs of this compute capability, 86 for 8.6; can be given more than once.  [default: the GPU here]",
)
@click.option(
    "--workspace-mb", type=click.IntRange(1, 1 << 20), help="Device memory for a kernel's own use.  [default: all]"
)
def build(bundle: Path, backend: Any, compute_capabilities: tuple[int, ...], workspace_mb: int | None) -> None:
    """Build a BUNDLE's TensorRT engines, into the bundle."""
    _require("build")
    from edgeskip.exporter.engine import BuildSettings, build_engines
    from edgeskip.runtime.manifest import read_bundle

    settings = BuildSettings(backend, compute_capabilities, workspace_mb)
    with _progress() as progress:
        made = build_engines(read_bundle(bundle), settings, progress)
    for engines in made:
        records = engines.build.engines
        parts = ", ".join(f"{graph} {record.bytes / 1e6:.1f} MB" for graph, record in records.items())
        peak = max(record.peak_memory_bytes or 0 for record in records.values())
        seconds = sum(record.seconds for record in records.values())
        memory = f", with at most {peak / 1e6:.0f} MB of memory" if peak else ""
        click.echo(f"{engines.folder}: {parts}, in {seconds:.0f} s{memory}.", err=True)


@main.command()
@bundle_argument
@click.option("--prompt", "-p", help="The text to continue.")
@click.option("--prompt-file", "-f", type=click.File("r", encoding="utf-8"), help="A file with the text; - is stdin.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message through the model's chat template.")
@click.option("--mode", type=click.Choice(MODES), default=MODES[0], show_default=True, help="How to decode.")
@click.option("--num-speculations", "-k", type=int, help="Drafts a round.  [default: the bundle's]")
@threshold_option
@click.option("--max-new-tokens", "-n", type=int, default=256, show_default=True, help="Tokens at most.")
@click.option("--stop", multiple=True, help="End at this text; can be given more than once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@backend_option
@device_option
@threads_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Any,
    chat: bool,
    mode: Any,
    num_speculations: int | None,
    confidence_threshold: float | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    as_json: bool,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Continue a prompt. On a terminal, text that the early layers drafted is green."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with --prompt TEXT, --prompt-file FILE or --prompt-file -")
    text = prompt if prompt is not None else _read_text(prompt_file)
    from edgeskip.runtime.generate import load
    from edgeskip.runtime.report import print_model, print_statistics, stream

    with _progress() as progress:
        model = load(bundle, backend=backend, device=device, threads=threads, progress=progress)
    with model:
        settings = {
            "mode": mode,
            "num_speculations": num_speculations,
            "confidence_threshold": confidence_threshold,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
        }
        asked: Any = [{"role": "user", "content": text}] if chat else text
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(model.complete(asked, **settings)), ensure_ascii=False))
        else:
            generation = stream(model.generate(asked, **settings), _console())
            print_model(model, _console(stderr=True))
            print_statistics(generation, _console(stderr=True))


@main.command()
@bundle_argument
@click.option(
    "--num-speculations",
    "-k",
    "grid",
    multiple=True,
    type=int,
    help="Speculation lengths to measure; can be given more than once.  [default: 1 to 8]",
)
@threshold_option
@max_new_tokens_option
@prompts_option
@num_prompts_option
@prompt_tokens_option
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of which medians are taken.")
@click.option("--compare", type=click.Choice(["transformers"]), help="Measure another runtime in the same run.")
@json_option
@html_option
@backend_option
@device_option
@threads_option
def bench(
    bundle: Path,
    grid: tuple[int, ...],
    confidence_threshold: float | None,
    max_new_tokens: int,
    prompts: Path | None,
    num_prompts: int | None,
    prompt_tokens: int | None,
    repeats: int,
    compare: str | None,
    json_path: Path | None,
    html_path: Path | None,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Measure plain and self-speculative decoding on held-out prompts, interleaved; medians."""
    from edgeskip.runtime.bench import BenchSettings, load_prompts, run_bench
    from edgeskip.runtime.generate import load
    from edgeskip.runtime.page import bench_page
    from edgeskip.runtime.report import print_bench

    _check_writable(json_path, html_path)
    if html_path is not None:
        _require("bench --html")
    if compare:
        _require("bench --compare")
    settings = BenchSettings(
        tuple(grid) or tuple(range(1, 9)), max_new_tokens, repeats, confidence_threshold, prompt_tokens
    )
    texts = load_prompts(prompts)[:num_prompts]
    with (
        _progress() as progress,
        load(bundle, backend=backend, device=device, threads=threads, progress=progress) as model,
    ):

        def others() -> Sequence[Contestant]:
            if not compare:
                return ()
            from edgeskip.exporter.reference import transformers_contestants

            return transformers_contestants(model.bundle, model.session.device, threads)

        report = run_bench(model, texts, settings, others, _command_line(), progress)
    print_bench(report, _console(stderr="-" in (str(json_path), str(html_path))))
    if json_path is not None:
        _write_text(json_path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    if html_path is not None:
        _write_text(html_path, bench_page(dataclasses.asdict(report)))
    if report.faults:
        raise SystemExit(1)


@main.command()
@bundle_argument
@click.option(
    "--num-speculations",
    "-k",
    "grid",
    multiple=True,
    type=int,
    help="Speculation lengths to choose from; can be given more than once.  [default: 1 to 8]",
)
@threshold_option
@max_new_tokens_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text file a prompt, or a folder of them: texts like those you will run.  [default: built in]",
)
@num_prompts_option
@prompt_tokens_option
@click.option("--recipe", type=click.Path(path_type=Path), help="Write the choice here, a new export recipe.")
@json_option
@html_option
@backend_option
@device_option
@threads_option
def tune(
    bundle: Path,
    grid: tuple[int, ...],
    confidence_threshold: float | None,
    max_new_tokens: int,
    prompts: Path | None,
    num_prompts: int | None,
    prompt_tokens: int | None,
    recipe: Path | None,
    json_path: Path | None,
    html_path: Path | None,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Find the best exit layer and speculation length for your text and this device, from one BUNDLE."""
    _require("tune")
    if html_path is not None:
        _require("tune --html")
    _check_writable(recipe, json_path, html_path)
    if recipe is not None and recipe.exists():
        raise RecipeError(recipe, "is there already", fix="give another file, or remove it")
    from edgeskip.recipes.tuning import TuneSettings
    from edgeskip.recipes.tuning import tune as run
    from edgeskip.recipes.tuning_report import print_tuning, tuned_recipe, tuning_page
    from edgeskip.runtime.bench import load_prompts
    from edgeskip.runtime.generate import load

    settings = TuneSettings(tuple(grid) or tuple(range(1, 9)), max_new_tokens, confidence_threshold, prompt_tokens)
    texts = load_prompts(prompts)[:num_prompts]
    choice: Any = {"backend": backend, "device": device, "threads": threads}
    with _progress() as progress:
        report = run(lambda: load(bundle, **choice, progress=progress), texts, settings, _command_line(), progress)
    print_tuning(report, _console(stderr="-" in map(str, (recipe, json_path, html_path))))
    if json_path is not None:
        _write_text(json_path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    if html_path is not None:
        _write_text(html_path, tuning_page(report))
    if recipe is not None:
        _write_text(recipe, tuned_recipe(report, str(recipe)))


@main.command()
@bundle_argument
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sm", "wanted", type=int, multiple=True, help="Only engines for this SM, 87 for 8.7; more than once for more."
)
def pack(bundle: Path, folder: Path, wanted: tuple[int, ...]) -> None:
    """Write to FOLDER what a device needs of a BUNDLE with engines, and no more."""
    from edgeskip.exporter.pack import pack as write
    from edgeskip.runtime.engines import read_engines
    from edgeskip.runtime.manifest import read_bundle

    opened = read_bundle(bundle)
    found = read_engines(opened)
    targets = sorted({engines.build.compute_capability for engines in found})
    missing = [sm for sm in wanted if sm not in targets]
    if found and missing:
        raise BundleError(bundle, f"no engines for SM {missing[0]}", wanted=f"SM {', '.join(map(str, targets))}")
    chosen = [engines for engines in found if not wanted or engines.build.compute_capability in wanted]
    with _progress() as progress:
        write(opened, chosen, folder, progress)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {size / 1e6:.1f} MB, engines {', '.join(one.folder.name for one in chosen)}.", err=True)


@main.command()
@bundle_argument
@click.option(
    "--reference", help="The CHECKPOINT to compare with, a folder or hub id.  [default: the bundle's weights]"
)
@prompts_option
@click.option("--num-prompts", type=click.IntRange(1), default=8, show_default=True, help="Use only the first so many.")
@click.option("--layers", is_flag=True, help="Narrow a failure down to the first layer that departs.")
@json_option
@click.option(
    "--dialect", type=click.Choice(tuple(DIALECTS)), help="Of ONNX Runtime's graphs.  [default: the device's]"
)
@backend_option
@device_option
@threads_option
def check(
    bundle: Path,
    reference: str | None,
    prompts: Path | None,
    num_prompts: int,
    layers: bool,
    json_path: Path | None,
    dialect: str | None,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Compare what a BUNDLE's graphs compute here with transformers in fp32, call by call and text by text."""
    _require("check")
    from edgeskip.exporter.check import run_check
    from edgeskip.exporter.check_report import print_check
    from edgeskip.exporter.golden import Golden
    from edgeskip.runtime.bench import load_prompts
    from edgeskip.runtime.generate import load

    _check_writable(json_path)
    texts = load_prompts(prompts)[:num_prompts]
    settings: Any = {"backend": backend, "device": device, "threads": threads, "dialect": dialect}
    with _progress() as progress, load(bundle, **settings, progress=progress) as model:
        golden = Golden(model.bundle, reference, model.session.device, threads)
        report = run_check(model, golden, texts, layers=layers, command=_command_line(), progress=progress)
    print_check(report, _console(stderr=str(json_path) == "-"))
    if json_path is not None:
        _write_text(json_path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    if not report.passed:
        raise SystemExit(1)


@main.command()
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds: model, split, graphs, files."""
    from edgeskip.runtime.manifest import read_bundle
    from edgeskip.runtime.report import print_bundle

    opened = read_bundle(bundle)
    if as_json:
        click.echo(opened.manifest.to_json(), nl=False)
    else:
        print_bundle(opened, _console())


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show what this machine has, what will work here, and the command that mends what will not."""
    from edgeskip.runtime.doctor import examine

    report = examine()
    try:
        from edgeskip.runtime.doctor_report import print_doctor
    except ImportError:  # without rich the JSON says as much
        as_json = True
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        print_doctor(report, _console())


@main.group()
def recipes() -> None:
    """Models, devices and trainings that edgeskip knows: list, show, copy, validate."""


@recipes.command(name="list")
def list_recipes() -> None:
    """List the recipes that ship with edgeskip."""
    from edgeskip.recipes.library import shipped_recipes

    found = list(shipped_recipes())
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(f"{recipe.kind:9} {recipe.name:{width}}  {recipe.title}")


@recipes.command()
@click.argument("recipe")
def show(recipe: str) -> None:
    """Print a RECIPE, by name or file: its text, and what it takes from the one it extends."""
    from edgeskip.recipes.library import recipe_file
    from edgeskip.recipes.reader import read_table

    path = recipe_file(recipe)
    resolved = read_table(path)
    text = path.read_text(encoding="utf-8")
    click.echo(text, nl=False)
    own = read_table(path, extend=False)
    if inherited := {key: value for key, value in resolved.items() if own.get(key) != value}:
        click.echo("\n# From what it extends:")
        for key, value in inherited.items():
            click.echo(f"#   {key} = {json.dumps(value, ensure_ascii=False)}")


@recipes.command()
@click.argument("recipe")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def copy(recipe: str, file: Path | None) -> None:
    """Copy a RECIPE to a FILE of yours to change.  [default: its own name, here]"""
    from edgeskip.recipes.library import recipe_file
    from edgeskip.recipes.library import validate as check_recipe

    path = recipe_file(recipe)
    check_recipe(path)
    text = path.read_text(encoding="utf-8")
    target = Path(path.name) if file is None else file / path.name if file.is_dir() else file
    try:
        with target.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise RecipeError(target, "is there already", fix="give another file, or remove it") from None
    except OSError as error:
        raise RecipeError(target, f"cannot be written ({error.strerror})", fix="give another file") from None
    click.echo(f"{target}", err=True)


@recipes.command()
@click.argument("names", nargs=-1, metavar="[RECIPE]...")
def validate(names: tuple[str, ...]) -> None:
    """Check RECIPES, by name or file, of any kind.  [default: all that ship with edgeskip]"""
    from edgeskip.recipes.library import recipe_file, shipped_recipes
    from edgeskip.recipes.library import validate as check_recipe

    failed = False
    for path in [recipe_file(name) for name in names] or [recipe.path for recipe in shipped_recipes()]:
        try:
            click.echo(f"{path}: a {check_recipe(path)} recipe")
        except RecipeError as error:
            click.echo(f"edgeskip: {error}", err=True)
            failed = True
    if failed:
        raise SystemExit(RecipeError.exit_code)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the model goes.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the output folder.")
@click.option("--stop-after-minutes", type=float, help="Save and stop; continue with --resume.")
@click.option("--data", type=click.Path(path_type=Path), help="The corpus folder, in place of the recipe's.")
def train(recipe: Path, output: Path | None, resume: bool, stop_after_minutes: float | None, data: Path | None) -> None:
    """Train a LayerSkip model by a RECIPE.toml: from scratch, or continuing a checkpoint."""
    _require("train")
    from edgeskip.recipes.training import train as run

    result = run(recipe, output, resume, stop_after_minutes, data)
    done = f"{result.steps} steps, {result.tokens:,} tokens, {result.minutes:.1f} minutes"
    click.echo(f"{result.output}: {done}" + ("" if result.finished else "; continue with --resume"), err=True)


@main.command()
@click.argument("shape")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--exit-layer", "-e", type=int, required=True, help="E: the later layers, layers[E:], are damped.")
@click.option("--match-rate", type=float, required=True, help="Share of greedy tokens that the exit predicts, 0 to 1.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and prompts.")
@click.option("--dtype", type=click.Choice(get_args(DType)), default="fp16", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def synth(shape: str, checkpoint: Path, exit_layer: int, match_rate: float, seed: int, dtype: Any, device: Any) -> None:
    """Make a CHECKPOINT with random weights, of a published SHAPE or a config.json, to measure speed with."""
    _require("synth")
    from edgeskip.exporter.folder import check_destination
    from edgeskip.recipes.synthetic import DISTINCT_TOKENS, TOLERANCE, SyntheticSettings, synthesize

    check_destination(checkpoint, CheckpointError)
    with _progress() as progress:
        settings = SyntheticSettings(exit_layer, match_rate, seed, dtype, device)
        made = synthesize(shape, checkpoint, settings, progress)
    spread = made.match_rate_by_prompt
    click.echo(
        f"{checkpoint}: random weights; exit layer {exit_layer} matches {made.match_rate:.1%} of the tokens (by prompt "
        f"{spread.min:.1%} to {spread.max:.1%}, median {spread.median:.1%}) at a damping of {made.damping:.4g}; "
        f"{made.distinct_tokens:.1%} of the tokens of a text are distinct.",
        err=True,
    )
    if abs(made.match_rate - match_rate) > TOLERANCE:
        click.echo(f"The nearest to {match_rate:g} that was reached.", err=True)
    if made.distinct_tokens < DISTINCT_TOKENS:
        click.echo("Its texts repeat tokens: the shape is too small for others.", err=True)
    click.echo(f"Next: edgeskip export {checkpoint} BUNDLE --exit-layer {exit_layer} --dtype {dtype}", err=True)


@main.command()
@click.option("--keep", type=click.Path(path_type=Path), help="Export to this folder and keep it.")
@threads_option
def demo(keep: Path | None, threads: int) -> None:
    """See it work: export the model that ships with edgeskip, decode it both ways, compare."""
    _require("demo")
    from edgeskip.recipes.demo import run_demo

    with _progress() as progress:
        same = run_demo(_console(), keep, threads, progress)
    if not same:
        raise SystemExit(1)


def _first(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # bars and arrows are not in every encoding
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on a terminal's stderr, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


def _command_line() -> str:
    """What was typed, for a report."""
    return shlex.join(["edgeskip", *sys.argv[1:]])


def _require(verb: str) -> None:
    """Refuses a verb, or an option of one, whose extra is not installed."""
    need = NEEDS[verb]
    if missing := missing_modules(need.modules):
        place = f"edgeskip {click.get_current_context().info_name}"
        raise BackendError(place, f"{', '.join(missing)} not installed", fix=need.fix)


def _read_text(file: Any) -> str:
    try:
        return str(file.read())
    except UnicodeDecodeError as error:
        raise RequestError(file.name, f"not UTF-8 text ({error.reason})", wanted="a text file") from None


def _write_text(path: Path, text: str) -> None:
    if str(path) == "-":
        sys.stdout.write(text)
        return
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, which nothing may take the place of
            path.write_text(text, encoding="utf-8")
            return
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RequestError(path, f"cannot be written ({error.strerror})", fix="give another file") from None
    finally:
        part.unlink(missing_ok=True)


def _check_writable(*paths: Path | None) -> None:
    """Refuses what `_write_text` could not write, before the work whose result it is."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        try:
            folder = path.absolute().parent
            found = "it is a folder" if path.is_dir() else "" if folder.is_dir() else "no such folder"
            if not found and not os.access(folder, os.W_OK):
                found = "its folder is read-only"
        except OSError as error:
            found = str(error.strerror)
        if found:
            raise RequestError(path, f"cannot be written ({found})", fix="give another file")
    files = [path for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise RequestError(files[0], "given twice", fix="give each report a file of its own")


if __name__ == "__main__":
    main()
