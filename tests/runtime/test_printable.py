"""What people see of a text from outside shows the text and drives nothing."""

from __future__ import annotations

import unicodedata

import pytest

from edgeskip.runtime.errors import BundleError
from edgeskip.runtime.printable import one_line, printable


def test_no_character_of_unicode_drives_a_terminal():
    shown = printable("".join(map(chr, range(0x110000))))
    controls = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert controls == {"\n", "\t"}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI")}
    assert shown.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "caf\u00e9 \u4e2d\u6587 \u05e9\u05dc\u05d5\u05dd",
        "\U0001f469\u200d\U0001f4bb",
        "a\n\tb",
        "a\r\nb",
        "no\u00a0break",
        "\ue0b0",
    ],
)
def test_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31mred", "\\x9b31mred"),
        ("\x00\x07\x7f", "\\x00\\x07\\x7f"),
        ("over\rwritten", "over\\rwritten"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_drives_is_spelled_out(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_a_line_is_one_line_and_bounded():
    assert one_line(" a\n b\tc\u2028d ") == "a b c d"
    assert one_line("a" * 600 + "b" * 600, 100) == "a" * 50 + " ... " + "b" * 50
    assert len(one_line("\x1b" * 1_000_000)) < 10_000


def test_an_error_is_a_line_whatever_it_tells_of():
    error = BundleError("x" * 1_000_000, "\x1b[2J\n" * 1000, wanted="\x9b" * 1_000_000, fix="\u202e" * 1_000_000)
    assert len(str(error)) < 40_000
    assert str(error).isprintable()
    assert error.found.isprintable()
