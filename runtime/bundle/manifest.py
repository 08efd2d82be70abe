"""The bundle: what its manifest says, and whether its files are what the manifest says.

    bundle/
      manifest.json        this module's `Manifest`
      weights.safetensors  every tensor once; the graphs point into it
      draft.onnx verify.onnx head.onnx  draft.ort.onnx verify.ort.onnx head.ort.onnx   (more exits, more graphs)
      tokenizer.json, chat_template.jinja, config.json, LICENSE*

A bundle is data: nothing in it is run as code, and no name in it leads out of its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edgeskip.runtime.bundle.architecture import Architecture, Size
from edgeskip.runtime.bundle.dialects import DIALECTS, WHOLE, Dialect, dialects_of, engine_dialects_of
from edgeskip.runtime.bundle.dtypes import DType
from edgeskip.runtime.bundle.formats import FORMATS, is_quantized
from edgeskip.runtime.bundle.graphs import (
    MAX_SPECULATIONS,
    PICKERS,
    Graph,
    GraphName,
    HeadRecord,
    Split,
    can_exit,
    graph_table,
    split_at,
)
from edgeskip.runtime.bundle.layers import files_of, has_products
from edgeskip.runtime.bundle.tensors import TensorRecord, bundle_tensors, has_quantized_layers
from edgeskip.runtime.errors import BundleError, RequestError, reason
from edgeskip.runtime.files import keep, kept, sha256_of
from edgeskip.runtime.reading import kind_of, read_json
from edgeskip.runtime.sampling import GREEDY, Sampling
from edgeskip.runtime.structure import Pattern, Range, structure

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT_VERSION = 5
_MOST_HEADS = 16
_GRAPH_NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
SEAL = "sha256"  # the key of a record's own hash

FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
"""Names of a bundle's files: flat, and the same on every file system."""

FileSize = Annotated[int, Range(0, 1 << 50)]
Sha256 = Annotated[str, Pattern("[0-9a-f]{64}", "64 hexadecimal digits")]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done, and the bytes in all."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file of the bundle."""

    bytes: FileSize
    sha256: Sha256


