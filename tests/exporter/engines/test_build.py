"""Building engines, with TensorRT-RTX, which needs no GPU: that they are whole and what was asked for. None is run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
import types
from collections import Counter
from pathlib import Path

import onnx
import pytest
import tensorrt_rtx
from click.testing import CliRunner
from tests.conftest import VARIANTS, edit_json, make_model, save_checkpoint
from tests.standin import put_engines

from edgeskip.cli import main
from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.engines import build as engine
from edgeskip.exporter.engines.build import BuildSettings, build_engines
from edgeskip.exporter.engines.process import Fraction
from edgeskip.recipes.demo import CHECKPOINT as SHIPPED
from edgeskip.runtime.backends import device
from edgeskip.runtime.bundle.dialects import ENGINE_DIALECTS
from edgeskip.runtime.bundle.engines import BUILD, EngineKind, open_engines
from edgeskip.runtime.bundle.layers import PARTS, files_of
from edgeskip.runtime.bundle.manifest import MANIFEST, read_bundle
from edgeskip.runtime.bundle.profiles import EngineProfile, engine_profiles
from edgeskip.runtime.bundle.store import LIMIT, engines_place, read_engines, stored_sets
from edgeskip.runtime.errors import BackendError, BundleError, RequestError
from edgeskip.runtime.files import cache_folder, user_cache, whole_folder

TARGETS = (75, 80, 86, 89, 120, 121)
ATTENTION = ("KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "ATTENTION_INPUT", "ATTENTION_OUTPUT")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """The checkpoint that ships with edgeskip, in fp16, split where it was trained to be."""
    folder = tmp_path_factory.mktemp("shipped") / "python-10m"
    return export_bundle(open_checkpoint(str(SHIPPED)), folder, ExportSettings(3, "fp16"))


@pytest.fixture
def bundle(bundles, tmp_path):
    """A copy of a tiny bundle, to build in or to spoil."""
    return copied(bundles("llama-gqa", dtype="fp16"), tmp_path / "bundle")


def copied(bundle, folder):
    return read_bundle(shutil.copytree(bundle.folder, folder))


def build(bundle, *sms, backend="tensorrt-rtx", **settings):
    return build_engines(bundle, BuildSettings(backend, sms, **settings)).engines


def nothing_is_stored():
    """Neither engines nor anything hidden."""
    folder = user_cache() / "engines"
    return not folder.exists() or list(folder.iterdir()) == []


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def spoil_graph(bundle, change):
    """Changes draft.inputs.onnx and has the manifest agree."""
    path = bundle.graph_path("draft", "standard-inputs")
    model = onnx.load(path, load_external_data=False)
    path.write_bytes(change(model) or model.SerializeToString())
    record = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_json(bundle.path(MANIFEST), lambda manifest: manifest["files"].update({path.name: record}))
    return read_bundle(bundle.folder)


class Log(tensorrt_rtx.ILogger):
    """Keeps warnings and errors; the first logger of a process is the one that TensorRT uses to its end."""

    def __init__(self):
        tensorrt_rtx.ILogger.__init__(self)
        self.kept = []

    def log(self, severity, message):
        if severity <= tensorrt_rtx.Logger.WARNING:
            self.kept.append(message)


LOG = Log()


def parsed(path):
    """The layers that TensorRT's own parser makes of a graph, and what it warns of."""
    LOG.kept.clear()
    builder = tensorrt_rtx.Builder(LOG)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, LOG)
    assert parser.parse_from_file(str(path)), LOG.kept
    return Counter(layer.type.name for layer in network), list(LOG.kept)


