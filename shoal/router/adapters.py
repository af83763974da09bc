"""/v1/load_lora_adapter and /v1/unload_lora_adapter: at all servers of a model, for the router's operator.

Called by app.py. A load is for all or for none: where a server refuses it, those that took it unload it again. Changes
come one after the other. They go on to their end when the client is gone: nothing is to stay half loaded.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from shoal.errors import InvalidRequestError, NotFoundError, UnavailableError
from shoal.log import get_logger
from shoal.protocol.deadline import DEADLINE_HEADER, read_deadline
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_headers, error_type
from shoal.router import management
from shoal.router.asgi import Answer, Message, Receive, Scope, read_body
from shoal.router.backend import Backend
from shoal.router.core import Router
from shoal.router.pool import Pool
from shoal.router.request import parse_object
from shoal.router.upstream import authorization_of, describe, read_refusal

LOAD, UNLOAD = PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Which servers: for the router alone.
_MODEL_FIELDS = ("base_model_name", "model")
_MAX_BODY = 64 * 1024
# A proxy may say these of a server that goes on; those of the client's making are its own.
_OF_PROXIES = (502, 504)
_OF_CLIENTS = (400, 404, 409, 422)

logger = get_logger(__name__)


async def answer(router: Router, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: Answer) -> None:
    """A path of PATHS. Raises ShoalError."""
    management.check_method(scope, "POST")
    management.check_operator(router, scope, headers)
    router.check_admitting()
    options = router.settings.options
    deadline = read_deadline(headers.get(DEADLINE_HEADER), options.deadline)
    fields = parse_object(headers, await read_body(headers, receive, _MAX_BODY))
    # What the operator showed is the router's own, where it has keys.
    given = None if options.admin_key is not None or len(router.keys) else headers.get("authorization")
    change = _Change(router, fields, deadline, given, answer)
    work = change.load() if scope["path"].rstrip("/") == LOAD else change.unload()
    await router.while_connected(_stay, work)


async def _stay() -> Message:
    """The client, as if it never left."""
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Reply:
    """status: of HTTP, 0 where there was none. unknown: the server may have done it."""

    backend: Backend
    status: int
    why: str = ""
    unknown: bool = False

    def __str__(self) -> str:
        return f"{self.backend.url}: {self.why}"


class _Change:
    """deadline: seconds for each server's answer. given: the client's authorization where servers get that."""

    def __init__(
        self, router: Router, fields: dict[str, Any], deadline: float, given: str | None, answer: Answer
    ) -> None:
        self._router = router
        self._answer = answer
        self._deadline = deadline
        self._given = given
        self._model = _model_of(fields)
        self._body = {key: value for key, value in fields.items() if key not in _MODEL_FIELDS}
        name = fields.get("lora_name")
        if not isinstance(name, str) or not name.strip():
            raise InvalidRequestError(f"lora_name must be the adapter's name; got {str(name)[:80]!r}", "lora_name")
        self._name = name

    async def load(self) -> None:
        async with self._router.adapters_change:
            backends, untold = servers_of(self._router.pool, self._model)
            if untold:
                raise UnavailableError(f"it is not known whether these servers need the adapter: {untold}")
            self._check_name(backends)
            replies = await self._ask_all(backends, LOAD, self._body)
            failed = [reply for reply in replies if reply.status != 200]
            message = await self._take_back(replies, failed) if failed else ""
            for backend in backends if not failed else ():
                self._note(backend, there=True)
        # Others need not wait for this client.
        if failed:
            await self._fail(_status(failed), message)
        else:
            await self._done("loaded", backends)

    async def unload(self) -> None:
        async with self._router.adapters_change:
            backends, untold = servers_of(self._router.pool, self._model)
            replies = await self._unload_at(backends, self._body)
        done = [reply.backend for reply in replies if reply.status == 200]
        # One that was started again since has none to unload.
        failed = [reply for reply in replies if reply.status != 200 and (not done or reply.status != 404)]
        if not failed and not untold:
            await self._done("unloaded", done)
            return
        at = f"; it is unloaded at {_urls(done)}" if done else ""
        unasked = f"; these servers were not asked: {untold}" if untold else ""
        reasons = "; ".join(map(str, failed)) or "some servers have not told their models"
        status = _status(failed) if failed else 503
        await self._fail(status, f"the adapter {self._name!r} was not unloaded everywhere: {reasons}{unasked}{at}")

    async def _unload_at(self, backends: Sequence[Backend], fields: Mapping[str, Any]) -> list[_Reply]:
        """Requests that name it are not sent any more where it is gone."""
        replies = await self._ask_all(backends, UNLOAD, fields)
        for reply in replies:
            if reply.status in (200, 404):
                self._note(reply.backend, there=False)
        return replies

    async def _take_back(self, replies: Sequence[_Reply], failed: Sequence[_Reply]) -> str:
        """Unload where it was loaded, or may have been; what there is to say of that, and of who refused it."""
        took = [reply.backend for reply in replies if reply.status == 200 or reply.unknown]
        undone = await self._unload_at(took, {"lora_name": self._name})
        # A server that still loads it does not say 404.
        left = [reply for reply in undone if reply.status not in (200, 404)]
        message = f"the adapter {self._name!r} was not loaded: {'; '.join(map(str, failed))}"
        if back := [reply.backend for reply in undone if reply.status == 200]:
            message += f"; where it was loaded, it is unloaded again: {_urls(back)}"
            if self._body.get("load_inplace"):
                message += " (and what it replaced there is gone; load that again)"
        if left:
            message += f"; these may have it still, unload it there: {'; '.join(map(str, left))}"
        return message

    def _check_name(self, backends: Sequence[Backend]) -> None:
        """Requests must find this adapter, and no other model, by the name. Raises InvalidRequestError."""
        pool, name = self._router.pool, self._name
        is_model = any(name in backend.base_models for backend in pool if not backend.spec.models)
        if name in pool.aliases or is_model:
            raise InvalidRequestError(f"a model is called {name!r} here; give the adapter another name", "lora_name")
        elsewhere = [backend for backend in pool if backend not in backends and name in backend.models]
        if elsewhere:
            raise InvalidRequestError(
                f"servers of another model have something called {name!r} ({_urls(elsewhere)}); give the adapter "
                "another name",
                "lora_name",
            )

    def _note(self, backend: Backend, there: bool) -> None:
        """Send requests that name it there from now on, or no longer; the server's own list follows."""
        if backend.spec.models:  # the file says for what requests are sent there
            return
        backend.models = tuple(model for model in backend.models if model != self._name)
        backend.adapters = {name: parent for name, parent in backend.adapters.items() if name != self._name}
        if there:
            backend.adapters |= {self._name: next(iter(backend.base_models), "")}
            backend.models += (self._name,)
        backend.models_are_old = True
        backend.suspect()
        self._router.pool.changed()

    async def _ask_all(self, backends: Sequence[Backend], path: str, fields: Mapping[str, Any]) -> list[_Reply]:
        body = msgspec.json.encode(fields)
        return await asyncio.gather(*(self._ask(backend, path, body) for backend in backends))

    async def _ask(self, backend: Backend, path: str, body: bytes) -> _Reply:
        headers = {
            "content-type": "application/json",
            "x-request-id": self._answer.request_id,
            **authorization_of(backend.spec, self._given),
        }
        limit = aiohttp.ClientTimeout(total=self._deadline)
        try:
            async with self._router.session.post(
                backend.url + path, data=body, headers=headers, timeout=limit, allow_redirects=False
            ) as response:
                if response.status == 200:
                    return _Reply(backend, 200)
                refusal = await read_refusal(response)
                message = msgspec.json.decode(refusal.body)["error"]["message"]
                why = f"{message} (HTTP {response.status})"
                return _Reply(backend, refusal.status, why, unknown=refusal.status in _OF_PROXIES)
        except TimeoutError:
            return _Reply(backend, 0, f"it did not answer within {self._deadline:g} s", unknown=True)
        except aiohttp.ClientConnectorError as error:
            return _Reply(backend, 0, describe(error))
        except (aiohttp.ClientError, OSError) as error:
            return _Reply(backend, 0, describe(error), unknown=True)

    async def _done(self, what: str, backends: Sequence[Backend]) -> None:
        logger.info("the adapter %r is %s at %s", self._name, what, _urls(backends))
        servers = [backend.url for backend in backends]
        await self._answer.json({"status": what, "lora_name": self._name, "servers": servers})

    async def _fail(self, status: int, message: str) -> None:
        logger.warning("%s", message)
        code = "adapter_refused"
        body = ErrorBody(ErrorDetail(message, error_type(status), None, code)).encode()
        await self._answer.failure(status, body, error_headers(status))


