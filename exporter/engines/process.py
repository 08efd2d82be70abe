"""Builds engines in a process of its own, which build.py starts: jobs in, events out.

The system gets the memory back when the process ends, and killing it stops a build at any point. Each job comes as a
line of JSON on stdin; what goes out on stdout is one JSON object per line: {"done": 0..1000} while it works, then
{"built": {...}} or {"failed": "..."}. TensorRT's own output goes to stderr. To get its kernels ready takes the full
TensorRT seconds, so one process does all the jobs of a build.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from edgeskip.runtime.files import write_hashed

LAYER_TYPES = ("KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "ATTENTION_INPUT", "ATTENTION_OUTPUT")
LAYERS_PER_DECODER_LAYER = dict(zip(LAYER_TYPES, (2, 2, 1, 1), strict=True))
"""What one decoder layer must become: its caches written in place, q and k rotated, and one fused attention.

See inference-library/transformers-kv-cache and transformers-fused-attention in TensorRT's documentation.
"""

PROGRESS_STEPS = 1000


@dataclass(frozen=True)
class Job:
    """One engine to build.

    `native_layers` counts the decoder layers that must become layers of TensorRT's own. `profiles` gives, for each
    optimization profile, the smallest, best and largest shape of every input with rows; `compute_capability` is (8, 6)
    for a build ahead of time, null for the GPU present.
    """

    onnx: str
    engine: str
    native_layers: int
    profiles: list[dict[str, list[list[int]]]]
    compute_capability: list[int] | None
    workspace_bytes: int | None
    load_timing_cache: str | None
    save_timing_cache: str | None


@dataclass(frozen=True)
class Built:
    """What was built: the engine's hash and size, and the most memory this process held."""

    sha256: str
    bytes: int
    peak_memory_bytes: int | None


class EngineBuildError(Exception):
    """Why there is no engine, as one line."""


@dataclass
class Fraction:
    """The share of a build that is done, from TensorRT's nested phases: a phase is one step of its parent."""

    spans: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    done: float = 0.0

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """A phase of this many steps begins."""
        low, width, total = self.spans.get(parent or "", (0.0, 1.0, 1))
        low += width * min(self.steps.get(parent or "", 0), total - 1) / total
        self.spans[phase], self.steps[phase] = (low, width / total, max(num_steps, 1)), 0

    def step(self, phase: str, step: int) -> None:
        """A step of a phase ends."""
        low, width, total = self.spans[phase]
        self.steps[phase] = step + 1
        self.done = max(self.done, low + width * min(step + 1, total) / total)


def check_layers(network: Any, decoder_layers: int) -> None:
    """Compares a parsed network with what the decoder layers must become.

    Raises:
        EngineBuildError: a layer was parsed into something else, or without its mask: slow or wrong, but no error.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = Counter(layer.type.name for layer in layers)
    # query, key, value, mask: the parser ignores Attention's other inputs and says nothing
    found["attention mask"] = sum(
        layer.type.name == "ATTENTION_INPUT" and layer.num_inputs > 3 and layer.get_input(3) is not None
        for layer in layers
    )
    for name, count in (LAYERS_PER_DECODER_LAYER | {"attention mask": 1}).items():
        if found[name] != count * decoder_layers:
            raise EngineBuildError(
                f"TensorRT reads {found[name]} {name} from it; wanted {count * decoder_layers}, "
                f"{count} for each of {decoder_layers} decoder layers"
            )


def check_warnings(warnings: list[str]) -> None:
    """Refuses a network if TensorRT leaves out a part of it.

    Raises:
        EngineBuildError: an input is not used.
    """
    unused = [warning for warning in warnings if "unused input" in warning.lower()]
    if unused:
        raise EngineBuildError(f"TensorRT leaves out an input: {unused[0]}")


def build(job: Job, report: Any) -> Built:
    """Parses, checks, builds and writes one engine.

    Args:
        job: what to build.
        report: called with the steps done, out of PROGRESS_STEPS; returns whether to go on.

    Raises:
        EngineBuildError: the graph is not what it should be, or TensorRT refuses it.
    """
    from polygraphy.backend.trt import Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.backend.trt import util as trt_util
    from polygraphy.config import USE_TENSORRT_RTX
    from polygraphy.logger import G_LOGGER
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt: Any = lazy_import_trt()
    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1
    log = _logger(trt)
    log.errors.clear()
    log.warnings.clear()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.fraction = Fraction()

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self.fraction.start(phase, parent, num_steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self.fraction.step(phase, step)
            return bool(report(int(PROGRESS_STEPS * self.fraction.done)))

        def phase_finish(self, phase: str) -> None:
            pass

    trt_util.TRT_LOGGER = log  # Polygraphy's own passes messages to its log without their severity
    settings: dict[str, Any] = {
        "profiles": [_profile(Profile(), shapes) for shapes in job.profiles],
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "progress_monitor": Monitor(),
        "load_timing_cache": job.load_timing_cache,
    }
    if job.workspace_bytes is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job.workspace_bytes}
    if USE_TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        settings["compute_capabilities"] = job.compute_capability and [tuple(job.compute_capability)]
        create = CreateConfigRTX(**settings)
    else:
        from polygraphy.backend.trt import CreateConfig

        create = CreateConfig(**settings)

    def create_config(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # a round that is captured may not allocate
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    try:
        builder, network, _ = network_from_onnx_path(job.onnx, strongly_typed=True)
        check_layers(network, job.native_layers)
        engine = engine_bytes_from_network((builder, network), create_config, job.save_timing_cache)
        check_warnings(log.warnings)
    except EngineBuildError:
        raise
    except Exception as error:  # Polygraphy's, whose reason is in TensorRT's log
        raise EngineBuildError(log.errors[0] if log.errors else f"{type(error).__name__}: {error}") from None
    size, sha256 = write_hashed(Path(job.engine), [memoryview(engine)])
    return Built(sha256, size, _peak_memory_bytes())


@cache
def _logger(trt: Any) -> Any:
    """Keeps errors and warnings; TensorRT uses the first logger of a process to its end."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.Logger.ERROR:
                self.errors.append(message)
            elif severity == trt.Logger.WARNING:
                self.warnings.append(message)

    return Log()


def main() -> None:
    """Reads jobs, does them, and reports what came of each."""
    _end_with_parent()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that whatever a library prints stays out of the events
    for line in sys.stdin:
        _do(Job(**json.loads(line)), events)


def _do(job: Job, events: IO[str]) -> None:
    last = -1

    def report(done: int) -> bool:
        nonlocal last
        if done > last:
            last = done
            try:
                events.write(json.dumps({"done": done}) + "\n")
            except OSError:  # who wanted this engine is gone
                return False
        return True

    try:
        built = build(job, report)
    except (EngineBuildError, OSError, ImportError) as error:
        events.write(json.dumps({"failed": str(error)}) + "\n")
    else:
        events.write(json.dumps({"built": built.__dict__}) + "\n")


def _profile(profile: Any, shapes: dict[str, list[list[int]]]) -> Any:
    for name, (least, best, most) in shapes.items():
        profile.add(name, least, best, most)
    return profile


def _peak_memory_bytes() -> int | None:
    """The largest resident memory so far, where the system tells. (getrusage would count the parent's, too.)"""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return None


def _end_with_parent() -> None:
    """Has Linux kill this process when the one that wanted the engine is killed; nothing else would."""
    set_parent_death_signal = 1  # linux/prctl.h
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
