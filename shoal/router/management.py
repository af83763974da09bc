"""The router's own endpoints: probes, metrics, models, and /router/… for its operator. app.py calls it.

| path | 200 when |
|---|---|
| /livez | the router is there |
| /readyz | it takes new requests (which wait while no server is there) |
| /health, /ping | it takes new requests, and each model has a server that does |

/router/… asks for the admin key where one is set; else only this machine may. So do the paths of adapters.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.config.router_settings import normal_url
from shoal.errors import AuthenticationError, NotFoundError, UnavailableError
from shoal.log import get_logger
from shoal.network.http_server import comes_from_this_machine
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type
from shoal.router.asgi import Answer, Receive, Scope, read_body
from shoal.router.backend import Backend
from shoal.router.core import Router
from shoal.router.request import parse_object
from shoal.router.resume import replication
from shoal.version import __version__

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_BODY = 64 * 1024

logger = get_logger(__name__)


class MethodError(Exception):
    """The path is there, for another method (HTTP 405)."""

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self.body = ErrorBody(ErrorDetail(message, error_type(405), None, "method_not_allowed")).encode()
        self.headers = {"allow": ", ".join(allowed)}


def check_method(scope: Scope, *allowed: str) -> None:
    """Raises MethodError."""
    if scope["method"] not in allowed:
        does = f"{' and '.join(allowed)} do" if len(allowed) > 1 else f"{allowed[0]} does"
        raise MethodError(f"{scope['method']} does not work on {scope['path'][:200]}; {does}", allowed)


async def answer(router: Router, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: Answer) -> None:
    """A path of the router's own. Raises ShoalError."""
    path = scope["path"].rstrip("/")
    if path in ("/router/drain", "/router/undrain"):
        check_method(scope, "POST")
        check_operator(router, scope, headers)
        fields = parse_object(headers, await read_body(headers, receive, _MAX_BODY))
        await answer.json(_set_draining(router, fields, path == "/router/drain"))
        return
    if path == replication.PATH:
        check_method(scope, "POST")
        _check_peer(router, scope, headers)
        batch = replication.decode_batch(await read_body(headers, receive, replication.MAX_BATCH_BYTES))
        ring = router.entrance.max_ring_bytes
        reply = replication.take_batch(router.store, batch, router.peers.name, ring, time.monotonic())
        await answer.whole(200, replication.encode(reply), replication.MEDIA_TYPE)
        return
    if path == replication.CLAIM_PATH:
        check_method(scope, "POST")
        _check_peer(router, scope, headers)
        claim = replication.decode_claim(await read_body(headers, receive, replication.MAX_CLAIM_BYTES))
        given = await router.entrance.give(claim)
        await answer.whole(200, replication.encode(given), replication.MEDIA_TYPE)
        return
    check_method(scope, "GET", "HEAD")
    match path:
        case "/livez":
            await answer.json({"status": "ok"})
        case "/readyz":
            router.check_admitting()
            await answer.json({"status": "ok"})
        case "/health" | "/ping":
            _check_health(router)
            await answer.json({"status": "ok"})
        case "/version":
            await answer.json({"version": __version__, "router": True})
        case "/metrics":
            await answer.whole(200, router.metrics.render(), _METRICS_TYPE)
        case "/router/backends":
            check_operator(router, scope, headers)
            await answer.json(describe(router))
        case _:
            raise NotFoundError(
                f"there is no {path[:200]} here; there is /router/backends, /router/drain and /router/undrain",
                None,
                "not_found",
            )


async def models(router: Router, path: str, answer: Answer) -> None:
    """/v1/models: what all servers serve; /v1/models/NAME: one of it. Raises NotFoundError."""
    if path == "/v1/models":
        cards = [_card(router, name) for name in router.pool.models()]
        await answer.json({"object": "list", "data": cards})
    else:
        name = path.removeprefix("/v1/models/")
        router.pool.resolve(name)
        await answer.json(_card(router, name))


def _card(router: Router, name: str) -> dict[str, Any]:
    model = router.pool.aliases.get(name, name)
    lengths = [backend.max_lengths[model] for backend in router.pool if model in backend.max_lengths]
    parent = next((backend.adapters[model] for backend in router.pool if model in backend.adapters), None)
    card = {"id": name, "object": "model", "created": int(router.started), "owned_by": "shoal"}
    card |= {} if parent is None else {"parent": parent}
    return card | ({"max_model_len": min(lengths)} if lengths else {})


def describe(router: Router) -> dict[str, Any]:
    """Everything about the servers, for operators."""
    now = router.pool.clock()
    return {
        "admitting": router.admitting,
        "policy": router.settings.options.policy,
        "num_running": router.num_running,
        "num_waiting": router.admission.queue.num_waiting,
        "aliases": dict(router.pool.aliases),
        "backends": [backend.describe(now) for backend in router.pool],
        "num_kept": len(router.store),
        "peers": [
            {"url": link.url, "up": link.why_down is None, "why_down": link.why_down, "bytes": link.num_bytes}
            for link in router.peers.links
        ],
    }


def _set_draining(router: Router, fields: Mapping[str, Any], draining: bool) -> dict[str, Any]:
    url = fields.get("url")
    backend = router.pool.get(normal_url(url)) if isinstance(url, str) else None
    if backend is None:
        there = ", ".join(backend.url for backend in router.pool)
        raise NotFoundError(f"no server here has the url {str(url)[:200]!r}; there is {there}", "url", "not_found")
    if backend.draining != draining:
        backend.draining = draining
        logger.info("%s %s", backend.url, "is drained: it gets no new requests" if draining else "gets requests again")
        router.pool.changed()
    return _drain_state(backend)


def _drain_state(backend: Backend) -> dict[str, Any]:
    return {"url": backend.url, "draining": backend.draining, "num_running": backend.view.num_running}


def _check_health(router: Router) -> None:
    router.check_admitting()
    pool = router.pool
    now = pool.clock()
    without = [
        model
        for model in dict.fromkeys(model for backend in pool for model in backend.models)
        if not any(model in backend.models and backend.accepts(now) for backend in pool)
    ]
    if without or not any(backend.accepts(now) for backend in pool):
        models = f" for {', '.join(without)}" if without else ""
        raise UnavailableError(f"no server takes requests{models}: {pool.why_out(pool)}")


def check_operator(router: Router, scope: Scope, headers: Mapping[str, str]) -> None:
    """Raises AuthenticationError."""
    _check_key(router.settings.options.admin_key, "--admin-key", "admin key", scope, headers)


def _check_peer(router: Router, scope: Scope, headers: Mapping[str, str]) -> None:
    """Raises AuthenticationError."""
    options = router.settings.options
    _check_key(options.peer_key or options.admin_key, "--peer-key", "key of the routers", scope, headers)


def _check_key(key: str | None, flag: str, name: str, scope: Scope, headers: Mapping[str, str]) -> None:
    if key is None:
        if not comes_from_this_machine(scope):
            raise AuthenticationError(f"only this machine may use {scope['path'][:200]} while no {flag} is set")
        return
    kind, _, given = headers.get("authorization", "").partition(" ")
    matches = secrets.compare_digest(key.encode(), given.strip().encode("latin-1", "replace"))
    if kind.lower() != "bearer" or not matches:
        raise AuthenticationError(f"the {name} is missing or wrong; send the header Authorization: Bearer KEY")