@dataclass(frozen=True)
class Quantization:
    """How the quantized tensors of a bundle came by their numbers.

    `method` is its name, such as `search`; `seed` that of its random draws, and `calibration_sha256` the hash of the
    texts that it was told, each null where there were none.
    """

    method: str
    seed: int | None = None
    calibration_sha256: Sha256 | None = None

    @property
    def came(self) -> bool:
        """Whether the layers came quantized with the checkpoint; texts are only told to methods of the export's own."""
        return self.method != "search" and self.calibration_sha256 is None


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    `dtype` is what is computed in; `formats` names the tensors that are stored in another format. The model is cut
    after each of `exit_layers`, in order, and drafts from `exit_layer` unless told otherwise. `heads` has its heads,
    by graph. `max_length` is the cache capacity C in tokens, `num_speculations` the default number of drafts per round,
    `prefill_chunk` the prompt tokens of one call; `special_tokens` are texts for the chat template, by names such as
    `bos_token`; with `split_special_tokens`, they are ordinary text wherever they stand in a prompt. `graphs` and
    `chains` (by exit layer, the graphs that draft and those that verify) repeat the contract for other readers.
    `renumbered` says that token ids are not those of the checkpoint, but in the order of how frequent tokens are.
    `synthetic` says that the weights are random, from `edgeskip synth`: good for nothing but measuring speed.
    `quantization` is null where no tensor is quantized. `sampling` is how tokens are picked unless the user says
    otherwise, from the checkpoint's generation_config.json.
    """

    format_version: int
    edgeskip_version: str
    source: str
    architecture: Architecture
    exit_layer: int
    exit_layers: tuple[int, ...]
    dtype: DType
    formats: dict[str, str]
    max_length: Size
    num_speculations: Annotated[int, Range(1, MAX_SPECULATIONS)]
    prefill_chunk: Size
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    heads: dict[GraphName, HeadRecord]
    graphs: dict[GraphName, Graph]
    chains: dict[str, dict[str, tuple[GraphName, ...]]]
    files: dict[str, FileRecord]
    renumbered: bool = False
    synthetic: bool = False
    split_special_tokens: bool = False
    quantization: Quantization | None = None
    sampling: Sampling = GREEDY

    def to_json(self) -> str:
        """The text of manifest.json."""
        return sealed(dataclasses.asdict(self))

    def split(self, exit_layer: int | None = None, picker: str | None = None) -> Split:
        """How the graphs are chained to draft from an exit layer and to pick in some way; by default the bundle's own
        exit and the way of its first head.

        Raises:
            RequestError: the model is not cut there, or has no head that picks in this way.
        """
        return split_at(self.graphs, self.exit_layer if exit_layer is None else exit_layer, picker)

    def cut_at(self, exit_layer: int) -> Manifest:
        """The manifest of the same model cut after this layer alone, for a session that needs no graphs of the cut.

        Raises:
            RequestError: the model cannot exit there.
        """
        if not can_exit(exit_layer, self.architecture.num_layers):
            self.split(exit_layer)  # says where it is cut
        graphs, exits = graph_table(self.architecture.num_layers, (exit_layer,), self.heads), (exit_layer,)
        chains = chains_of(graphs, exits)
        return dataclasses.replace(self, exit_layer=exit_layer, exit_layers=exits, graphs=graphs, chains=chains)

    @property
    def other_exits(self) -> tuple[int, ...]:
        """The exit layers besides the default one."""
        return tuple(layer for layer in self.exit_layers if layer != self.exit_layer)

    @property
    def draft_vocabulary(self) -> int | None:
        """Rows of the vocabulary that the head which drafts knows; null where it is the one that verifies."""
        split = self.split()
        return None if split.draft_head == split.head else split.draft_head.vocabulary

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """The tensors that the weights file holds."""
        return bundle_tensors(self.architecture, self.max_length, self.dtype, self.formats)

    @property
    def dialects(self) -> dict[str, Dialect]:
        """The dialects that the bundle has files of, by name."""
        return dialects_of(self.formats.values())

    @property
    def engine_dialects(self) -> dict[str, Dialect]:
        """The dialects that its engines are built from, by the names that users know."""
        return engine_dialects_of(self.formats.values())

    def has_products(self, compute_capability: int) -> bool:
        """Whether kernels of ours do what rounds need on a GPU of this SM, where a session has them; see layers.py."""
        greedy = all(head.picker == "greedy" for head in self.heads.values())
        return greedy and has_products(self.architecture, self.dtype, self.formats.values(), compute_capability)

    @property
    def has_quantized_layers(self) -> bool:
        """Whether matrices of layers are quantized, not only the tables."""
        return has_quantized_layers(self.tensors.values())

    def graph_hashes(self, dialect: Dialect) -> dict[GraphName, str]:
        """sha256 of each file of a dialect, by graph."""
        return {graph: self.files[dialect.file.format(graph)].sha256 for graph in files_of(self.graphs, dialect)}

    @property
    def weights_bytes(self) -> int:
        """Size of the weights file."""
        return self.files[WEIGHTS].bytes


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest, read and checked."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file of the bundle is."""
        return self.folder / name

    def graph_path(self, graph: GraphName, dialect: str) -> Path:
        """Where a graph is, in a dialect.

        Raises:
            BundleError: the bundle has no graphs in this dialect.
        """
        if dialect not in self.manifest.dialects:
            found = f"no graphs of the {dialect} dialect, as its weights are quantized"
            whole = (name for name in WHOLE if name in self.manifest.dialects)
            raise BundleError(self.folder, found, wanted=" or ".join(whole))
        return self.folder / DIALECTS[dialect].file.format(graph)


def read_bundle(folder: str | Path) -> Bundle:
    """Reads a bundle's manifest and checks that its files are there and of the right size.

    Raises:
        BundleError: no bundle, another format version, a malformed manifest, or a file that is missing, has
            another size or is outside the folder.
        RequestError: not even a path.
    """
    if not isinstance(folder, str | Path):
        raise RequestError("bundle", f"{folder!r:.60}", wanted="a folder")
    folder = Path(folder)
    path = folder / MANIFEST
    found = kind_of(folder, BundleError)
    if found != "a folder":
        raise BundleError(folder, found or "no such folder", fix="give the folder that `edgeskip export` wrote")
    if path.is_symlink():
        raise BundleError(path, "a link, which may lead out of the bundle", fix="do not use this bundle")
    if not kind_of(path, BundleError):
        raise BundleError(folder, f"no {MANIFEST}, so not a bundle", fix="make one with `edgeskip export`")
    data = read_json(path, BundleError, fix="export the bundle again")
    _check_version(path, data)
    seal = data.pop(SEAL, None)
    manifest = structure(Manifest, data, path, BundleError)
    _check_consistent(path, manifest)
    for name, record in manifest.files.items():
        _check_file(folder, name, record)
    check_seal(path, data, seal, "copy the bundle again or export it again")
    return Bundle(folder, manifest)


def sealed(record: dict[str, Any]) -> str:
    """The JSON of a record with its own hash, which shows accidental changes; anybody can hash intended ones again."""
    return json.dumps({**record, SEAL: _record_sha256(record)}, indent=2) + "\n"


def check_seal(path: Path, record: dict[str, Any], seal: object, fix: str) -> None:
    """Compares what a record says with the hash that was in it.

    Raises:
        BundleError: it has no hash, or another one.
    """
    found = _record_sha256(record)
    if found != seal:
        wanted = f"{seal!s:.12}..., as written" if seal else f"one under {SEAL!r}"
        raise BundleError(path, f"what it says has the sha256 {found[:12]}...", wanted=wanted, fix=fix)


