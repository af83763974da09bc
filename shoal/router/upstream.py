"""What all HTTP to backends shares: the pooled session, headers, and reading answers that are errors."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp
import msgspec

from shoal.config.router_settings import BackendSpec
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type
from shoal.protocol.internal import TOKEN_HEADER
from shoal.router.outcome import Refused
from shoal.router.request import GenerationRequest

# Shorter than servers keep idle connections (uvicorn: 5 s), so that no request meets one that is just being closed.
_KEEP_ALIVE_SECONDS = 4.0
_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_MAX_ERROR_BYTES = 1024 * 1024
_PASSED_ON = ("retry-after", "www-authenticate")


def make_session() -> aiohttp.ClientSession:
    """One for the whole router: as many connections as there are requests, kept open between them."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS, ttl_dns_cache=10)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"accept-encoding": "identity", "user-agent": "shoal-router"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        trust_env=False,
    )


def authorization_of(spec: BackendSpec, given: str | None = None) -> dict[str, str]:
    """The backend's own key; the client's where it has none and `given` is passed on."""
    if spec.api_key is not None:
        return {"authorization": f"Bearer {spec.api_key}"}
    return {"authorization": given} if given else {}


def internal_headers(secret: str | None) -> dict[str, str]:
    """For /internal/… of a server."""
    return {} if secret is None else {TOKEN_HEADER: secret}


def backend_headers(spec: BackendSpec, request: GenerationRequest) -> dict[str, str]:
    """Of a request that is forwarded."""
    return {
        "content-type": "application/json",
        "x-request-id": request.request_id,
        **authorization_of(spec, request.authorization),
    }


async def read_refusal(response: aiohttp.ClientResponse) -> Refused:
    """An answer that is an error. Its body is OpenAI's error object, made into one where it was not."""
    body = await response.content.read(_MAX_ERROR_BYTES)
    if response.status < 400:
        text = f"the server answered {response.status}, which is no answer to this request"
        return Refused(502, as_error_object(502, text.encode()), {})
    headers = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
    return Refused(response.status, as_error_object(response.status, body), headers)


async def refuses_connections(url: str) -> bool:
    """Whether nobody listens there any more: the server has ended, and it was not only the connection that broke."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
            )
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def as_error_object(status: int, body: bytes) -> bytes:
    """The body if it is an error object already; else one that quotes it."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(content.get("error"), dict) and "message" in content["error"]:
        return body
    if isinstance(content, dict) and isinstance(content.get("message"), str):  # vLLM's older form
        text, code = content["message"], content.get("code")
    else:
        text, code = body[:500].decode("utf-8", "replace").strip(), None
    message = text or f"the server answered {status} and gave no reason"
    return ErrorBody(ErrorDetail(message, error_type(status), None, None if code is None else str(code))).encode()


def describe(error: BaseException) -> str:
    """A failed connection in a few words; aiohttp's own tell of parser states and of the TLS that is not used."""
    match error:
        case aiohttp.ClientConnectorError():
            return f"no connection: {error.strerror or type(error.os_error).__name__}"
        case aiohttp.ClientPayloadError():
            return "it was closed in the middle of the answer"
        case aiohttp.ServerDisconnectedError():
            return "it was closed before the answer"
    return str(error) or type(error).__name__
