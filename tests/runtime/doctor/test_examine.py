"""The doctor: what it says of this machine, and that nothing it meets makes it fail.

What is here is looked at as it is. GPUs that are not here are descriptions, judged by the libraries that are.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner
from rich.console import Console

import edgeskip
from edgeskip.cli import main
from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.backends.engines import library
from edgeskip.runtime.backends.engines.targets import RTX_SERVES
from edgeskip.runtime.doctor import examine as doctor
from edgeskip.runtime.doctor import hardware
from edgeskip.runtime.doctor.examine import LEAST_SM, BackendState, Doctor, Software, Verb, examine
from edgeskip.runtime.doctor.hardware import Gpu, Hardware, Jetson, read_hardware
from edgeskip.runtime.doctor.report import print_doctor
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.host import Disk, HostMemory
from edgeskip.runtime.packages import NEEDS, install

ROOT = Path(__file__).parents[3]
NAMES = [("onnxruntime", "cpu"), ("onnxruntime", "cuda"), ("tensorrt", "cuda"), ("tensorrt-rtx", "cuda")]
COMMAND = re.compile(r"(pip (un)?install|python3 -m venv|sudo apt install|sudo ubuntu-drivers|unset) \S")


def has_gpu():
    try:
        CudaDevice().close()
    except BackendError:
        return False
    return True


without_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU here")


def process(*arguments, path=(), **settings):
    """The command line in a process of its own, with these folders before all others in Python's path."""
    environment = settings.pop("env", dict(os.environ))
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), environment.get("PYTHONPATH", "")]).strip(os.pathsep)
    command = [sys.executable, *settings.pop("flags", ()), "-m", "edgeskip.cli", "doctor", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, **settings)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done.stdout.decode()


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def judged(report, name, device="cuda"):
    return next(backend for backend in report.backends if (backend.name, backend.device) == (name, device))


def verb(report, name):
    return next(verb for verb in report.verbs if verb.name == name)


# This machine


def test_this_machine_runs_bundles_on_its_cpu():
    report = examine()
    assert [(backend.name, backend.device) for backend in report.backends] == NAMES
    assert judged(report, "onnxruntime", "cpu") == BackendState(
        "onnxruntime", "cpu", True, onnxruntime.__version__, None, None
    )
    assert f"on the CPU with onnxruntime {onnxruntime.__version__}" in report.now
    assert verb(report, "generate, bench") == Verb("generate, bench", True, (), None)
    for backend in report.backends:
        assert backend.works == (backend.version is not None) == (backend.reason is None)
        assert backend.fix is None or COMMAND.match(backend.fix)


@without_gpu
def test_without_a_gpu_no_command_would_help_and_the_reason_says_so():
    report = examine()
    if report.hardware.has_gpu:
        pytest.skip("there is a GPU without a driver here")
    for name, device in NAMES[1:]:
        backend = judged(report, name, device)
        assert (backend.works, backend.fix) == (False, None)
        assert backend.reason == "GPU: there is no NVIDIA GPU in this machine"
    assert report.hardware.gpu is None
    assert "no usable GPU" in report.unknown["gpu"]
    assert report.next.startswith("edgeskip demo")


@pytest.mark.gpu
def test_a_real_gpu_is_shown_and_judged_by_the_onnxruntime_that_is_here():
    report = examine()
    assert judged(report, "onnxruntime").works == ("CUDAExecutionProvider" in onnxruntime.get_available_providers())
    printed = CliRunner().invoke(main, ["doctor"]).stdout
    assert f"{report.hardware.gpu.name}, SM {report.hardware.gpu.compute_capability}, driver " in printed


# The command line


