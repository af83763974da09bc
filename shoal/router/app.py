"""RouterApp: the router as an ASGI application. Pure ASGI: answers are streamed through it token by token.

Its own endpoints are answered here and in management.py; /v1/chat/completions and /v1/completions are forwarded by
failover.py, all else of the OpenAI API by passthrough.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from shoal.errors import NotFoundError, ShoalError
from shoal.log import get_logger
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type, status_of
from shoal.router import management
from shoal.router.admission import ApiKey, Charge, Entry
from shoal.router.asgi import Answer, Receive, Scope, Send, read_body, read_headers, request_id_of
from shoal.router.core import Router
from shoal.router.failover import Forwarding
from shoal.router.outcome import ClientGone
from shoal.router.passthrough import is_passed, pass_through
from shoal.router.request import (
    GENERATING_PATHS,
    GenerationRequest,
    model_name,
    parse_object,
    read_deadline,
    with_model,
)

_PROBES = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics", "/version"})
_CLIENT_GONE = 499  # as nginx logs it

logger = get_logger(__name__)


class RouterApp:
    def __init__(self, router: Router) -> None:
        self.router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.monotonic()
        headers = read_headers(scope)
        answer = Answer(send, request_id_of(headers))
        gone = False
        try:
            await self._answer(scope, headers, receive, answer)
        except ClientGone:
            gone = True
        except management.MethodError as error:
            await answer.failure(405, error.body, error.headers)
        except ShoalError as error:
            if scope["path"] in GENERATING_PATHS:
                self.router.metrics.refused(status_of(error))
            await answer.error(error)
        except Exception:
            logger.exception("request %s failed", answer.request_id)
            if answer.started:  # too late for an answer: cut it off, so that nobody takes it for whole
                raise
            message = f"internal error of the router; its log has the details under the request id {answer.request_id}"
            await answer.failure(500, ErrorBody(ErrorDetail(message, error_type(500), None, "internal_error")).encode())
        finally:
            status = _CLIENT_GONE if gone or not answer.status else answer.status
            self._log(scope, status, time.monotonic() - started, answer.request_id)

    async def _answer(self, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: Answer) -> None:
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        router = self.router
        if path in _PROBES or path.startswith("/router/"):
            await management.answer(router, scope, headers, receive, answer)
            return
        key = router.keys.authenticate(headers.get("authorization"))
        if path == "/v1/models" or path.startswith("/v1/models/"):
            management.check_method(scope, "GET", "HEAD")
            await management.models(router, path, answer)
        elif path in GENERATING_PATHS:
            management.check_method(scope, "POST")
            router.check_admitting()
            body = await read_body(headers, receive, router.settings.options.max_request_bytes)
            await router.while_connected(receive, self._generate(path, key, headers, body, answer))
        elif is_passed(path):
            router.check_admitting()
            body = await read_body(headers, receive, router.settings.options.max_request_bytes)
            await router.while_connected(receive, pass_through(router, scope, headers, body, key, answer))
        else:
            raise NotFoundError(f"there is no {method} {path[:200]} here", None, "not_found")

    async def _generate(self, path: str, key: ApiKey, headers: Mapping[str, str], body: bytes, answer: Answer) -> None:
        router, arrived = self.router, time.monotonic()
        fields = parse_object(headers, body)
        name = model_name(fields)
        deadline = read_deadline(headers, router.settings.options.deadline)
        model = await router.resolve(name, deadline)
        key.check_model(name or model)
        request = GenerationRequest(
            path=path,
            request_id=answer.request_id,
            body=with_model(fields, body, model),
            fields=fields,
            model=model,
            deadline=deadline,
            # Where the router asks for keys of its own, they are nobody else's business.
            authorization=None if len(router.keys) else headers.get("authorization"),
        )
        given = fields.get("priority")
        # Lower goes first: a request may put itself behind others, not before them.
        priority = max(key.priority, given) if type(given) is int else key.priority
        view = router.view(request, headers, priority)
        charge = router.limits.charge(key, view.num_tokens, time.monotonic())
        entry = Entry(
            key=key.name,
            priority=priority,
            weight=key.weight,
            num_tokens=view.num_tokens,
            num_bytes=len(body),
            max_wait=deadline,
            max_concurrent=key.max_concurrent,
        )
        forwarding: Forwarding | None = None
        status: int | None = _CLIENT_GONE
        try:
            async with router.admission.admit(entry):
                router.metrics.queue_time.add(entry.waited)
                forwarding = Forwarding(router.context, request, view, answer)
                await forwarding.run()
                status = answer.status
        except ShoalError:
            status = None  # not taken in: counted as refused
            raise
        finally:
            self._account(request, forwarding, charge, status, arrived, answer)

    def _account(
        self,
        request: GenerationRequest,
        forwarding: Forwarding | None,
        charge: Charge,
        status: int | None,
        arrived: float,
        answer: Answer,
    ) -> None:
        """A request has ended: count what it really had."""
        router, now = self.router, time.monotonic()
        num_tokens = forwarding.num_tokens if forwarding is not None else 0
        num_prompt = forwarding.num_prompt_tokens if forwarding is not None else None
        router.limits.correct(charge, (num_prompt or 0) + num_tokens, now)
        if status is not None:
            router.metrics.ended(request.model, status, num_tokens, now - arrived)
        if request.stream and answer.status == 200:
            router.metrics.time_to_first_token.add(answer.started_at - arrived)
        if status == 200:
            router.learn(request, num_prompt, num_tokens)

    def _log(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        path = scope["path"]
        quiet = path in _PROBES or path.startswith("/router/") or self.router.settings.options.disable_log_requests
        log = logger.debug if quiet else logger.info
        shown = path[:200] if path.isprintable() else repr(path[:200])
        log("%s %s %d %.3f s %s", scope["method"], shown, status, seconds, request_id)
