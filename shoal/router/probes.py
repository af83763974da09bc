"""The questions that health.py asks of one server, and what the answers mean."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from shoal.config.router_settings import GoldenSpec
from shoal.protocol import internal
from shoal.protocol.errors import NOT_THIS_KIND
from shoal.router.backend import Backend, Health
from shoal.router.golden import GoldenAnswer, golden_request, read_golden
from shoal.router.upstream import authorization_of, describe, internal_headers

# A golden prompt stands in the server's queue like any request.
GOLDEN_SECONDS = 30.0
_MAX_BYTES = 4 * 1024 * 1024
# Each server is asked by a task of its own; so many of them at a time, of which each takes `timeout` at most.
_MOST_AT_ONCE = 256


class ProbeError(Exception):
    """The server did not answer as it should. silent: it did not answer at all, though it may in a moment."""

    def __init__(self, message: str, *, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class _Version(msgspec.Struct):
    internal: list[str] = []


class Model(msgspec.Struct):
    """What a server says of one. max_model_len: where it says it. parent: the model that an adapter is of."""

    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[Model]


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Error(msgspec.Struct):
    error: _ErrorDetail


class Prober:
    """Asks. timeout: seconds for one answer. internal_secret: what servers are shown at /internal/…."""

    def __init__(self, session: aiohttp.ClientSession, timeout: float, internal_secret: str | None = None) -> None:
        self._session = session
        self.timeout = timeout
        self._internal_secret = internal_secret
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)

    async def health(self, backend: Backend) -> Health:
        """Raises ProbeError where nobody answers."""
        status, body = await self._get(backend, "/health")
        if status == 200:
            return Health(alive=True, progressing=True, admitting=True, why="")
        if status in (404, 405) and not backend.native:
            status, body = await self._get(backend, "/v1/models")
            good = status == 200
            return Health(alive=True, progressing=good, admitting=good, why="" if good else _why(status, body))
        why = _why(status, body)
        if not backend.native:
            return Health(alive=True, progressing=False, admitting=False, why=why)
        ready, _ = await self._get(backend, "/readyz")
        if ready == 200:
            return Health(alive=True, progressing=False, admitting=True, why=why)
        alive, _ = await self._get(backend, "/livez")
        return Health(alive=alive == 200, progressing=alive == 200, admitting=False, why=why)

    async def is_native(self, backend: Backend) -> bool:
        """Whether it speaks /internal/v1/continue. Raises ProbeError."""
        status, body = await self._get(backend, "/version")
        if status >= 500:
            raise ProbeError(_why(status, body))
        try:
            return status == 200 and internal.CAPABILITY in msgspec.json.decode(body, type=_Version).internal
        except msgspec.DecodeError:
            return False

    async def why_shut_out(self, backend: Backend) -> str | None:
        """Why it does not let this router use /internal/…; None when it does. Raises ProbeError."""
        status, body = await self._get(backend, internal.PATH)  # 405 when it does
        if status != 401:
            return None
        try:
            error = msgspec.json.decode(body, type=_Error).error
        except msgspec.DecodeError:
            return None
        return f"shuts this router out: {error.message}" if error.code == internal.TOKEN_CODE else None

    async def models(self, backend: Backend) -> dict[str, Model]:
        """By name. Raises ProbeError."""
        status, body = await self._get(backend, "/v1/models")
        if status != 200:
            raise ProbeError(f"does not tell its models: {_why(status, body)}")
        try:
            found = {model.id: model for model in msgspec.json.decode(body, type=_Models).data}
        except msgspec.DecodeError as error:
            raise ProbeError(f"does not answer /v1/models like an OpenAI API: {error}") from None
        if not found:
            raise ProbeError("serves no model")
        return found

    async def golden(self, backend: Backend, spec: GoldenSpec) -> dict[str, GoldenAnswer]:
        """Its answers to the golden prompt, by model, but for models that generate nothing. Raises ProbeError."""
        answers = {}
        for model in backend.models:
            body = golden_request(spec, model, with_ids=bool(backend.native))
            status, content = await self._ask(backend, "POST", "/v1/completions", GOLDEN_SECONDS, body)
            if status == 400 and _code(content) == NOT_THIS_KIND:
                continue  # it makes embeddings or scores: there is no text to compare
            if status != 200:
                hint = "; --golden-prompt off does without it" if status < 500 else ""
                raise ProbeError(f"does not answer the golden prompt for {model}: {_why(status, content)}{hint}")
            try:
                answers[model] = read_golden(content)
            except msgspec.DecodeError as error:
                raise ProbeError(f"does not answer the golden prompt like an OpenAI API: {error}") from None
        return answers

    async def _get(self, backend: Backend, path: str) -> tuple[int, bytes]:
        async with self._slots:
            return await self._ask(backend, "GET", path, self.timeout)

    async def _ask(
        self, backend: Backend, method: str, path: str, seconds: float, body: bytes | None = None
    ) -> tuple[int, bytes]:
        headers = authorization_of(backend.spec) | ({"content-type": "application/json"} if body is not None else {})
        if path == internal.PATH:
            headers |= internal_headers(self._internal_secret)
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, backend.url + path, data=body, headers=headers, timeout=limit
            ) as response:
                return response.status, await response.content.read(_MAX_BYTES)
        except TimeoutError:
            raise ProbeError(f"does not answer {path} within {seconds:g} s", silent=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeError(f"cannot be reached: {describe(error)}") from None


def _code(body: bytes) -> str | int | None:
    try:
        return msgspec.json.decode(body, type=_Error).error.code
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _why(status: int, body: bytes) -> str:
    try:
        message = msgspec.json.decode(body, type=_Error).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = body[:200].decode("utf-8", "replace").strip()
    return f"{message} ({status})" if message else f"answers {status}"
