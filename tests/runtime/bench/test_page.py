"""The page of a bench report: whole, self-contained, and right where a figure can be computed by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from edgeskip.runtime.bench.page import bench_page
from edgeskip.runtime.bench.plots import acceptance_by_position, figure, size
from edgeskip.runtime.errors import BackendError

VOID = {"meta", "link", "img", "br", "hr", "input"}
SECTIONS = ("speed", "stages", "rounds", "acceptance", "memory")


def row(mode, k, ms, **figures):
    return {
        "mode": mode,
        "num_speculations": k,
        "tokens_per_second": 1e3 / ms,
        "ms_per_token": ms,
        "speedup": 1.25 / ms,
        "time_to_first_token_ms": 9.0,
        "acceptance_rate": None,
        "match_rate": None,
        "tokens_per_round": None,
        "distinct_tokens": 0.4,
        "distinct_4grams": 0.9,
        "acceptance_histogram": None,
        "stage_ms_per_round": None,
        "host_ms_per_round": None,
        "host_share": None,
        **figures,
    }


def stage(graph, rows, ms, num_bytes):
    rate = num_bytes / ms / 1e6
    return {
        "graph": graph,
        "rows": rows,
        "ms": ms,
        "bytes": num_bytes,
        "gb_per_s": rate,
        "share_of_copy": rate / 2940,
    }


REPORT = {
    "source": "someone/model-1b",
    "synthetic": False,
    "backend": "a backend",
    "hardware": {"device": "a device", "host": "a host"},
    "versions": {"edgeskip": "1.2.3", "onnxruntime": "4.5.6"},
    "command": "edgeskip bench bundle --html page.html",
    "dtype": "fp16",
    "exit_layer": 4,
    "num_layers": 16,
    "max_length": 2048,
    "prompts": 3,
    "prompt_tokens": 187,
    "settings": {"grid": [2, 4], "max_new_tokens": 128, "repeats": 5, "confidence_threshold": 0.0},
    "copy_gb_per_s": 2940.0,
    "weight_bytes": {"draft": 486e6, "verify": 1460e6, "head": 525e6},
    "ideal_ms_per_token": 0.8405,
    "memory_bytes": {"weights": 2471000000, "caches": 67000000, "workspace": 31000000, "other": 0},
    "stages": [stage("draft", 1, 0.31, 486e6), stage("verify", 5, 0.64, 1460e6), stage("head", 1, 0.22, 525e6)],
    "rows": [
        row("autoregressive", 0, 1.25, stage_ms_per_round={"device": 1.19}, host_ms_per_round=0.06, host_share=0.048),
        row(
            "self-speculative",
            2,
            1.0,
            acceptance_rate=0.7,
            match_rate=0.75,
            tokens_per_round=2.4,
            acceptance_histogram=[20, 20, 60],
            stage_ms_per_round={"device": 2.3},
            host_ms_per_round=0.1,
            host_share=0.042,
        ),
        row("self-speculative", 4, 0.95, acceptance_histogram=[25, 15, 12, 12, 36]),
        row("transformers", 0, 13.0),
        row("transformers early exit", 0, 1.5),
    ],
    "differences": [],
    "faults": 0,
}


class Page(HTMLParser):
    """Checks that tags balance; collects ids, text, links and inlined SVG."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())
        self.svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)

    def handle_starttag(self, tag, attrs):
        assert tag not in {"script", "link", "img", "iframe", "object"}
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.sources += [attrs[name] for name in ("href", "xlink:href", "src", "srcset", "data") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def changed(**fields):
    """The report as read back from its JSON file, with other values; a field of None is null there."""
    return json.loads(json.dumps({**copy.deepcopy(REPORT), **fields}))


def sections(page):
    return [name for name in SECTIONS if name in page.ids]


def test_the_page_is_whole_and_each_plot_is_xml():
    page = Page(bench_page(REPORT))
    assert sections(page) == list(SECTIONS)
    assert len(page.svgs) == len(SECTIONS)
    for svg in page.svgs:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_plots_are_whole_and_legible_on_a_narrow_screen():
    text = bench_page(REPORT)
    assert "min-width" not in text  # a plot is as wide as the page, and cut off nowhere
    for svg in Page(text).svgs:
        width = float(ElementTree.fromstring(svg).get("viewBox").split()[2])
        smallest = min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg))
        assert smallest * (500 - 40) / width >= 8  # px of letters, in a window of 500 less its margins


def test_nothing_is_fetched():
    text = bench_page(REPORT)
    links = set(re.findall(r"\w+://[^\s\"'<>]*", text))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert all(source.startswith("#") for source in Page(text).sources)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_meet_one():
    text = bench_page(REPORT)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    references = {source[1:] for source in page.sources} | set(re.findall(r"url\(#([^)]*)\)", text))
    references |= set(re.findall(r'aria-labelledby="([^"]*)"', text))
    assert references
    assert references <= set(page.ids)


def test_a_report_gives_the_same_page_fresh_and_read_back_and_always():
    assert bench_page(REPORT) == bench_page(changed())


def test_the_result_is_told_in_words():
    text = Page(bench_page(REPORT)).text
    assert "With 4 drafts per round, self-speculative decoding takes 0.95 ms per token , 1.32 times as fast" in text
    assert "would take 0.84 ms; this is 1.13 times that" in text  # (486 + 1460 + 525) MB / 2940 GB/s; 0.95 / 0.84
    slow = [REPORT["rows"][0], row("self-speculative", 1, 1.5)]
    assert "no faster than plain decoding here: at best 1.50 ms per token" in Page(bench_page(changed(rows=slow))).text