def assert_engines_are_whole(bundle, sm, dialect="standard"):
    """They are read back, hold no weights, and nothing else is there."""
    kinds = (sm, dialect)
    (engines,) = (f for f in read_engines(bundle) if (f.build.compute_capability, f.build.dialect) == kinds)
    with open_engines(engines):
        pass
    profiles = engine_profiles(bundle.manifest, ENGINE_DIALECTS[dialect], sm)
    graphs = files_of(bundle.manifest.graphs, ENGINE_DIALECTS[dialect])
    assert set(profiles) == ({*PARTS} if dialect == "layers" and bundle.manifest.has_products(sm) else {*graphs})
    wanted = {BUILD, *(f"{graph}.engine" for graph in profiles)}
    assert {path.name for path in engines.folder.iterdir()} == wanted
    assert engines.build.bytes <= engine.KERNEL_BYTES_PER_LAYER * (bundle.manifest.architecture.num_layers + 4)
    for graph, record in engines.build.engines.items():
        assert record.profiles == profiles[graph]
        assert record.seconds > 0
        assert 50e6 < record.peak_memory_bytes < 0.8e9
    assert (engines.build.backend, engines.build.backend_version) == ("tensorrt-rtx", tensorrt_rtx.__version__)
    assert (engines.build.gpu, engines.build.dtype) == (None, bundle.manifest.dtype)
    assert engines.build.manifest_sha256 == hashlib.sha256(bundle.path(MANIFEST).read_bytes()).hexdigest()
    assert engines.folder == place(bundle, sm, dialect)


def place(bundle, sm, dialect="standard"):
    """Where engines of TensorRT-RTX belong."""
    return engines_place(bundle, EngineKind("tensorrt-rtx", tensorrt_rtx.__version__, sm, dialect))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_builds(variant, bundles, tmp_path):
    bundle = copied(bundles(variant, dtype="fp16"), tmp_path / "bundle")
    build(bundle, 86)
    assert_engines_are_whole(bundle, 86)


@pytest.mark.parametrize(("dtype", "sms"), [("fp16", TARGETS), ("bf16", TARGETS[1:])])
def test_every_gpu_builds(dtype, sms, bundles, tmp_path):
    """With chunks longer than a round, so with two profiles."""
    bundle = copied(bundles("llama-gqa", dtype=dtype, prefill_chunk=32), tmp_path / "bundle")
    assert [made.build.compute_capability for made in build(bundle, *sms)] == list(sms)
    for sm in sms:
        assert_engines_are_whole(bundle, sm)


@pytest.mark.parametrize("dialect", ["layers", "primitive"])
def test_every_gpu_builds_the_dialects_for_older_versions(dialect, tmp_path):
    save_checkpoint(make_model("llama-gqa", num_hidden_layers=2), tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(1, "fp16", prefill_chunk=8))
    build(bundle, *TARGETS, dialect=dialect)
    for sm in TARGETS:
        assert_engines_are_whole(bundle, sm, dialect)


def test_the_targets_are_the_librarys_own():
    """Where a release brings others, `test_every_gpu_builds` and the README want them too."""
    members = tensorrt_rtx.ComputeCapability.__members__
    assert tuple(sorted(int(name[2:]) for name in members if name.startswith("SM"))) == TARGETS


@pytest.mark.parametrize("sm", [75, 120])
def test_the_shipped_checkpoint_builds(sm, shipped):
    build(shipped, sm)
    assert_engines_are_whole(shipped, sm)


def test_every_decoder_layer_is_two_cache_updates_two_rotations_and_one_attention(shipped, bundles):
    for bundle in (shipped, bundles("llama-mha", dtype="bf16"), bundles("qwen3", dtype="fp16", exit_layer=1)):
        for graph, contract in bundle.manifest.graphs.items():
            layers, warnings = parsed(bundle.graph_path(graph, "standard-inputs"))
            count = len(contract.layers)
            assert [layers[kind] for kind in ATTENTION] == [2 * count, 2 * count, count, count]
            assert not [warning for warning in warnings if "unused" in warning.lower()]


def test_a_mask_that_the_parser_passes_over_is_refused(bundle):
    """The number of valid cache rows, beside is_causal: TensorRT attends to the whole cache and says nothing."""

    def plant(model):
        first = next(node.output[0] for node in model.graph.node if node.op_type == "Squeeze")
        for node in model.graph.node:
            if node.op_type == "Attention":
                node.input[:] = [*node.input[:3], "", "", "", first]
                node.attribute.append(onnx.helper.make_attribute("is_causal", 1))

    spoiled = spoil_graph(bundle, plant)
    layers, warnings = parsed(spoiled.graph_path("draft", "standard-inputs"))
    assert layers["ATTENTION_INPUT"] == 2
    assert all("Int64 binding" in warning for warning in warnings)
    with pytest.raises(
        BackendError, match=r"draft.inputs.onnx: TensorRT reads 0 attention mask from it; wanted 2, 1 for each"
    ):
        build(spoiled, 86)
    assert nothing_is_stored()


