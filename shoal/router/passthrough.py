"""Requests of the OpenAI API that generate nothing token by token (/tokenize, /v1/embeddings …): passed to a server.

What computes the same again (GET, and the POSTs listed here) is tried elsewhere until its answer has begun; other
POSTs only where no connection came about. Until then watch.py looks after the wait, by the request's deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import quote, unquote

import aiohttp
from yarl import URL

from shoal.errors import NotFoundError, UnavailableError
from shoal.log import get_logger
from shoal.protocol.deadline import DEADLINE_HEADER, read_deadline
from shoal.protocol.errors import error_headers
from shoal.protocol.media_type import is_json, media_type_of
from shoal.router.admission import ApiKey, Entry
from shoal.router.asgi import Answer, Scope
from shoal.router.backend import Backend
from shoal.router.core import Router
from shoal.router.flight import Flight
from shoal.router.outcome import Lost
from shoal.router.policies import RequestView
from shoal.router.request import model_name, parse_object, with_model
from shoal.router.upstream import authorization_of, describe, read_refusal

_REPEATABLE = frozenset(
    {
        "/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/v1/embeddings", "/embeddings", "/pooling",
        "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v1/moderations",
    }
)  # fmt: skip
_NOT_PASSED_ON = frozenset(
    {
        "connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "date", "server",
        "x-request-id", "upgrade", "trailer", "te",
    }
)  # fmt: skip
_PAUSE = 0.1
_RETRIED = (429, 500, 502, 503, 504)

logger = get_logger(__name__)


def check_path(path: str) -> None:
    """Raises NotFoundError for a path with dots or empty parts in it: somebody may resolve it to another one, which is
    not for clients, or not without the queue."""
    parts = unquote(path).replace("\\", "/").split("/")[1:]
    if any(part in (".", "..") for part in parts) or "" in parts[:-1]:
        raise NotFoundError(f"the path {path[:200]!r} has dots or empty parts in it", None, "not_found")


def is_passed(path: str) -> bool:
    """What servers have for clients; what they have for their operators is not reached through the router."""
    return path.startswith("/v1/") or path in _REPEATABLE


async def pass_through(
    router: Router, scope: Scope, headers: Mapping[str, str], body: bytes, key: ApiKey, answer: Answer
) -> None:
    """Raises ShoalError."""
    name = None
    arrived = router.pool.clock()
    deadline = read_deadline(headers.get(DEADLINE_HEADER), router.settings.options.deadline)
    until = arrived + deadline
    if body and is_json(media_type_of(headers.get("content-type"))):
        fields = parse_object(headers, body)
        name = model_name(fields)
        model = await router.resolve(name, until, len(body))
        body = with_model(fields, body, model)
    else:
        model = await router.resolve(None, until, len(body))
    key.check_model(name or model)
    charge = router.limits.charge(key, 1, router.pool.clock())
    router.limits.correct(charge, 0, router.pool.clock())
    entry = Entry(
        key=key.name,
        priority=key.priority,
        weight=key.weight,
        num_bytes=len(body),
        max_wait=max(until - router.pool.clock(), 0.0),
        max_concurrent=key.max_concurrent,
    )
    async with router.admission.admit(entry):
        await _Passing(router, scope, headers, body, model, answer, arrived, deadline).run()


class _Passing:
    def __init__(
        self,
        router: Router,
        scope: Scope,
        headers: Mapping[str, str],
        body: bytes,
        model: str,
        answer: Answer,
        arrived: float,
        deadline: float,
    ) -> None:
        self._router = router
        self._method = scope["method"]
        query = scope.get("query_string", b"").decode("latin-1")
        raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
        self._path = raw_path.decode("latin-1") + (f"?{query}" if query else "")
        self._repeatable = self._method in ("GET", "HEAD") or scope["path"].rstrip("/") in _REPEATABLE
        self._headers = headers
        self._body = body
        self._model = model
        self._answer = answer
        self._arrived = arrived
        self._deadline = deadline
        self._charged: set[Backend] = set()  # to their breakers: no request opens one alone
        self._view = RequestView(answer.request_id, num_prompt_bytes=len(body))

    async def run(self) -> None:
        pool = self._router.pool
        until = self._arrived + self._deadline
        excluded: set[Backend] = set()
        last = ""
        while (left := until - pool.clock()) > 0:
            candidates = pool.candidates(self._model, excluded)
            if not candidates:
                if excluded:
                    await asyncio.sleep(min(_PAUSE, left))
                else:
                    await pool.wait_change(min(left, 0.5))
                excluded.clear()
                continue
            backend = pool.pick(self._view, candidates)
            failure = await self._attempt(backend, may_retry=len(candidates) > 1)
            if failure is None:
                return
            last = f"{backend.url}: {failure}"
            excluded.add(backend)
            backend.suspect()
        why = f"; the last one: {last}" if last else f": {pool.why_out(pool.serving(self._model))}"
        raise UnavailableError(f"no server of the model {self._model!r} could answer{why}")

    async def _attempt(self, backend: Backend, may_retry: bool) -> str | None:
        """Why another server should be asked; None when the client has its answer."""
        router, clock = self._router, self._router.pool.clock
        flight = Flight(backend, self._model, self._view, router.pool.policy)
        flight.may_move = lambda: self._repeatable
        flight.deadline, flight.last_progress = self._deadline, self._arrived
        try:
            failure = await self._exchange(backend, flight, may_retry)
        except BaseException:
            backend.breaker.undecided(clock())
            raise
        else:
            if failure is None:
                backend.breaker.succeeded(clock())
            elif backend in self._charged:
                backend.breaker.undecided(clock())
            else:
                self._charged.add(backend)
                backend.breaker.failed(clock())
            return failure
        finally:
            flight.end()

    async def _exchange(self, backend: Backend, flight: Flight, may_retry: bool) -> str | None:
        router, answer = self._router, self._answer
        given = None if len(router.keys) else self._headers.get("authorization")
        headers = {"x-request-id": answer.request_id, **authorization_of(backend.spec, given)}
        headers |= {name: self._headers[name] for name in ("content-type", "accept") if name in self._headers}
        flight.waiting_since = router.pool.clock()
        try:
            async with router.session.request(
                self._method,
                URL(backend.url + self._path, encoded=True),  # as it was checked
                data=self._body or None,
                headers=headers,
                allow_redirects=False,
            ) as response:
                if response.status >= 400:
                    refusal = await read_refusal(response)
                    flight.waiting_since = None
                    if response.status in _RETRIED and self._repeatable and may_retry:
                        return str(refusal)
                    await answer.failure(
                        refusal.status, refusal.body, {**error_headers(refusal.status), **refusal.headers}
                    )
                    return None
                await self._copy(response, flight)
                return None
        except asyncio.CancelledError:
            reason = flight.take_interrupt()
            if reason is None:
                raise
            if not isinstance(reason, Lost):
                raise reason from None
            if not self._repeatable:
                raise _may_be_done(reason) from None
            return str(reason)
        except aiohttp.ClientConnectorError as error:
            return describe(error)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if answer.started:
                raise
            if not self._repeatable:
                raise _may_be_done(error) from None
            return describe(error)

    async def _copy(self, response: aiohttp.ClientResponse, flight: Flight) -> None:
        chunk = b"" if self._method == "HEAD" else await response.content.readany()
        flight.waiting_since = None
        kept = {name.lower(): value for name, value in response.headers.items()}
        await self._answer.start(response.status, {name: kept[name] for name in kept if name not in _NOT_PASSED_ON})
        while chunk:
            await self._answer.data(chunk)
            chunk = await response.content.readany()
        await self._answer.end()


def _may_be_done(error: Exception) -> UnavailableError:
    return UnavailableError(f"the connection to the server broke; it may have done the work: {error}")
