"""What `load` cannot take is one clear line."""

from __future__ import annotations

import gc
import weakref

import pytest

import edgeskip
from edgeskip.runtime.errors import RequestError


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bundle": 3}, "bundle: 3; wanted a folder, or the id of a bundle on the hub"),
        ({"bundle": ""}, "bundle: ''; wanted a folder"),
        ({"bundle": b"/tmp"}, "bundle: b'/tmp'; wanted a folder"),
        ({"backend": None}, "backend: None; wanted one of auto, onnxruntime"),
        ({"device": ["cpu"]}, r"device: \['cpu'\]; wanted one of auto, cpu, cuda"),
        ({"dialect": "nope"}, "dialect: 'nope'; wanted one of standard, ort, cpu"),
        (
            {"dialect": "layers"},
            "dialect: 'layers'; wanted one of standard, ort, cpu",
        ),  # they are parts
        ({"threads": "2"}, "threads: '2'; wanted a whole number"),
        ({"threads": -1}, "threads: -1; wanted a whole number"),
        ({"exit_layer": "2"}, "exit layer: '2'; wanted 2: the bundle is cut there"),
        ({"exit_layer": 2.0}, "exit layer: 2.0; wanted 2: the bundle is cut there"),
        ({"progress": None}, "progress: None; wanted a function"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changed, message, bundles):
    with pytest.raises(RequestError, match=message):
        edgeskip.load(**{"bundle": bundles("llama-gqa").folder, **changed})


def test_closing_gives_weights_back_without_python_s_collector(bundles):
    gc.disable()
    try:
        with edgeskip.load(bundles("llama-gqa").folder, device="cpu", dialect="cpu") as model:
            text = model.complete([5, 6, 7], max_new_tokens=30).text
            model.complete([5, 6, 7], max_new_tokens=30, stop=text[8:11])  # leaves a round under way
            graphs = [weakref.ref(graph) for graph in model.session._graphs._sessions.values()]
        assert [graph() for graph in graphs] == [None] * len(graphs)
    finally:
        gc.enable()


def test_engines_are_added_from_a_folder_alone():
    with pytest.raises(RequestError, match="bundle: 3; wanted a folder"):
        edgeskip.add_engines(3)
