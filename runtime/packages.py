"""Packages: the versions that are installed, and what each verb needs beyond the base install. Imports none of them."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import util

RUNTIME_PACKAGES = (
    *("edgeskip", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "cuda-core"),
    *("torch", "transformers"),
)
"""What a measured speed depends on."""

PACKAGES = (
    *RUNTIME_PACKAGES,
    *("tokenizers", "jinja2", "rich", "click"),
    *("onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"),
    *("polygraphy", "accelerate", "matplotlib", "prompt_toolkit", "starlette", "uvicorn", "prometheus_client"),
    "llguidance",
)

LEAST_VERSIONS: dict[str, tuple[int, ...]] = {
    "onnxruntime": (1, 23),
    "onnxruntime-gpu": (1, 31),
    "tensorrt": (10, 3),
    "tensorrt-rtx": (1, 4),
}
"""The oldest versions that run a bundle, as in pyproject.toml."""


@dataclass(frozen=True)
class Need:
    """The modules that a verb looks for, and the extras that bring them."""

    extras: str
    modules: tuple[str, ...]

    @property
    def fix(self) -> str:
        """The command that installs them."""
        return install(self.extras)


_EXPORT = ("onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "ml_dtypes")

BASE = ("numpy", "tokenizers", "jinja2", "rich")
"""Modules of the base install, which every verb may use."""

NEEDS = {
    "export": Need("export", _EXPORT),
    "export --quantizer gptq": Need("check", ("torch",)),
    "build": Need("build", ("polygraphy",)),
    "check": Need("check", ("polygraphy", "torch", "transformers", *_EXPORT)),
    "push": Need("hub", ("huggingface_hub",)),
    "train": Need("train", ("torch", "transformers", "accelerate")),
    "synth": Need("train,export", ("torch", "transformers", "safetensors", "huggingface_hub")),
    "demo": Need("demo", (*_EXPORT, "onnxruntime")),
    "bench --html": Need("plots", ("matplotlib",)),
    "bench --compare": Need("train,export", ("torch", "transformers", *_EXPORT)),
    "chat": Need("chat", ("prompt_toolkit",)),
    "generate --json-schema": Need("grammar", ("llguidance",)),
    "serve": Need("serve", ("starlette", "uvicorn", "prometheus_client")),
    "tune": Need("export", _EXPORT),
    "tune --html": Need("plots", ("matplotlib",)),
}
"""By verb, or by verb and option."""


def install(extras: str) -> str:
    """The command that installs extras, given as `cpu` or `train,export`."""
    return f'pip install "edgeskip[{extras}]"'


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [module for module in modules if util.find_spec(module) is None]


def version_numbers(version: str | None) -> tuple[int, int]:
    """The first two numbers of a version, zeros where it is not known."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", version or "")), 0, 0]
    return major, minor


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those of these packages that are installed."""
    from importlib import metadata  # late, for a command line that only helps

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            version: str | None = metadata.version(package)
        except Exception:  # not there, or its metadata is damaged
            continue
        if version:  # so that what has lost its metadata counts as not installed, in every Python
            found[package] = version
    return found
