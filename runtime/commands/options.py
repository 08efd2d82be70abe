"""The options that verbs share, and what is checked before a verb begins."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edgeskip.runtime.backends.choice import BACKENDS, DEVICES
from edgeskip.runtime.drafting.drafters import DRAFTS
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.files import lend_cache
from edgeskip.runtime.packages import NEEDS, missing_modules
from edgeskip.runtime.printable import printable

CommandT = TypeVar("CommandT", bound=Callable[..., Any] | click.Command)


class Place(click.Path):
    """A path. An empty one, as of a variable that is not set, is none, and not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("it is empty.", param, ctx)
        return super().convert(value, param, ctx)


class Folder(Place):
    """A path that a shell completes with the names of folders."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """One item, which leaves completion to the shell."""
        return [CompletionItem(incomplete, type="dir")]


class BundleFolder(Folder):
    """A bundle's folder; one that is named by its hub id is fetched into the user's cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The folder."""
        from edgeskip.runtime.hub.access import local_bundle

        return super().convert(local_bundle(value), param, ctx)


if TYPE_CHECKING:
    _AnyType = click.ParamType[Any]
else:
    _AnyType = click.ParamType  # of older releases, no generic class


class Choice(_AnyType):
    """A number, such as an exit layer or a speculation length, or a word, such as `auto`."""

    def __init__(self, word: str = "auto") -> None:
        self.name, self._word = f"integer|{word}", word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        try:
            return value if value == self._word else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self._word}.", param, ctx)


class ExitLayers(_AnyType):
    """Exit layers in a list with commas; `auto` may be one of them where that is said."""

    name = "E[,E...]"

    def __init__(self, auto: bool = False) -> None:
        self._auto = auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Their numbers."""
        try:
            return tuple(one if self._auto and one == "auto" else int(one) for one in value.split(","))
        except ValueError:
            others = " or auto" if self._auto else ""
            self.fail(f"{value!r} is no list of whole numbers{others}, such as 4 or 3,5.", param, ctx)


def exit_layers_option(text: str, auto: bool = False) -> Callable[[CommandT], CommandT]:
    """Several exit layers: a list, or the option again; None where it is not given."""

    def joined(ctx: click.Context, param: click.Parameter, given: tuple[tuple[Any, ...], ...]) -> Any:
        return tuple(one for some in given for one in some) or None

    settings: Any = {"type": ExitLayers(auto), "multiple": True, "callback": joined, "help": text}
    return click.option("--exit-layer", "-e", "exit_layers", **settings)


bundle_argument = click.argument("bundle", type=BundleFolder(path_type=Path))
length_option = click.option(
    "--num-speculations",
    "-k",
    type=Choice(),
    help="Drafts per round; auto goes by the text and by time.  [default: the bundle's; auto unless --draft exit]",
)
exit_option = click.option(
    "--exit-layer",
    "-e",
    type=Choice(),
    help="The exit that drafts, of those that the bundle has; auto goes by the text and by time.  [default: its first]",
)
threshold_option = click.option(
    "--confidence-threshold",
    type=click.FloatRange(0, 1),
    help="A draft less probable than this is the last of its round; 0 always drafts K.  [default: the backend's; a CPU "
    "with a K that goes by the text has none, and drafts while that pays]",
)
draft_option = click.option(
    "--draft",
    type=click.Choice(DRAFTS),
    help="What drafts: the exit; ngram, what the text had after the same tokens before; auto, that where there is any."
    f"  [default: {DRAFTS[0]}]",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="auto takes TensorRT engines that fit this machine, else ONNX Runtime.",
)
device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="ONNX Runtime's device; auto takes the GPU if there is one.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 means one per core."
)
max_new_tokens_option = click.option(
    "--max-new-tokens", "-n", type=int, default=128, show_default=True, help="Tokens per prompt, at least 2."
)
num_prompts_option = click.option(
    "--num-prompts", type=click.IntRange(1), help="Use only this many prompts, the first ones."
)
prompt_tokens_option = click.option("--prompt-tokens", type=click.IntRange(1), help="Cut prompts to this many tokens.")


_DRAWING = (
    click.option("--temperature", type=float, help="Draw tokens at this temperature; 0 takes the most probable one."),
    click.option("--top-k", type=int, help="Draw from this many most probable tokens; 0 from all."),
    click.option("--top-p", type=float, help="Draw from the most probable tokens that have this probability together."),
    click.option("--min-p", type=float, help="Draw from tokens with at least this share of the largest probability."),
    click.option("--seed", type=int, help="Draw the same text again.  [default: one is drawn, and shown]"),
)
_PENALTIES = (
    click.option("--repetition-penalty", type=float, help="Divide the logits of tokens that the text has, from 1 up."),
    click.option("--presence-penalty", type=float, help="Subtract this from the logits of tokens of the new text."),
    click.option("--frequency-penalty", type=float, help="Subtract this for each time that the new text has a token."),
)


def drawing_options(command: CommandT) -> CommandT:
    """How tokens are drawn: options by the names of `SamplingSettings`, None where they are not given."""
    for option in reversed(_DRAWING):
        command = option(command)
    return command


def sampling_options(command: CommandT) -> CommandT:
    """How tokens are picked: those and the penalties."""
    for option in reversed(_PENALTIES):
        command = option(command)
    return drawing_options(command)


def report_option(name: str, text: str) -> Callable[[CommandT], CommandT]:
    """An option that takes a file, and that means standard output without one."""
    settings: Any = {"type": Place(path_type=Path), "is_flag": False, "flag_value": "-", "metavar": "[FILE]"}
    return click.option(f"--{name}", f"{name}_path", help=text, **settings)


json_option = report_option("json", "Write the report to FILE as JSON; without FILE, to stdout.")
html_option = report_option("html", "Write a page with plots to FILE; without FILE, to stdout.")
prompts_option = click.option(
    "--prompts",
    type=Place(path_type=Path),
    help="A text file with one prompt, or a folder of such files.  [default: built in]",
)


def first(given: Any, otherwise: Any) -> Any:
    """What was given, or else something other."""
    return otherwise if given is None else given


def say(text: str) -> None:
    """A line for people, on standard error."""
    click.echo(printable(text), err=True)


def command_line() -> str:
    """What was typed, for a report."""
    return shlex.join(["edgeskip", *sys.argv[1:]])


def require(verb: str) -> None:
    """Refuses a verb, or one of its options, if its extra is not installed; tells torch where our cache is."""
    need = NEEDS[verb]
    if missing := missing_modules(need.modules):
        place = f"edgeskip {click.get_current_context().info_name}"
        raise BackendError(place, f"{', '.join(missing)} not installed", fix=need.fix)
    if "torch" in need.modules:  # by itself it keeps what it compiles, and runs, in a known folder for temporary files
        lend_cache("TORCHINDUCTOR_CACHE_DIR", "inductor")
        os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # for these it knows no other place
