"""A conversation with a model: what was said, and room made for what comes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeskip.runtime.decoding.chat import check_message, check_takes_chats, expect_chats
from edgeskip.runtime.decoding.model import Generation, Model, Piece
from edgeskip.runtime.errors import RequestError, reason
from edgeskip.runtime.files import write_file
from edgeskip.runtime.reading import read_json

Message = Mapping[str, Any]
"""A message with `role` and `content`."""

_LOG = logging.getLogger(__name__)


class Chat:
    """A conversation with a model, through its chat template.

    Each turn computes its own tokens alone, as the model's caches hold those before it. Several conversations can take
    turns on one model; give it room for their rows in host memory with `model.held.most_saved_bytes`.

    `messages` are those that were said, after the system prompt; `generation` is the latest answer, if it came to its
    end; `dropped_messages` counts those that the latest turn left out for good, because the context was full.

    Args:
        model: answers.
        system: the system prompt, which stays at the beginning.
        messages: what was said before.
        settings: how to answer, as for `Model.generate`.

    Raises:
        RequestError: the model has no chat template, a message is malformed, or a setting cannot be served.
        BackendError: there is a grammar and its library is not installed.
    """

    def __init__(self, model: Model, *, system: str | None = None, messages: Sequence[Message] = (), **settings: Any):
        if not isinstance(model, Model):
            raise RequestError("model", f"{model!r:.60}", wanted="what edgeskip.load returns")
        check_takes_chats(model.bundle)
        if not (system is None or isinstance(system, str)):
            raise RequestError("system", f"{system!r:.60}", wanted="a text")
        if not isinstance(messages, Sequence):
            raise RequestError("messages", f"{messages!r:.60}", wanted="a list of messages")
        model.check(**settings)
        expect_chats()
        self.model, self.system, self.settings = model, system, settings
        self.messages: list[Message] = [check_message(f"message {n}", said) for n, said in enumerate(messages, 1)]
        self.generation: Generation | None = None
        self.dropped_messages = 0

    def send(self, text: str) -> Iterator[Piece]:
        """Says something and streams the answer. Closing the iterator ends it: the answer is then what has come.

        Where the context would have no room for an answer, the oldest messages go, until half of it is free: so that
        this does not happen, and the rest is not computed anew, at every turn.

        Raises:
            RequestError: on the first piece, if the message is malformed or too long; it is then not part of the
                conversation.
        """
        said = {"role": "user", "content": text}
        prompt_ids, kept = self._fitted([*self.messages, said])
        pieces = self.model.generate(prompt_ids, **self.settings)
        answer: list[str] = []
        try:
            for piece in pieces:
                answer.append(piece.text)
                self.generation = piece.generation
                if len(answer) == 1:  # it is under way, so it is said
                    self.dropped_messages = len(self.messages) + 1 - len(kept)
                    self.messages = kept
                    if self.dropped_messages:
                        _LOG.warning("the context is full: the oldest %d messages were dropped", self.dropped_messages)
                yield piece
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})

    def ask(self, text: str) -> str:
        """Says something and returns the whole answer."""
        return "".join(piece.text for piece in self.send(text))

    def reset(self) -> None:
        """Begins anew, with the system prompt."""
        self.messages, self.generation, self.dropped_messages = [], None, 0

    def save(self, path: Path | str) -> None:
        """Writes the conversation to a JSON file.

        Raises:
            RequestError: it cannot be written.
        """
        place = _file(path)
        written = json.dumps({"system": self.system, "messages": self.messages}, indent=2)
        try:
            write_file(place, f"{written}\n")
        except (OSError, ValueError) as error:
            raise RequestError(place, f"cannot be written ({reason(error)})", fix="give another file") from None

    def load(self, path: Path | str) -> None:
        """Goes on with a conversation that was saved.

        Raises:
            RequestError: the file cannot be read, or is not a conversation.
        """
        place = _file(path)
        data = read_json(place, RequestError)
        if not isinstance(data, dict) or set(data) != {"system", "messages"}:
            raise RequestError(place, "not a conversation", wanted="a file that was saved from one")
        system, messages = data["system"], data["messages"]
        if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
            raise RequestError(place, "not a conversation", wanted="a system prompt and a list of messages")
        checked = [check_message(f"{place}, message {number}", said) for number, said in enumerate(messages, 1)]
        self.reset()
        self.system, self.messages = system, [*checked]

    def _fitted(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """The prompt's token ids, and the messages that have room."""
        capacity = self.model.bundle.manifest.max_length
        ids, kept = self._encoded(messages, capacity + 1), messages
        if len(ids) > capacity - self._room(capacity):
            while len(ids) > capacity // 2 and len(kept) > 1:
                after = next((i for i, message in enumerate(kept) if i and message["role"] == "user"), len(kept) - 1)
                kept = kept[after:]
                ids = self._encoded(kept, capacity + 1)
        return self._encoded(kept) if len(ids) > capacity else ids, kept

    def _room(self, capacity: int) -> int:
        """Tokens that an answer should have room for."""
        asked: int = self.settings.get("max_new_tokens") or capacity
        return min(asked, capacity // 4)

    def _encoded(self, messages: list[Message], most: int | None = None) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.encode([*system, *messages], most=most)


def _file(path: Path | str) -> Path:
    if not isinstance(path, str | Path) or path == "":
        raise RequestError("file", f"{path!r:.60}", wanted="a path")
    return Path(path)
