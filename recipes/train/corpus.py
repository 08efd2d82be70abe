"""A corpus of permissively licensed Python, and a tokenizer for it.

    python -m edgeskip.recipes.train.corpus OUT --site-packages VENV/lib/python3.11/site-packages

The sources are the running interpreter's standard library and the distributions of a site-packages folder
whose metadata names a permissive licence. Only their own, hand-written modules are kept: vendored trees,
generated files, tables of data and copies of other files are left out. The split is by file.

    OUT/train/<distribution>/<path>.py      OUT/SOURCES.md, OUT/sources.json   what came from where
    OUT/heldout/<distribution>/<path>.py    OUT/tokenizer/                     byte-level BPE
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import Distribution, PackageMetadata, distributions
from pathlib import Path, PurePosixPath
from string import ascii_letters

import click
from rich.console import Console
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edgeskip.runtime.errors import RecipeError
from edgeskip.runtime.files import whole_folder

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

PERMISSIVE = {  # SPDX identifier: the other names that metadata gives it, in lower case
    "0BSD": ("zero-clause bsd (0bsd)",),
    "Apache-2.0": (
        "apache", "apache 2", "apache 2.0", "apache license", "apache license 2.0", "apache 2.0 license",
        "apache license, version 2.0", "apache license version 2.0", "apache software license",
    ),
    "BSD": ("bsd license", "new bsd", "new bsd license", "modified bsd license"),
    "BSD-2-Clause": ("bsd 2-clause license", "simplified bsd"),
    "BSD-3-Clause": ("bsd 3-clause", "bsd 3-clause license", "3-clause bsd license"),
    "BSL-1.0": ("boost software license 1.0 (bsl-1.0)",),
    "CC0-1.0": ("cc0 1.0 universal (cc0 1.0) public domain dedication",),
    "HPND": ("historical permission notice and disclaimer (hpnd)",),
    "ISC": ("isc license", "isc license (iscl)"),
    "MIT": ("mit license", "the mit license", "the mit license (mit)"),
    "MIT-0": ("mit no attribution license (mit-0)",),
    "MIT-CMU": ("cmu license (mit-cmu)",),
    "PSF-2.0": ("psf", "python-2.0", "python software foundation license"),
    "Unlicense": ("the unlicense (unlicense)",),
    "Zlib": ("zlib/libpng license",),
}  # fmt: skip
SPDX = {name: spdx for spdx, names in PERMISSIVE.items() for name in (spdx.lower(), *names)}

VENDORED = re.compile(r"_*(vendor(ed|s)?|extern(al)?s?|third_?party(_\w+)?|bundled)")
TESTS = re.compile(r"tests?|idle_test|test_.*|.*_tests?\.py|conftest\.py")
GENERATED = re.compile(
    r"auto-?\s?(matically )?generated|generated (by|from|with|using|at)\b|do not edit|@generated", re.I
)
COPYLEFT = re.compile(r"\b[AL]?GPL(v\d|\b)|GNU (Lesser |Affero )?General Public|Mozilla Public|\bMPL\b")
EMAIL = re.compile(
    r"[\w.+-]+@[\w.-]+\.(com|org|net|edu|gov|info|io|dev|ai|me|eu|ac\.\w+"  # not `a@b.at[i]`, an expression
    r"|au|be|br|ca|ch|cn|cz|de|dk|es|fi|fr|hu|il|it|jp|kr|nl|no|nz|pl|pt|ru|se|tw|uk|us)\b"
)
TABLE_ROW = re.compile(r"""[\[({]*\s*[-+]?["'\d].*,""")  # a line that is an item of a literal

MIN_BYTES, MAX_BYTES, MAX_LINE = 200, 200_000, 400
SHINGLE_LINES = 12
MAX_COPIED = {"train": 0.5, "heldout": 0.3}  # of a file's shingles, seen before in any other file
TESTS_SHARE = 0.05  # of a distribution's other code

# Pieces that no token crosses. Line breaks and the indentation after them are pieces of their own, so that
# text means the same to the model wherever a prompt is cut.
PIECES = "|".join(
    (
        r"(?<![^\n])[ \t]+",  # indentation
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word and the character before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"[\r\n]+",
        r"[^\S\r\n]+(?![^\r\n])",  # blanks that end a line
        r"\s+(?!\S)",
        r"\s",
    )
)


@dataclass(frozen=True)
class Origin:
    """A distribution's modules: pairs of the path to list a file under and the file."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[PurePosixPath, Path], ...] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Document:
    """A file of the corpus."""

    origin: Origin
    path: PurePosixPath
    split: str
    text: str


def permissive_licence(metadata: PackageMetadata) -> str | None:
    """The licence as an SPDX expression, or None unless everything that is named is known and permissive."""

    def values(name: str) -> list[str]:
        return [value for value in metadata.get_all(name) or [] if value.strip()]

    if expression := values("License-Expression"):
        terms = re.sub(r"WITH\s+\S+|[()]", " ", expression[0]).split()
        return expression[0] if {t.lower() for t in terms} - {"and", "or"} <= SPDX.keys() else None
    classifiers = [c.removeprefix("License :: ") for c in values("Classifier") if c.startswith("License :: ")]
    names = [c.removeprefix("OSI Approved :: ") for c in classifiers if c != "OSI Approved"]
    names = names or [value.strip().splitlines()[0] for value in values("License")]
    found = {SPDX.get(name.lower()) for name in names}
    return " AND ".join(sorted(spdx for spdx in found if spdx)) if found and all(found) else None


def standard_library(folder: Path) -> Origin:
    """The standard library in `folder`, without its tests."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    own = (path for path in paths if not {"site-packages", "dist-packages", "lib2to3"} & set(path.parts))
    files = tuple((PurePosixPath(p), folder / p) for p in own if not any(map(TESTS.fullmatch, p.parts)))
    return Origin("cpython", platform.python_version(), "PSF-2.0", files)


def installed(folder: Path, names: Sequence[str] = ()) -> Iterator[Origin]:
    """The permissively licensed distributions in a site-packages folder: all, or those of `names`.

    Raises:
        RecipeError: there is no such distribution.
    """

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    there = {canonical(d.metadata["Name"]): d for d in distributions(path=[str(folder)])}
    for name in map(canonical, names):
        if name not in there:
            close = get_close_matches(name, there, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "install it there first"
            raise RecipeError(folder, f"no distribution {name!r}", fix=fix)
    for name in sorted(set(map(canonical, names)) or there):
        if licence := permissive_licence(there[name].metadata):
            yield Origin(name, there[name].version, licence, tuple(_modules(there[name])))


def _modules(distribution: Distribution) -> Iterator[tuple[PurePosixPath, Path]]:
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        unwanted = ".." in file.parts or any(map(VENDORED.fullmatch, file.parts))
        if file.suffix == ".py" and not unwanted and path.is_file():
            yield PurePosixPath(file), path


def fault(content: bytes) -> str:
    """Why a file is left out, in a word or two; empty if it is not."""
    if not MIN_BYTES <= len(content) <= MAX_BYTES:
        return "size"
    try:
        lines = [line.strip() for line in content.decode().splitlines()]
    except UnicodeDecodeError:
        return "not UTF-8"
    head = "\n".join(lines[:40])
    if GENERATED.search(head):
        return "generated"
    if COPYLEFT.search(head):
        return "other licence"
    letters = len(content) - len(content.translate(None, ascii_letters.encode()))
    if max(map(len, lines)) > MAX_LINE or letters < 0.5 * len(content.translate(None, b" \n\r\t")):
        return "data"
    if sum(map(bool, map(TABLE_ROW.fullmatch, lines))) > 0.5 * sum(map(bool, lines)):
        return "data"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "does not parse"
    return ""


def shingles(text: str) -> set[int]:
    """Hashes of every run of 12 lines of code, blanks and comments aside. The same in every process."""
    lines = (line.strip() for line in text.encode().splitlines())
    marks = [zlib.crc32(line) for line in lines if line and not line.startswith(b"#")]
    return {hash(tuple(marks[i : i + SHINGLE_LINES])) for i in range(max(1, len(marks) - SHINGLE_LINES + 1))}


def rank(path: PurePosixPath, purpose: str) -> float:
    """A fixed draw from [0, 1) for a path: the same wherever and whenever the corpus is made."""
    digest = hashlib.blake2b(str(path).encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def select(
    origins: Sequence[Origin], *, heldout: float, limit_bytes: int, left_out: Counter[str]
) -> Iterator[Document]:
    """The files worth learning from, training ones first.

    Whether a file is held out depends on its path alone. No distribution gives more than `limit_bytes`, nor more
    tests than a twentieth of its other code. A file counts as a copy, and is left out, if more than half of its
    shingles were seen in files before it; 30% for a held-out file, which all training files come before.

    Args:
        origins: where files are taken from.
        heldout: the share of files to hold out.
        limit_bytes: taken from any one distribution, at most.
        left_out: counts the files that were left out, by reason.
    """
    queue = []
    for origin in origins:
        for path, file in origin.files:
            listed = origin.name / path
            split = "heldout" if rank(listed, "split") < heldout else "train"
            tests = any(map(TESTS.fullmatch, path.parts))
            queue.append((split == "heldout", tests, rank(listed, "order"), split, origin, path, file))
    seen: set[int] = set()
    taken: Counter[tuple[str, str, bool]] = Counter()  # bytes by distribution, split, whether tests
    queue.sort(key=lambda entry: entry[:3])
    for _, tests, _, split, origin, path, file in track(queue, "reading", console=Console(stderr=True)):
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        room = limit_bytes * (heldout if split == "heldout" else 1 - heldout)
        if tests:
            room = TESTS_SHARE * taken[origin.name, split, False]
        if taken[origin.name, split, tests] + len(content) > room:
            left_out["enough of its distribution"] += 1
            continue
        if reason := fault(content):
            left_out[reason] += 1
            continue
        text = EMAIL.sub("user@example.com", content.decode())
        marks = shingles(text)
        if len(marks & seen) > MAX_COPIED[split] * len(marks):
            left_out["copy"] += 1
            continue
        seen |= marks
        taken[origin.name, split, tests] += len(content)
        yield Document(origin, path, split, text)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (any text comes back exactly) that begins each text with BOS, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,  # no token for a ruler of dashes
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
    )
    return tokenizer


def build(
    out: Path,
    origins: Sequence[Origin],
    *,
    heldout: float = 0.02,
    limit_bytes: int = 20_000_000,
    vocab_size: int = 4096,
    sample_bytes: int = 40_000_000,
) -> str:
    """Write the corpus and its tokenizer to `out`, or nothing at all.

    Args:
        out: a new or an empty folder.
        origins: where files are taken from.
        heldout: the share of files to hold out.
        limit_bytes: taken from any one distribution, at most.
        vocab_size: the tokenizer's, its two special tokens included.
        sample_bytes: how much of the training text the tokenizer sees.

    Returns:
        A line that says what was written.

    Raises:
        RecipeError: `out` holds something, or no file is left after filtering.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(out, "is not empty", fix="give a new folder")
    left_out: Counter[str] = Counter()
    with whole_folder(out, 0, RecipeError, replace=True) as folder:
        documents = list(select(origins, heldout=heldout, limit_bytes=limit_bytes, left_out=left_out))
        for document in track(documents, "writing", console=Console(stderr=True)):
            target = folder / document.split / document.origin.name / document.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(document.text, encoding="utf-8", newline="\n")
        mixed = sorted(
            (document for document in documents if document.split == "train"),
            key=lambda document: rank(document.origin.name / document.path, "sample"),
        )
        if not mixed:
            raise RecipeError(out, "no file to learn from was found", fix="install more distributions")
        sample = _first((document.text for document in mixed), sample_bytes)
        save_tokenizer(train_tokenizer(sample, vocab_size), folder / "tokenizer")
        return _write_sources(folder, documents, left_out)


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        size -= len(text)
        if size < 0:
            return
        yield text


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as `tokenizers` and transformers' AutoTokenizer load it."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_sources(folder: Path, documents: Sequence[Document], left_out: Counter[str]) -> str:
    sizes: dict[Origin, Counter[str]] = {}
    for document in documents:
        count = sizes.setdefault(document.origin, Counter())
        count[f"{document.split}_files"] += 1
        count[f"{document.split}_bytes"] += len(document.text.encode())
    columns = ("train_files", "train_bytes", "heldout_files", "heldout_bytes")
    rows = [
        {"name": o.name, "version": o.version, "licence": o.licence, **{c: sizes[o][c] for c in columns}}
        for o in sorted(sizes, key=lambda origin: origin.name)
    ]
    total = {column: sum(count[column] for count in sizes.values()) for column in columns}
    record = {"sources": rows, "total": total, "left_out_files": dict(left_out.most_common())}
    (folder / "sources.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    line = (
        f"{len(rows)} sources: {total['train_files']} files, {total['train_bytes'] / 1e6:.1f} MB to train on, "
        f"{total['heldout_files']} files, {total['heldout_bytes'] / 1e6:.1f} MB held out"
    )
    table = [
        "# Sources of the corpus",
        "",
        f"{line}.",
        "",
        "| source | version | licence | files | bytes | held-out files | held-out bytes |",
        "|---|---|---|--:|--:|--:|--:|",
        *("| " + " | ".join(map(str, row.values())) + " |" for row in rows),
    ]
    (folder / "SOURCES.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    return line


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--site-packages",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=sysconfig.get_path("purelib"),
    help="Where the distributions are installed.  [default: where this interpreter's are]",
)
@click.option("--packages", multiple=True, help="A distribution, or a file that lists some.  [default: all]")
@click.option("--heldout", type=click.FloatRange(0, 0.5), default=0.02, show_default=True)
@click.option("--limit-mb", type=click.FloatRange(0, min_open=True), default=20, show_default=True)
@click.option("--vocab-size", type=click.IntRange(258), default=4096, show_default=True)
def main(
    out: Path, site_packages: Path, packages: tuple[str, ...], heldout: float, limit_mb: float, vocab_size: int
) -> None:
    """Write a corpus of permissively licensed Python, and a tokenizer for it, to the folder OUT."""
    names = [n for p in packages for n in (Path(p).read_text("utf-8").split() if Path(p).is_file() else [p])]
    try:
        origins = [standard_library(Path(sysconfig.get_path("stdlib"))), *installed(site_packages, names)]
        limit_bytes = round(limit_mb * 1e6)
        click.echo(build(out, origins, heldout=heldout, limit_bytes=limit_bytes, vocab_size=vocab_size))
    except RecipeError as error:
        click.echo(error, err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
