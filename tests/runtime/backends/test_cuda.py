"""The CUDA device and its sessions: what they promise on a GPU, and one clear line wherever that cannot be had."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import types
from itertools import pairwise

import numpy as np
import onnxruntime
import pytest
from tests.conftest import run_round

import edgeskip
from edgeskip.runtime.backends import cuda_session, ort_cuda_session
from edgeskip.runtime.backends import ort as ort_backend
from edgeskip.runtime.backends.choice import open_session
from edgeskip.runtime.backends.device import ALIGNMENT, CudaDevice, uncollected
from edgeskip.runtime.bundle.dtypes import ITEMSIZE
from edgeskip.runtime.bundle.tensors import EMBEDDINGS
from edgeskip.runtime.decoding.rounds import speculative_round
from edgeskip.runtime.errors import BackendError

PROMPT = list(range(40, 60))


def has_gpu():
    try:
        CudaDevice().close()
    except BackendError:
        return False
    return True


@pytest.fixture
def device():
    with CudaDevice() as with_gpu:
        yield with_gpu


# With a GPU


@pytest.mark.gpu
def test_arrays_are_zeroed_aligned_and_apart(device):
    arrays = device.zeros([(3, 5), (300, 2), (8, 1)])
    assert all(array.address % ALIGNMENT == 0 for array in arrays)
    starts = sorted((array.address, array.bytes) for array in arrays)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))
    host = device.pinned((600,), np.uint8)
    host[:] = 7
    device.copier(host.ctypes.data, arrays[1].address, 600)()
    device.stream.sync()
    assert not host.any()


@pytest.mark.gpu
def test_a_captured_copy_reads_its_source_at_each_launch(device):
    (array,) = device.zeros([(8, 1)])
    source, back = device.pinned((1,), np.int64), device.pinned((1,), np.int64)
    to, from_ = (
        device.copier(array.address, source.ctypes.data, 8),
        device.copier(back.ctypes.data, array.address, 8),
    )
    kept, lent = device.captured(lambda: (to(), from_())), device.captured_for_now(lambda: (to(), from_()))
    with lent as launch:
        for number, launched in ((3, kept), (4, launch), (5, kept), (6, launch)):
            source[0] = number
            launched()
            device.stream.sync()
            assert back[0] == number


@pytest.mark.gpu
def test_all_memory_is_given_back(bundles, device):
    bundle = bundles("llama-gqa", dtype="fp16")
    with edgeskip.load(bundle.folder, device="cuda") as model:  # libraries and kernels stay loaded
        model.complete(PROMPT, max_new_tokens=20)
    before = device.free_bytes()
    with edgeskip.load(bundle.folder, device="cuda") as model:
        model.complete(PROMPT, max_new_tokens=20)
        assert device.free_bytes() < before
    assert device.free_bytes() >= before - (8 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_heads_of_onnx_runtime_read_the_one_table_on_the_device(dtype, bundles):
    bundle = bundles("llama-tied", dtype=dtype)
    with edgeskip.load(bundle.folder, device="cuda", backend="onnxruntime") as model:
        session = model.session
        before = model.complete(PROMPT, max_new_tokens=9).token_ids
        (address,) = session._tables.values()
        size = int(np.prod(bundle.manifest.tensors[EMBEDDINGS].shape)) * ITEMSIZE[dtype]
        session._device.copier(address, session._device.zeros([(size, 1)])[0].address, size)()
        model.forget()
        after = model.complete(PROMPT, max_new_tokens=9).token_ids
    assert any(before)
    assert not any(after)


@pytest.mark.gpu
def test_rounds_are_captured_on_their_second_run_and_stay_the_same(bundles, monkeypatch):
    captured = []
    real = CudaDevice.captured
    monkeypatch.setattr(CudaDevice, "captured", lambda self, enqueue: captured.append(1) or real(self, enqueue))
    bundle = bundles("llama-gqa", dtype="fp16")
    with open_session(bundle, device="cuda") as session:
        session.write("inputs_embeds", np.ones((1, 64), np.float16))
        round_ = speculative_round(bundle.manifest.split(), 3)
        results = [run_round(session, round_, 0) for _ in range(4)]
    assert len(captured) == 1
    assert all(result == results[0] for result in results)


@pytest.mark.gpu
def test_the_device_that_a_round_runs_on_needs_no_host(bundles):
    """No node of any graph is left to the CPU: ONNX Runtime refuses such graphs at load."""
    with open_session(bundles("llama-gqa", dtype="fp16"), device="cuda") as session:
        for loaded in session._graphs._sessions.values():
            assert loaded.get_providers()[0] == "CUDAExecutionProvider"
            assert loaded.get_session_options().get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


@pytest.mark.gpu
def test_the_confidence_threshold_works_where_the_host_asks_for_it(bundles):
    with edgeskip.load(bundles("llama-gqa", exit_layer=3, dtype="fp16").folder, device="cuda") as model:
        assert model.session.confidence_threshold == 0
        fixed = model.complete(PROMPT, num_speculations=4, max_new_tokens=30)
        single = model.complete(PROMPT, num_speculations=4, confidence_threshold=1.0, max_new_tokens=30)
    assert fixed.statistics.drafted > single.statistics.drafted
    assert single.statistics.drafted <= single.statistics.rounds


@pytest.mark.gpu
@pytest.mark.parametrize("left_mb", [100, 500, 600, 700, 900])
def test_memory_that_does_not_suffice_is_said_in_one_line(left_mb, bundles):
    """In a process of its own; what its context and libraries take is their affair, so some of these may suffice."""
    command = [sys.executable, "-m", "edgeskip.cli", "generate", str(bundles("llama-gqa", dtype="fp16").folder)]
    command += ["--device", "cuda", "--prompt", "abc", "--max-new-tokens", "3"]
    with CudaDevice() as hog:
        hog.zeros([(hog.free_bytes() - (left_mb << 20), 1)])
        short = subprocess.run(command, capture_output=True, text=True)
    print(left_mb, short.returncode, short.stderr)
    assert short.returncode in ((0, 6) if left_mb > 100 else (6,))
    if short.returncode:
        assert "memory" in short.stderr.lower()
        assert len(short.stderr.strip().splitlines()) == 1
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.gpu
def test_a_session_that_fails_gives_its_memory_back(bundles, device, monkeypatch):
    bundle = bundles("llama-gqa", dtype="fp16")
    edgeskip.load(bundle.folder, device="cuda").close()  # libraries stay loaded
    before = device.free_bytes()

    def fail(*_):
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(cuda_session.CudaSession, "_warm_up", fail)
    with pytest.raises(BackendError, match="out of device memory"):
        edgeskip.load(bundle.folder, device="cuda")
    assert device.free_bytes() >= before - (8 << 20)


@pytest.mark.gpu
def test_caches_larger_than_the_device_are_refused_before_anything_is_taken(bundles, monkeypatch):
    monkeypatch.setattr(CudaDevice, "free_bytes", lambda self: 1000)
    with pytest.raises(BackendError, match=r"out of device memory, 0 MB free; wanted \d MB; .*--max-length"):
        open_session(bundles("llama-gqa", dtype="fp16"), device="cuda")


@pytest.mark.gpu
def test_fp32_runs_the_standard_dialect_and_refuses_the_other(bundles):
    bundle = bundles("llama-gqa")
    with open_session(bundle, device="auto") as session:
        assert "standard dialect, fp32" in session.description
    with pytest.raises(BackendError, match="in fp32, which the ort dialect's attention lacks"):
        open_session(bundle, device="cuda", dialect="ort")


# Without one


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_no_gpu_is_one_line(bundles):
    with pytest.raises(BackendError, match="GPU: there is no NVIDIA GPU in this machine; give --device cpu"):
        open_session(bundles("llama-gqa"), device="cuda")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_a_gpu_that_cannot_be_used_is_one_line(bundles, monkeypatch):
    monkeypatch.setattr("edgeskip.runtime.backends.device.has_nvidia_gpu", lambda: True)
    with pytest.raises(BackendError, match=r"CUDA: no usable GPU \(.*\); wanted an NVIDIA GPU and its driver"):
        open_session(bundles("llama-gqa"), device="cuda")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_auto_takes_the_cpu_and_says_why_not_the_gpu(bundles, monkeypatch):
    with open_session(bundles("llama-gqa")) as session:
        assert session.device == "cpu"
        assert "GPU" not in session.description  # this ONNX Runtime is for a CPU
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with open_session(bundles("llama-gqa")) as session:
        assert "CPU, cpu dialect, fp32; not the GPU: GPU: there is no NVIDIA GPU" in session.description


def test_cuda_core_that_is_missing_is_named(bundles, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    monkeypatch.setattr("edgeskip.runtime.backends.device.has_nvidia_gpu", lambda: True)
    with pytest.raises(BackendError, match=r'cuda-core: not usable .*pip install "edgeskip\[cuda\]"'):
        open_session(bundles("llama-gqa"), device="cuda")


def library(tmp_path, **changes):
    """An onnxruntime package as far as it is looked at before anything is loaded."""
    (tmp_path / "capi").mkdir()
    settings = {
        "__file__": str(tmp_path / "__init__.py"),
        "__version__": "1.31.1",
        "cuda_version": "13.0",
        "get_available_providers": lambda: ["CUDAExecutionProvider"],
        "preload_dlls": lambda: None,
    }
    return types.SimpleNamespace(**(settings | changes))


def test_an_onnxruntime_for_the_cpu_is_named(tmp_path):
    ort = library(tmp_path, get_available_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"1.31.1 has no CUDA provider; pip uninstall onnxruntime && pip install"):
        ort_backend.check_cuda_provider(ort, (13, 0))


def test_a_driver_too_old_is_named(tmp_path):
    with pytest.raises(
        BackendError, match=r"a driver for CUDA 12.4; wanted one for CUDA 13.0; upgrade the NVIDIA driver"
    ):
        ort_backend.check_cuda_provider(library(tmp_path), (12, 4))


def test_missing_cuda_libraries_are_named(tmp_path):
    ort = library(tmp_path)
    for name in ("shared", "cuda"):
        (tmp_path / "capi" / f"libonnxruntime_providers_{name}.so").write_bytes(b"no library")
    with pytest.raises(
        BackendError, match=r'libraries missing \(.*libonnxruntime_providers.*pip install "edgeskip\[cuda'
    ):
        ort_backend.check_cuda_provider(ort, (13, 0))


@pytest.mark.parametrize(
    ("text", "free_mb", "short"),
    [
        ("CUDA failure 2: out of memory", 900, True),
        ("Failed to allocate memory for requested buffer", 900, True),
        ("CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR", 90, True),  # what cuDNN says for want of memory
        ("CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR", 900, False),
        ("x: out of device memory, 1 MB free", 90, False),  # said already
    ],
)
def test_the_libraries_ways_of_running_out_of_memory_are_known(text, free_mb, short):
    device = types.SimpleNamespace(free_bytes=lambda: free_mb << 20)
    assert ort_cuda_session._is_out_of_memory(RuntimeError(text), device) == short


def test_the_end_of_one_capture_does_not_let_the_collector_into_another():
    collects, first_ends, second_began = [], threading.Event(), threading.Event()

    def second():
        first_ends.wait(10)
        second_began.set()
        with uncollected():
            first.join(10)
            collects.append(gc.isenabled())

    def first_of_two():
        with uncollected():
            first_ends.set()
            second_began.wait(10)
            time.sleep(0.05)  # for the second to get as far as it can
            collects.append(gc.isenabled())

    first, other = threading.Thread(target=first_of_two), threading.Thread(target=second)
    first.start(), other.start()
    first.join(10), other.join(10)
    assert collects == [False, False]
    assert gc.isenabled()
