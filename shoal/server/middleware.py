"""What every HTTP request passes on its way in: an id, a line in the log, the keys. Pure ASGI, outermost first.

Nothing here may touch the body: answers are streamed through it.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.errors import AuthenticationError
from shoal.log import get_logger
from shoal.network.http_server import comes_from_this_machine
from shoal.protocol.internal import PREFIX, TOKEN_CODE, TOKEN_HEADER
from shoal.server.error_handlers import error_response, internal_error_response

# Where no key is asked for: probes, scrapers and the documentation. All else is guarded.
OPEN_PATHS = frozenset(
    {"/health", "/livez", "/readyz", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json"}
)
# The documentation's own scripts and styles.
STATIC_PATH = "/static-docs"
_PROBES = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CLIENT_GONE = 499  # as nginx logs it

logger = get_logger(__name__)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{STATIC_PATH}/")


class RequestContext:
    """Gives each request an id (the client's x-request-id where it sent one), logs it, and answers our own faults."""

    def __init__(self, app: ASGIApp, *, log_requests: bool) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["shoal.request_id"] = _request_id(scope)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:  # too late for an answer: cut it off, so that nobody takes it for whole
                raise
            await internal_error_response(request_id)(scope, receive, send_with_id)
        finally:
            self._log(scope, status or _CLIENT_GONE, time.monotonic() - started, request_id)

    def _log(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        log = logger.debug if scope["path"] in _PROBES or not self._log_requests else logger.info
        log("%s %s %d %.3f s %s", scope["method"], _printable(scope["path"]), status, seconds, request_id)


class InternalAccess:
    """Keeps /internal/… for routers: for who shows the secret, where there is one. Else an API key will do, where there
    are any; else only this machine may use it."""

    def __init__(self, app: ASGIApp, *, secret: str | None, has_keys: bool) -> None:
        self._app = app
        self._secret = secret
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why_not = self._why_not(scope) if scope["type"] == "http" and scope["path"].startswith(PREFIX) else None
        if why_not is None:
            await self._app(scope, receive, send)
        else:
            await error_response(AuthenticationError(why_not, TOKEN_CODE))(scope, receive, send)

    def _why_not(self, scope: Scope) -> str | None:
        if self._secret is not None:
            given = Request(scope).headers.get(TOKEN_HEADER, "")
            if secrets.compare_digest(self._secret.encode(), given.encode("latin-1")):
                return None
            found = "is wrong" if given else "is missing"
            return (
                f"the secret of {PREFIX}… {found} ({TOKEN_HEADER}); give the router this server's --internal-token, or "
                "the cluster's token that it has (SHOAL_CLUSTER_TOKEN)"
            )
        if self._has_keys or comes_from_this_machine(scope):
            return None
        return (
            f"only this machine may use {PREFIX}… while the server has neither a secret for it nor an API key; give "
            "server and router the same --internal-token"
        )


class Authentication:
    """Asks for `Authorization: Bearer KEY` wherever the path is not open, if there are keys at all."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        kind, _, given = Request(scope).headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time: nothing is to be learnt from how long it takes.
        matches = [secrets.compare_digest(key, given.strip().encode("latin-1")) for key in self._keys]
        if kind.lower() == "bearer" and any(matches):
            await self._app(scope, receive, send)
            return
        found = "the API key is wrong" if given else "an API key is missing"
        error = AuthenticationError(f"{found}; send the header Authorization: Bearer KEY")
        await error_response(error)(scope, receive, send)


def _request_id(scope: Scope) -> str:
    given = Request(scope).headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _printable(path: str) -> str:
    return path[:200] if path.isprintable() else repr(path[:200])
