"""Files from outside: only regular ones, no larger than they may be, and one line for all else."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.reading import check_plain, kind_of, parse_json, read_bytes, read_json, read_text

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")


def refusal(call, *arguments, **settings):
    with pytest.raises(RequestError) as caught:
        call(*arguments, RequestError, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes("a\r\nb\u00e9".encode())
    assert read_text(tmp_path / "file", RequestError) == "a\r\nb\u00e9"
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link", RequestError) == "a\r\nb\u00e9".encode()


def test_a_file_may_have_so_many_bytes_and_no_more(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    assert len(read_bytes(tmp_path / "file", RequestError, most=10)) == 10
    assert "too large; wanted at most" in refusal(read_bytes, tmp_path / "file", most=9, fix="cut it")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file; mend it"),
        (".", "is a folder; wanted a file; mend it"),
        ("a\0b", "cannot be read (embedded null byte); mend it"),
        ("\ud800", "cannot be read ('utf-8' codec"),
        ("x" * 300, "cannot be read (File name too long); mend it"),
        ("file/below", "cannot be read (Not a directory); mend it"),
        ("loop", "cannot be read (Too many levels of symbolic links); mend it"),
    ],
)
def test_what_is_no_file(name, message, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    assert message in refusal(read_bytes, tmp_path / name, fix="mend it")


@posix
def test_nothing_but_a_regular_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(read_bytes, tmp_path / "pipe").endswith("is a pipe; wanted a file")
    assert refusal(read_bytes, Path("/dev/zero")) == "/dev/zero: is a device; wanted a file"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert refusal(read_bytes, tmp_path / "s").endswith("is a socket; wanted a file")


@posix
def test_a_pipe_that_takes_the_place_of_a_file_holds_nobody_up(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    regular = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: regular)  # as it was when it was looked at
    assert refusal(read_bytes, tmp_path / "pipe").endswith("is a pipe; wanted a file")


@posix
def test_what_a_user_names_may_be_a_stream_and_is_bounded_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("through a pipe"))
    writer.start()
    assert read_text(tmp_path / "pipe", RequestError, streams=True) == "through a pipe"
    writer.join()
    assert "too large" in refusal(read_bytes, Path("/dev/zero"), streams=True, most=1000)
    assert "is a folder" in refusal(read_bytes, tmp_path, streams=True)


def test_what_is_no_text_is_told_with_its_place(tmp_path):
    (tmp_path / "file").write_bytes(b"abc\xff")
    assert "not UTF-8 text (invalid start byte at byte 3)" in refusal(read_text, tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("1" * 400, "a number of more than 40 digits"),
        ("[-" + "1" * 400 + "]", "a number of more than 40 digits"),
        ("1" * 5000, "digit"),
        ("\ufeff{}", "BOM"),
        ("[1]x", "Extra data"),
    ],
)
def test_what_is_no_plain_json(text, message, tmp_path):
    (tmp_path / "file.json").write_text(text, encoding="utf-8")
    line = refusal(read_json, tmp_path / "file.json", fix="mend it")
    assert "file.json: not valid JSON (" in line
    assert message in line
    assert line.endswith("; mend it")


@pytest.mark.parametrize("data", [None, 1, -0.5, "text", [], {}, [1, {"a": [None, True]}], 10**30, "1" * 400])
def test_plain_json_is_what_it_says(data):
    assert parse_json(json.dumps(data).encode(), "", RequestError) == data


def test_data_of_any_reader_can_be_looked_at():
    deep = {}
    for _ in range(sys.getrecursionlimit() * 2):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="nested"):
        check_plain(deep)
    with pytest.raises(ValueError, match="digits"):
        check_plain({"a": [0x10**5000]})


def test_what_stands_at_a_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nothing")
    names = ("file", ".", "nothing", "file/below", "dangling")
    assert [kind_of(tmp_path / name, RequestError) for name in names] == ["a file", "a folder", "", "", ""]
    for name in ("a\0b", "x" * 300):
        assert "cannot be looked up (" in refusal(kind_of, tmp_path / name)