def test_an_input_that_tensorrt_leaves_out_is_refused(bundle):
    def plant(model):
        model.graph.input.append(onnx.helper.make_tensor_value_info("valid_rows", onnx.TensorProto.INT64, [1]))

    with pytest.raises(
        BackendError, match=r"draft.inputs.onnx: TensorRT leaves out an input: Unused Input: valid_rows"
    ):
        build(spoil_graph(bundle, plant), 86)
    assert nothing_is_stored()


def test_a_graph_that_is_parsed_into_other_layers_is_refused(bundle):
    spoiled = spoil_graph(bundle, lambda _: bundle.graph_path("head", "standard-inputs").read_bytes())
    message = "draft.inputs.onnx: TensorRT reads 0 KV_CACHE_UPDATE from it; wanted 4, 2 for each of 2 decoder layers"
    with pytest.raises(BackendError, match=message):
        build(spoiled, 86)


def test_a_graph_that_tensorrt_refuses_is_one_line_with_its_reason(bundle):
    spoiled = spoil_graph(bundle, lambda model: model.SerializeToString()[:-100])
    result = run("build", spoiled.folder, "--backend", "tensorrt-rtx", "--sm", 86)
    assert result.exit_code == 6
    assert result.stderr.startswith(f"edgeskip: {spoiled.graph_path('draft', 'standard-inputs')}: ")
    assert "INVALID_PROTOBUF" in result.stderr or "arse" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"prefill_chunk": 48, "num_speculations": 6}, ([(1, 1, 17), (1, 48, 48)], [(1, 7, 17), (1, 48, 48)])),
        ({"prefill_chunk": 17}, ([(1, 1, 17)], [(1, 5, 17)])),  # a round's profile serves such chunks too
        ({"prefill_chunk": 8, "num_speculations": 16}, ([(1, 1, 17)], [(1, 17, 17)])),
        ({"max_length": 4}, ([(1, 1, 4)], [(1, 4, 4)])),  # no more rows than the caches have
    ],
)
def test_profiles(settings, wanted, bundles):
    profiles = engine_profiles(bundles("llama-gqa", **settings).manifest, ENGINE_DIALECTS["standard"], 87)
    draft, verify = (tuple(EngineProfile(*profile) for profile in graph) for graph in wanted)
    assert (profiles["draft"], profiles["verify"], profiles["head"]) == (draft, verify, verify[:1])


def test_caches_shorter_than_a_round_build(bundles, tmp_path):
    bundle = copied(bundles("llama-gqa", dtype="fp16", max_length=4), tmp_path / "bundle")
    build(bundle, 86)
    assert_engines_are_whole(bundle, 86)


def test_building_again_replaces_the_folder_and_leaves_the_others(bundle):
    (other,), (first,) = build(bundle, 80), build(bundle, 86)
    (first.folder / "stray").write_text("x")
    kept = (other.folder / BUILD).read_bytes()
    build(bundle, 86, force=True)
    assert_engines_are_whole(bundle, 86)
    assert (other.folder / BUILD).read_bytes() == kept
    assert {path.name for path in first.folder.parent.iterdir()} == {other.folder.name, first.folder.name}
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700


