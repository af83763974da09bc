"""What can go wrong with a fake server on purpose, and the control endpoint that makes it go wrong.

POST /fault {"kind": …} begins a fault, POST /heal ends all of them, GET /state tells what runs, GET /times when tokens
were made. The endpoint has a port of its own: a server that refuses connections can still be healed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.router.fakes.core import PacedCore

KINDS = {
    "error": "every request for tokens is answered with 500",
    "hang": "requests for tokens are taken and never answered",
    "half_event": "every stream breaks off in the middle of its next event",
    "freeze": "the engine makes no step; the server still says that it is there",
    "silent": "nothing is sent any more, connections stay open",
    "slow": "steps take `factor` times as long",
    "refuse": "connections are cut and new ones refused",
    "lost": "the engine is gone",
}


class Broken(Exception):
    """Makes the HTTP server close the connection in the middle of an answer."""


class Host(Protocol):
    """The fake server, as far as faults reach into it."""

    @property
    def core(self) -> PacedCore: ...

    async def refuse_connections(self) -> None: ...

    async def take_connections(self) -> None: ...


class FaultyApp:
    """The server's app with faults in front."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.kind: str | None = None
        self.num_struck = 0  # requests that met the fault
        self._healed = asyncio.Event()
        self._healed.set()

    def begin(self, kind: str) -> None:
        self.kind = kind
        self._healed.clear()

    def heal(self) -> None:
        self.kind = None
        self._healed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks_for_tokens = scope["type"] == "http" and scope["method"] == "POST"
        if asks_for_tokens and self.kind == "error":
            self.num_struck += 1
            await _answer(send, 500, {"error": {"message": "a fault on purpose", "type": "server_error"}})
            return
        if asks_for_tokens and self.kind == "hang":
            self.num_struck += 1
            while (await receive())["type"] != "http.disconnect":
                pass
            return

        async def send_faultily(message: Message) -> None:
            if self.kind == "silent":
                self.num_struck += 1
                await self._healed.wait()
            if self.kind == "half_event" and asks_for_tokens and len(message.get("body", b"")) > 1:
                self.num_struck += 1
                await send({**message, "body": message["body"][: len(message["body"]) // 2], "more_body": True})
                raise Broken
            await send(message)

        await self._app(scope, receive, send_faultily)


class Control:
    """The control endpoint, an ASGI app."""

    def __init__(self, host: Host, app: FaultyApp) -> None:
        self._host = host
        self._app = app
        self._routes: dict[tuple[str, str], Callable[[dict[str, Any]], Awaitable[Any]]] = {
            ("POST", "/fault"): self._begin,
            ("POST", "/heal"): self._heal,
            ("GET", "/state"): self._state,
            ("GET", "/times"): self._times,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await _answer(send, 404, {"error": f"there is {sorted(self._routes)}"})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            await _answer(send, 200, await route(json.loads(body or b"{}")))
        except (ValueError, KeyError) as error:
            await _answer(send, 400, {"error": str(error)})

    async def _begin(self, order: dict[str, Any]) -> Any:
        kind, core = order["kind"], self._host.core
        if kind not in KINDS:
            raise ValueError(f"there is no fault {kind!r}, but {', '.join(KINDS)}")
        match kind:
            case "freeze":
                core.freeze()
            case "slow":
                core.slow = float(order["factor"])
            case "lost":
                core.die()
            case "refuse":
                await self._host.refuse_connections()
            case _:
                self._app.begin(kind)
        return await self._state({})

    async def _heal(self, order: dict[str, Any]) -> Any:
        self._app.heal()
        await self._host.take_connections()
        core = self._host.core
        core.thaw()
        core.slow = 1.0
        return await self._state({})

    async def _times(self, order: dict[str, Any]) -> Any:
        return self._host.core.token_times

    async def _state(self, order: dict[str, Any]) -> Any:
        core = self._host.core
        return {
            "fault": self._app.kind,
            "num_struck": self._app.num_struck,
            "running": sorted(core.running),
            "num_waiting": len(core.waiting),
            "num_tokens": core.stats.generation_tokens_total,
        }


async def _answer(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
