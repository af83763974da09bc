"""What our HTTP servers share: uvicorn without signals of its own, TLS, CORS, the loop. The API server and the router
run on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import ipaddress
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.errors import ConfigError
from shoal.network.http_protocol import BoundedHttpProtocol

# Longer than the clients' own keep-alive, so that it is they who close an idle connection, never in mid-request.
_KEEP_ALIVE_SECONDS = 75
_LAST_BYTES_SECONDS = 5
# Not for web pages, which a browser on this machine may show: what is open to this machine is not open to them.
_NOT_FOR_PAGES = ("/router/", "/internal/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_EXPOSED_HEADERS = ("x-request-id", "retry-after", "idempotency-key")


class HttpOptions(Protocol):
    """What both servers are told of TLS and CORS: as config.options.HttpOptions declares it."""

    @property
    def ssl_keyfile(self) -> str | None: ...
    @property
    def ssl_certfile(self) -> str | None: ...
    @property
    def ssl_ca_certs(self) -> str | None: ...
    @property
    def ssl_cert_reqs(self) -> int | None: ...
    @property
    def allowed_origins(self) -> Sequence[str]: ...
    @property
    def allowed_methods(self) -> Sequence[str]: ...
    @property
    def allowed_headers(self) -> Sequence[str]: ...
    @property
    def allow_credentials(self) -> bool: ...


class HttpServer(uvicorn.Server):
    """uvicorn without its own idea of signals: its owner decides what they mean."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


def http_config(app: Any, options: HttpOptions | None = None) -> uvicorn.Config:
    """For an ASGI app that logs its requests itself. options: for TLS; None: without."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    tls: dict[str, Any] = {}
    if options is not None and options.ssl_certfile:
        tls = {
            "ssl_certfile": options.ssl_certfile,
            "ssl_keyfile": options.ssl_keyfile,
            "ssl_ca_certs": options.ssl_ca_certs,
            "ssl_cert_reqs": _cert_reqs(options),
        }
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        **tls,
    )


def check_tls(options: HttpOptions) -> None:
    """Raise ConfigError for TLS files that are missing, do not go together or cannot be read."""
    if not options.ssl_certfile:
        for flag, given in (
            ("--ssl-keyfile", options.ssl_keyfile),
            ("--ssl-ca-certs", options.ssl_ca_certs),
            ("--ssl-cert-reqs", options.ssl_cert_reqs),
        ):
            if given:
                raise ConfigError(f"{flag} needs --ssl-certfile with the certificate (PEM)")
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = " and ".join(filter(None, (options.ssl_certfile, options.ssl_keyfile)))
        raise ConfigError(f"TLS cannot use {files}: {error}; both must be PEM files that belong together") from error
    if options.ssl_ca_certs:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"TLS cannot use {options.ssl_ca_certs}: {error}; it must be a PEM file with certificates of CAs"
            ) from error
    elif _cert_reqs(options):
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs with the CAs that sign clients' certificates (PEM)")


def _cert_reqs(options: HttpOptions) -> int:
    """Of ssl: CERT_NONE, CERT_OPTIONAL or CERT_REQUIRED. Who names CAs wants clients to be checked."""
    if options.ssl_cert_reqs is not None:
        return options.ssl_cert_reqs
    return int(ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE)


class Cors:
    """ASGI around an app: web pages of these origins may call it, but for what is its operator's."""

    def __init__(self, app: ASGIApp, *, options: HttpOptions) -> None:
        self._app = app
        self._for_pages = CORSMiddleware(
            app,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods,
            allow_headers=options.allowed_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=_EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_NOT_FOR_PAGES):
            await self._app(scope, receive, send)
        elif any(name == b"origin" for name, _ in scope["headers"]):
            await self._for_pages(scope, receive, send)
        else:
            await self._app(scope, receive, functools.partial(_send_varying, send))


def _send_varying(send: Send, message: Message) -> Awaitable[None]:
    """What no page asked for is not for a page's cache. No coroutine of its own: each token of a stream passes here."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), (b"vary", b"Origin")]
    return send(message)


def comes_from_this_machine(scope: Mapping[str, Any]) -> bool:
    """Whether the other end of a request's connection (ASGI scope) is a loopback address, or the very address that it
    leads to, which nobody else can have."""
    client, server = scope.get("client"), scope.get("server")
    if client is not None and server is not None and client[0] == server[0]:
        return True
    try:
        address = ipaddress.ip_address(client[0] if client is not None else "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The faster event loop where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    return functools.partial(uvloop.new_event_loop)
