"""Text from outside, made safe for a terminal: it shows what it says and controls nothing."""

from __future__ import annotations

import re

_DRIVING = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # C0 and C1, but line breaks and tabs
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"  # other line breaks; what reverses the order of characters
    r"\ud800-\udfff]"  # halves of characters, which no encoding has
)


def printable(text: str) -> str:
    r"""The text with every character that drives a terminal, or cannot be encoded, spelled out, as `\x1b`."""
    return _DRIVING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: object, most: int = 500) -> str:
    """The text on one line and printable; of one longer than `most` characters, its beginning and its end."""
    whole = str(text)
    if len(whole) > most:
        whole = f"{whole[: most // 2]} ... {whole[-(most // 2) :]}"
    return printable(" ".join(whole.split()))
