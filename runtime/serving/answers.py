"""What clients get, in OpenAI's shapes: objects, the events of a stream, and errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

from edgeskip.runtime.decoding.model import Generation, Piece
from edgeskip.runtime.decoding.sampling import TokenLogprob
from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.decoding.streaming import token_spelling
from edgeskip.runtime.serving.calls import Call, CallReader

_FINISHES = {"eos": "stop", "stop_string": "stop", "max_new_tokens": "length", "capacity": "length"}

END = "data: [DONE]\n\n"
"""The last event of a stream."""


class Answer:
    """The objects of one answer, which have an id and a time in common.

    Args:
        model: the name that it is served under.
        tokenizer: spells tokens, where their probabilities are told.
        is_chat: whether it is a chat's next message or a text's continuation.
        calls: reads calls of tools out of the text, where there may be any.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, *, is_chat: bool, calls: CallReader | None = None) -> None:
        self._is_chat, self._calls, self._spelling = is_chat, calls, token_spelling(tokenizer)
        self._num_calls = self._offset = 0
        self._untold: list[TokenLogprob] = []
        self._kind = "chat.completion" if is_chat else "text_completion"
        name = "chatcmpl" if is_chat else "cmpl"
        self._head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer at once."""
        parts = [*self._parts(generation.text), *self._rest()]
        text = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := [_call(part) for part in parts if isinstance(part, Call)]:
            message |= {"content": text or None, "tool_calls": calls}
        told = None if generation.logprobs is None else self._told(generation.logprobs)
        choice = self._choice({"message": message} if self._is_chat else {"text": text}, told, self._finish(generation))
        return {**self._head, "object": self._kind, "choices": [choice], "usage": usage_of(generation.statistics)}

    def begins(self) -> list[str]:
        """The events before any text."""
        return [self._event({"delta": {"role": "assistant", "content": ""}})] if self._is_chat else []

    def goes_on(self, piece: Piece) -> list[str]:
        """The events with more text, each with the probabilities of the tokens that came since the one before it."""
        self._untold += piece.logprobs
        return [self._event(self._said(part)) for part in self._parts(piece.text)]

    def ends(self, last: Piece, *, include_usage: bool) -> list[str]:
        """The events after all text."""
        generation = last.generation
        assert generation is not None
        self._untold += last.logprobs
        rest = [self._event(self._said(part)) for part in self._rest()]
        said: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        events = [*rest, self._event(said, self._finish(generation))]
        if include_usage:
            events.append(event(self._chunk([]) | {"usage": usage_of(generation.statistics)}))
        return [*events, END]

    def _parts(self, text: str) -> Sequence[str | Call]:
        return [text] if self._calls is None else self._calls.push(text)

    def _rest(self) -> Sequence[str | Call]:
        return [] if self._calls is None else self._calls.finish()

    def _said(self, part: str | Call) -> dict[str, Any]:
        """A part of the answer as an event says it."""
        if isinstance(part, str):
            return {"delta": {"content": part}} if self._is_chat else {"text": part}
        self._num_calls += 1
        return {"delta": {"tool_calls": [{"index": self._num_calls - 1, **_call(part)}]}}

    def _event(self, said: Mapping[str, Any], finish: str | None = None) -> str:
        told = self._told(self._untold) if self._untold else None
        self._untold = []
        return event(self._chunk([self._choice(said, told, finish)]))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": f"{self._kind}.chunk" if self._is_chat else self._kind, "choices": choices}

    def _choice(self, said: Mapping[str, Any], told: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": told, "finish_reason": finish}

    def _finish(self, generation: Generation) -> str:
        finish = _FINISHES[generation.stop_reason]
        return "tool_calls" if finish == "stop" and self._calls is not None and self._calls.has_called else finish

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Probabilities of tokens, in the shape of chats or that of texts."""
        if self._is_chat:
            content = [
                self._spelled(one.token_id, one.logprob)
                | {"top_logprobs": [self._spelled(token_id, logprob) for token_id, logprob in one.top]}
                for one in logprobs
            ]
            return {"content": content, "refusal": None}
        tokens = [self._text(one.token_id) for one in logprobs]
        *offsets, self._offset = accumulate(map(len, tokens), initial=self._offset)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._text(token_id): logprob for token_id, logprob in one.top} for one in logprobs],
            "text_offset": offsets,
        }

    def _spelled(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(self._spelling(token_id))}

    def _text(self, token_id: int) -> str:
        return self._spelling(token_id).decode(errors="replace")


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_of(statistics: Statistics) -> dict[str, Any]:
    """Tokens read and made, those of the prompt that needed no computing, and drafts by what became of them."""
    return {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": statistics.new_tokens,
        "total_tokens": statistics.prompt_tokens + statistics.new_tokens,
        "prompt_tokens_details": {"cached_tokens": statistics.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": statistics.accepted,
            "rejected_prediction_tokens": statistics.drafted - statistics.accepted,
        },
    }


def event(data: Mapping[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def error_of(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error, as clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_of(name: str, created: int) -> dict[str, Any]:
    """A model, as clients list it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgeskip"}
