"""Who may import whom, and which libraries stay out of a process that has no need of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import edgeskip.runtime

ROOT = Path(edgeskip.runtime.__file__).parents[1]
RUNTIME_LIBRARIES = {"click", "numpy", "tokenizers", "jinja2", "rich"}  # the base install
PLOTS = {"matplotlib"}
HUB = {"huggingface_hub"}
SERVING = {"prompt_toolkit", "starlette", "uvicorn", "prometheus_client"}
GRAMMARS = {"llguidance"}
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
    return {
        f"{path.relative_to(ROOT)}": imported(
            path.read_text(), ".".join(("edgeskip", *path.relative_to(ROOT).parent.parts))
        )
        for path in paths
    }


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
    allowed = RUNTIME_LIBRARIES | BACKENDS | PLOTS | SERVING | GRAMMARS | HUB | sys.stdlib_module_names | {"edgeskip"}
    tops = {(file, name.partition(".")[0]) for file, names in sources("runtime").items() for name in names}
    assert {(file, top) for file, top in tops if top not in allowed} == set()


def test_the_exporter_does_not_import_recipes():
    assert breaches("exporter", ["edgeskip.recipes", "edgeskip.cli"]) == []


def test_training_imports_of_the_exporter_only_how_a_checkpoint_s_tokenizer_is_read():
    allowed = {"edgeskip.exporter.config", "edgeskip.exporter.tokenizer"}
    names = {name for names in sources("recipes/train").values() for name in names}
    modules = {".".join(name.split(".")[:3]) for name in names if name.startswith("edgeskip.exporter.")}
    assert modules == allowed
    assert breaches("recipes", ["edgeskip.cli"]) == []


FLOORS = {  # each folder of runtime, and those that it may import; modules beside the folders are open to all
    "bundle": set(),
    "grammar": set(),
    "drafting": {"bundle"},
    "decoding": {"bundle", "grammar", "drafting"},
    "backends": {"bundle", "grammar", "drafting", "decoding"},
    "hub": {"bundle"},
    "chat": {"bundle", "grammar", "drafting", "decoding"},
    "serving": {"bundle", "grammar", "drafting", "decoding"},
    "bench": {"bundle", "grammar", "drafting", "decoding"},
    "doctor": {"bundle", "backends"},
    "commands": {"bundle", "grammar", "drafting", "decoding", "backends", "hub", "chat", "serving", "bench", "doctor"},
}


@pytest.mark.parametrize("folder", FLOORS)
def test_the_folders_of_runtime_form_no_circle(folder):
    above = set(FLOORS) - FLOORS[folder] - {folder}
    forbidden = [f"edgeskip.runtime.{other}" for other in above]
    if folder != "commands":
        forbidden += (
            ["edgeskip.runtime.load", "edgeskip.runtime.terminal"]
            if folder in ("bundle", "grammar", "drafting", "decoding", "backends")
            else []
        )
    assert breaches(f"runtime/{folder}", forbidden) == []


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert folders == set(FLOORS)


@pytest.mark.parametrize("part", ["runtime", "exporter", "recipes"])
def test_commands_are_on_top(part):
    commands = [f"edgeskip.{top}.commands" for top in ("runtime", "exporter", "recipes")]
    below = breaches(part, commands)
    assert [breach for breach in below if "/commands/" not in breach.split()[0]] == []


def test_a_folder_holds_at_most_12_modules():
    folders = Counter(
        path.parent for part in ("runtime", "exporter", "recipes") for path in (ROOT / part).rglob("*.py")
    )
    assert {folder: count for folder, count in folders.items() if count > 13} == {}  # with its __init__


@pytest.mark.parametrize("part", ["runtime", "exporter", "recipes"])
def test_functions_have_at_most_7_parameters(part):
    """But for commands, whose parameters are their options."""
    found = []
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and path.parent.name != "commands":
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                commands = [one for one in node.decorator_list if ast.unparse(one).startswith("click.")]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 7 and not commands:
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == []


def loaded_by(code, *arguments):
    """Top-level modules in sys.modules of a fresh process that ran the code."""
    code += "\nimport sys; print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.rpartition("loaded:")[2].split())
    assert "edgeskip" in loaded
    return loaded


def test_the_version_loads_click_and_the_standard_library_alone():
    code = "from edgeskip.cli import main; import sys; main(['--version'], standalone_mode=False)"
    bare = loaded_by("import edgeskip, click")
    assert loaded_by(code) - bare - sys.stdlib_module_names <= {"edgeskip"}


def test_importing_edgeskip_loads_no_library():
    everything = (RUNTIME_LIBRARIES - {"click"}) | BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES
    assert loaded_by("import edgeskip; edgeskip.__version__") & everything == set()


def test_importing_the_runtime_loads_no_backend_and_no_export_or_training_library():
    loaded = loaded_by("import edgeskip; edgeskip.load")
    assert loaded & (BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES) == set()
    assert "tokenizers" in loaded


@pytest.mark.parametrize("verb", ["", "generate", "export", "synth", "check"])
def test_help_loads_no_library(verb):
    code = "from edgeskip.cli import main; import sys; main(sys.argv[1:], standalone_mode=False)"
    everything = (RUNTIME_LIBRARIES - {"click"}) | BACKENDS | EXPORT_LIBRARIES | TRAINING_LIBRARIES
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
