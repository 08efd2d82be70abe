"""The command `edgeskip`, and `python -m edgeskip`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the command line is there ends it without a traceback

from edgeskip.cli import main

if __name__ == "__main__":
    main()
