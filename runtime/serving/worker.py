"""One generation at a time, in a thread of its own, for as many requests as the queue holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from time import monotonic
from typing import TypeVar

from edgeskip.runtime.decoding.model import Piece, iterated

T = TypeVar("T")

_ENCODERS = 2


class QueueFullError(Exception):
    """As many requests wait as may."""


class ClosingError(Exception):
    """The server ends, and begins nothing more."""


class Worker:
    """Runs generations in the order of their requests.

    The device goes on whatever a client does: pieces wait in memory for one that reads slowly, and a client that leaves
    ends its own generation at the next piece. All but the threads happens in one event loop.

    Args:
        most_waiting: requests that may wait beside the one that is served.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most = most_waiting + 1
        self._turn = asyncio.Lock()
        self._decoding = ThreadPoolExecutor(1, "edgeskip-decoding")
        self._encoding = ThreadPoolExecutor(_ENCODERS, "edgeskip-encoding")
        self._mean_seconds = 1.0
        self.admitted = 0
        self.is_closing = False

    @property
    def waiting(self) -> int:
        """Requests that were taken and are not being decoded."""
        return max(0, self.admitted - self._turn.locked())

    @property
    def is_decoding(self) -> bool:
        """Whether the device has work."""
        return self._turn.locked()

    @property
    def retry_after_seconds(self) -> int:
        """When there will be room in the queue, by what generations took of late."""
        return max(1, round(self._mean_seconds))

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, kept until the request is served.

        Raises:
            QueueFullError: there is none.
            ClosingError: nothing is taken any more.
        """
        if self.is_closing:
            raise ClosingError
        if self.admitted >= self._most:
            raise QueueFullError
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def prepare(self, work: Callable[[], T]) -> T:
        """Does what needs no device, such as encoding a prompt, beside what is being decoded."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    async def pieces(self, generation: Iterator[Piece]) -> AsyncGenerator[Piece, None]:
        """The pieces of a generation, once it is its turn.

        Raises:
            ClosingError: nothing is begun any more.
            Exception: what the generation raises.
        """
        await self._turn.acquire()
        if self.is_closing:
            self._turn.release()
            raise ClosingError
        start = monotonic()

        def ended() -> None:
            self._mean_seconds += 0.2 * (monotonic() - start - self._mean_seconds)
            self._turn.release()

        async with aclosing(iterated(generation, self._decoding, ended)) as pieces:
            async for piece in pieces:
                yield piece

    def close(self) -> None:
        """Waits for what is being decoded."""
        self.is_closing = True
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._decoding.shutdown()
