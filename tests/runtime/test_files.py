"""Files and folders are whole or absent, whoever is killed, whoever comes second, and whatever stands in the way."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeskip.runtime import files
from edgeskip.runtime.errors import BundleError, RecipeError
from edgeskip.runtime.files import (
    InUseError,
    cache_folder,
    discard,
    keep,
    kept,
    locked,
    put_back,
    scratch_folder,
    sha256_of,
    shared,
    sweep,
    trusted_folder,
    user_cache,
    whole_file,
    whole_folder,
    write_file,
    write_hashed,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of "abc": FIPS 180-4's example


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """The way of Linux and the way of other systems."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_rename_with", lambda *_: False)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def killed(code, folder):
    """Runs code that ends in `die()` in a process of its own, which is killed there."""
    head = "import os; from pathlib import Path; from edgeskip.runtime import files\n"
    head += "die = lambda *_: os.kill(os.getpid(), 9)\n"
    process = subprocess.run([sys.executable, "-c", head + code, str(folder)], cwd=folder, check=False)
    assert process.returncode == -9


# Files


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "x"
    write_file(path, "old")
    path.chmod(0o640)
    with whole_file(path) as file:
        file.write("naïve".encode())
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "naïve"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(ZeroDivisionError), whole_file(path):
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "naïve"
    assert names(tmp_path) == ["x"]


def test_a_new_file_takes_nobodys_place(tmp_path):
    (tmp_path / "there").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("there", "dangling"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, "x", new=True)
    with pytest.raises(FileExistsError), whole_file(tmp_path / "x", new=True):
        (tmp_path / "x").write_text("appeared meanwhile")
    assert (tmp_path / "x").read_text() == "appeared meanwhile"
    assert names(tmp_path) == ["dangling", "there", "x"]
    write_file(tmp_path / "y", "new", new=True)
    assert (tmp_path / "y").read_text() == "new"


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/x")
    for text in ("a", "b"):
        write_file(tmp_path / "link", text)
        assert (tmp_path / "folder" / "x").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_and_an_open_file_are_written_as_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_file(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    assert (tmp_path / "pipe").is_fifo()
    with (tmp_path / "x").open("wb") as file:
        inode = os.fstat(file.fileno()).st_ino
        write_file(Path(f"/proc/self/fd/{file.fileno()}"), "into it")
    assert ((tmp_path / "x").read_text(), (tmp_path / "x").stat().st_ino) == ("into it", inode)


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_the_longest_names(name, tmp_path):
    write_file(tmp_path / name, "x")
    with pytest.raises(OSError, match="File name too long"):
        write_file(tmp_path / f"{name}xx", "x")
    with whole_folder(tmp_path / f"{name[:-1]}-", 0):
        pass
    assert names(tmp_path) == sorted([name, f"{name[:-1]}-"])


def test_a_planted_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 8)
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".x.00000000.edgeskip").symlink_to("victim")
    with pytest.raises(OSError, match="another process is writing it"):
        write_file(tmp_path / "x", "x")
    assert (tmp_path / "victim").read_text() == "kept"


def test_hashes(tmp_path):
    assert write_hashed(tmp_path / "x", [b"a", memoryview(b"bc")]) == (3, ABC)
    with (tmp_path / "x").open("rb") as file:
        counted = []
        assert sha256_of(file, counted.append) == ABC
    assert counted == [3]
    with pytest.raises(FileExistsError):
        write_hashed(tmp_path / "x", [])


# Folders


