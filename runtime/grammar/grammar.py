"""What a text must be: a grammar as a user gives it. masks.py keeps texts to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.structure import plain

MOST_CHARACTERS = 1 << 15
"""Of a grammar, so that it is compiled in little time, and in a stack of known size."""

Kind = Literal["json_schema", "regex", "lark"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Grammar:
    """What a generated text must be, from its first character to its last. `from_json_schema`, `any_json_object`,
    `from_regex` and `from_lark` make one.

    A text that is cut, by `max_new_tokens`, a stop text or a full context, is the beginning of one that fits.

    Args:
        kind: what the source is.
        source: a JSON schema as JSON; a regular expression without look-around and backreferences, after Rust's
            `regex`; or rules in llguidance's variant of Lark.

    Raises:
        RequestError: another kind, or a source that is no text, or too long. Whether it is sound shows when it is used.
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if plain(self.kind) not in KINDS:
            raise RequestError("grammar", f"{self.kind!r:.60}", wanted=f"one of {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise RequestError("grammar", f"a {type(self.source).__name__}", wanted=f"a text, as {self.kind}")
        if len(self.source) > MOST_CHARACTERS:
            raise RequestError("grammar", f"{len(self.source)} characters", wanted=f"at most {MOST_CHARACTERS}")

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that fits a schema. Members stand in the order of its `properties`.

        Raises:
            RequestError: a schema that is no JSON object.
        """
        if not isinstance(schema, Mapping):
            raise RequestError("grammar", f"a schema that is a {type(schema).__name__}", wanted="a JSON object")
        try:
            return cls("json_schema", json.dumps(dict(schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("grammar", f"a schema that is not JSON ({error})", wanted="a JSON object") from None

    @classmethod
    def any_json_object(cls) -> Grammar:
        """A JSON object, whatever its members."""
        return cls.from_json_schema({"type": "object"})

    @classmethod
    def from_regex(cls, pattern: str) -> Grammar:
        """All that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def from_lark(cls, rules: str) -> Grammar:
        """All that rules derive from `start`."""
        return cls("lark", rules)
