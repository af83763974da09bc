"""What our HTTP servers share of uvicorn: no signals of its own, its settings, the loop. The API server and the router
run on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

# Longer than the clients' own keep-alive, so that it is they who close an idle connection, never in mid-request.
_KEEP_ALIVE_SECONDS = 75
_LAST_BYTES_SECONDS = 5


class HttpServer(uvicorn.Server):
    """uvicorn without its own idea of signals: its owner decides what they mean."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


def http_config(app: Any, *, ssl_keyfile: str | None = None, ssl_certfile: str | None = None) -> uvicorn.Config:
    """For an ASGI app that logs its requests itself."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        app,
        http="httptools" if importlib.util.find_spec("httptools") else "h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile or None,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The faster event loop where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    return functools.partial(uvloop.new_event_loop)