def _record_sha256(record: dict[str, Any]) -> str:
    """The hash of the record's JSON without spaces, with sorted keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify_hashes(bundle: Bundle, progress: Progress = lambda *_: None, *, weights: bool = True) -> None:
    """Compares every file with its sha256; in full the first time.

    Later loads trust a stamp in the user's cache while size, times of change and inode of each stay as they were.
    Without `weights`, their file is left to whoever reads it, who then calls `keep_checked`.

    Raises:
        BundleError: a file differs from what was exported.
    """
    if is_checked(bundle):
        return
    files = {name: record for name, record in bundle.manifest.files.items() if weights or name != WEIGHTS}
    count = counted("checking the bundle", sum(record.bytes for record in files.values()), progress)
    for file in files:
        path = bundle.path(file)
        try:
            with path.open("rb") as opened:
                found = sha256_of(opened, count)
        except OSError as error:
            raise BundleError(path, f"cannot be read ({reason(error)})") from None
        check_file_hash(bundle, file, found)
    if weights:
        keep_checked(bundle)


def is_checked(bundle: Bundle) -> bool:
    """Whether all files were compared before, and have not been touched since."""
    return kept("checked", _stamp_name(bundle)) == _stamp(bundle)


def keep_checked(bundle: Bundle) -> None:
    """Remembers that all files were compared."""
    keep("checked", _stamp_name(bundle), _stamp(bundle))


def check_file_hash(bundle: Bundle, file: str, found: str) -> None:
    """Compares the sha256 of one of the bundle's files with the manifest's.

    Raises:
        BundleError: it differs.
    """
    wanted = bundle.manifest.files[file].sha256
    check_hash(bundle.path(file), found, wanted, "as exported", "copy the bundle again or export it again")


def check_hash(path: Path, found: str, sha256: str, when: str, fix: str) -> None:
    """Compares a file's sha256 with the one that it had `when` (such as "as exported").

    Raises:
        BundleError: it differs.
    """
    if found != sha256:
        raise BundleError(path, f"sha256 is {found[:12]}...", wanted=f"{sha256[:12]}..., {when}", fix=fix)


def chains_of(
    graphs: Mapping[GraphName, Graph], exit_layers: Sequence[int]
) -> dict[str, dict[str, tuple[GraphName, ...]]]:
    """The paper's two subgraphs, by exit layer: each is a chain of graphs that ends in a head."""
    splits = {str(layer): split_at(graphs, layer) for layer in exit_layers}
    return {
        layer: {
            "draft": (*(link.graph for link in split.draft), split.draft_head.graph),
            "verify": (*(link.graph for link in split.verify), split.head.graph),
        }
        for layer, split in splits.items()
    }


def formats_problem(formats: Mapping[str, str], tensors: Mapping[str, TensorRecord], dtype: DType) -> str:
    """What is wrong with the formats of some tensors, by name; empty where nothing is."""
    known = [name for name in FORMATS if name == dtype or is_quantized([name])]
    for name, format_ in formats.items():
        if name not in tensors:
            return f"{name!r} is no tensor of the model"
        if format_ not in known:  # another plain format would have to be converted at each call
            return f"{name!r} in {format_!r}, where {dtype} has {', '.join(known)}"
        tensor = tensors[name]
        if is_quantized([format_]) and not (tensor.is_matrix and FORMATS[format_].divides(tensor.shape[1])):
            return f"{name!r} {list(tensor.shape)} in {format_!r}, which is for matrices of whole blocks"
    return ""