def test_a_folder_appears_whole(tmp_path):
    place = tmp_path / "deep" / "place"
    with whole_folder(place, 0) as folder:
        (folder / "new").touch()
        assert not place.exists()
    assert names(tmp_path) == ["deep", "deep/place", "deep/place/new"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    with pytest.raises(BundleError, match="already exists"), whole_folder(place, 0):
        pass


@pytest.mark.usefixtures("renames")
def test_a_folder_is_replaced_at_the_end_or_left(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(place, 0, replace=True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["place", "place/old"]

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", fail)
        with pytest.raises(RecipeError, match="Input/output error"), whole_folder(place, 0, RecipeError, replace=True):
            pass
    assert names(tmp_path) == ["place", "place/old"]
    with whole_folder(place, 0, replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["place", "place/new"]


@pytest.mark.usefixtures("renames")
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Everything is written, and what another process may be writing is left alone."""

    def refuse(*_):
        raise OSError(errno.EBADF, "no locks on NFS")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    for text in ("a", "b"):
        write_file(tmp_path / "x", text)
        with whole_folder(tmp_path / "place", 0, replace=True) as folder:
            (folder / text).touch()
        with locked(tmp_path):
            pass
    assert names(tmp_path) == ["place", "place/b", "x"]
    (tmp_path / folder.name).mkdir()
    message = rf"another process is writing it, as {folder.name}"
    with pytest.raises(BundleError, match=message), whole_folder(tmp_path / "place", 0, replace=True):
        pass
    assert names(tmp_path) == [folder.name, "place", "place/b", "x"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_put(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_rename_with", lambda *_: False)
    place, rename = tmp_path / "place", Path.rename
    place.mkdir()
    (place / "old").touch()

    def fail(source, target):
        if target == place and not source.name.endswith(".old.edgeskip"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(BundleError, match="Input/output error"), whole_folder(place, 0, replace=True):
            pass
    assert names(tmp_path) == ["place", "place/old"]


@pytest.mark.usefixtures("renames")
def test_a_folder_that_appears_meanwhile_is_left(tmp_path):
    place = tmp_path / "place"
    with pytest.raises(BundleError, match="place: appeared meanwhile"), whole_folder(place, 0):
        place.mkdir()  # an empty one, which a plain rename would replace
    assert names(tmp_path) == ["place"]


def test_the_second_writer_of_a_folder_is_told(tmp_path):
    place = tmp_path / "place"
    with whole_folder(place, 0) as folder:
        message = rf"place: another process is writing it, as {folder.name}; wait for it"
        with pytest.raises(BundleError, match=message), whole_folder(place, 0):
            pass
        with whole_folder(tmp_path / "other", 0):
            pass
        (folder / "x").touch()
    assert names(tmp_path) == ["other", "place", "place/x"]


def test_a_full_disk_is_told_with_what_is_wanted(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match="10 MB free on the disk; wanted 16 MB; free some room"):  # noqa: SIM117
        with whole_folder(tmp_path / "place", 16 * 10**6):
            pass
    with pytest.raises(BundleError, match="10 MB free on the disk; free some room"):  # noqa: SIM117
        with whole_folder(tmp_path / "place", 0):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_locked_folder_is_the_first_ones(tmp_path):
    with locked(tmp_path), pytest.raises(InUseError), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


# What killed processes leave


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    killed("with files.whole_folder(Path('a'), 0) as f: (f / 'b').mkdir(); (f / 'b' / 'x').touch(); die()", tmp_path)
    assert len(names(tmp_path)) == 3
    killed("with files.whole_file(Path('report')) as f: f.write(b'half'); f.flush(); die()", tmp_path)
    assert len(names(tmp_path)) == 1
    with whole_folder(tmp_path / "c", 0):
        assert len(names(tmp_path)) == 1  # only what is under way
    assert names(tmp_path) == ["c"]


def test_what_others_have_is_left_alone(tmp_path):
    strange = {".b.edgeskip", ".b.zzzzzzzz.edgeskip", "b.00000000.edgeskip", ".00000000.edgeskip", ".cache"}
    for name in strange:
        (tmp_path / name).mkdir()
    (tmp_path / ".link.00000000.edgeskip").symlink_to(tmp_path / ".cache")
    with whole_folder(tmp_path / "a", 0) as alive:
        write_file(tmp_path / "x", "x")
        assert set(names(tmp_path)) == {*strange, ".link.00000000.edgeskip", "x", alive.name}


def test_where_two_names_cannot_be_exchanged_the_old_folder_is_put_back_at_the_next_look(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").touch()
    code = "files._rename_with = lambda *_: False; rename = Path.rename\n"
    code += "Path.rename = lambda a, b: rename(a, b) if a.name == 'place' else die()\n"
    code += "with files.whole_folder(Path('place'), 0, replace=True): pass"
    killed(code, tmp_path)
    assert ".place.old.edgeskip/old" in names(tmp_path)
    assert not (tmp_path / "place").exists()
    put_back(tmp_path)
    assert (tmp_path / "place" / "old").exists()
    with whole_folder(tmp_path / "place", 0, replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["place", "place/new"]


def test_an_old_folder_that_was_replaced_goes_with_the_next(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / ".place.old.edgeskip").mkdir()
    put_back(tmp_path)
    assert len(names(tmp_path)) == 2  # looking removes nothing
    write_file(tmp_path / "x", "x")
    assert names(tmp_path) == ["place", "x"]


def test_a_scratch_folder_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with scratch_folder("demo") as first, scratch_folder("demo") as second:
        assert first != second
        (first / "x").touch()
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert names(tmp_path) == []


def test_a_folder_has_the_mode_that_was_asked_for(tmp_path):
    for mode in (0o755, 0o700):
        with whole_folder(tmp_path / "x", 0, replace=True, mode=mode) as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # until it is whole
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


# Removing


def test_what_is_shared_is_not_discarded_and_may_be_shared_again(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").touch()
    with shared(tmp_path / "x"):
        with shared(tmp_path / "x"):
            assert not discard(tmp_path / "x")
        assert not discard(tmp_path / "x")
        with pytest.raises(InUseError), locked(tmp_path / "x"):
            pass
    assert names(tmp_path) == ["x", "x/y"]
    with locked(tmp_path / "x"), pytest.raises(InUseError), shared(tmp_path / "x"):
        pass
    assert discard(tmp_path / "x")
    assert names(tmp_path) == []


def test_what_is_discarded_may_be_a_file_and_need_not_be_there(tmp_path):
    (tmp_path / "x").write_text("x")
    (tmp_path / "link").symlink_to("x")
    assert [discard(tmp_path / name) for name in ("link", "x", "x")] == [False, True, False]
    assert names(tmp_path) == ["link"]


def test_a_folder_that_cannot_be_renamed_is_not_gone(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError

    (tmp_path / "x").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        assert not discard(tmp_path / "x")
    assert names(tmp_path) == ["x"]


@pytest.mark.usefixtures("renames")
def test_a_folder_that_is_read_is_replaced_and_its_reader_keeps_what_it_opened(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").write_text("old")
    with shared(tmp_path / "x"), (tmp_path / "x" / "y").open() as file:
        with whole_folder(tmp_path / "x", 0, replace=True) as folder:
            (folder / "y").write_text("new")
        assert file.read() == "old"
        assert discard(tmp_path / "x")  # the new one, which nobody reads
    assert names(tmp_path) == []


def test_a_folder_that_was_replaced_while_it_was_opened_is_told(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    right = os.open

    def slow(path, *arguments):
        descriptor = right(path, *arguments)
        (tmp_path / "x").rename(tmp_path / "y")
        return descriptor

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(InUseError, match="another process has replaced it"), shared(tmp_path / "x"):
        pass


def test_what_killed_processes_left_is_swept(tmp_path):
    left, owned = tmp_path / ".x.01234567.edgeskip", tmp_path / ".y.01234567.edgeskip"
    for path in (left, owned, tmp_path / "z"):
        path.mkdir()
    with locked(owned):
        sweep(tmp_path)
        assert names(tmp_path) == [owned.name, "z"]


# The user's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeskip"


def test_what_is_kept_is_for_the_user_alone(cache):
    before = os.umask(0)
    try:
        keep("kernels", "x", b"code")
    finally:
        os.umask(before)
    assert kept("kernels", "x") == b"code"
    modes = {name: stat.S_IMODE((cache / name).stat().st_mode) for name in (".", "kernels", "kernels/x")}
    assert modes == {".": 0o700, "kernels": 0o700, "kernels/x": 0o600}
    assert kept("kernels", "y") is kept("stamps", "x") is None
    assert names(cache) == ["kernels", "kernels/x", "stamps"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("part", [".", "kernels"])
def test_a_cache_that_others_can_write_is_not_believed(part, mode, cache):
    keep("kernels", "x", b"code")
    (cache / part).chmod(mode)
    assert kept("kernels", "x") is None
    keep("kernels", "y", b"code")
    (cache / part).chmod(0o700)
    assert (kept("kernels", "x"), kept("kernels", "y")) == (b"code", None)


def test_what_needs_a_cache_says_that_there_is_none(cache):
    assert trusted_folder("engines") == cache / "engines"
    (cache / "engines").chmod(0o777)
    message = (
        rf"^{cache}/engines: cannot be made, or others can write it, .*; set XDG_CACHE_HOME to a folder of your own$"
    )
    with pytest.raises(BundleError, match=message):
        trusted_folder("engines")


def test_a_cache_of_another_user_is_not_believed(cache, monkeypatch):
    keep("kernels", "x", b"code")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert kept("kernels", "x") is cache_folder("kernels") is None


def test_a_link_in_the_cache_is_not_believed(cache, tmp_path):
    keep("kernels", "x", b"code")
    (cache / "kernels" / "y").symlink_to("x")
    assert kept("kernels", "y") is None


@pytest.mark.parametrize("xdg", [None, "", "relative"])
def test_no_cache_is_kept_in_the_current_folder(xdg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "relative")
    keep("kernels", "x", b"code")
    assert names(tmp_path) == []
    assert kept("kernels", "x") is None
    with pytest.raises(RuntimeError):
        user_cache()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep("kernels", "x", b"code")
    assert kept("kernels", "x") is None