def test_a_fine_tune_has_its_engines_already(bundle, tmp_path, monkeypatch):
    """Other weights, the same structure: nothing is built and nothing is hashed, and a line says so."""
    assert run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86).exit_code == 0
    assert_engines_are_whole(bundle, 86)
    before = {path: path.read_bytes() for path in place(bundle, 86).iterdir()}
    save_checkpoint(make_model("llama-gqa", seed=5), tmp_path / "checkpoint")
    settings = ExportSettings(2, "fp16", prefill_chunk=8)
    tuned = export_bundle(open_checkpoint(str(tmp_path / "checkpoint")), tmp_path / "tuned", settings)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_builder", None)
        patch.setattr(engine, "verify_hashes", None)
        result = run("build", tuned.folder, "--backend", "tensorrt-rtx", "--sm", 86)
    assert (result.exit_code, result.stdout) == (0, "")
    when = r"built \d{4}-\d\d-\d\d \d\d:\d\d for llama-gqa; --force builds them again\.\n"
    assert re.fullmatch(rf"{place(tuned, 86)}: the cache has them already: {when}", result.stderr)
    assert {path: path.read_bytes() for path in place(tuned, 86).iterdir()} == before
    (path, data), *_ = before.items()
    for spoil in (lambda: path.write_bytes(data[:-1] + b"x"), path.unlink):
        spoil()
        build(tuned, 86)  # what is damaged is no hindrance
        assert len(read_engines(tuned)) == 1


def test_another_limit_of_the_workspace_is_another_set(bundle):
    (one,), (other,) = build(bundle, 86), build(bundle, 86, workspace_mb=64)
    assert one.folder != other.folder
    assert {engines.build.workspace_mb for engines in read_engines(bundle)} == {None, 64}


def test_what_was_used_least_recently_makes_room(bundle, bundles, monkeypatch):
    old = put_engines(bundles("llama-mha"), EngineKind("tensorrt", "10.16", 87, "standard"))
    monkeypatch.setenv(LIMIT, "0")
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86, "--sm", 89)
    assert result.exit_code == 0
    removed = "Removed what was used least recently, to stay within the limit: "
    assert result.stderr.splitlines()[2:] == [f"{removed}{old.name}."]
    assert {one.folder for one in stored_sets()} == {place(bundle, 86), place(bundle, 89)}
    monkeypatch.setenv(LIMIT, "1 MB")
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86, "--force")
    assert (result.exit_code, "EDGESKIP_CACHE_MB: '1 MB'; wanted" in result.stderr) == (5, True)


def test_without_a_cache_that_can_be_trusted_nothing_is_built(bundle, monkeypatch):
    cache_folder("engines").chmod(0o777)
    monkeypatch.setattr(engine, "_builder", None)
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert "others can write it" in result.stderr
    assert "set XDG_CACHE_HOME to a folder of your own" in result.stderr


def test_the_command_says_what_it_made(bundle):
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86, "--sm", 89, "--workspace-mb", 64)
    assert (result.exit_code, result.stdout) == (0, "")
    lines = result.stderr.splitlines()
    for sm, line in zip((86, 89), lines, strict=True):
        assert line.startswith(f"{user_cache()}/engines/tensorrt-rtx-sm{sm}-{tensorrt_rtx.__version__}-")
        assert ": draft 1." in line


def test_progress_rises_to_the_end_for_each_graph(bundle):
    seen = {}
    build_engines(
        bundle, BuildSettings("tensorrt-rtx", (86,)), lambda what, *done: seen.setdefault(what, []).append(done)
    )
    assert list(seen) == ["checking the bundle", "draft for SM 86", "verify for SM 86", "head for SM 86"]
    for events in list(seen.values())[1:]:
        assert len(events) > 10
        assert events == sorted(events)
        assert events[-1] == (1000, 1000)


