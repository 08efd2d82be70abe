"""The command `edgeskip`, and `python -m edgeskip`: what must be settled before anything else is imported."""

import os
import sys


def _leave_out_the_current_folder() -> None:
    """It may be a bundle, so neither modules nor commands are taken from it, here or in processes that are started.

    `export PATH=$PATH:`, for one, leaves an empty entry, which means this folder.
    """
    for name in {"PATH", "PYTHONPATH"} & os.environ.keys():
        entries = os.environ.pop(name).split(os.pathsep)
        absolute = [entry for entry in entries if os.path.isabs(entry)]  # noqa: PTH117
        if absolute:
            os.environ[name] = os.pathsep.join(absolute)
        if name == "PYTHONPATH":
            relative = {os.path.abspath(entry) for entry in entries} - set(absolute)  # noqa: PTH100
            sys.path[:] = [entry for entry in sys.path if entry not in relative]


try:  # noqa: SIM105  (contextlib is not here yet)
    _leave_out_the_current_folder()
except OSError:  # it is gone
    pass

import signal  # noqa: E402  (a module of Python's own that it does not have by now)

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the command line is there ends it without a traceback

from edgeskip.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
