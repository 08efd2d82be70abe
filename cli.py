"""The command line: which module has a verb, what errors become, and what signals do. Nothing else is imported."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

import click

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import edgeskip
from edgeskip.runtime.errors import BackendError, EdgeskipError, RequestError, reason

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
    "push": "edgeskip.runtime.commands.push",
    "check": "edgeskip.exporter.commands.check",
    "generate": "edgeskip.runtime.commands.generate",
    "chat": "edgeskip.runtime.commands.chat",
    "serve": "edgeskip.runtime.commands.serve",
    "bench": "edgeskip.exporter.commands.bench",
    "inspect": "edgeskip.runtime.commands.inspect",
    "cache": "edgeskip.runtime.commands.cache",
    "doctor": "edgeskip.runtime.commands.doctor",
}
"""In the order of a first use; each module has a click command with the verb's name."""

REPORTS = ("--json", "--html")
"""Options that take a file, and that mean standard output without one."""

_LEAST_ADDRESSES = 1 << 28
"""Bytes that Python and the libraries of any verb take before there is a model."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 tokens differ or a check fails, 2 wrong command line, 3 checkpoint, "
    "4 bundle, 5 request, 6 backend, 7 recipe, 130 interrupted, 143 ended by the system."
)


class _Group(click.Group):
    """Imports a verb when it is asked for; prints what the user can mend as one line, and exits with its code."""

    def main(self, *args: Any, **settings: Any) -> Any:
        _prepare_streams()
        return super().main(*args, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """A folder is not a report: after a bare --json, it is the next argument."""
        pairs = zip(args, [*args[1:], ""], strict=False)
        given = [f"{one}=-" if one in REPORTS and os.path.isdir(after) else one for one, after in pairs]  # noqa: PTH112
        with _in_one_line(ctx), _until_unread(ctx):
            return super().parse_args(ctx, given)

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
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _not_raised
        with _in_one_line(ctx):
            _check_surroundings()
            with _until_unread(ctx), _not_imported():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result


def _prepare_streams() -> None:
    """Opens streams that were closed, to no effect, or the next file to be opened would take their place; spells out
    characters that an encoding lacks.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            useless = os.O_WRONLY if name == "stdin" else os.O_RDONLY if name == "stdout" else os.O_WRONLY
            descriptor = os.open(os.devnull, useless)  # the lowest that is free, and that is its own
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: PTH123, SIM115
            assert descriptor == number
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")


def _check_surroundings() -> None:
    """Refuses surroundings in which libraries crash or print messages of their own."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise RequestError("current folder", f"is gone ({error.strerror})", fix="change into another") from None
    if resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if 0 <= limit < _LEAST_ADDRESSES:
            wanted = f"{_LEAST_ADDRESSES / 1e6:.0f} MB or more"
            raise BackendError("memory", f"limited to {limit / 1e6:.0f} MB", wanted=wanted, fix="ulimit -v unlimited")


@contextmanager
def _in_one_line(ctx: click.Context) -> Iterator[None]:
    """Prints what the user can mend as one line, and exits with its code."""
    try:
        yield
        return
    except EdgeskipError as error:
        said = error
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        said = BackendError("memory", f"not enough ({str(error) or 'none is left'})", fix="free some")
    except OSError as error:
        if error.errno is None:
            raise  # a library's own, of which nothing is known
        said = _of_the_system(error)
    except KeyboardInterrupt:
        _exit(ctx, "interrupted", 130)
    _exit(ctx, str(said), said.exit_code)


def _exit(ctx: click.Context, line: str, code: int) -> NoReturn:
    """The code is told even where stderr takes no line."""
    with suppress(OSError):
        click.echo(f"edgeskip: {line}", err=True)
    ctx.exit(code)


@contextmanager
def _until_unread(ctx: click.Context) -> Iterator[None]:
    """Ends the run without a word where the reader is gone, as with `| head`, and discards what is left for it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EPIPE or error.filename is not None:
            raise
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        ctx.exit(128 + signal.SIGPIPE)  # as for programs that this signal ends


@contextmanager
def _not_imported() -> Iterator[None]:
    """Raises a signal's exception again where a library that was being imported made a failure of it."""
    try:
        yield
    except (EdgeskipError, ImportError) as error:
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, ImportError) and isinstance(link.__cause__, (KeyboardInterrupt, SystemExit)):
                raise link.__cause__ from None
            link = link.__cause__ or link.__context__
        raise


def _of_the_system(error: OSError) -> EdgeskipError:
    """What the system refused unexpectedly: a file, or a stream, which has no name here."""
    if error.filename is not None:
        return RequestError(error.filename, reason(error))
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left has nowhere to go
    return RequestError("stdout", f"cannot be written ({reason(error)})")


_CLEANING_S = 5.0
_ended_at, _ended_by = -_CLEANING_S, 0


def _end(number: int, _: Any) -> None:
    """Ends the run by an exception, so that `finally` cleans up; signals that come meanwhile are ignored."""
    global _ended_at, _ended_by
    if time.monotonic() < _ended_at + _CLEANING_S:
        return
    _ended_at, _ended_by = time.monotonic(), number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _not_raised(dropped: Any) -> None:
    """Sends a signal again whose exception Python had to drop, as it does in a destructor or a library's callback."""
    global _ended_at
    if not _ended_by or dropped.exc_type not in (KeyboardInterrupt, SystemExit):
        sys.__unraisablehook__(dropped)
        return
    _ended_at = -_CLEANING_S
    again = threading.Timer(0.05, os.kill, (os.getpid(), _ended_by))  # when it will be over
    again.daemon = True
    again.start()


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeskip.__version__, prog_name="edgeskip")
def main() -> None:
    """LayerSkip models on the edge: split, export and decode self-speculatively from one set of weights."""


if __name__ == "__main__":
    main()
