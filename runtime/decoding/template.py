"""Renders one chat template within limits of time and memory: `python -I -S template.py FOLDER...`, job in, answer out.

A template is a program from somebody else. The sandbox keeps it from the machine, but not from taking all of the
machine's time and memory, which only the system can. The folders are those to import jinja2 from. The job comes as JSON
on stdin, when everything is imported: `template` has the text, `variables` what it sees. The answer is JSON on stdout,
{"text": ...} or {"failed": ...}; without a job, there is none. This file imports nothing of edgeskip, and nothing from
any other folder.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

SECONDS, WALL_SECONDS, BYTES, CHARACTERS = 3, 20, 1 << 29, 1 << 24
"""Of processor time, of time in all, of address space to take, and of the text."""


def environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what the model said, for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012  (the base class has it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:
            return caller()

    class PublicNamespace(Namespace):
        """Takes no name that begins with an underscore."""

        def __init__(self, /, *args: Any, **values: Any) -> None:
            for name in dict(*args, **values):
                _check(name)
            super().__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            super().__setitem__(name, value)

    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace has no name {name!r}")

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": PublicNamespace}
    return made


def limit() -> None:
    """Sets the limits, where the system has any."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_AS: BYTES + _held()}
    for what, most in limits.items():
        with suppress(ValueError, OSError):  # a lower limit holds already, or the system knows none
            resource.setrlimit(what, (most, most))


def _held() -> int:
    """Bytes of address space that this process has taken so far, as far as the system tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  (pathlib is slow to import)
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 28


def main() -> None:
    """Does the job."""
    sys.path += sys.argv[1:]
    made = environment()
    given = sys.stdin.read()
    if not given:  # nobody has one
        return
    job = json.loads(given)
    limit()
    try:
        text = made.from_string(job["template"]).render(job["variables"])
        answer = {"text": text} if len(text) <= CHARACTERS else {"failed": f"writes more than {CHARACTERS} characters"}
        written = json.dumps(answer)
    except MemoryError:
        written = json.dumps({"failed": f"takes more than {BYTES >> 20} MB"})
    except Exception as error:  # a template can fail in any way
        written = json.dumps({"failed": f"refuses ({str(error)[:300] or type(error).__name__})"})
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
