"""No grammar ends the process, however deep: this file as a program compiles many, where a crash harms nobody else."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading

import numpy as np
from tokenizers import Tokenizer

from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.grammar.grammar import MOST_CHARACTERS, Grammar
from edgeskip.runtime.grammar.masks import TokenMask, token_table

AROUND = [
    lambda inner: {"items": inner},
    lambda inner: {"properties": {"a": inner}, "required": ["a"]},
    lambda inner: {"prefixItems": [inner]},
    lambda inner: {"additionalProperties": inner},
    lambda inner: {"anyOf": [inner, {"type": "null"}]},
    lambda inner: {"oneOf": [inner]},
    lambda inner: {"allOf": [inner, {"minimum": 1}]},
    lambda inner: {"type": "array", "items": inner, "minItems": 1},
]


def schema(chosen, depth, kinds, loops):
    """As many definitions as there is room for, each so deep at most and then on to the next, or back to any."""
    made, size = {"$ref": "#/0"}, 20
    for number in itertools.count():
        inner = {"$ref": f"#/{chosen.randrange(number + 1) if chosen.random() < loops else number + 1}"}
        for _ in range(chosen.randint(1, depth)):
            inner = chosen.choice(kinds)(inner)
        size += len(json.dumps({str(number): inner}))
        if size > MOST_CHARACTERS - 40:
            return Grammar.from_json_schema(made | {str(number): {"type": "integer"}})
        made[str(number)] = inner


def grammars():
    chosen, most = random.Random(0), MOST_CHARACTERS - 99
    for kind in AROUND:
        yield schema(chosen, 30, [kind], 0)
    for depth, loops in ((1, 0), (4, 0.1), (30, 0), (30, 0.1)):
        yield schema(chosen, depth, AROUND, loops)
    for opened, closed in ("()", "[]"):
        yield Grammar.from_lark("start: " + opened * (most // 2) + '"a"' + closed * (most // 2))
        yield Grammar.from_regex(opened * (most // 2) + "a" + closed * (most // 2))
        yield Grammar.from_json_schema({"pattern": opened * (most // 2) + "a" + closed * (most // 2)})
    names = ["".join(name) for name in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3)][: most // 8]
    for ending in ("", "?", "+"):
        rules = [f"{one}:{other}{ending}" for one, other in itertools.pairwise(names[: most // (8 + len(ending))])]
        yield Grammar.from_lark("\n".join(["start: aaa", *rules, f'{names[len(rules)]}:"a"']))
    yield Grammar.from_json_schema({"const": json.loads("[" * 900 + "]" * 900)})


def compile_all():
    table, sound = token_table(Tokenizer.from_file(sys.argv[1]), 300, [1]), 0
    for grammar in grammars():
        try:
            TokenMask(grammar, table).allowed(np.zeros(0, np.int64))
            sound += 1
        except RequestError:
            pass
    print(sound)


def test_no_grammar_however_deep_ends_the_process(tmp_path):
    from tests.conftest import make_tokenizer  # which brings torch

    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, __file__, str(tmp_path / "tokenizer.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) > 10  # and not all were refused


if __name__ == "__main__":
    threading.stack_size(1 << 18)  # the caller's own stack is of no matter
    threading.Thread(target=compile_all).start()
