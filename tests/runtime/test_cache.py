"""The user's cache: what is in it, and that it goes when it is asked to, but for what is in use."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.standin import VERSION, put_engines

from edgeskip.cli import main
from edgeskip.exporter.pack import pack
from edgeskip.runtime.bundle.engines import BUILD, EngineKind, open_engines
from edgeskip.runtime.bundle.store import KIND, LIMIT, engines_place, read_engines
from edgeskip.runtime.cache import KINDS, cache_sizes, clear
from edgeskip.runtime.errors import BundleError
from edgeskip.runtime.files import cache_folder, keep, kept, whole_folder

ROOT = Path(__file__).parents[2]
ORIN = EngineKind("tensorrt", VERSION, 87, "standard")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeskip"


@pytest.fixture
def bundle(bundles):
    return bundles("llama-gqa")


def run(*arguments):
    return CliRunner().invoke(main, ["cache", *map(str, arguments)])


def test_every_kind_that_is_kept_is_known():
    found = {KIND}
    for part in ("runtime", "exporter", "recipes"):
        for path in (ROOT / part).rglob("*.py"):
            pattern = r'\b(?:kept|keep|cache_folder|lend_cache|trusted_folder)\((?:"[A-Z_]+", )?"(\w+)"'
            found |= set(re.findall(pattern, path.read_text(encoding="utf-8")))
    assert found == set(KINDS)


def test_sizes_are_those_of_the_files_and_nothing_is_made(place, bundle):
    assert cache_sizes() == {}
    assert not place.parent.exists()
    keep("kernels", "a", bytes(100))
    keep("kernels", "b", bytes(11))
    folder = put_engines(bundle, ORIN)
    engines = sum(path.stat().st_size for path in folder.iterdir())
    assert cache_sizes() == {"engines": engines, "kernels": 111}


def test_clearing_a_kind_leaves_the_others(place, bundle):
    keep("kernels", "a", bytes(100))
    keep("timings", "a", bytes(20))
    folder = put_engines(bundle, ORIN)
    cleared = clear(["kernels", "checked"])
    assert (cleared.freed, cleared.stayed) == ({"kernels": 100}, ())
    assert kept("kernels", "a") is None
    assert kept("timings", "a") == bytes(20)
    assert not (place / "checked").exists()
    assert set(clear(KINDS).freed) == {"engines", "timings"}
    assert not folder.exists()
    assert cache_sizes() == {}


def test_what_is_in_use_stays(place, bundle):
    put_engines(bundle, ORIN)
    (engines,) = read_engines(bundle)
    new = engines_place(bundle, EngineKind("tensorrt", VERSION, 86, "standard"))
    with open_engines(engines), whole_folder(new, 0) as being_written:
        cleared = clear(KINDS)
        assert cleared.freed == {}
        assert set(cleared.stayed) == {engines.folder, being_written}
    assert {path.name for path in (place / "engines").iterdir()} == {engines.folder.name, new.name}


def test_what_killed_processes_left_goes_too(place):
    (cache_folder("engines") / ".x.01234567.edgeskip").mkdir()
    assert clear(KINDS).stayed == ()
    assert list((place / "engines").iterdir()) == []


def test_a_cache_that_others_can_write_is_left_alone(place, bundle):
    folder = put_engines(bundle, ORIN)
    place.chmod(0o777)
    with pytest.raises(BundleError, match="set XDG_CACHE_HOME"):
        clear(KINDS)
    assert run("clear").exit_code == run("list").exit_code == 4
    assert (folder / BUILD).exists()


# The command


def test_list_shows_kinds_sets_total_and_limit(place, bundle, bundles, monkeypatch):
    keep("kernels", "a", bytes(123_456))
    put_engines(bundle, ORIN)
    broken = put_engines(bundles("llama-mha"), ORIN)
    (broken / BUILD).write_text("[]")
    monkeypatch.setenv(LIMIT, "7")
    result = run("list")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("kernels 0.12 ") for line in lines)
    assert any(
        re.match(rf"tensorrt 87 {VERSION} fp32 standard 0.00 \d{{4}}-\d\d-\d\d \d\d:\d\d", line) for line in lines
    )
    assert any(line.startswith(f"{broken.name} ") and "of no use" in line for line in lines)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    assert lines[-1] == f"{size / 1e6:.2f} MB in {place}; engines may take 7 MB (EDGESKIP_CACHE_MB)"


def test_an_empty_cache_is_listed_and_cleared(place):
    assert run("list").stdout == "0.00 MB in the cache; engines may take 2000 MB (EDGESKIP_CACHE_MB)\n"
    assert run("clear").stderr == "Freed 0.00 MB.\n"
    assert not place.parent.exists()


def test_clear_says_what_it_freed_and_what_stays(place, bundle):
    keep("kernels", "a", bytes(123_456))
    keep("timings", "a", bytes(5_000))
    put_engines(bundle, ORIN)
    (engines,) = read_engines(bundle)
    assert run("clear", "--kind", "timings").stderr == "Freed 0.01 MB (timings 0.01).\n"
    with open_engines(engines):
        said = run("clear", "--kind", "kernels", "--kind", "engines").stderr.splitlines()
    assert said == ["Freed 0.12 MB (kernels 0.12).", f"{engines.folder}: stays, as it is in use or cannot be removed."]
    result = run("clear", "--kind", "weights")
    assert (result.exit_code, "'weights' is not one of 'engines', 'kernels'" in result.stderr) == (2, True)


def test_a_limit_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv(LIMIT, "a lot")
    result = run("list")
    assert result.exit_code == 5
    assert result.stderr == "edgeskip: EDGESKIP_CACHE_MB: 'a lot'; wanted a whole number of MB\n"


def test_add_says_what_it_added_and_what_went(bundle, bundles, tmp_path, monkeypatch):
    folder = put_engines(bundle, ORIN)
    packed = pack(bundle, read_engines(bundle), tmp_path / "packed").folder
    shutil.rmtree(folder)
    old = put_engines(bundles("llama-mha"), ORIN)
    monkeypatch.setenv(LIMIT, "0")
    result = run("add", packed)
    assert (result.exit_code, result.stdout) == (0, "")
    said = result.stderr.splitlines()
    assert said[0] == f"{folder}: 0.0 MB."
    assert said[1] == f"Removed what was used least recently, to stay within the limit: {old.name}."
    assert run("add", packed).stderr == f"{folder}: there already.\n"
    result = run("add", bundle.folder)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert "no engines came with it" in result.stderr
