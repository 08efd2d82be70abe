"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from edgeskip.runtime.decoding.chat import expect_chats
from edgeskip.runtime.errors import RequestError, reason
from edgeskip.runtime.serving.app import Served, make_app

_KEEP_ALIVE_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        RequestError: there is no such address here, or the port is taken.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # of an address, a negative one, which the system cannot spell
        why = os.strerror(number) if number > 0 else reason(error)
        raise RequestError(f"{host}:{port}", f"cannot listen there ({why})", fix="give another") from None


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def serve(served: Served, listening: socket.socket, grace_seconds: int, ready: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM: then what is being decoded may go on for so long, and what waits is refused."""
    expect_chats()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports cancelled requests as errors
    config = uvicorn.Config(
        make_app(served),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds,
    )
    try:
        _Server(config, served, ready).run(sockets=[listening])
    finally:
        served.worker.close()


class _Server(uvicorn.Server):
    """Tells when it listens, and ends by a signal as by its own will."""

    def __init__(self, config: uvicorn.Config, served: Served, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._served, self._ready = served, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Closes; a second signal does not wait."""
        self.force_exit = self.should_exit
        self.should_exit = self._served.worker.is_closing = True
