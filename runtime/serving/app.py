"""The server's routes: who may ask, what is answered, and what becomes of errors and of clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from edgeskip.runtime.decoding.chat import chat_template, check_takes_chats
from edgeskip.runtime.decoding.model import Generation, Model, Piece
from edgeskip.runtime.errors import EdgeskipError, RequestError
from edgeskip.runtime.grammar.grammar import Grammar
from edgeskip.runtime.grammar.masks import UnsoundError
from edgeskip.runtime.reading import check_plain
from edgeskip.runtime.serving.answers import Answer, error_of, event, model_of
from edgeskip.runtime.serving.calls import CallFormat, CallReader, call_format, demanded_calls
from edgeskip.runtime.serving.metrics import CONTENT_TYPE, Metrics
from edgeskip.runtime.serving.requests import Asked, read_request
from edgeskip.runtime.serving.worker import ClosingError, QueueFullError, Worker

MOST_BYTES = 1 << 23
"""Of a request's body."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_LEFT = 499
"""The status, in the metrics alone, of a request whose client left."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What is served, and to whom.

    `name` is the model's; `api_key` what clients must show, if anything; `loopback` says that clients are on this
    machine, so that a page in its browser, which reaches it under another name, is none.
    """

    model: Model
    worker: Worker
    name: str
    api_key: str | None = None
    loopback: bool = True