def test_json_is_one_object_with_every_field():
    def keys(kind):
        return {field.name for field in dataclasses.fields(kind)}

    made = json.loads(process("--json"))
    assert set(made) == keys(Doctor)
    assert made["edgeskip"] == edgeskip.__version__
    assert set(made["hardware"]) == keys(Hardware)
    assert set(made["hardware"]["memory"]) == keys(HostMemory)
    assert set(made["hardware"]["disk"]) == set(made["hardware"]["cache_disk"]) == keys(Disk)
    assert set(made["software"]) == keys(Software)
    assert all(set(backend) == keys(BackendState) for backend in made["backends"])
    assert all(set(verb) == keys(Verb) for verb in made["verbs"])
    assert [verb["name"] for verb in made["verbs"]] == ["generate, bench", *NEEDS]


def test_people_get_a_line_a_fact_and_the_verdict_last():
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"edgeskip             {edgeskip.__version__}, Python {sys.version.split()[0]}")
    assert f"onnxruntime on cpu   yes {onnxruntime.__version__}" in lines
    assert [line.split()[0] for line in lines[-2:]] == ["now", "next"]
    assert "…" not in result.stdout


def test_neither_home_nor_path_is_needed():
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    made = json.loads(process("--json", env=environment | {"PATH": ""}))
    assert made["backends"][0]["works"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_locale_can_print_it(encoding, tmp_path):
    folder = tmp_path / "ö日"
    folder.mkdir()
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    printed = subprocess.run(
        [sys.executable, "-m", "edgeskip.cli", "doctor"], cwd=folder, env=environment, capture_output=True, check=True
    ).stdout
    assert (b"\xf6\\u65e5" if encoding == "latin-1" else b"\\xf6\\u65e5") in printed
    assert json.loads(process("--json", env=environment, cwd=folder))["hardware"]["disk"]["folder"] == str(folder)


def test_what_drives_a_terminal_is_not_printed(monkeypatch, tmp_path):
    shown(monkeypatch, gpu=described(name="evil\x1b[31m\n\x07GPU"))
    printed = CliRunner().invoke(main, ["doctor"]).stdout
    assert "evil?[31m??GPU" in printed
    assert "\x1b" not in printed


# Packages that are missing or broken


@pytest.fixture
def bare(tmp_path):
    """A folder for Python's path, with edgeskip and what else is linked into it; nothing else is installed."""
    site = tmp_path / "site"
    site.mkdir()

    def link(*names):
        for name in names:
            found = Path(find_spec(name).origin)
            source = found.parent if found.name == "__init__.py" else found
            (site / source.name).symlink_to(source)
            libraries = source.with_name(f"{name}.libs")
            if libraries.is_dir():
                (site / libraries.name).symlink_to(libraries)
        return site

    link("click")
    (site / "edgeskip").symlink_to(ROOT / "src" / "edgeskip")
    return link


def test_without_the_base_install_it_says_so_in_json(bare):
    """Not even rich is there to print with."""
    made = json.loads(process(path=[bare()], flags=["-S"]))
    assert {backend["fix"] for backend in made["backends"]} == {"pip install edgeskip"}
    assert made["backends"][0]["reason"] == "numpy, tokenizers, jinja2, rich: not installed"
    assert made["verbs"][0]["missing"] == ["numpy", "tokenizers", "jinja2", "rich"]
    assert (made["now"], made["next"]) == ("no backend works, so no bundle runs", "pip install edgeskip")


def test_without_a_backend_it_names_the_extra(bare):
    site = bare("numpy", "tokenizers", "jinja2", "markupsafe", "rich", "markdown_it", "mdurl", "pygments")
    made = json.loads(process("--json", path=[site], flags=["-S"]))
    assert set(made["software"]["packages"]) <= {"edgeskip"}
    cpu = made["backends"][0]
    assert cpu["reason"].startswith("onnxruntime: not usable (No module named 'onnxruntime')")
    assert cpu["fix"] == 'pip install "edgeskip[cpu]"'
    missing = {verb["name"]: verb for verb in made["verbs"]}
    assert missing["generate, bench"]["fix"] == 'pip install "edgeskip[cpu]"'
    assert missing["build"]["missing"] == ["polygraphy", "tensorrt or tensorrt_rtx"]
    assert missing["build"]["fix"] == 'pip install "edgeskip[build,rtx]"'
    for name, need in NEEDS.items():
        assert missing[name]["works"] is False
        assert missing[name]["missing"][: len(need.modules)] == list(need.modules)
        assert missing[name]["fix"] == need.fix or name == "build"
    printed = process(path=[site], flags=["-S"])
    assert '\n                         pip install "edgeskip[cpu]"\n' in printed


@pytest.mark.parametrize(
    ("name", "raises", "wanted"),
    [
        ("onnxruntime", "OSError('libcublas.so.13: cannot open')", r"onnxruntime: broken \(OSError: libcublas"),
        ("onnxruntime", "ImportError('no libstdc++')", r"onnxruntime: not usable \(no libstdc\+\+\)"),
        ("onnxruntime", "None", r"onnxruntime: broken \(AttributeError: .*__version__"),
        ("numpy", "RuntimeError('built for\\nanother CPU')", r"numpy: broken \(RuntimeError: built for another CPU\)"),
    ],
)
def test_a_package_that_breaks_on_import_is_one_to_install_again(name, raises, wanted, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"print('noise')\nerror = {raises}\nif error:\n    raise error\n")
    made = json.loads(process("--json", path=[tmp_path]))
    cpu = made["backends"][0]
    assert re.match(wanted, cpu["reason"])
    assert cpu["fix"].startswith(f"pip install --force-reinstall {name}")
    assert made["next"] == cpu["fix"]
    assert "now                  no backend works" in process(path=[tmp_path])


@without_gpu
def test_broken_cuda_bindings_break_nothing_else(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("raise OSError('libcuda is odd')")
    made = json.loads(process("--json", path=[tmp_path]))
    assert "cuda-core: broken (OSError: libcuda is odd)" in made["unknown"]["gpu"]
    assert made["backends"][0]["works"]


def test_a_folder_that_is_gone_and_a_home_that_is_not_there_are_unknown(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(hardware, "user_cache", no_home)
    report = examine()
    assert report.hardware.disk is report.hardware.cache_disk is None
    assert "No such file" in report.unknown["disk"]
    assert report.unknown["cache_disk"] == "RuntimeError: Could not determine home directory."
    assert judged(report, "onnxruntime", "cpu").works
    monkeypatch.chdir(tmp_path)  # without a current folder no command begins
    printed = CliRunner().invoke(main, ["doctor"]).stdout
    assert "cache                unknown (RuntimeError: Could not determine home directory.)\n" in printed


@pytest.mark.parametrize("text", ["", "MemTotal: many kB\n", "MemTotal:\n", None])
def test_an_odd_meminfo_is_unknown(text, tmp_path):
    (tmp_path / "proc").mkdir()
    if text is None:
        (tmp_path / "proc/meminfo").mkdir()
    else:
        (tmp_path / "proc/meminfo").write_text(text)
    report = examine(tmp_path)
    assert report.hardware.memory is None
    assert report.unknown["memory"]


@without_gpu
@pytest.mark.parametrize(("kind", "is_gpu"), [("0x030000", True), ("0x030200", True), ("0x040300", False)])
def test_a_gpu_without_a_driver_is_found_on_the_bus(kind, is_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name, vendor in (("0000:00:02.0", "0x8086"), ("0000:01:00.0", "0x10de")):
        (tmp_path / "sys/bus/pci/devices" / name).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "sys/bus/pci/devices" / name / "class").write_text(f"{kind}\n")
    report = examine(tmp_path)
    assert (report.hardware.has_gpu, report.hardware.gpu) == (is_gpu, None)
    cuda = judged(report, "onnxruntime")
    assert cuda.fix is None
    assert ("there is one, and it cannot be used" in cuda.reason) == is_gpu
    assert ("install its driver" in cuda.reason) == is_gpu


# Backends on GPUs that are not here


def described(**changes):
    settings = {
        "name": "NVIDIA GeForce RTX 3060",
        "count": 1,
        "compute_capability": 86,
        "driver_version": "580.95.05",
        "driver_cuda_version": "13.0",
        "memory_bytes": 12 << 30,
        "free_bytes": 11 << 30,
        "shares_host_memory": False,
    }
    return Gpu(**(settings | changes))


def shown(monkeypatch, gpu=None, jetson=None, refusal=None):
    """What the doctor says where this is the hardware."""
    found = dataclasses.replace(read_hardware(Path("/"), {})[0], has_gpu=True, gpu=gpu, jetson=jetson)
    monkeypatch.setattr(doctor, "read_hardware", lambda root, unknown: (found, refusal))
    return examine()


def printed(report):
    """The report as people read it."""
    console = Console(file=io.StringIO(), width=200)
    print_doctor(report, console)
    return console.file.getvalue()


def board_of(l4t, jetpack):
    return Jetson("NVIDIA Jetson AGX Orin", l4t, jetpack, "MAXN", 306.0, 1300.5)


def loaded(monkeypatch, name, **attributes):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**attributes))


def ort_for_cuda(monkeypatch, tmp_path, **changes):
    """An onnxruntime package for CUDA, as far as it is looked at before anything is loaded."""
    settings = {
        "__file__": str(tmp_path / "__init__.py"),
        "__version__": "1.31.1",
        "cuda_version": "13.0",
        "get_available_providers": lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "preload_dlls": lambda: None,
    }
    loaded(monkeypatch, "onnxruntime", **(settings | changes))


def installed(monkeypatch, *names):
    """As if these packages, and no others, were known to pip."""
    monkeypatch.setattr(doctor, "versions", lambda packages: {"python": "3.12.0"} | dict.fromkeys(names, "1.0"))


def test_an_onnxruntime_for_the_cpu_is_to_be_replaced(monkeypatch):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() or sys.version_info < (3, 11):
        pytest.skip("needs an ONNX Runtime for the CPU, and Python 3.11")
    report = shown(monkeypatch, gpu=described())
    backend = judged(report, "onnxruntime")
    assert backend.reason == f"onnxruntime: {onnxruntime.__version__} has no CUDA provider"
    assert backend.fix == 'pip uninstall onnxruntime && pip install "edgeskip[cuda]"'
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    both = judged(shown(monkeypatch, gpu=described()), "onnxruntime")
    assert both.fix == 'pip uninstall onnxruntime onnxruntime-gpu && pip install "edgeskip[cuda]"'


def test_two_onnxruntimes_in_one_folder_that_do_not_load(monkeypatch):
    loaded(monkeypatch, "onnxruntime")
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    backend = judged(examine(), "onnxruntime", "cpu")
    assert backend.reason.startswith("onnxruntime: broken (AttributeError: ")
    assert backend.fix == 'pip uninstall onnxruntime onnxruntime-gpu && pip install "edgeskip[cpu]"'


def test_an_onnxruntime_for_cuda_works_and_the_verdict_says_where(monkeypatch, tmp_path):
    ort_for_cuda(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    report = shown(monkeypatch, gpu=described())
    assert judged(report, "onnxruntime") == BackendState("onnxruntime", "cuda", True, "1.31.1", None, None)
    assert report.now == (
        "bundles run on the GPU (NVIDIA GeForce RTX 3060) with onnxruntime 1.31.1, "
        "and on the CPU with onnxruntime 1.31.1"
    )


@pytest.mark.parametrize(
    ("gpu", "changes", "reason"),
    [
        ({"driver_cuda_version": "12.4"}, {}, "CUDA: a driver for CUDA 12.4; wanted one for CUDA 13.0; upgrade the"),
        ({"compute_capability": 70}, {}, "GPU: SM 70 is too old; the libraries of CUDA 13 serve 75 and later"),
    ],
)
def test_what_no_command_mends_of_onnxruntime_on_cuda(gpu, changes, reason, monkeypatch, tmp_path):
    ort_for_cuda(monkeypatch, tmp_path, **changes)
    backend = judged(shown(monkeypatch, gpu=described(**gpu)), "onnxruntime")
    assert backend.reason.startswith(reason)
    assert (backend.works, backend.fix) == (False, None)


@pytest.mark.parametrize(
    ("gpu", "jetson", "reason"),
    [
        ({"driver_cuda_version": "12.6"}, None, r"CUDA: a driver for CUDA 12.6; .*; upgrade the NVIDIA driver"),
        (
            {"driver_cuda_version": "12.6"},
            board_of("36.4.3", "6.2"),
            "onnxruntime-gpu: its wheels have no kernels that a Jetson runs; use TensorRT",
        ),
        ({"compute_capability": 61}, None, r"GPU: SM 61 is too old"),
    ],
)
def test_no_wheel_is_named_that_would_not_work(gpu, jetson, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    backend = judged(shown(monkeypatch, gpu=described(**gpu), jetson=jetson), "onnxruntime")
    assert re.match(reason, backend.reason)
    assert backend.fix is None


@pytest.mark.parametrize(("version", "is_named"), [((3, 10), True), ((3, 11), False)])
def test_a_python_that_the_wheels_are_not_built_for(version, is_named, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(doctor.sys, "version_info", version)
    installed(monkeypatch)
    backend = judged(shown(monkeypatch, gpu=described()), "onnxruntime")
    assert ("wanted 3.11 or later, for onnxruntime-gpu" in backend.reason) == is_named
    assert backend.fix == (None if is_named else 'pip install "edgeskip[cuda]"')


@pytest.mark.parametrize(
    ("version", "extra", "device"), [("1.22.0", "cpu", "cpu"), ("1.23.2", "cuda", "cuda"), ("1.9", "cpu", "cpu")]
)
def test_an_onnxruntime_that_is_too_old(version, extra, device, monkeypatch, tmp_path):
    ort_for_cuda(monkeypatch, tmp_path, __version__=version)
    installed(monkeypatch, "onnxruntime" if device == "cpu" else "onnxruntime-gpu")
    monkeypatch.setattr(doctor.sys, "version_info", (3, 12))
    backend = judged(shown(monkeypatch, gpu=described()), "onnxruntime", device)
    assert f"{version} is too old; wanted 1.{23 if device == 'cpu' else 31} or later" in backend.reason
    assert backend.fix == install(extra)


def test_cuda_core_is_named_with_the_extra_of_each_backend(monkeypatch, tmp_path):
    ort_for_cuda(monkeypatch, tmp_path)
    loaded(monkeypatch, "tensorrt", __version__="10.16.0.72")
    missing = BackendError("cuda-core", "not usable (No module named 'cuda')", fix='pip install "edgeskip[cuda]"')
    report = shown(monkeypatch, gpu=described(), refusal=missing)
    assert judged(report, "onnxruntime").fix == 'pip install "edgeskip[cuda]"'
    assert judged(report, "tensorrt").fix == 'pip install "edgeskip[tensorrt]"'
    assert {judged(report, name).reason for name in ("onnxruntime", "tensorrt")} == {
        "cuda-core: not usable (No module named 'cuda')"
    }


def test_a_gpu_that_is_hidden_or_full(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    full = BackendError("CUDA", "no memory free for a context", fix="free the device's memory")
    backend = judged(shown(monkeypatch, gpu=described(), refusal=full), "onnxruntime")
    assert backend.reason == "CUDA: no memory free for a context; free the device's memory"
    assert backend.fix is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    none = BackendError("CUDA", "no usable GPU (no device)", wanted="an NVIDIA GPU and its driver")
    backend = judged(shown(monkeypatch, gpu=described(), refusal=none), "tensorrt")
    assert backend.reason == "CUDA: no usable GPU (no device), with CUDA_VISIBLE_DEVICES="
    assert backend.fix == "unset CUDA_VISIBLE_DEVICES"


def test_an_ubuntu_without_a_driver_has_a_command_for_it(monkeypatch, tmp_path):
    program(tmp_path / "programs", "ubuntu-drivers", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    none = BackendError("CUDA", "no usable GPU (no driver)", wanted="an NVIDIA GPU and its driver")
    report = shown(monkeypatch, refusal=none)
    assert judged(report, "onnxruntime").fix == "sudo ubuntu-drivers install"
    assert report.next == "sudo ubuntu-drivers install  (to use the GPU)"


@pytest.mark.parametrize(("sm", "extra"), [(86, "rtx"), (90, "tensorrt"), (None, "rtx")])
def test_engines_are_built_with_the_tensorrt_that_serves_the_gpu(sm, extra, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    build = verb(shown(monkeypatch, gpu=described(compute_capability=sm)), "build")
    assert build.missing[-1] == "tensorrt or tensorrt_rtx"
    assert build.fix == f'pip install "edgeskip[build,{extra}]"'


@pytest.mark.parametrize(
    ("version", "sm", "reason", "engines"),
    [
        ("10.16.0.72", 87, None, "the standard dialect"),
        ("10.15.1.29", 75, None, "the standard dialect"),
        ("10.13.3.9", 110, None, "the layers dialect, as standard needs 10.15"),
        ("10.3.0", 87, None, "the layers dialect, as standard needs 10.15"),
        ("10.2.0", 87, "tensorrt: 10.2.0 is too old; wanted 10.3 or later", None),
        ("9.16.0", 87, "tensorrt: 9.16.0 is too old; wanted 10.3 or later", None),
        ("10.16.0.72", 72, "GPU: SM 72 is too old; TensorRT serves 75 and later", None),
    ],
)
def test_tensorrt_by_version_and_gpu(version, sm, reason, engines, monkeypatch):
    monkeypatch.setattr(library, "check_nvrtc", lambda *_: None)
    loaded(monkeypatch, "tensorrt", __version__=version)
    report = shown(monkeypatch, gpu=described(compute_capability=sm))
    backend = judged(report, "tensorrt")
    assert backend.engines == engines
    if engines:
        lines = printed(report).splitlines()
        assert f"tensorrt             yes {version}: engines of {engines}" in lines
    assert (backend.works, backend.version, backend.reason) == (
        reason is None,
        version if reason is None else None,
        reason,
    )
    assert backend.fix == ('pip install "edgeskip[tensorrt]"' if reason and "tensorrt:" in reason else None)


def test_a_driver_too_old_for_the_wheels_of_tensorrt(monkeypatch):
    loaded(monkeypatch, "tensorrt", __version__="10.16.0.72")
    monkeypatch.setattr(doctor, "_requirements", lambda package: [f"{package}_cu13==10.16.0.72"])
    backend = judged(shown(monkeypatch, gpu=described(driver_cuda_version="12.8")), "tensorrt")
    assert backend.reason.startswith("CUDA: a driver for CUDA 12.8; wanted one for tensorrt, which is for CUDA 13")
    assert judged(shown(monkeypatch, gpu=described()), "tensorrt").works


def test_tensorrt_that_is_missing_off_a_jetson(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    backend = judged(shown(monkeypatch, gpu=described()), "tensorrt")
    assert backend.reason.startswith("tensorrt: not usable")
    assert backend.fix == 'pip install "edgeskip[tensorrt]"'


def test_on_a_jetson_tensorrt_is_jetpacks(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "check_nvrtc", lambda *_: None)
    gpu = described(name="Orin", compute_capability=87, driver_cuda_version="12.6")
    loaded(monkeypatch, "tensorrt", __version__="10.3.0")
    report = shown(monkeypatch, gpu=gpu, jetson=board_of("36.4.3", "6.2"))
    backend = judged(report, "tensorrt")
    assert (backend.works, backend.engines) == (True, "the layers dialect, as standard needs 10.15")
    assert "bundles run on the GPU (Orin) with tensorrt 10.3.0" in report.now
    missing = BackendError("cuda-core", "not usable (No module named 'cuda')", fix='pip install "edgeskip[cuda]"')
    report = shown(monkeypatch, gpu=gpu, jetson=board_of("36.4.3", "6.2"), refusal=missing)
    assert judged(report, "tensorrt").fix == 'pip install "edgeskip[jetson]"'
    loaded(monkeypatch, "tensorrt", __version__="8.6.2")
    backend = judged(shown(monkeypatch, gpu=gpu, jetson=board_of("36.3.0", "6.0")), "tensorrt")
    assert backend.reason == "tensorrt: 8.6.2 is too old; wanted 10.3 or later; JetPack 6.1 has 10.3, 7.2 has 10.16"
    assert backend.fix is None
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    old = judged(shown(monkeypatch, gpu=gpu, jetson=board_of("36.3.0", "6.0")), "tensorrt")
    assert "10.3 or later is not in JetPack 6.0; wanted JetPack 6.1 or later" in old.reason
    assert old.fix is None
    for l4t, jetpack in (("36.4.0", "6.1"), ("38.4.0", "7.1"), ("39.2.0", "7.2")):
        new = judged(shown(monkeypatch, gpu=gpu, jetson=board_of(l4t, jetpack)), "tensorrt")
        assert new.fix == "sudo apt install nvidia-jetpack"


def test_what_builds_on_a_jetson(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    gpu, board = described(name="Orin", compute_capability=87), board_of("36.4.3", "6.2")
    assert verb(shown(monkeypatch, gpu=gpu, jetson=board), "build").fix == "sudo apt install nvidia-jetpack"
    loaded(monkeypatch, "tensorrt", __version__="10.3.0", __spec__=object())
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert verb(shown(monkeypatch, gpu=gpu, jetson=board), "build").fix == 'pip install "edgeskip[jetson]"'


def nvrtc(monkeypatch, version=None, architectures=(87,)):
    """NVRTC as cuda-bindings shows it, or none."""

    def get_version():
        if version is None:
            raise RuntimeError("Failed to dlopen libnvrtc.so.12")
        return (0, *version)

    found = types.ModuleType("cuda.bindings.nvrtc")
    found.nvrtcVersion, found.nvrtcGetSupportedArchs = get_version, lambda: (0, list(architectures))
    monkeypatch.setattr(sys.modules["cuda.bindings"], "nvrtc", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", found)


@pytest.mark.parametrize(
    ("tensorrt", "version", "jetson", "reason", "fix"),
    [
        ("10.3.0", (12, 6), board_of("36.4.3", "6.2"), None, None),
        ("10.16.0", None, board_of("39.2.0", "7.2"), None, None),  # which needs no kernels of ours
        ("10.3.0", None, board_of("36.4.3", "6.2"), "NVRTC: not found (Failed to", "sudo apt install nvidia-jetpack"),
        ("10.6.0", None, None, "NVRTC: not found (Failed to dlopen", 'pip install "cuda-core[cu13]"'),
        ("10.6.0", (11, 1), None, "NVRTC: 11.1 has no SM 90; install a newer CUDA toolkit", None),
    ],
)
def test_the_compiler_of_our_kernels_is_looked_for(tensorrt, version, jetson, reason, fix, monkeypatch):
    nvrtc(monkeypatch, version)
    loaded(monkeypatch, "tensorrt", __version__=tensorrt)
    monkeypatch.setattr(library, "versions", lambda _: {"cuda-bindings": "13.5.0"})
    gpu = described(compute_capability=87 if jetson or version is None else 90)
    backend = judged(shown(monkeypatch, gpu=gpu, jetson=jetson), "tensorrt")
    assert (backend.works, backend.fix) == (reason is None, fix)
    assert reason is None or backend.reason.startswith(reason)


def test_a_virtual_environment_that_does_not_see_jetpacks_tensorrt(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(doctor.sys, "prefix", "/home/me/my env")
    (tmp_path / "usr/lib/python3.12/dist-packages/tensorrt").mkdir(parents=True)
    found, _ = read_hardware(Path("/"), {})
    found = dataclasses.replace(found, has_gpu=True, gpu=described(), jetson=board_of("39.2.0", "7.2"))
    monkeypatch.setattr(doctor, "read_hardware", lambda root, unknown: (found, None))
    backend = judged(examine(tmp_path), "tensorrt")
    assert backend.fix == "python3 -m venv --system-site-packages '/home/me/my env'"
    assert "JetPack's cannot be seen from /home/me/my env" in backend.reason
    monkeypatch.setattr(doctor.sys, "prefix", sys.base_prefix)
    assert judged(examine(tmp_path), "tensorrt").fix == "sudo apt install nvidia-jetpack"


def test_tensorrt_rtx_serves_some_gpus_only(monkeypatch):
    library = pytest.importorskip("tensorrt_rtx")
    for sm in (*RTX_SERVES, 70, 87, 90, 100, 110):
        backend = judged(shown(monkeypatch, gpu=described(compute_capability=sm)), "tensorrt-rtx")
        assert backend.works == (sm in RTX_SERVES)
        if not backend.works:
            assert backend.fix is None
            assert f"it serves SM 75, 80, 86, 89, 120, 121 and not this GPU's SM {sm}" in backend.reason
            assert ("TensorRT does" in backend.reason) == (sm >= LEAST_SM)
        else:
            assert backend.version == library.__version__


def test_tensorrt_rtx_is_offered_to_the_gpus_that_it_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    installed(monkeypatch)
    served = judged(shown(monkeypatch, gpu=described(compute_capability=89)), "tensorrt-rtx")
    assert served.fix == 'pip install "edgeskip[rtx]"'
    for gpu, jetson in ((described(compute_capability=90), None), (None, board_of("36.4.3", "6.2"))):
        backend = judged(shown(monkeypatch, gpu=gpu, jetson=jetson), "tensorrt-rtx")
        assert backend.fix is None
        assert "TensorRT-RTX: it serves SM 75" in backend.reason


def test_a_gpu_that_is_not_used_yet_comes_next(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 12))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    report = shown(monkeypatch, gpu=described())
    assert report.now == f"bundles run on the CPU with onnxruntime {onnxruntime.__version__}"
    assert report.next == 'pip uninstall onnxruntime && pip install "edgeskip[cuda]"  (to use the GPU)'
    result = CliRunner().invoke(main, ["doctor"])
    assert (
        "GPU                  NVIDIA GeForce RTX 3060, SM 86, driver 580.95.05 for CUDA up to 13.0, " in result.stdout
    )


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        (HostMemory(16 * 10**9, 4 * 10**9, 0, 0), "4.0 GB free of 16.0 GB, no swap"),
        (HostMemory(16 * 10**9, None, None, None), "unknown free of 16.0 GB, swap unknown"),
        (HostMemory(16 * 10**9, 10**9, 2 * 10**9, 10**8), "1.0 GB free of 16.0 GB, swap 0.1 GB free of 2.0 GB"),
    ],
)
def test_memory_in_words(memory, text, monkeypatch):
    monkeypatch.setattr(hardware, "host_memory", lambda root: memory)
    assert f"memory               {text}\n" in CliRunner().invoke(main, ["doctor"]).stdout


def test_more_gpus_and_a_jetson_in_words(monkeypatch):
    gpu = described(name="Orin", count=2, shares_host_memory=True, driver_version=None)
    shown(monkeypatch, gpu=gpu, jetson=board_of("36.4.3", "6.2"))
    printed = CliRunner().invoke(main, ["doctor"]).stdout
    assert (
        "Orin, SM 86, driver unknown for CUDA up to 13.0, 11.8 GB free of 12.9 GB, memory shared with the CPU"
        in printed
    )
    assert "the first of 2, and the one used\n" in printed
    wanted = "NVIDIA Jetson AGX Orin, JetPack 6.2 (L4T 36.4.3), power mode MAXN, GPU clock 306 MHz, at most 1300\n"
    assert f"Jetson               {wanted}" in printed
