"""edgeskip serve."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from edgeskip.runtime.commands.options import (
    backend_option,
    bundle_argument,
    device_option,
    draft_option,
    exit_option,
    first,
    require,
    say,
    threads_option,
)


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What clients call the model.  [default: the bundle's folder]")
@click.option("--api-key", envvar="EDGESKIP_API_KEY", help="What clients must show; better given as EDGESKIP_API_KEY.")
@click.option(
    "--queue", type=click.IntRange(0), default=32, show_default=True, help="Requests that may wait for their turn."
)
@click.option(
    "--grace", type=click.IntRange(0), default=30, show_default=True, help="Seconds to end a text in when stopped."
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Host memory for what the caches held of earlier texts.",
)
@draft_option
@exit_option
@backend_option
@device_option
@threads_option
def serve(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    queue: int,
    grace: int,
    prefix_cache_mb: int,
    draft: Any,
    exit_layer: Any,
    backend: Any,
    device: Any,
    threads: int,
) -> None:
    """Serve a BUNDLE to clients of OpenAI's interface, until Ctrl-C or SIGTERM."""
    require("serve")
    logging.basicConfig(level=logging.WARNING, format="edgeskip: %(message)s")
    from edgeskip.runtime.load import load
    from edgeskip.runtime.serving.app import Served
    from edgeskip.runtime.serving.server import is_loopback, listen, url_of
    from edgeskip.runtime.serving.server import serve as run
    from edgeskip.runtime.serving.worker import Worker
    from edgeskip.runtime.terminal import console, print_model, progress_bar

    with listen(host, port) as listening:
        with progress_bar() as progress:
            model = load(
                bundle, backend=backend, device=device, threads=threads, exit_layer=exit_layer, progress=progress
            )
        with model:
            model.held.most_saved_bytes, model.draft = prefix_cache_mb * 10**6, first(draft, model.draft)
            model.check()  # what no request could be served with
            called = name or bundle.resolve().name
            served = Served(model, Worker(queue), called, api_key or None, is_loopback(listening))
            print_model(model, console(stderr=True))
            if not (served.loopback or served.api_key):
                say(f"{host} is open to others, and no API key is set: anyone who reaches it can use it.")
            run(served, listening, grace, lambda: say(f"{called} is served at {url_of(listening)}"))