def test_the_fraction_of_nested_phases():
    fraction = Fraction()
    fraction.start("build", None, 2)
    fraction.start("parse", "build", 4)
    fraction.step("parse", 0)
    assert fraction.done == pytest.approx(1 / 8)
    fraction.step("build", 0)
    assert fraction.done == pytest.approx(1 / 2)
    for _ in range(2):  # a phase that comes twice within one step does not go back
        fraction.start("time", "build", 2)
        fraction.step("time", 0)
        assert fraction.done == pytest.approx(3 / 4)
    fraction.step("build", 1)
    assert fraction.done == pytest.approx(1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing_and_the_old_engines(number, code, shipped):
    folder = place(shipped, 86)
    for old in (False, True):
        wanted = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        command = [
            sys.executable,
            "-m",
            "edgeskip.cli",
            "build",
            shipped.folder,
            "--backend",
            "tensorrt-rtx",
            "--sm",
            "86",
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not list(folder.parent.glob(".*/draft.engine")):
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == code
        said = [line for line in stderr.splitlines() if not line.endswith("%")]  # that is progress, on a slow machine
        assert said == (["edgeskip: interrupted"] if number == signal.SIGINT else [])
        while any(map(runs, children)):  # what had just been started has nothing to do, and ends by itself
            time.sleep(0.01)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == wanted
        assert old or nothing_is_stored()
        if not old:
            folder.mkdir()
            (folder / BUILD).write_text("old")


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("variant", "dtype", "arguments", "code", "message"),
    [
        ("llama-gqa", "fp16", ["--sm", "90"], 5, "SM 90: not served by TensorRT-RTX 1.7.1"),
        ("llama-gqa", "fp16", ["--sm", "86", "--sm", "87"], 5, "served by --backend tensorrt, run on them"),
        ("llama-gqa", "bf16", ["--sm", "75"], 5, "in bf16, for SM 75; wanted SM 80 or later for bf16"),
        ("llama-gqa", "fp32", ["--sm", "86"], 5, "in fp32, for SM 86; wanted fp16 or bf16"),
        (
            "llama-gqa",
            "fp16",
            [],
            6,
            "no NVIDIA GPU in this machine; give --sm, of 75, 80, 86, 89, 120, 121, to build for another machine",
        ),
        ("llama-gqa", "fp16", ["--sm", "x"], 2, "'x' is not a valid integer"),
        ("llama-gqa", "fp16", ["--sm", "86", "--workspace-mb", "0"], 2, "0 is not in the range"),
    ],
)
def test_what_cannot_be_built_is_told_before_anything_is(
    variant, dtype, arguments, code, message, bundles, monkeypatch
):
    monkeypatch.setattr(device, "CudaDevice", no_gpu)
    bundle = bundles(variant, dtype=dtype)
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert code == 2 or (result.stderr.startswith("edgeskip: ") and result.stderr.count("\n") == 1)
    assert nothing_is_stored()


@pytest.mark.parametrize("dialect", ["standard", "primitive"])
def test_quantized_bundles_have_engines_of_layers_only(dialect, bundles):
    bundle = bundles("llama-gqa", dtype="fp16", weights="int4")
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86, "--dialect", dialect)
    assert result.exit_code == 5
    wanted = f"edgeskip: --dialect {dialect}: quantized bundles have engines of layers only; give --dialect layers\n"
    assert result.stderr == wanted
    assert nothing_is_stored()


@pytest.mark.parametrize(("sm", "fix"), [(86, "with --dtype fp16"), (75, "without --weights")])
def test_a_quantized_bundle_in_fp32_is_refused_with_what_would_do(sm, fix, bundles):
    with pytest.raises(
        RequestError, match=f"quantized weights, in fp32 and for SM {sm}.*; export the checkpoint {fix}"
    ):
        build(bundles("llama-gqa", weights="int4"), sm, dialect="layers")
    assert nothing_is_stored()


def test_a_quantized_bundle_needs_no_engines(bundles):
    bundle = bundles("llama-gqa", dtype="fp16", weights="int4")
    for said in ("no engine is needed", "the cache has them already"):
        result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86)
        assert result.exit_code == 0
        assert said in result.stderr
    (engines,) = read_engines(bundle)
    assert (engines.build.dialect, engines.build.engines) == ("layers", {})
    assert "tensorrt-rtx" in run("inspect", bundle.folder).stdout
    whole_layers = bundles("llama-gqa", dtype="fp16", head="int8")
    assert set(build(whole_layers, 86)[0].build.engines) == {*PARTS}


