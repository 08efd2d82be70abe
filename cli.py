"""The command line: which module has a verb, what errors become, and what signals do. Nothing else is imported."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from importlib import import_module
from typing import Any

import click

import edgeskip
from edgeskip.runtime.errors import EdgeskipError, RequestError

VERBS = {
    "export": "edgeskip.recipes.commands.export",
    "plan": "edgeskip.recipes.commands.plan",
    "tune": "edgeskip.recipes.commands.tune",
    "recipes": "edgeskip.recipes.commands.recipes",
    "train": "edgeskip.recipes.commands.train",
    "synth": "edgeskip.recipes.commands.synth",
    "demo": "edgeskip.recipes.commands.demo",
    "build": "edgeskip.exporter.commands.build",
    "pack": "edgeskip.exporter.commands.pack",
    "check": "edgeskip.exporter.commands.check",
    "generate": "edgeskip.runtime.commands.generate",
    "bench": "edgeskip.exporter.commands.bench",
    "inspect": "edgeskip.runtime.commands.inspect",
    "doctor": "edgeskip.runtime.commands.doctor",
}
"""In the order of a first use; each module has a click command of the verb's name."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 tokens differ, or a check fails, 2 wrong command line, 3 checkpoint, "
    "4 bundle, 5 request, 6 backend, 7 recipe, 130 interrupted, 143 ended by the system."
)


class _Group(click.Group):
    """Imports a verb when it is asked for; prints what the user can mend as one line, with its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(VERBS[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _end)  # what the parent ignores, as under nohup, stays ignored
        try:
            return super().invoke(ctx)
        except EdgeskipError as error:
            click.echo(f"edgeskip: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left has nowhere to go
            click.echo("edgeskip: stdout: cannot be written (no space left)", err=True)
            ctx.exit(RequestError.exit_code)
        except KeyboardInterrupt:
            click.echo("edgeskip: interrupted", err=True)
            ctx.exit(130)


_CLEANING_S = 5.0
_ended_at = -_CLEANING_S


def _end(number: int, _: Any) -> None:
    """Ends the run by an exception, so that `finally` cleans up; what comes while it does is passed over."""
    global _ended_at
    if time.monotonic() < _ended_at + _CLEANING_S:
        return
    _ended_at = time.monotonic()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeskip.__version__, prog_name="edgeskip")
def main() -> None:
    """LayerSkip models on the edge: split, export and decode self-speculatively from one set of weights."""


if __name__ == "__main__":
    main()
