"""The page of a bundle on the hub: what it was made from, what it holds, how it is run, and measured figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edgeskip.runtime.bundle.formats import is_quantized
from edgeskip.runtime.bundle.manifest import Manifest
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.printable import one_line

_LONGEST = 10_000
"""Characters of a line: a command names many files at times."""


def model_card(
    manifest: Manifest,
    name: str,
    *,
    base_model: str | None,
    license_id: str | None,
    figures: Sequence[str],
) -> str:
    """The text of README.md.

    Args:
        manifest: the bundle's.
        name: the repository's, owner/name.
        base_model: the hub id of the checkpoint.
        license_id: as the hub spells it.
        figures: lines of Markdown, from `bench_figures` and `check_figures`.
    """
    head = {"base_model": base_model, "license": license_id, "library_name": "edgeskip"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value is not None]
    a, m = manifest.architecture, manifest
    formats = sorted({tensor.format for tensor in m.tensors.values() if is_quantized([tensor.format])})
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else m.source
    size = sum(record.bytes for record in m.files.values())
    facts = {
        "made from": origin + (" (synthetic: random weights, made to measure speed)" if m.synthetic else ""),
        "exit layer": f"{m.exit_layer} of {a.num_layers}: layers[:{m.exit_layer}] draft, the others verify",
        **({"other exit layers": ", ".join(map(str, m.other_exits))} if m.other_exits else {}),
        "drafts per round": f"up to {m.num_speculations}",
        "computed in": m.dtype,
        "weights": ", ".join([*formats, *([] if formats else [m.dtype])]),
        "context": f"{m.max_length} tokens",
        "size": f"{size / 1e6:.0f} MB",
        "exported by": f"edgeskip {m.edgeskip_version}",
    }
    text = [
        *("---", *lines, "tags:", "- layerskip", "- self-speculative-decoding", "- onnx", "---", ""),
        *(f"# {name.partition('/')[2]}", ""),
        "A bundle for edgeskip: a LayerSkip model split for self-speculative decoding with ONNX Runtime and TensorRT.",
        *("", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""),
        *("```sh", f'edgeskip generate {name} --prompt "The capital of France is"', "```", ""),
    ]
    return "\n".join(one_line(line, _LONGEST) for line in [*text, *figures])


def bench_figures(report: Any, place: object) -> list[str]:
    """What a report of `edgeskip bench` has to say, as lines of Markdown.

    Raises:
        RequestError: it is no such report; `place` is where it was found.
    """
    try:
        rows = [
            f"| {row['mode']} | {row['num_speculations']} | {row['tokens_per_second']:.1f} | {row['speedup']:.2f} |"
            for row in report["rows"]
        ]
        head = f"Measured by `{report['command']}` on {report['hardware']['device']}:"
        doubts = [] if report["valid"] else [f"Not a valid measurement: {'; '.join(report['doubts'])}.", ""]
    except (KeyError, TypeError, ValueError):
        raise RequestError(place, "not a report to show", wanted="one of `edgeskip bench --json`") from None
    return [head, "", "| decoding | drafts | tokens/s | speedup |", "|---|---:|---:|---:|", *rows, "", *doubts]


def check_figures(report: Any, place: object) -> list[str]:
    """What a report of `edgeskip check` has to say, as lines of Markdown.

    Raises:
        RequestError: it is no such report; `place` is where it was found.
    """
    try:
        head = f"Compared by `{report['command']}` on {report['hardware']['device']} with transformers in fp32"
        verdict = "what runs is what was trained" if report["passed"] is True else "**it does not pass**"
        rows = [f"| {mode} | {agreed} of {report['prompts']} |" for mode, agreed in report["agreed"].items()]
        ties = sum(one["is_tie"] for one in report["disagreements"])
        lost = [
            f"| {one['exit_layer']} | {one['original_perplexity']:.3f} | {one['perplexity']:.3f} | {one['kl']:.4f} | "
            f"{one['agreement']:.1%} |"
            for one in report["lost"] or ()
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RequestError(place, "not a report to show", wanted="one of `edgeskip check --json`") from None
    lines = [f"{head}: {verdict}.", "", "| decoding | greedy texts that are the same |", "|---|---:|", *rows, ""]
    lines += [f"Texts that part at a tie: {ties}.", ""] if ties else []
    if lost:
        top = "| after layer | perplexity before | perplexity | KL, nats | same top token |"
        lines += ["What quantization cost:", "", top, "|---:|---:|---:|---:|---:|", *lost, ""]
    return lines
