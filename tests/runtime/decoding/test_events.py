"""Generation for event loops: the same text, while the loop goes on; and what is logged."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress

import pytest

import edgeskip
from edgeskip.runtime.decoding.model import Piece, iterated
from edgeskip.runtime.errors import RequestError


@pytest.fixture(scope="module")
def model(chat_bundles):
    with edgeskip.load(chat_bundles(1024).folder, device="cpu", threads=1) as loaded:
        yield loaded


def test_an_event_loop_goes_on_while_a_text_comes(model):
    wanted = model.complete("def f(x):", max_new_tokens=64)
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def collect():
        counting = asyncio.ensure_future(count())
        pieces = [piece async for piece in model.agenerate("def f(x):", max_new_tokens=64)]
        counting.cancel()
        return pieces

    pieces = asyncio.run(collect())
    assert "".join(map(str, pieces)) == wanted.text
    assert pieces[-1].generation.token_ids == wanted.token_ids
    assert turns > len(pieces)


def test_leaving_ends_the_text_and_frees_the_model(model):
    async def leave():
        async with aclosing(model.agenerate("tell", max_new_tokens=1000)) as pieces:
            async for _ in pieces:
                break
        return [piece async for piece in model.agenerate("tell", max_new_tokens=3)][-1]

    assert len(asyncio.run(leave()).generation.token_ids) == 3


def test_a_task_that_is_cancelled_frees_the_model(model):
    async def cancel():
        begun = asyncio.Event()

        async def ask():
            async for _ in model.agenerate("tell", max_new_tokens=1000):
                begun.set()

        asking = asyncio.create_task(ask())
        await begun.wait()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        return [piece async for piece in model.agenerate("tell", max_new_tokens=3)][-1]

    assert len(asyncio.run(cancel()).generation.token_ids) == 3


def test_what_is_raised_in_the_thread_is_raised_here(model):
    async def ask(prompt):
        return [piece async for piece in model.agenerate(prompt)]

    with pytest.raises(RequestError, match="prompt: empty"):
        asyncio.run(ask(""))

    def breaks():
        yield Piece("a")
        raise ValueError("broken")

    async def collect(into):
        async for item in iterated(breaks()):
            into.append(item)

    got = []
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect(got))
    assert list(map(str, got)) == ["a"]


def test_the_logger_tells_what_was_loaded_and_what_came(chat_bundles, caplog):
    with caplog.at_level(logging.DEBUG, "edgeskip"), edgeskip.load(chat_bundles(1024).folder, device="cpu") as model:
        model.complete("abc", max_new_tokens=4)
    loaded, made = (record.getMessage() for record in caplog.records)
    assert loaded == f"{model.bundle.folder}: {model.session.description}"
    assert made == f"4 tokens after {len(model.encode('abc'))}, ended by max_new_tokens"
