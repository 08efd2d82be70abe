"""Who may import whom, and which libraries stay out of a process that has no need of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgeskip

ROOT = Path(edgeskip.__file__).parent
RUNTIME_LIBRARIES = {"numpy", "tokenizers", "jinja2", "rich"}  # the base install
PLOTS = {"matplotlib"}
BACKENDS = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
EXPORT_LIBRARIES = {"onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"}
TRAINING_LIBRARIES = {"torch", "transformers", "accelerate"}


def imported(source, package):
    """Every module that a source names in an import, wherever it stands; relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {ast.literal_eval(arg) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def sources(part):
    paths = sorted((ROOT / part).rglob("*.py"))
    assert paths
    return {f"{part}/{path.relative_to(ROOT / part)}": imported(path.read_text(), f"edgeskip.{part}") for path in paths}


def breaches(part, forbidden):
    return [
        f"{file} imports {name}"
        for file, names in sources(part).items()
        for name in sorted(names)
        for other in forbidden
        if f"{name}.".startswith(f"{other}.")
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from edgeskip import recipes", "edgeskip.recipes"),
        ("from .. import recipes", "edgeskip.recipes"),
        ("from ..recipes import demo", "edgeskip.recipes"),
        ("def late():\n    from torch import nn", "torch"),
        ("importlib.import_module('onnx')", "onnx"),
    ],
)
def test_imports_are_found_in_every_form(source, name):
    assert name in imported(source, "edgeskip.runtime")


def test_the_runtime_imports_neither_exporter_nor_recipes():
    assert breaches("runtime", ["edgeskip.exporter", "edgeskip.recipes", "edgeskip.cli"]) == []


def test_the_runtime_needs_the_base_install_and_a_backend_only():
    allowed = RUNTIME_LIBRARIES | BACKENDS | PLOTS | sys.stdlib_module_names | {"edgeskip"}
    tops = {(file, name.partition(".")[0]) for file, names in sources("runtime").items() for name in names}
    assert {(file, top) for file, top in tops if top not in allowed} == set()


def test_the_exporter_does_not_import_recipes():
    assert breaches("exporter", ["edgeskip.recipes", "edgeskip.cli"]) == []


def test_training_does_not_import_the_exporter():
    training = {"corpus", "early_exit", "evaluation", "layerskip", "reader", "schema", "tokens", "training"}
    training_files = {f"recipes/{name}.py" for name in training}
    assert training_files <= set(sources("recipes"))
    assert {breach.split()[0] for breach in breaches("recipes", ["edgeskip.exporter"])} & training_files == set()
    assert breaches("recipes", ["edgeskip.cli"]) == []


def loaded_by(code, *arguments):
    """Top-level modules in sys.modules of a fresh process that ran the code."""
    code += "\nimport sys; print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.rpartition("loaded:")[2].split())
    assert "edgeskip" in loaded
    return loaded


def test_importing_edgeskip_loads_no_library():
    everything = RUNTIME_LIBRARIES | BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES
    assert loaded_by("import edgeskip; edgeskip.__version__") & everything == set()


def test_importing_the_runtime_loads_no_backend_and_no_export_or_training_library():
    loaded = loaded_by("import edgeskip; edgeskip.load")
    assert loaded & (BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES) == set()
    assert "tokenizers" in loaded


@pytest.mark.parametrize("verb", ["", "generate", "export", "synth", "check"])
def test_help_loads_no_library(verb):
    code = "from edgeskip.cli import main; import sys; main(sys.argv[1:], standalone_mode=False)"
    everything = RUNTIME_LIBRARIES | BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES
    assert loaded_by(code, *filter(None, [verb]), "--help") & everything == set()


def test_export_loads_neither_torch_nor_transformers(checkpoints, tmp_path):
    code = "from edgeskip.cli import main; import sys; main(sys.argv[1:], standalone_mode=False)"
    loaded = loaded_by(code, "export", str(checkpoints("llama-gqa")), str(tmp_path / "bundle"), "--exit-layer", "2")
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert loaded & TRAINING_LIBRARIES == set()
    assert "onnx_ir" in loaded


def test_generation_loads_neither_export_nor_training_libraries(bundles):
    code = "from edgeskip.cli import main; import sys; main(sys.argv[1:], standalone_mode=False)"
    loaded = loaded_by(code, "generate", str(bundles("llama-gqa").folder), "--prompt", "a", "-n", "3")
    assert loaded & (EXPORT_LIBRARIES | TRAINING_LIBRARIES) == set()
    assert "onnxruntime" in loaded
