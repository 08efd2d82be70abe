"""TensorRT's session: how it calls, binds, captures and refuses.

The stand-ins of tests/standin.py run everywhere, on a CUDA device too where there is one; tests/runtime/test_decode.py
puts whole texts through them. Real engines are built and run where there is a GPU that an installed TensorRT serves,
and there these tests fail rather than skip.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import weakref

import pytest
from tests.conftest import edit_json, run_round
from tests.runtime.backends.test_history import CASES, same
from tests.standin import VERSION, HostDevice, StandInTensorRT, make_device, standin_model, with_engines

import edgeskip
from edgeskip.exporter.engines.build import BuildSettings, build_engines
from edgeskip.runtime.backends import choice as backends
from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import library as trt
from edgeskip.runtime.backends.engines.session import TrtSession
from edgeskip.runtime.backends.engines.targets import VERSIONS
from edgeskip.runtime.bench.measure import tie_gap
from edgeskip.runtime.bundle.engines import BUILD, ENGINE_BACKENDS
from edgeskip.runtime.bundle.graphs import HEAD_ROWS
from edgeskip.runtime.bundle.manifest import read_bundle
from edgeskip.runtime.bundle.store import read_engines
from edgeskip.runtime.decoding.rounds import speculative_round
from edgeskip.runtime.errors import BackendError, BundleError, RequestError
from edgeskip.runtime.packages import version_numbers

PROMPT = list(range(40, 60))
KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def bundle(bundles):
    return bundles("llama-gqa", exit_layer=3)


def model_of(bundle, tmp_path, kind="host", **settings):
    return standin_model(bundle, tmp_path / "b", make_device(kind), **settings)


def refused(bundle, device=None, **settings):
    (engines,) = read_engines(bundle)
    device = device or HostDevice()
    with pytest.raises((BundleError, BackendError)) as error:
        TrtSession(bundle, engines, device, StandInTensorRT(**settings))
    assert "\n" not in str(error.value)
    assert device.used_bytes() == 0 or device.name != "host memory"
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_are_captured_and_the_statistics_say_so(kind, bundle, tmp_path):
    with model_of(bundle, tmp_path, kind) as model:
        s = model.complete(PROMPT, num_speculations=4, max_new_tokens=40).statistics
        assert s.captured_rounds == s.rounds > 3  # the bundle's own K was captured while loading
        other = model.complete(PROMPT, num_speculations=3, max_new_tokens=40).statistics
        assert other.captured_rounds == other.rounds - 1  # the first one was enqueued


def test_what_stands_for_an_engine_writes_to_no_memory_of_a_session_that_is_closed(bundle, tmp_path):
    with model_of(bundle, tmp_path) as model:
        model.complete(PROMPT, max_new_tokens=5)
        engines, memory = [*model.session._engines.values()], [*model.session._device._kept]
        assert all(engine.loaded for engine in engines)
    for block in memory:
        block[:] = 0xAB
    gone = [weakref.ref(engine) for engine in engines]
    del engines
    gc.collect()
    assert not any(ref() for ref in gone)
    assert all((block == 0xAB).all() for block in memory)


@pytest.mark.parametrize("rtx", [False, True])
def test_what_cannot_be_captured_is_enqueued_with_the_same_tokens(rtx, bundle, tmp_path):
    with edgeskip.load(bundle.folder, device="cpu") as plain:
        wanted = plain.complete(PROMPT, confidence_threshold=0, max_new_tokens=40)
    with model_of(bundle, tmp_path, rtx=rtx, capturable=False) as model:
        ours = model.complete(PROMPT, max_new_tokens=40)
        assert ours.token_ids == wanted.token_ids
        assert ours.statistics.captured_rounds == (0 if rtx else ours.statistics.rounds)


def test_a_call_that_was_timed_leaves_no_captured_graph(bundle, tmp_path):
    with model_of(bundle, tmp_path) as model:
        device = model.session._device
        captures, graphs = device.captures, device.graphs
        for call in speculative_round(model.split, 2).calls:
            assert model.session.time_call_ms(call, 5, 1) > 0
        assert (device.captures > captures, device.graphs) == (True, graphs)


def test_prompts_in_chunks_of_their_own_profile_decode_as_on_a_cpu(bundles, tmp_path):
    bundle = bundles("llama-gqa", exit_layer=3, prefill_chunk=32)
    with edgeskip.load(bundle.folder, device="cpu") as plain, model_of(bundle, tmp_path) as model:
        for length in (5, 17, 18, 32, 40, 64, 95):
            prompt = [40 + i % 50 for i in range(length)]
            wanted = plain.complete(prompt, confidence_threshold=0, max_new_tokens=20)
            assert model.complete(prompt, max_new_tokens=20).token_ids == wanted.token_ids


def test_a_closed_model_lets_go_of_its_engines_while_a_generator_is_held(bundle, tmp_path):
    model = model_of(bundle, tmp_path)
    engines = [weakref.ref(engine) for engine in model.session._engines.values()]
    pieces = model.generate(PROMPT)
    next(pieces)
    model.close()
    gc.collect()
    assert [engine() for engine in engines] == [None] * 3
    with pytest.raises(RequestError, match="closed"):
        next(pieces)


def test_drafts_that_are_looked_at_one_by_one_are_no_rounds_of_their_own(bundle, tmp_path):
    with model_of(bundle, tmp_path) as model:
        s = model.complete(PROMPT, confidence_threshold=0.2, max_new_tokens=40).statistics
    assert 0 < s.captured_rounds <= s.rounds


def test_stale_engines_do_not_keep_a_bundle_from_onnxruntime(bundle, tmp_path):
    copied = with_engines(bundle, tmp_path / "b")
    (engines,) = read_engines(copied)
    edit_json(engines.folder / BUILD, lambda build: build["engines"]["draft"].update(onnx_sha256="0" * 64))
    with open_session(copied) as session:
        assert session.device == "cpu"
        assert "built from another draft graph; edgeskip build" in session.description
    with pytest.raises(BundleError, match="built from another draft graph"):
        open_session(copied, backend="tensorrt")


def test_prompts_of_other_lengths_replay_the_same_rounds(bundles, tmp_path, monkeypatch):
    """They are rounded up to 64 rows where the caches, of 96, have room; what comes after them is not seen."""
    captured, bundle = [], bundles("llama-gqa", exit_layer=3, prefill_chunk=64)
    with edgeskip.load(bundle.folder, device="cpu") as plain, model_of(bundle, tmp_path) as model:
        bound, real = list(model.session._bound), HostDevice.captured
        monkeypatch.setattr(HostDevice, "captured", lambda self, enqueue: captured.append(1) or real(self, enqueue))
        for length in (50, 37, 64, 23, 85):  # the last one in two chunks, the second of which overlaps the first
            prompt = [40 + (i * length) % 50 for i in range(length)]
            wanted = plain.complete(prompt, confidence_threshold=0, max_new_tokens=9)
            assert model.complete(prompt, mode="autoregressive", max_new_tokens=9).token_ids == wanted.token_ids
        bound = [one for one in model.session._bound if one not in bound]
        assert [one.rows for one in bound if one.rows > HEAD_ROWS and not one.num_targets] == [64]
        assert captured
        near = list(range(40, 90))  # what is new of it, 21 rows, leaves no room to round up
        wanted = plain.complete(prompt[:60] + near[:21], confidence_threshold=0, max_new_tokens=9)
        assert model.complete(prompt[:60] + near[:21], max_new_tokens=9).token_ids == wanted.token_ids


def test_prompts_are_rounded_up_to_no_more_than_a_chunk(bundles, tmp_path):
    """Else rows would be computed for a length that is not replayed either."""
    bundle, prompt = bundles("llama-gqa", exit_layer=3, prefill_chunk=40), list(range(40, 70))
    with edgeskip.load(bundle.folder, device="cpu") as plain, model_of(bundle, tmp_path) as model:
        wanted = plain.complete(prompt, mode="autoregressive", max_new_tokens=9)
        assert model.complete(prompt, mode="autoregressive", max_new_tokens=9).token_ids == wanted.token_ids
        assert [one.rows for one in model.session._bound if not one.num_targets] == [30]


def test_a_context_serves_one_graph_and_number_of_rows(bundle, tmp_path):
    device, library = HostDevice(), StandInTensorRT()
    copied = with_engines(bundle, tmp_path / "b")
    with TrtSession(copied, read_engines(copied)[0], device, library) as session:
        # a chunk's draft and verify over 8 rows; draft 1, head 1, verify 5 and head 5 of the round that warms up
        assert library.contexts == 6
        run_round(session, speculative_round(bundle.manifest.split(), 4), 0)
        assert library.contexts == 6


def test_the_caches_are_bound_past_and_present_to_one_address(bundle, tmp_path):
    copied = with_engines(bundle, tmp_path / "b")
    with TrtSession(copied, read_engines(copied)[0], HostDevice(), StandInTensorRT()) as session:
        for context in session._contexts.values():
            pasts = {name: at for name, at in context.addresses.items() if name.startswith("past_key_values.")}
            for name, address in pasts.items():
                assert context.addresses[name.replace("past_key_values.", "present.")] == address
        scratch = {context.scratch for context in session._contexts.values()}
        assert len(scratch) == 1


def test_rtx_keeps_what_it_compiled_for_the_next_start(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for found in (None, b"kernels"):
        library = StandInTensorRT(rtx=True)
        copied = read_bundle(tmp_path / "b") if (tmp_path / "b").exists() else with_engines(bundle, tmp_path / "b")
        TrtSession(copied, read_engines(copied)[0], HostDevice(), library).close()
        assert [cache.found for cache in library.caches] == [found] * 3


def test_memory_is_planned_and_told_by_kind(bundle, tmp_path):
    with model_of(bundle, tmp_path, scratch=1 << 20) as model:
        memory = model.session.memory()
    assert memory.workspace > 1 << 20  # scratch and activations are in it
    assert memory.caches == 4 * 2 * 2 * 96 * 16 * 4  # layers, key and value, heads, rows, head size, fp32


@pytest.mark.parametrize("size", [1000, 300_000, 1 << 20])
def test_memory_that_does_not_suffice_leaves_nothing_behind(size, bundle, tmp_path):
    message = refused(with_engines(bundle, tmp_path / "b"), HostDevice(size), scratch=2 << 20)
    assert "out of device memory" in message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuses", "TensorRT refuses it (no kernel image is available); edgeskip build"),
        ("alias", "present.0.key is not past_key_values.0.key updated in place but None"),
        ("fails", "does not run"),
        ("shapes", "does not run"),
    ],
)
def test_what_tensorrt_says_is_one_line_and_leaves_nothing_behind(fault, message, bundle, tmp_path):
    assert message in refused(with_engines(bundle, tmp_path / "b"), faults=[fault])


def test_engines_of_another_gpu_or_version_name_the_command_that_rebuilds_them(bundle, tmp_path):
    copied = with_engines(bundle, tmp_path / "b", sm=86)
    message = refused(copied)
    assert "built for SM 86, this GPU is SM 87; edgeskip build" in message
    shutil.rmtree(read_engines(copied)[0].folder)
    copied = with_engines(bundle, tmp_path / "b", version="10.16.0")
    assert f"built by tensorrt 10.16.0, {VERSION} is installed; edgeskip build" in refused(copied)


def test_a_changed_byte_is_noticed(bundle, tmp_path):
    copied = with_engines(bundle, tmp_path / "b")
    (engines,) = read_engines(copied)
    path = engines.path("verify")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert "verify.engine: sha256 is" in refused(copied)


def test_engines_of_other_tensors_are_refused(bundle, bundles, tmp_path):
    copied = with_engines(bundle, tmp_path / "b")
    (engines,) = read_engines(copied)
    other = bundles("llama-gqa", exit_layer=2).path("draft.inputs.onnx")
    path = engines.path("draft")
    made = json.loads(path.read_text()) | {"onnx": str(other)}
    path.write_text(json.dumps(made))
    record = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    edit_json(engines.folder / BUILD, lambda build: build["engines"]["draft"].update(record))
    assert "draft.engine: its tensor " in refused(copied)


def test_a_bundle_without_engines_says_how_to_build_them(bundle):
    with pytest.raises(BundleError, match=r"no tensorrt-rtx engines for it in the cache; edgeskip build .* --backend"):
        open_session(bundle, backend="tensorrt-rtx")


def test_tensorrt_that_is_missing_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeskip.runtime.backends.device.CudaDevice", HostDevice)
    copied = with_engines(bundle, tmp_path / "b")
    with pytest.raises(BackendError, match=r"tensorrt: not usable .*edgeskip\[tensorrt\]"):
        open_session(copied, backend="tensorrt")


def standin_machine(monkeypatch, device):
    """A machine that has the stand-ins: TensorRT and a GPU."""
    monkeypatch.setattr(trt, "import_tensorrt", lambda backend: StandInTensorRT(rtx=backend.endswith("rtx")))
    monkeypatch.setattr("edgeskip.runtime.backends.device.CudaDevice", lambda: device)


def test_auto_takes_engines_that_fit_and_else_says_why_not(bundle, tmp_path, monkeypatch):
    standin_machine(monkeypatch, HostDevice())
    copied = with_engines(bundle, tmp_path / "b")
    with open_session(copied) as session:
        assert session.description == f"tensorrt {VERSION}, host memory, standard dialect, fp32"
    shutil.rmtree(read_engines(copied)[0].folder)
    with_engines(bundle, tmp_path / "b", sm=86)
    with open_session(copied) as session:
        assert session.device == "cpu"
        assert "not tensorrt" in session.description
        assert "built for SM 86, this GPU is SM 87" in session.description


def test_of_several_engines_the_fitting_one_is_taken(bundle, tmp_path, monkeypatch):
    standin_machine(monkeypatch, HostDevice())
    copied = with_engines(bundle, tmp_path / "b", sm=87)
    (fitting,) = read_engines(copied)
    with_engines(bundle, tmp_path / "b", sm=86)
    assert read_engines(copied)[0] != fitting
    with open_session(copied, backend="tensorrt") as session:
        assert session.description.startswith("tensorrt ")
    assert read_engines(copied)[0] == fitting  # the last used
    shutil.rmtree(fitting.folder)
    with pytest.raises(BundleError, match="built for SM 86, this GPU is SM 87"):
        open_session(copied, backend="tensorrt")


def test_the_choices_of_backends_are_those_of_the_engines():
    assert set(backends.BACKENDS) == {"auto", "onnxruntime", *ENGINE_BACKENDS}


def served_backends():
    """Backends whose TensorRT is installed and serves the GPU of this machine."""
    found = []
    try:
        with CudaDevice() as device:
            sm = device.compute_capability
    except BackendError:
        return found
    for backend in ENGINE_BACKENDS:
        try:
            library = trt.import_tensorrt(backend)
        except BackendError:
            continue
        if backend == "tensorrt" or f"SM{sm}" in library.ComputeCapability.__members__:
            found.append(backend)
    return found


FAMILIES = (
    "llama-gqa",
    "llama-mqa",
    "llama-tied",
    "llama-odd-head-dim",
    "llama-attention-bias",
    "llama-mlp-bias",
    "qwen2",
)


def served():
    """What real engines can be built and run here: backend, dialect, family and dtype."""
    cases = []
    for backend in served_backends():
        version = trt.import_tensorrt(backend).__version__
        dialects = [name for name, least in VERSIONS[backend].items() if version_numbers(version) >= least]
        cases += [
            (backend, dialect, variant, "fp16") for dialect in dialects for variant in ("llama-llama3-rope", "qwen3")
        ]
        cases += [(backend, dialects[0], variant, "fp16") for variant in FAMILIES]
        cases += [(backend, dialects[0], "llama-gqa", "bf16")]
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dialect", "variant", "dtype"), served())
def test_real_engines_give_the_tokens_of_onnxruntime(backend, dialect, variant, dtype, bundles, tmp_path):
    """Two bytes against fp32, up to the first place where rounding may decide."""
    source = bundles(variant, dtype=dtype, exit_layer=3, prefill_chunk=32)
    shutil.copytree(source.folder, tmp_path / "b")
    build_engines(read_bundle(tmp_path / "b"), BuildSettings(backend, dialect=dialect))
    compared, tie = 0, 0.1 if dtype == "fp16" else 0.5
    with (
        edgeskip.load(tmp_path / "b", backend=backend) as model,
        edgeskip.load(bundles(variant, exit_layer=3).folder, device="cpu") as judge,
    ):
        assert model.session.dialect == dialect
        for prompt in (PROMPT, PROMPT * 2, PROMPT[:1]):
            wanted = judge.complete(prompt, mode="autoregressive", max_new_tokens=30).token_ids
            for k in (0, 1, 4, 8):
                mode = {"num_speculations": k} if k else {"mode": "autoregressive"}
                ours = model.complete(prompt, max_new_tokens=30, **mode)
                parted = next((i for i, (a, b) in enumerate(zip(ours.token_ids, wanted)) if a != b), len(wanted))  # noqa: B905
                if parted < len(wanted):
                    gap = tie_gap(judge, [*prompt, *wanted[:parted]], ours.token_ids[parted], wanted[parted])
                    assert gap < tie
                compared += parted
        for settings in CASES.values():
            plain = model.complete(PROMPT, mode="autoregressive", max_new_tokens=30, **settings)
            drafted = model.complete(PROMPT, num_speculations=4, max_new_tokens=30, **settings)
            same(drafted, plain, model, settings, tie)
    assert compared > 100
