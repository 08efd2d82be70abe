"""The machine around the GPU: processor, memory, disks, and what a command of the system says."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_MAX_OUTPUT = 1 << 16
_LEAST_RELEASED = 1 << 22


@dataclass(frozen=True)
class HostMemory:
    """Bytes; `available` is what a process can still take. What the system does not tell is null."""

    total: int
    available: int | None
    swap_total: int | None
    swap_free: int | None


@dataclass(frozen=True)
class Disk:
    """Bytes of the file system that holds a folder; `free` is what this user may take."""

    folder: str
    total: int
    free: int


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name, or its kind where the system has no name for it."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release_freed_memory() -> None:
    """Gives the system back what glibc keeps of freed memory. Other C libraries have no such call."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def releasing_freed_memory(growth: int) -> Iterator[None]:
    """Releases freed memory again and again, once the process has grown by so many bytes; up to then it may be kept, as
    memory that is used anew costs less time than new memory.
    """
    ended = threading.Event()

    def release() -> None:
        limit = anonymous_bytes() + growth
        while not ended.wait(0.01):
            if anonymous_bytes() > limit:
                release_freed_memory()
                limit = max(limit, anonymous_bytes() + _LEAST_RELEASED)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def anonymous_bytes() -> int:
    """Memory of this process, less that of mapped files; 0 where the system does not tell."""
    try:
        _, resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def others_seconds(root: Path = Path("/")) -> float | None:
    """Processor time of all else so far on this process's cores, a hypervisor's other guests included; null where the
    system does not tell.
    """
    cores = {f"cpu{core}" for core in (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ())}
    try:
        lines = [line.split() for line in (root / "proc/stat").read_text(encoding="ascii").splitlines()]
        # user nice system idle iowait irq softirq steal
        ticks = sum(int(line[i]) for line in lines if line and line[0] in cores for i in (1, 2, 3, 6, 7, 8))
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Memory according to /proc/meminfo; where there is no such file, as on macOS, its size alone.

    Raises:
        OSError, ValueError, LookupError: the system does not tell.
    """
    path = root / "proc/meminfo"
    if not path.exists():
        return HostMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None, None, None)
    lines = (line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines() if ":" in line)
    sizes = {name: 1024 * int(value.split()[0]) for name, value in lines if value.strip().endswith("kB")}
    return HostMemory(sizes["MemTotal"], *map(sizes.get, ("MemAvailable", "SwapTotal", "SwapFree")))


def disk(folder: Path) -> Disk:
    """The file system that holds a folder, or that would if the folder were made.

    Raises:
        OSError: it cannot be asked.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    return Disk(str(folder), usage.total, usage.free)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether there is an NVIDIA GPU, with a driver or without: on the PCI bus, in a Jetson, or in WSL."""
    with suppress(OSError, ValueError):
        for folder in (root / "sys/bus/pci/devices").glob("*"):
            if (folder / "vendor").read_text().strip() == "0x10de" and (folder / "class").read_text()[:4] == "0x03":
                return True
    with suppress(OSError):
        if b"nvidia,tegra" in (root / "proc/device-tree/compatible").read_bytes():
            return True
    return any((root / "dev" / name).exists() for name in ("nvidiactl", "dxg"))


def command_output(name: str, *arguments: str, root: Path = Path("/"), timeout_s: float = 5.0) -> str:
    """What a command prints on stdout and stderr.

    It is looked for on the PATH, less the current folder, then in the system's own folders, which a PATH may lack.

    Raises:
        FileNotFoundError: there is no such command.
        TimeoutError: it does not end in time; it is killed with all that it started.
        OSError: it cannot be run, fails, or prints more than 64 KB.
    """
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(folder).is_absolute()]
    folders += [str(root / folder) for folder in ("usr/bin", "usr/sbin", "bin", "sbin", "usr/lib/wsl/lib")]
    command = shutil.which(name, path=os.pathsep.join(folders))
    if command is None:
        raise FileNotFoundError(f"no command {name}")
    process = subprocess.Popen(
        [command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts can be ended with it
        env=os.environ | {"LC_ALL": "C"},
    )
    assert process.stdout is not None
    deadline, output = time.monotonic() + timeout_s, b""
    try:
        while select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            piece = os.read(process.stdout.fileno(), _MAX_OUTPUT)
            output += piece
            if not piece or len(output) > _MAX_OUTPUT:
                break
        else:
            raise TimeoutError(f"{name} gave no answer in {timeout_s:g} s")
        if len(output) > _MAX_OUTPUT:
            raise OSError(f"{name} prints without end")
        try:
            code = process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{name} did not end in {timeout_s:g} s") from None
    except BaseException:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what hangs in a driver cannot be killed
            process.wait(1)
        raise
    finally:
        process.stdout.close()
    text = output.decode(errors="replace")
    if code:
        raise OSError(f"{name} ended with exit code {code} ({text.strip().rpartition(chr(10))[2]:.200})")
    return text
