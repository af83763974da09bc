"""The application of a RayService: each replica of Ray Serve starts a server on its node and hands requests on to it.

KubeRay has Ray Serve import `build`. Ray Serve counts, places and replaces the replicas; all else the servers do.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import msgspec

from shoal import env
from shoal.cluster.deploy.actors import ReplicaActor
from shoal.cluster.deploy.records import Launch, Report
from shoal.errors import ConfigError, StartupError

# After the server's own time to finish requests: for its engine to end.
_END_SECONDS = 15.0
_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 5.0
# Of one connection to the next; the rest passes through as it is.
_HOP_BY_HOP = (b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"proxy-connection")
# The server has its own queue, and says 503 when it is full.
_MOST_REQUESTS = 10_000
_HEALTH_SECONDS = 5.0
# A server that ends so often before it is ready will not come up.
_MOST_EARLY_ENDS = 3

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AppArguments(msgspec.Struct, forbid_unknown_fields=True):
    """`args` of the application. flags: of `shoal serve`. needs_ray: the server places its ranks by Ray."""

    flags: list[str]
    replicas: int = 1
    num_gpus: float = 0
    num_cpus: float = 1
    needs_ray: bool = False
    start_seconds: float = 1800.0
    drain_seconds: float = 120.0


class ServerReplica:
    """One server, and an ASGI app before it. The constructor returns when the server is ready.

    Raises StartupError, with the server's last words, when it does not come up.
    """

    def __init__(self, arguments: AppArguments, program: list[str] | None = None) -> None:
        """program: what stands before the flags; default: `shoal serve`."""
        launch = Launch(
            program=program or [sys.executable, "-m", "shoal.cli", "serve"],
            flags=arguments.flags,
            variables={"SHOAL_API_KEY": key} if (key := env.api_key()) else {},
            takes_gpus=arguments.num_gpus > 0,
            needs_ray=arguments.needs_ray,
            grace=arguments.drain_seconds + _END_SECONDS,
        )
        self._grace = launch.grace
        self._actor = ReplicaActor(msgspec.json.encode(launch))
        try:
            self._url = self._wait_ready(arguments.start_seconds)
        except BaseException:
            self._actor.stop()
            raise
        # No limit for an answer: a stream may pause, and the server ends what does not get on.
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS), trust_env=False)

    def report(self) -> Report:
        return msgspec.json.decode(self._actor.report(), type=Report)

    def check(self) -> None:
        """Raises StartupError while the server is not well: Ray Serve sends no requests here then, and replaces it."""
        report = self.report()
        if report.state != "ready":
            raise StartupError(f"the server is {report.state}: {report.why or 'it takes no requests'}")

    async def stop(self) -> None:
        """Let requests finish, then end the server."""
        self._actor.stop()
        deadline = time.monotonic() + self._grace
        while self.report().state != "stopped" and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        await self._http.aclose()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        url = self.report().url or self._url
        target = scope.get("raw_path") or scope["path"].encode()
        if query := scope.get("query_string"):
            target = target.split(b"?")[0] + b"?" + query
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        request = self._http.build_request(
            scope["method"], url + target.decode("latin-1"), headers=headers, content=_body(receive)
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            await _refuse(send, str(error) or type(error).__name__)
            return
        try:
            kept = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            # What comes after the first byte cannot be an error any more: a cut stream is cut for the client, too.
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await response.aclose()

    def _wait_ready(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while True:
            report = self.report()
            if report.state == "ready" and report.url is not None:
                return report.url
            if report.num_early_ends >= _MOST_EARLY_ENDS:
                raise StartupError(f"the server does not come up: {report.why}")
            if time.monotonic() >= deadline:
                raise StartupError(f"the server was not ready within {seconds:g} s: {report.why or report.state}")
            time.sleep(_POLL_SECONDS)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("the client is gone")
        if chunk := message.get("body", b""):
            yield chunk
        if not message.get("more_body"):
            return


async def _refuse(send: Send, why: str) -> None:
    """The server is not there; it comes back, or Ray Serve replaces this replica."""
    error = {"message": f"the server cannot be reached: {why}", "type": "server_error", "code": None, "param": None}
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"error": error})})


def build(args: dict[str, Any]) -> Any:
    """The application, from `args` of the Serve config. Raises ConfigError where they do not fit."""
    from ray import serve  # what KubeRay has import this is Ray Serve itself

    try:
        arguments = msgspec.convert(args, AppArguments)
    except msgspec.ValidationError as error:
        raise ConfigError(f"args of the application: {error}") from error
    given = msgspec.to_builtins(arguments)

    class Shoal:
        """The deployment: Ray Serve calls these by name."""

        def __init__(self) -> None:
            self._replica = ServerReplica(msgspec.convert(given, AppArguments))

        def __serve_build_asgi_app__(self) -> ServerReplica:
            return self._replica

        def check_health(self) -> None:
            self._replica.check()

        async def __del__(self) -> None:
            if hasattr(self, "_replica"):
                await self._replica.stop()

    # Requests that run end first, and then the server: each has the time to drain.
    deployment = serve.deployment(
        name="server",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_gpus": arguments.num_gpus, "num_cpus": arguments.num_cpus},
        max_ongoing_requests=_MOST_REQUESTS,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=2 * arguments.drain_seconds + _END_SECONDS,
    )
    return deployment(serve.ingress()(Shoal)).bind()