def test_the_figures_stand_in_the_plots():
    speed, stages, rounds, _, memory = Page(bench_page(REPORT)).svgs
    for label in ("ideal plain decoder, 0.84", "plain decoding, 1.25", "transformers early exit, 1.50", ">0.95<"):
        assert label in speed
    assert "transformers, " not in speed  # 13 ms would squash it
    assert "Too slow to be drawn: transformers, 13.0 ms." in Page(bench_page(REPORT)).text
    assert "0.31 ms, 1,568 GB/s, 53% of the copy rate" in stages
    assert "2.40 ms for 2.40 tokens, host 4%" in rounds
    assert "weights 2.47 GB" in memory
    assert "2.57 GB" in memory
    assert "other" not in memory


def test_acceptance_by_position_is_accepted_over_those_that_got_there():
    # 100 rounds: 80 accept the first draft; 60 of those 80 the second
    assert acceptance_by_position([20, 20, 60]) == [0.8, 0.75]
    assert acceptance_by_position([10, 0, 0]) == [0.0]  # no round came to the second
    assert acceptance_by_position([7]) == []
    assert acceptance_by_position([]) == []
    acceptance = Page(bench_page(REPORT)).svgs[3]
    shares = [int(share) for share in re.findall(r">(\d+)</text>", acceptance)]
    assert [s for s in shares if s >= 60 and s != 100] == [80, 75, 75, 80, 80, 75]


@pytest.mark.parametrize("field", ["source", "backend", "command", "dtype"])
def test_names_are_text(field):
    text = bench_page(changed(**{field: "<script>alert(1)</script>"}))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_mode_is_text_in_plots_too():
    text = bench_page(changed(rows=[*REPORT["rows"], row("<script>$x^{$</script>", 0, 1.3)]))
    assert "<script" not in text
    assert "&lt;script&gt;$x^{$&lt;/script&gt;, 1.30" in text
    assert len(Page(text).svgs) == len(SECTIONS)


def test_the_badge_stands_on_synthetic_weights_only():
    assert "synthetic" not in Page(bench_page(REPORT)).text
    assert "synthetic weights" in Page(bench_page(changed(synthetic=True))).text


def test_differences_are_listed_and_their_absence_is_told():
    same = "Every mode gave exactly the tokens of plain decoding."
    assert same in Page(bench_page(REPORT)).text
    where = {"mode": "self-speculative", "num_speculations": 4, "prompt": 1, "position": 57}
    differences = [{**where, "gap": 0.0123, "is_tie": True}, {**where, "gap": math.inf, "is_tie": False}]
    text = Page(bench_page(changed(differences=differences, faults=1))).text
    assert same not in text
    assert re.search(r"self-speculative 4 1 57 0.012 a tie self-speculative 4 1 57 – not a tie", text)
    assert "1 fault: self-speculative tokens differ" in text


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"stages": []}, ["speed", "rounds", "acceptance", "memory"]),
        ({"memory_bytes": None, "stages": None}, ["speed", "rounds", "acceptance"]),
        ({"rows": REPORT["rows"][:1]}, ["speed", "stages", "rounds", "memory"]),
        ({"rows": [row("autoregressive", 0, 1.0), row("self-speculative", 1, 0.9)]}, ["speed", "stages", "memory"]),
        ({"rows": [row("transformers", 0, 1.0)]}, ["stages", "memory"]),
        ({"rows": []}, ["stages", "memory"]),
    ],
)
def test_a_section_without_figures_is_left_out(fields, left):
    page = Page(bench_page(changed(**fields)))
    assert sections(page) == left
    assert len(page.svgs) == len(left)


@pytest.mark.parametrize("field", sorted(REPORT))
def test_any_field_may_be_null(field):
    assert Page(bench_page(changed(**{field: None}))).text


def test_a_cpu_report_shows_its_graphs_and_its_threshold():
    times = {"draft": 0.5, "verify": 0.6, "head": 0.3}
    rows = [
        row("autoregressive", 0, 1.44, stage_ms_per_round=times, host_ms_per_round=0.04),
        row("self-speculative", 3, 1.0, stage_ms_per_round=times, host_ms_per_round=-0.001),
    ]
    stages = [{"graph": "draft", "rows": 1, "ms": 0.5, "bytes": None, "gb_per_s": None, "share_of_copy": None}]
    settings = {**REPORT["settings"], "confidence_threshold": 0.5}
    page = Page(bench_page(changed(rows=rows, stages=stages, settings=settings, ideal_ms_per_token=None)))
    assert "ideal" not in page.text
    assert all(f">{graph}<" in page.svgs[2] for graph in (*times, "host"))
    assert ">0.50 ms<" in page.svgs[1]
    assert "a probability below 0.5" in page.text
    assert "time within the graphs" in page.text


def test_figures_keep_two_or_three_digits():
    values = (0.0446, 0.31, 1.25, 13.04, 1567.7)
    assert [figure(value) for value in values] == ["0.045", "0.31", "1.25", "13.0", "1,568"]
    assert [size(num) for num in (31e6, 1.46e9)] == ["31.0 MB", "1.46 GB"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_no_settings_are_taken_from_the_current_folder(tmp_path):
    """matplotlib would wait for this pipe."""
    os.mkfifo(tmp_path / "matplotlibrc")
    code = "import os; from edgeskip.runtime.bench.plots import svg; svg('x', 1, lambda _: None); print(os.getcwd())"
    environment = {key: value for key, value in os.environ.items() if key != "MATPLOTLIBRC"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.stdout == f"{tmp_path}\n", out.stderr


def test_a_missing_matplotlib_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r'bench page: .*; pip install "edgeskip\[plots\]"'):
        bench_page(REPORT)
