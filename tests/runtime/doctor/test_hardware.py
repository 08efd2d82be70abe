"""The machine as it is found: this one, and others made of files and small programs on the PATH."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from edgeskip.runtime.doctor import hardware, jetson
from edgeskip.runtime.doctor.hardware import Gpu, Jetson, read_hardware
from edgeskip.runtime.host import HostMemory, command_output, disk, host_memory


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_memory_disks_and_cores_are_the_systems():
    found, _ = read_hardware(Path("/"), {})
    assert 1 <= found.cores <= os.cpu_count()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.memory.total == pytest.approx(total, rel=0.01)
    assert found.memory.available is None or 0 < found.memory.available <= found.memory.total
    assert found.disk.total == shutil.disk_usage(Path.cwd()).total
    assert found.disk.folder == str(Path.cwd())
    assert found.cache_disk.folder == str(Path(os.environ["XDG_CACHE_HOME"]) / "edgeskip")


@pytest.mark.gpu
def test_a_real_gpu_is_described_as_its_driver_describes_it():
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    name, sm, driver, total = (cell.strip() for cell in rows[0].split(","))
    unknown = {}
    found, refusal = read_hardware(Path("/"), unknown)
    assert refusal is None
    assert unknown == {}
    gpu = found.gpu
    assert found.has_gpu
    assert (gpu.name, gpu.driver_version, gpu.count) == (name, driver, len(rows))
    assert gpu.compute_capability == int(sm.replace(".", ""))
    assert int(gpu.driver_cuda_version.split(".")[0]) >= 12
    assert gpu.memory_bytes == pytest.approx(int(total) << 20, rel=0.05)
    assert 0 < gpu.free_bytes <= gpu.memory_bytes
    assert gpu.shares_host_memory == (found.jetson is not None)
    by_command = hardware._gpu_by_command(Path("/"), False)
    assert (
        dataclasses.replace(
            by_command,
            memory_bytes=gpu.memory_bytes,
            free_bytes=gpu.free_bytes,
            shares_host_memory=gpu.shares_host_memory,
        )
        == gpu
    )


def test_meminfo_is_read_in_kilobytes(tmp_path):
    (tmp_path / "proc").mkdir()
    lines = ["MemTotal: 100 kB", "MemFree: 7 kB", "MemAvailable: 60 kB", "SwapTotal: 8 kB", "SwapFree: 3 kB", "X: 0"]
    (tmp_path / "proc/meminfo").write_text("\n".join(lines))
    assert host_memory(tmp_path) == HostMemory(102400, 61440, 8192, 3072)


def test_without_proc_the_size_of_the_memory_is_known(tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory(tmp_path) == HostMemory(total, None, None, None)


def test_the_disk_of_a_folder_to_be_made_is_that_of_its_parent(tmp_path):
    made = disk(tmp_path / "not" / "yet")
    assert made.total == shutil.disk_usage(tmp_path).total
    assert made.folder == str(tmp_path / "not" / "yet")


# Commands of the system


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    program(tmp_path, "hangs", f"sleep 600 & echo $! > {pid}; echo first; wait")
    for timeout_s in (0.5, 5, 50):  # more, where the machine had not come so far
        with pytest.raises(TimeoutError, match=f"hangs gave no answer in {timeout_s} s"):
            command_output(str(tmp_path / "hangs"), timeout_s=timeout_s)
        if pid.exists() and pid.read_text():
            break
    stat = Path("/proc") / pid.read_text().strip() / "stat"
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def test_a_command_that_closes_its_outputs_and_hangs_is_ended(tmp_path):
    program(tmp_path, "hangs", f"touch {tmp_path}/started; exec >&- 2>&-; sleep 600")
    for timeout_s in (0.5, 5, 50):
        with pytest.raises(TimeoutError, match=f"in {timeout_s} s") as caught:
            command_output(str(tmp_path / "hangs"), timeout_s=timeout_s)
        if "gave no answer" not in str(caught.value):
            break
    assert str(caught.value) == f"{tmp_path}/hangs did not end in {timeout_s} s"


@pytest.mark.parametrize(
    ("script", "error"),
    [("echo bad luck >&2; exit 3", r"ended with exit code 3 \(bad luck\)"), ("exec yes", "prints without end")],
)
def test_a_command_that_fails_is_an_oserror(script, error, tmp_path):
    program(tmp_path, "fails", script)
    with pytest.raises(OSError, match=error):
        command_output(str(tmp_path / "fails"), timeout_s=100)


@pytest.mark.parametrize("path", ["", ".", ":.:", "here"])
def test_no_command_of_the_current_folder_is_run(path, tmp_path, monkeypatch):
    program(tmp_path, "tool", "echo run from the current folder")
    program(tmp_path / "here", "tool", "echo run from the current folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    with pytest.raises(FileNotFoundError, match="no command tool"):
        command_output("tool", root=tmp_path / "none")


def test_commands_outside_the_path_are_found_in_the_systems_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="no command tool"):
        command_output("tool", root=tmp_path)
    (tmp_path / "usr").mkdir()
    program(tmp_path / "usr" / "sbin", "tool", 'echo "$1 and $LC_ALL"')
    assert command_output("tool", "a b", root=tmp_path) == "a b and C\n"


# Jetsons


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Makes the files and commands of a Jetson; gives the root of its file system."""
    root, programs = tmp_path / "root", tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)

    def make(release="# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic", devfreq="17000000.gpu", **commands):
        for folder in ("etc", "proc/device-tree", f"sys/class/devfreq/{devfreq}", "sys/class/devfreq/15340000.vic"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "etc/nv_tegra_release").write_text(release + "\n")
        (root / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
        (root / f"sys/class/devfreq/{devfreq}/cur_freq").write_text("306000000\n")
        (root / f"sys/class/devfreq/{devfreq}/max_freq").write_text("624750000\n")
        commands = {"dpkg_query": "exit 1", "nvpmodel": "echo 'NV Power Mode: 15W'; echo 0"} | commands
        for name, script in commands.items():
            program(programs, name.replace("_", "-"), script)
        return root

    return make


def test_a_jetson_tells_what_it_is(board):
    unknown = {}
    found, _ = read_hardware(board(), unknown)
    assert found.jetson == Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", "6.2", "15W", 306.0, 624.75)
    assert found.has_gpu
    assert not [fact for fact in unknown if fact.startswith("jetson")]


@pytest.mark.parametrize(
    ("release", "package", "l4t", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1", "printf 6.2.1+b38", "36.4.3", "6.2.1"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "exit 1", "36.4.7", "6.2.1"),
        ("# R36 (release), REVISION: 9.9, GCID: 1", "printf '<none>'", "36.9.9", "6"),
        ("# R38 (release), REVISION: 4.0, GCID: 1", "exit 1", "38.4.0", "7.1"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "exit 1", "39.2.0", "7.2"),
        ("# R77 (release), REVISION: 1.0, GCID: 1", "exit 1", "77.1.0", None),
        ("nothing of the kind", "printf 7.2-b1", None, "7.2-b1"),
        ("nothing of the kind", "exit 1", None, None),
        ("", "exit 1", None, None),
    ],
)
def test_jetpack_by_its_package_or_by_l4t(release, package, l4t, jetpack, board):
    unknown = {}
    found, _ = read_hardware(board(release, dpkg_query=package), unknown)
    assert (found.jetson.l4t, found.jetson.jetpack) == (l4t, jetpack)
    assert ("jetson.l4t" in unknown, "jetson.jetpack" in unknown) == (l4t is None, jetpack is None)


@pytest.mark.parametrize(
    ("devfreq", "is_found"),
    [("17000000.ga10b", True), ("gpu-gpc-0", True), ("57000000.gpu", True), ("17000000.gv11b", True), ("emc", False)],
)
def test_the_gpus_clock_by_every_name_that_it_has(devfreq, is_found, board):
    unknown = {}
    found, _ = read_hardware(board(devfreq=devfreq), unknown)
    assert found.jetson.gpu_clock_mhz == (306.0 if is_found else None)
    assert ("jetson.gpu_clock_mhz" in unknown) != is_found


def test_of_thors_two_clocks_the_one_that_computes(board):
    root = board(devfreq="gpu-nvd-0")
    board(devfreq="gpu-gpc-0")
    (root / "sys/class/devfreq/gpu-nvd-0/cur_freq").write_text("1\n")
    assert jetson.gpu_clock_mhz(root) == (306.0, 624.75)


@pytest.mark.parametrize(
    ("script", "mode", "reason"),
    [
        ("echo NVPM WARN: fan mode is not set; echo 'NV Power Mode: MAXN'; echo 0", "MAXN", None),
        ("echo 'NV Fan Mode:quiet'; echo 'NV Power Mode: MODE_30W_ALL'", "MODE_30W_ALL", None),
        ("head -c 3000 /dev/urandom", None, "nvpmodel says"),
        ("printf 'NV Power Mode:\\n3\\n'", None, "nvpmodel says"),
        ("exit 0", None, "nvpmodel says ''"),
        ("echo 'NVPM ERROR: no permission' >&2; exit 255", None, "exit code 255 (NVPM ERROR: no permission)"),
        ("exec yes", None, "prints without end"),
        ("sleep 60", None, "gave no answer"),
    ],
)
def test_whatever_nvpmodel_does_is_borne(script, mode, reason, board, monkeypatch):
    timeout_s = 0.5 if script.startswith("sleep") else 100
    monkeypatch.setattr(jetson, "command_output", partial(command_output, timeout_s=timeout_s))
    unknown = {}
    found, _ = read_hardware(board(nvpmodel=script), unknown)
    assert found.jetson.power_mode == mode
    assert found.jetson.model == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (reason is None) == ("jetson.power_mode" not in unknown)
    assert reason is None or reason in unknown["jetson.power_mode"]
    assert json.loads(json.dumps(unknown)) == unknown


def test_a_jetson_without_any_of_its_files_is_known_by_its_chip(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"acme,carrier\0nvidia,tegra234\0")
    unknown = {}
    assert read_hardware(tmp_path, unknown)[0].jetson == Jetson(None, None, None, None, None, None)
    facts = {f"jetson.{name}" for name in ("model", "l4t", "jetpack", "power_mode", "gpu_clock_mhz")}
    assert facts <= set(unknown)


def test_another_board_is_no_jetson(tmp_path):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 4 Model B\0")
    assert read_hardware(tmp_path, {})[0].jetson is None


# GPUs by other ways than cuda-core


SMI = """case "$1" in
  --query-gpu=driver_version) echo 580.95 ;;
  --query*) printf '%s\\n' "{rows}" ;;
  *) echo '| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |' ;;
esac"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Makes an nvidia-smi, where cuda-core is of no use."""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"), prepend=os.pathsep)
    (tmp_path / "root").mkdir()

    def make(*rows):
        program(tmp_path / "programs", "nvidia-smi", SMI.replace("{rows}", "\n".join(rows)))
        unknown = {}
        found, refusal = read_hardware(tmp_path / "root", unknown)
        assert refusal.place == "cuda-core"
        return found, unknown

    return make


def test_without_cuda_core_nvidia_smi_is_asked(smi):
    row = "NVIDIA GeForce RTX 3060, 8.6, 580.95.05, 12288, 12000"
    found, unknown = smi(row, row)
    wanted = Gpu("NVIDIA GeForce RTX 3060", 2, 86, "580.95.05", "13.0", 12288 << 20, 12000 << 20, None)
    assert (found.gpu, found.has_gpu, unknown) == (wanted, True, {})


def test_what_nvidia_smi_does_not_tell_is_null(smi):
    found, _ = smi("NVIDIA Thor, [N/A], 580.00, [N/A], [Not Supported]")
    assert found.gpu == Gpu("NVIDIA Thor", 1, None, "580.00", "13.0", None, None, None)


def test_an_nvidia_smi_without_gpus_is_a_reason(smi):
    found, unknown = smi("No devices were found")
    assert (found.gpu, found.has_gpu) == (None, False)
    assert "cuda-core: not usable" in unknown["gpu"]
    assert "nvidia-smi says 'No devices were found" in unknown["gpu"]


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (builder@host)",
    ],
)
def test_the_drivers_version_by_its_kernel_module(line, tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version: 12.3.0\n")
    assert hardware._driver_version(tmp_path) == "535.104.05"
