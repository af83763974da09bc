"""RouterApp: the router as an ASGI application. Pure ASGI: answers are streamed through it token by token.

Its own endpoints are answered here, in management.py and adapters.py; /v1/chat/completions and /v1/completions are
forwarded by generate.py, all else of the OpenAI API by passthrough.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from shoal.errors import NotFoundError, ShoalError
from shoal.log import get_logger
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type, status_of
from shoal.router import adapters, management
from shoal.router.admission import ApiKey
from shoal.router.asgi import Answer, Receive, Scope, Send, read_body, read_headers, request_id_of
from shoal.router.core import Router
from shoal.router.generate import CLIENT_GONE, generate
from shoal.router.outcome import ClientGone
from shoal.router.passthrough import check_path, is_passed, pass_through
from shoal.router.request import GENERATING_PATHS, parse_object
from shoal.router.resume import KeptRequest, asks_to_be_kept
from shoal.router.resume.entrance import NotResumed

_PROBES = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics", "/version"})
_SHOWN_BYTES = 500

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
        except NotResumed as error:
            self.router.metrics.refused(error.status)
            await answer.failure(error.status, error.body)
        except ShoalError as error:
            if scope["path"] in GENERATING_PATHS:
                self.router.metrics.refused(status_of(error))
            await answer.error(error)
        except Exception:
            logger.exception("request %s failed", answer.request_id)
            message = f"internal error of the router; its log has the details under the request id {answer.request_id}"
            body = ErrorBody(ErrorDetail(message, error_type(500), None, "internal_error")).encode()
            if answer.started:  # too late for an answer: cut it off, so that nobody takes it for whole
                answer.stream_error = (500, body)
                raise
            await answer.failure(500, body)
        finally:
            status = CLIENT_GONE if gone or not answer.status else answer.outcome
            self._log(scope, status, time.monotonic() - started, answer)

    async def _answer(self, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: Answer) -> None:
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        check_path(path)
        router = self.router
        if path in _PROBES or path.startswith("/router/"):
            await management.answer(router, scope, headers, receive, answer)
            return
        if path in adapters.PATHS:
            await adapters.answer(router, scope, headers, receive, answer)
            return
        key = router.keys.authenticate(headers.get("authorization"))
        if path == "/v1/models" or path.startswith("/v1/models/"):
            management.check_method(scope, "GET", "HEAD")
            await management.models(router, path, answer)
        elif path in GENERATING_PATHS:
            management.check_method(scope, "POST")
            router.check_admitting()
            body = await read_body(headers, receive, router.settings.options.max_request_bytes)
            fields = parse_object(headers, body)
            if router.keeps_requests and asks_to_be_kept(headers):
                await router.while_connected(receive, self._keep(path, key, headers, fields, body, answer))
            else:
                work = generate(router, path, key, headers, fields, body, answer)
                await router.while_connected(receive, work)
        elif is_passed(path):
            router.check_admitting()
            body = await read_body(headers, receive, router.settings.options.max_request_bytes)
            await router.while_connected(receive, pass_through(router, scope, headers, body, key, answer))
        else:
            raise NotFoundError(f"there is no {method} {path[:200]} here", None, "not_found")

    async def _keep(
        self,
        path: str,
        key: ApiKey,
        headers: Mapping[str, str],
        fields: dict[str, Any],
        body: bytes,
        answer: Answer,
    ) -> None:
        async def run(kept: KeptRequest, answer: Answer) -> None:
            # A run may begin again: each has its own fields.
            await generate(self.router, path, key, headers, dict(fields), body, answer, kept)

        await self.router.entrance.answer(path, key, headers, fields, answer, run)

    def _log(self, scope: Scope, status: int, seconds: float, answer: Answer) -> None:
        path = scope["path"]
        quiet = path in _PROBES or path.startswith("/router/") or self.router.settings.options.disable_log_requests
        log = logger.debug if quiet else logger.info
        shown = path[:200] if path.isprintable() else repr(path[:200])
        log("%s %s %d %.3f s %s", scope["method"], shown, status, seconds, answer.request_id)
        if answer.stream_error is not None:
            error = answer.stream_error[1][:_SHOWN_BYTES].decode("utf-8", "replace")
            logger.warning("request %s: its stream ended with an error: %s", answer.request_id, error)
