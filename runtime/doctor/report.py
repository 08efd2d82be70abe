"""What the doctor found, as lines that a terminal may wrap and a user may copy."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from edgeskip.runtime.doctor.examine import BackendState, Doctor, Verb
from edgeskip.runtime.doctor.hardware import Gpu, Jetson
from edgeskip.runtime.host import Disk, HostMemory

_UNKNOWN = "unknown"


def print_doctor(report: Doctor, console: Console) -> None:
    """The machine, the packages, the backends and verbs with what mends them, and what follows."""
    for label, text in _machine(report):
        _line(console, label, text)
    console.print()
    for backend in report.backends:
        said = f"{backend.version}: engines of {backend.engines}" if backend.engines else backend.version
        _judgement(console, _backend_name(backend), backend.works, said or backend.reason or "", backend.fix)
    console.print()
    for verb in report.verbs:
        _judgement(console, verb.name, verb.works, _missing(verb), verb.fix)
    console.print()
    _line(console, "now", report.now, "bold")
    _line(console, "next", report.next, "bold")


def _machine(report: Doctor) -> Iterator[tuple[str, str]]:
    """Labels and the texts that follow them."""
    hardware, software = report.hardware, report.software
    yield "edgeskip", f"{report.edgeskip}, Python {software.python} ({software.executable})"
    yield "system", hardware.system
    yield "CPU", f"{hardware.cpu or _UNKNOWN}, {hardware.cores or _UNKNOWN} cores"
    yield "memory", _memory(hardware.memory) if hardware.memory else _because(report, "memory")
    yield "disk", _disk(hardware.disk) if hardware.disk else _because(report, "disk")
    yield "cache", _disk(hardware.cache_disk) if hardware.cache_disk else _because(report, "cache_disk")
    if hardware.gpu:
        yield "GPU", _gpu(hardware.gpu)
    elif hardware.has_gpu:
        yield "GPU", _because(report, "gpu")
    else:
        yield "GPU", "no NVIDIA GPU"
    if hardware.jetson:
        yield "Jetson", _jetson(hardware.jetson)
    yield "packages", ", ".join(f"{name} {version}" for name, version in software.packages.items()) or "none"


def _because(report: Doctor, fact: str) -> str:
    return f"{_UNKNOWN} ({report.unknown.get(fact, 'no reason given')})"


def _memory(memory: HostMemory) -> str:
    swap = "no swap" if memory.swap_total == 0 else f"swap {_free(memory.swap_free, memory.swap_total)}"
    return f"{_free(memory.available, memory.total)}, {swap}"


def _free(free: int | None, total: int | None) -> str:
    if total is None:
        return _UNKNOWN
    return f"{_UNKNOWN if free is None else f'{free / 1e9:.1f} GB'} free of {total / 1e9:.1f} GB"


def _disk(disk: Disk) -> str:
    return f"{_free(disk.free, disk.total)} in {disk.folder}"


def _gpu(gpu: Gpu) -> str:
    sm = gpu.compute_capability or _UNKNOWN
    driver, cuda = gpu.driver_version or _UNKNOWN, gpu.driver_cuda_version or _UNKNOWN
    parts = [gpu.name, f"SM {sm}", f"driver {driver} for CUDA up to {cuda}"]
    if gpu.memory_bytes is not None:
        parts.append(_free(gpu.free_bytes, gpu.memory_bytes))
    if gpu.shares_host_memory:
        parts.append("memory shared with the CPU")
    if gpu.count is not None and gpu.count > 1:
        parts.append(f"the first of {gpu.count}, and the one used")
    return ", ".join(parts)


def _jetson(jetson: Jetson) -> str:
    clock = _UNKNOWN
    if jetson.gpu_clock_mhz is not None and jetson.gpu_max_clock_mhz is not None:
        clock = f"{jetson.gpu_clock_mhz:.0f} MHz, at most {jetson.gpu_max_clock_mhz:.0f}"
    return (
        f"{jetson.model or _UNKNOWN}, JetPack {jetson.jetpack or _UNKNOWN} (L4T {jetson.l4t or _UNKNOWN}), "
        f"power mode {jetson.power_mode or _UNKNOWN}, GPU clock {clock}"
    )


def _backend_name(backend: BackendState) -> str:
    return f"{backend.name} on {backend.device}" if backend.name == "onnxruntime" else backend.name


def _missing(verb: Verb) -> str:
    return f"missing: {', '.join(verb.missing)}" if verb.missing else ""


def _judgement(console: Console, label: str, works: bool, text: str, fix: str | None) -> None:
    """One line, and another with nothing but the command that mends it."""
    _line(console, label, f"{'yes' if works else 'no':<4}{text}", "green" if works else "yellow")
    if fix:
        _line(console, "", f"    {fix}", "bold")


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    """A label in a column of its own and a text, in what the terminal or the pipe can spell."""
    shown = "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else "?" for c in text).rstrip()
    try:
        shown = shown.encode(console.encoding, "backslashreplace").decode(console.encoding)
    except LookupError:
        shown = ascii(shown)
    console.print(Text.assemble((f"{label:<21}", "dim"), (shown, style)), soft_wrap=True)