HEADS = {
    "too small": (
        {"head_dim": 8},
        "4 attention heads of 8; wanted a head size of 16 to 256 in steps of 8, for the attention of standard",
    ),
    "in between": ({"head_dim": 20}, "4 attention heads of 20; wanted a head size of 16 to 256"),
    "too large": ({"head_dim": 264}, "4 attention heads of 264; wanted a head size of 16 to 256"),
    "one": (
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        "one head of 64; wanted two attention heads or more, for the attention of standard; give --dialect layers",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_attention_heads_that_tensorrt_does_not_compute_are_refused_by_name(name, tmp_path, monkeypatch):
    """And TensorRT refuses them indeed, so that nothing is refused in vain."""
    changes, message = HEADS[name]
    save_checkpoint(make_model("llama-gqa", num_hidden_layers=2, **changes), tmp_path / "checkpoint")
    bundle = export_bundle(
        open_checkpoint(str(tmp_path / "checkpoint")), tmp_path / "bundle", ExportSettings(1, "fp16")
    )
    with pytest.raises(RequestError, match=message):
        build(bundle, 86)
    build(bundle, 86, dialect="primitive")
    assert_engines_are_whole(bundle, 86, "primitive")
    monkeypatch.setattr(engine, "heads_problem", lambda *_: "")
    with pytest.raises(BackendError, match=r"draft\.inputs\.onnx: "):
        build(bundle, 86)


def test_the_largest_heads_build(tmp_path):
    model = make_model("llama-gqa", num_hidden_layers=2, head_dim=256)
    save_checkpoint(model, tmp_path / "checkpoint")
    bundle = export_bundle(
        open_checkpoint(str(tmp_path / "checkpoint")), tmp_path / "bundle", ExportSettings(1, "fp16")
    )
    assert [made.folder for made in build(bundle, 86)] == [found.folder for found in read_engines(bundle)]


def no_gpu():
    raise BackendError("CUDA", "no GPU here")


def test_tensorrt_without_the_library(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="GPU: there is no NVIDIA GPU in this machine; wanted the one that"):
        build_engines(bundle, BuildSettings("tensorrt"))
    monkeypatch.setattr(engine, "has_nvidia_gpu", lambda: True)
    with pytest.raises(BackendError, match=r'tensorrt: not usable .*pip install "edgeskip\[tensorrt\]"'):
        build(bundle, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86)
    assert result.exit_code == 6
    assert 'polygraphy not installed; pip install "edgeskip[build]"' in result.stderr


@pytest.mark.parametrize(
    ("version", "dialect", "message"),
    [
        ("10.2.0", None, "tensorrt 10.2.0: too old; wanted TensorRT 10.3 or later"),
        (
            "10.3.0",
            "standard",
            "10.3.0: does not read the standard dialect; wanted 10.15 or later; give --dialect layers",
        ),
        ("10.14.1", "standard", "10.14.1: does not read the standard dialect; wanted 10.15 or later"),
        ("10.3.0", None, "GPU: there is no NVIDIA GPU in this machine"),  # which is looked for next
        ("10.15.1", "standard", "GPU: there is no NVIDIA GPU in this machine"),
    ],
)
def test_tensorrt_by_version_and_dialect(version, dialect, message, bundle, monkeypatch):
    monkeypatch.setattr(device, "CudaDevice", no_gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
    with pytest.raises(BackendError, match=re.escape(message)):
        build(bundle, backend="tensorrt", dialect=dialect)


@pytest.fixture
def as_tensorrt(tmp_path, monkeypatch):
    """TensorRT-RTX under the name of TensorRT, in this process and those it starts, and a GPU that it is for."""
    (tmp_path / "path" / "tensorrt").mkdir(parents=True)
    code = "from tensorrt_rtx import *\n__version__ = '10.16.0.72'\n"
    (tmp_path / "path" / "tensorrt" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = types.ModuleType("tensorrt")
    here.__dict__.update(vars(tensorrt_rtx) | {"__version__": "10.16.0.72"})
    monkeypatch.setitem(sys.modules, "tensorrt", here)

    class Gpu:
        name, compute_capability = "Orin", 87

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(device, "CudaDevice", Gpu)


@pytest.mark.usefixtures("as_tensorrt")
def test_tensorrt_refuses_to_build_for_another_machine(bundle):
    with pytest.raises(RequestError, match="--sm: given with --backend tensorrt, which times kernels"):
        build(bundle, 86, backend="tensorrt")


@pytest.mark.usefixtures("as_tensorrt")
def test_the_way_of_tensorrt(bundle, tmp_path):
    """All of it but TensorRT: its name, its config, its cache of timings, the GPU that is present."""
    for _ in range(2):  # the second reads what the first measured
        (made,) = build(bundle, backend="tensorrt", workspace_mb=64, force=True)
        assert made.folder.name.startswith("tensorrt-sm87-10.16.0.72-")
        assert (made.build.gpu, made.build.compute_capability) == ("Orin", 87)
        assert (tmp_path / "cache/edgeskip/timings/tensorrt-sm87-10.16.0.72.cache").is_file()
        assert len(list(made.folder.iterdir())) == 4
    (engines,) = read_engines(bundle)
    with open_engines(engines):
        pass


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL; the system does that where memory is short"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV$"),
        ("raise ZeroDivisionError('a bug')", r"ended with exit code 1 \(ZeroDivisionError: a bug\)"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
    ],
)
def test_a_process_that_dies_is_one_line(code, message, bundle, tmp_path, monkeypatch):
    (tmp_path / "path" / "polygraphy").mkdir(parents=True)
    (tmp_path / "path" / "polygraphy" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(BackendError, match=message) as caught:
        build(bundle, 86)
    assert "\n" not in str(caught.value)
    assert nothing_is_stored()


MODULES = ("json", "typing", "ctypes", "click", "numpy", "polygraphy", "tensorrt_rtx", "sitecustomize", "edgeskip")


def test_nothing_is_run_from_the_current_folder(bundle):
    """By the command itself, for `python -m` would run what lies there before anything of ours."""
    for name in MODULES:
        (bundle.folder / f"{name}.py").write_text("raise SystemExit('run from the current folder')")
    command = Path(sysconfig.get_path("scripts")) / "edgeskip"
    arguments = ["build", ".", "--backend", "tensorrt-rtx", "--sm", "86"]
    out = subprocess.run([command, *arguments], cwd=bundle.folder, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert_engines_are_whole(bundle, 86)


def test_the_second_build_of_the_same_engines_is_told(bundle):
    with whole_folder(place(bundle, 86), 0, replace=True):
        result = run("build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", 86)
    assert result.exit_code == 4
    assert "another process is writing it" in result.stderr


def test_a_changed_graph_is_refused(bundle):
    path = bundle.graph_path("verify", "standard-inputs")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"verify.inputs.onnx: sha256 is"):
        build(bundle, 86)


def test_a_folder_that_cannot_be_written(bundle):
    place(bundle, 86).write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        build(bundle, 86)
    place(bundle, 86).unlink()


def test_a_full_disk_is_refused_before_the_work(bundle, monkeypatch):
    usage = shutil.disk_usage(bundle.folder)._replace(free=10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match="10 MB free on the disk; wanted 16 MB"):
        build(bundle, 86)
    assert nothing_is_stored()


def test_building_loads_only_what_a_device_has(bundle):
    """No torch, no onnx: a Jetson builds with TensorRT and Polygraphy alone; and Polygraphy only where it builds."""
    code = "import sys; from edgeskip.cli import main; main(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    arguments = ["build", bundle.folder, "--backend", "tensorrt-rtx", "--sm", "86"]
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in out.stdout.split()}
    assert "tensorrt_rtx" in loaded
    assert loaded & {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy"} == set()
    code = (
        "import sys; from edgeskip.exporter.engines.process import main; main(); print(*sys.modules, file=sys.stderr)"
    )
    job = {"onnx": "x", "engine": "x", "native_layers": 0, "profiles": [], "compute_capability": [8, 6]}
    job |= dict.fromkeys(("workspace_bytes", "load_timing_cache", "save_timing_cache"))
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True, check=True, env=environment
    )
    assert "failed" in json.loads(out.stdout.splitlines()[-1])
    loaded = {name.partition(".")[0] for name in out.stderr.split()}
    assert {"tensorrt_rtx", "polygraphy"} <= loaded
    assert loaded & {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"} == set()