def servers_of(pool: Pool, wanted: str | None) -> tuple[list[Backend], str]:
    """(All servers of a model, by its name or an alias; what is to be said of those that never told their models).

    Without a name: all servers, if they have a model in common. Raises NotFoundError, InvalidRequestError, or
    UnavailableError where no server has told its models.
    """
    told = [backend for backend in pool if backend.models]
    untold = pool.why_out(backend for backend in pool if not backend.models)
    if not told:
        raise UnavailableError(f"no server has told its models: {untold}" if untold else "there is no server")
    there = ", ".join(dict.fromkeys(model for backend in told for model in backend.base_models))
    if wanted is None:
        if not set.intersection(*(set(backend.base_models) for backend in told)):
            raise InvalidRequestError(f"name one model as base_model_name; there is {there}", "base_model_name")
        return told, untold
    model = pool.aliases.get(wanted, wanted)
    backends = [backend for backend in told if model in backend.base_models]
    if not backends:
        raise NotFoundError(
            f"no server has the model {wanted[:200]!r}; there is {there}", "base_model_name", "model_not_found"
        )
    return backends, untold


def _model_of(fields: Mapping[str, Any]) -> str | None:
    """Raises InvalidRequestError."""
    given = {name: fields[name] for name in _MODEL_FIELDS if fields.get(name) is not None}
    for name, model in given.items():
        if not isinstance(model, str):
            raise InvalidRequestError(f"{name} must be a string; got {str(model)[:80]}", name, "invalid_type")
    if len(set(given.values())) > 1:
        raise InvalidRequestError("base_model_name and model name two models; give one of them", "base_model_name")
    return next(iter(given.values()), None)


def _status(failed: Sequence[_Reply]) -> int:
    """That of the servers, where it is one and the client's affair."""
    statuses = {reply.status for reply in failed}
    if len(statuses) == 1 and (status := statuses.pop()) in _OF_CLIENTS:
        return status
    return 503 if all(reply.status in (0, 503) for reply in failed) else 502


def _urls(backends: Sequence[Backend]) -> str:
    return ", ".join(backend.url for backend in backends)