def make_app(served: Served) -> Starlette:
    """The server as an ASGI application."""
    created, metrics = int(time.time()), Metrics(served.worker)
    form = call_format(chat_template(served.model.bundle))

    def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_of(served.name, created)]})

    def model(request: Request) -> Response:
        check_name(request.path_params["name"], served.name)
        return JSONResponse(model_of(served.name, created))

    def health(_: Request) -> Response:
        closing = served.worker.is_closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    def figures(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def answers(is_chat: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            asked = read_request(await _body(request), is_chat=is_chat)
            check_name(asked.model, served.name)
            return _Answering(served, metrics, asked, form)

        return answer

    def guarded(endpoint: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Looks at the client first, and counts what is answered before anything is generated."""

        async def checked(request: Request) -> Response:
            try:
                _check_client(request, served)
                made = endpoint(request)
                response: Response = await made if isinstance(made, Awaitable) else made
            except Exception as error:
                response = _refusal(error, served.worker)
            if not isinstance(response, _Answering):
                metrics.requests.labels(request.scope["route"].path, response.status_code).inc()
            return response

        return checked

    routes = [
        Route("/v1/chat/completions", guarded(answers(is_chat=True)), methods=["POST"]),
        Route("/v1/completions", guarded(answers(is_chat=False)), methods=["POST"]),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/health", health),
        Route("/metrics", figures),
    ]

    def no_route(_: Request, error: Exception) -> Response:
        return _refusal(error, served.worker)

    return Starlette(routes=routes, exception_handlers={HTTPException: no_route})


def check_name(asked: str, name: str) -> None:
    """Checks that a client asks for the model that is served.

    Raises:
        NoModelError: it asks for another.
    """
    if asked != name:
        raise NoModelError(404, f"there is no model {asked!r:.100} here; ask for {name!r}")


def _check_client(request: Request, served: Served) -> None:
    if served.api_key is not None:
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        # the bytes as they came
        right = hmac.compare_digest(shown.encode("latin-1"), served.api_key.encode(errors="surrogateescape"))
        if kind.lower() != "bearer" or not right:
            raise HTTPException(401, "the API key is missing or wrong; send `Authorization: Bearer KEY`")
    elif served.loopback and request.url.hostname not in LOOPBACK:
        wanted = f"{', '.join(LOOPBACK)}, or an API key"
        raise HTTPException(403, f"the host is {request.url.hostname!r:.100}; wanted {wanted}")


async def _body(request: Request) -> Any:
    """The JSON of a request. Its type must say so, as a page from elsewhere cannot without being asked back."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be JSON, with `Content-Type: application/json`")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise HTTPException(413, f"the body is too large; send at most {MOST_BYTES} bytes")
    try:
        parsed = json.loads(data)
        check_plain(parsed)
    except (ValueError, RecursionError) as error:
        raise RequestError("body", f"not valid JSON ({error})") from None
    return parsed


class _Answering(Response):
    """A response that is generated, whole or as a stream, unless the client leaves first."""

    def __init__(self, served: Served, metrics: Metrics, asked: Asked, form: CallFormat | None) -> None:
        super().__init__()
        self._served, self._metrics, self._asked = served, metrics, asked
        self._prompt_tools: Sequence[Any] = ()
        self._settings, calls = asked.settings, None
        if asked.tools is not None:
            if form is None:
                check_takes_chats(served.model.bundle)
                found = "the model's chat template takes none, or shows no way of writing calls that is known here"
                raise RequestError("tools", found, fix="leave them out")
            self._prompt_tools = asked.tools.given
            calls = CallReader(form, [*asked.tools.schemas], several=asked.tools.several)
            if asked.tools.required:
                demanded = demanded_calls(form, asked.tools.schemas, several=asked.tools.several)
                self._settings = {**asked.settings, "grammar": demanded}
        self._answer = Answer(served.name, served.model.tokenizer, is_chat=asked.is_chat, calls=calls)
        self._start = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole, status = False, _LEFT

        async def say(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        generating = asyncio.ensure_future(self._respond(scope, receive, say))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait([generating, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not whole:  # it may have all and be gone before the task ends
                generating.cancel()
            with suppress(asyncio.CancelledError):
                status = await generating
            self._metrics.requests.labels(scope["route"].path, status).inc()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Answers; returns the status. An error after the beginning of a stream is its last event."""
        begun = False
        try:
            with self._served.worker.place():
                generation = await self._generation()
                if not self._asked.stream:
                    response: Response = JSONResponse(self._answer.whole(await self._whole(generation)))
                else:
                    begun = True
                    await self._stream(generation, send)
                    return 200
        except Exception as error:
            grammar = "response_format" if self._asked.tools is None else "tool_choice"
            response = _refusal(error, self._served.worker, grammar=grammar)
            if begun:
                await send({"type": "http.response.body", "body": event(json.loads(bytes(response.body))).encode()})
                return response.status_code
        await response(scope, receive, send)
        return response.status_code

    async def _generation(self) -> Iterator[Piece]:
        """A generation that is ready to run: its prompt is encoded and has room, its grammar is sound."""
        model, prompt = self._served.model, self._asked.prompt
        ids = await self._served.worker.prepare(lambda: model.encode(prompt, tools=self._prompt_tools))
        capacity = model.bundle.manifest.max_length
        if len(ids) > capacity:
            raise _ContextFullError("prompt", f"{len(ids)} tokens", wanted=f"at most {capacity}", fix="shorten it")
        return await self._served.worker.prepare(lambda: self._begun(ids))

    def _begun(self, ids: list[int]) -> Iterator[Piece]:
        """Begins to generate. Of a grammar that was made of tools, what is wrong with one of these is told."""
        generate, tools = self._served.model.generate, self._asked.tools
        try:
            return generate(ids, **self._settings)
        except UnsoundError:
            if tools is None:
                raise
        for name, schema in tools.schemas.items():
            try:
                generate(ids, **{**self._settings, "grammar": Grammar.from_json_schema(schema)})
            except UnsoundError as error:
                raise RequestError("tools", f"the parameters of {name} are {error.found}") from None
        raise RequestError("tools", "more than llguidance takes together", fix="give fewer or simpler ones")

    async def _whole(self, generation: Iterator[Piece]) -> Generation:
        async with aclosing(self._served.worker.pieces(generation)) as pieces:
            async for piece in pieces:
                self._note(piece)
        assert piece.generation is not None
        return piece.generation

    async def _stream(self, generation: Iterator[Piece], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(events: list[str], *, more: bool = True) -> None:
            body = "".join(events).encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await say(self._answer.begins())
        async with aclosing(self._served.worker.pieces(generation)) as pieces:
            async for piece in pieces:
                self._note(piece)
                if piece.generation is None:
                    await say(self._answer.goes_on(piece))
                else:  # in one message: a client may leave with the last event
                    await say(self._answer.ends(piece, include_usage=self._asked.include_usage), more=False)

    def _note(self, piece: Piece) -> None:
        """Counts a piece: the first one by its time, the last one by its statistics."""
        if self._start:
            self._metrics.first_token.observe(time.monotonic() - self._start)
            self._start = 0.0
        if piece.generation is not None:
            self._metrics.add(piece.generation.statistics)


class NoModelError(HTTPException):
    """A client asks for a model that is not served."""


class _ContextFullError(RequestError):
    """A prompt that is longer than the caches."""


async def _left(receive: Receive) -> None:
    """Waits until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


_CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "queue_full", 503: "closing"}


def _refusal(error: Exception, worker: Worker, *, grammar: str = "response_format") -> Response:
    """An error as clients read it; what only the server's owner can mend is logged. `grammar` is the parameter that a
    grammar came from.
    """
    headers: Mapping[str, str] | None = None
    param = code = None
    if isinstance(error, RequestError):
        status, message, param = 400, str(error), grammar if error.place == "grammar" else error.place.replace(" ", "_")
        code = "context_length_exceeded" if isinstance(error, _ContextFullError) else None
    elif isinstance(error, QueueFullError):
        status, message = 429, "too many requests are waiting"
        headers = {"Retry-After": str(worker.retry_after_seconds)}
    elif isinstance(error, ClosingError):
        status, message = 503, "the server is closing"
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
        code = "model_not_found" if isinstance(error, NoModelError) else None
    elif isinstance(error, ClientDisconnect):
        status, message = _LEFT, "the client left"
    else:
        known = isinstance(error, EdgeskipError)
        _LOG.error("a request failed: %s", error, exc_info=None if known else error)
        status, message = 500, str(error) if known else "an error of the server"
    kind = "invalid_request_error" if status < 429 else "server_error" if status >= 500 else "rate_limit_error"
    body = error_of(message, kind, param=param, code=code or _CODES.get(status))
    return JSONResponse(body, status, headers)