def counted(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up bytes as they come, and tells `progress`."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(what, done, total)

    return count


def _check_version(path: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BundleError(path, "no format_version, so not a bundle's manifest", fix="export the bundle again")
    if version != FORMAT_VERSION:
        fix = "upgrade edgeskip" if version > FORMAT_VERSION else f"export it again: {_export_command(data)}"
        raise BundleError(path, f"format version {version}", wanted=f"{FORMAT_VERSION}", fix=fix)


def _export_command(data: Mapping[str, Any]) -> str:
    """The command that makes a bundle anew, as far as its manifest of another version tells. Of a checkpoint that was
    no repository's but a folder, that has the name alone.
    """
    given = {k: v for k, v in data.items() if isinstance(v, (str, int)) and v is not True}
    source = str(given.get("source", ""))[:200]
    is_id = "/" in source
    words = ["edgeskip", "export", source if is_id else "CHECKPOINT", "NEW_BUNDLE"]
    match data:
        case {"exit_layer": int() as first, "exit_layers": [_, _, *_] as exits}:
            given["exit_layer"] = ",".join(map(str, [first, *(one for one in exits if one != first)]))
    for key in ("exit_layer", "dtype", "max_length", "num_speculations"):
        if key in given:
            words += [f"--{key.replace('_', '-')}", str(given[key])[:100]]
    match data:
        case {"heads": {"draft_head": {"vocabulary": int() as rows}}}:
            words += ["--draft-vocabulary", str(rows)[:20], *([] if data.get("renumbered") else ["--keep-token-ids"])]
    counted = ", and --calibration with the texts its tokens were counted in, if any" if data.get("renumbered") else ""
    quantized = ", and the options that its weights were quantized with, if any" if data.get("quantization") else ""
    named = f", where CHECKPOINT is the folder of {source!r}" if source and not is_id else ""
    return shlex.join(words) + counted + quantized + named


def _check_consistent(path: Path, manifest: Manifest) -> None:
    layers, vocab_size = manifest.architecture.num_layers, manifest.architecture.vocab_size
    if not all(0 <= i < vocab_size for i in manifest.eos_token_ids):
        raise BundleError(path, f"eos_token_ids {manifest.eos_token_ids}", wanted=f"0 to {vocab_size - 1}")
    context = manifest.architecture.max_position_embeddings
    if not 2 <= manifest.max_length <= context:
        raise BundleError(path, f"max_length {manifest.max_length}", wanted=f"2 to {context}, the model's context")
    if manifest.prefill_chunk > manifest.max_length:
        raise BundleError(path, f"prefill_chunk {manifest.prefill_chunk}", wanted=f"1 to {manifest.max_length}")
    exits = manifest.exit_layers
    if not (exits and list(exits) == sorted({*exits}) and exits[0] >= 1 and exits[-1] < layers):
        raise BundleError(path, f"exit_layers {exits}", wanted=f"layers in order, of 1 to {layers - 1}")
    if manifest.exit_layer not in exits:
        raise BundleError(path, f"exit_layer {manifest.exit_layer}", wanted=f"one of {exits}")
    if len(manifest.heads) > _MOST_HEADS:
        raise BundleError(path, f"{len(manifest.heads)} heads", wanted=f"at most {_MOST_HEADS}")
    for name, head in manifest.heads.items():
        if head.picker not in PICKERS or not 1 <= head.vocabulary <= vocab_size or not _GRAPH_NAME.fullmatch(name):
            raise BundleError(path, f"head {name!r} {head}", wanted=f"1 to {vocab_size} rows, by {', '.join(PICKERS)}")
    for picker in {head.picker for head in manifest.heads.values()} or {"greedy"}:
        if vocab_size not in [head.vocabulary for head in manifest.heads.values() if head.picker == picker]:
            raise BundleError(path, f"no {picker} head knows the whole vocabulary", fix="export the bundle again")
    table = graph_table(layers, exits, manifest.heads)
    if manifest.graphs != table or manifest.chains != chains_of(table, exits):
        raise BundleError(
            path, "its graphs are not those of this version", fix="export the bundle again with this version"
        )
    if manifest.formats and (problem := formats_problem(manifest.formats, manifest.tensors, manifest.dtype)):
        raise BundleError(path, f"formats: {problem}", fix="export the bundle again")
    if (manifest.quantization is None) == is_quantized(manifest.formats.values()):
        found = "quantized tensors" if manifest.quantization is None else "no quantized tensor"
        raise BundleError(path, f"{found}, with quantization {manifest.quantization}", fix="export the bundle again")
    graphs = (
        dialect.file.format(graph) for dialect in manifest.dialects.values() for graph in files_of(table, dialect)
    )
    for name in (WEIGHTS, "tokenizer.json", *graphs):
        if name not in manifest.files:
            raise BundleError(path, f"lists no {name}", fix="export the bundle again")


def _check_file(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    if not FILE_NAME.fullmatch(name) or os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):  # noqa: PTH120
        raise BundleError(folder / MANIFEST, f"file {name!r} leads out of the bundle", fix="do not use this bundle")
    if kind_of(path, BundleError) != "a file":
        raise BundleError(path, "missing", fix="copy the bundle again or export it again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(
            path, f"{size} bytes", wanted=f"{record.bytes}", fix="copy the bundle again or export it again"
        )


def _stamp_name(bundle: Bundle) -> str:
    return f"{hashlib.sha256(str(bundle.folder.resolve()).encode()).hexdigest()[:32]}.json"


def _stamp(bundle: Bundle) -> bytes:
    """What the system says about each file; st_ctime is the one time that nobody can set."""
    stats = {name: bundle.path(name).stat() for name in bundle.manifest.files}
    stamp = {
        name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino, bundle.manifest.files[name].sha256]
        for name, s in stats.items()
    }
    return json.dumps(stamp).encode()
