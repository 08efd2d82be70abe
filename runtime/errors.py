"""The errors that a person can mend.

    EdgeskipError              exit code 1
    +-- CheckpointError        3   the model folder or hub id given to export
    +-- BundleError            4   a bundle that is damaged, foreign or not there
    +-- RequestError           5   a prompt, a length or a setting that cannot be served
    +-- BackendError           6   a library or a device that is missing or refuses
    +-- RecipeError            7   a recipe file

Each is one line, printable and of bounded length: where, what was found, what was wanted, what to do. The command line
prints that line and exits with the code (2 is a wrong command line, 130 is Ctrl-C); any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

from edgeskip.runtime.printable import one_line


class EdgeskipError(Exception):
    """A condition that the user can mend.

    Args:
        place: where it is: a file, a setting, an argument.
        found: what is there.
        wanted: what should be there, where that is not obvious.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, place: object, found: str, *, wanted: str = "", fix: str = "") -> None:
        self.place, self.found, self.wanted, self.fix = map(one_line, (place, found, wanted, fix))
        line = f"{self.place}: {self.found}"
        if wanted:
            line += f"; wanted {self.wanted}"
        if fix:
            line += f"; {self.fix}"
        super().__init__(line)


class CheckpointError(EdgeskipError):
    """The checkpoint cannot be read, or its kind is not supported."""

    exit_code = 3


class BundleError(EdgeskipError):
    """The bundle cannot be read, or cannot be written where it was asked for."""

    exit_code = 4


class RequestError(EdgeskipError):
    """What was asked of a loaded model cannot be served."""

    exit_code = 5


class BackendError(EdgeskipError):
    """A backend is missing, or refuses the bundle."""

    exit_code = 6


class RecipeError(EdgeskipError):
    """A recipe is malformed or names something that is not there."""

    exit_code = 7


def reason(error: Exception) -> str:
    """What the system said, without the path that a message names already."""
    return getattr(error, "strerror", None) or str(error)
