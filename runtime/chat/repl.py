"""A conversation on a terminal: lines in, answers and the outcome of commands out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from edgeskip.runtime.chat.conversation import Chat
from edgeskip.runtime.decoding.model import Generation, Piece
from edgeskip.runtime.errors import EdgeskipError, RequestError
from edgeskip.runtime.terminal import print_pieces, print_statistics, shown

HELP = {
    "/reset": "begin anew; the system prompt stays",
    "/system TEXT": "begin anew with this system prompt; without TEXT, with none",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with one that was saved",
    "/stats": "show what the last answer cost, and how full the context is",
    "/help": "show this",
    "/bye": "end, as Ctrl-D does",
}
KEYS = "Enter sends, Alt-Enter begins another line, the arrows bring back what you said; Ctrl-C stops an answer."

Read = Callable[[], str | None]
"""What the user says next; None at the end."""


def read_terminal() -> Read:
    """Lines from a terminal, with editing, a history of this conversation, and messages of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    commands = WordCompleter([line.split()[0] for line in HELP], sentence=True)
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys,
        completer=commands,
        complete_while_typing=False,
        reserve_space_for_menu=4,
        prompt_continuation="  ",
    )

    def read() -> str | None:
        try:
            return session.prompt()
        except EOFError:
            return None
        except KeyboardInterrupt:  # it clears the line
            return ""

    return read


def read_lines() -> str | None:
    """The next line of standard input, where that is no terminal."""
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def converse(chat: Chat, read: Read, out: Console, notes: Console) -> int:
    """Talks until the input ends; answers go to `out`, all else to `notes`. Returns the exit code of the first message
    or command that failed, or 0.
    """
    failed = 0
    with _interrupts() as seen:
        while (said := read()) is not None:
            seen.clear()
            try:
                if said.startswith("/"):
                    if _command(chat, said.strip(), notes) == "end":
                        break
                elif said.strip():
                    _answer(chat, said, out, notes, lambda: bool(seen))
            except EdgeskipError as error:
                notes.print(shown(error), style="bold")
                failed = failed or error.exit_code
            seen.clear()
    return failed


def _answer(chat: Chat, said: str, out: Console, notes: Console, stopped: Callable[[], bool]) -> None:
    print_pieces(_until(stopped, chat.send(said), lambda: _say_dropped(chat, notes)), out)
    if stopped():
        notes.print("stopped", style="dim")
    elif chat.generation and chat.generation.stop_reason == "capacity":
        notes.print("the context is full, so the answer ends here", style="dim")


def _until(stopped: Callable[[], bool], pieces: Iterator[Piece], begun: Callable[[], None]) -> Iterator[Piece]:
    """The pieces until somebody stops them."""
    first = True
    for piece in pieces:
        if first:
            begun()
            first = False
        yield piece
        if stopped():
            pieces.close()  # type: ignore[attr-defined]
            return


def _say_dropped(chat: Chat, notes: Console) -> None:
    if count := chat.dropped_messages:
        capacity = chat.model.bundle.manifest.max_length
        notes.print(f"the context of {capacity} tokens is full: the oldest {count} messages are forgotten", style="dim")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes each Ctrl-C meanwhile: the first ends an answer between two tokens, and nothing else; a second one before
    the next message interrupts at once.
    """
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _command(chat: Chat, line: str, notes: Console) -> str:
    name, *rests = line.split(maxsplit=1)
    rest = "".join(rests)
    if name in ("/bye", "/exit", "/quit"):
        return "end"
    if name == "/help":
        notes.print("\n".join(f"{usage:14} {text}" for usage, text in HELP.items()), KEYS, sep="\n", markup=False)
    elif name == "/reset":
        chat.reset()
        notes.print("a new conversation", style="dim")
    elif name == "/system":
        chat.reset()
        chat.system = rest or None
        notes.print(f"a new conversation, {'with this' if rest else 'without a'} system prompt", style="dim")
    elif name == "/stats":
        _stats(chat, chat.generation, notes)
    elif name in ("/save", "/load"):
        if not rest:
            raise RequestError(name, "no file", wanted=f"{name} FILE")
        file = os.path.expanduser(rest)  # noqa: PTH111 - pathlib's raises where nobody has that name
        if name == "/load":
            chat.load(file)
        else:
            chat.save(file)
        notes.print(f"{len(chat.messages)} messages", style="dim")
    else:
        raise RequestError(name, "no such command", wanted=", ".join(usage.split()[0] for usage in HELP))
    return ""


def _stats(chat: Chat, generation: Generation | None, notes: Console) -> None:
    if generation is None:
        notes.print("no whole answer yet", style="dim")
        return
    print_statistics(generation, notes)
    used = len(generation.prompt_token_ids) + len(generation.token_ids) - 1  # the last token has not been read
    capacity = chat.model.bundle.manifest.max_length
    cached = generation.statistics.cached_tokens
    notes.print(
        f"[dim]context: {used} of {capacity} tokens; of the prompt's {len(generation.prompt_token_ids)}, {cached} were "
        f"there already[/dim]"
    )
