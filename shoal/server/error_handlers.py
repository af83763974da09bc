"""Errors as responses: every one is OpenAI's error object, whoever raised it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shoal.errors import ShoalError
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_body, error_headers, error_type, status_of

_CODES = {404: "not_found", 405: "method_not_allowed"}


def error_response(error: ShoalError) -> Response:
    """What a client gets for one of our errors."""
    status = status_of(error)
    return _respond(status, error_body(error), error_headers(status, getattr(error, "retry_after", None)))


def internal_error_response(request_id: str) -> Response:
    """What a client gets for a fault of ours: the log has the rest, under this id."""
    message = f"internal error of the server; its log has the details under the request id {request_id}"
    return _respond(500, ErrorBody(ErrorDetail(message, error_type(500), None, "internal_error")))


def install_error_handlers(app: FastAPI) -> None:
    async def on_shoal_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ShoalError)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        message = str(error.detail)
        if status == 404:
            message = _no_such_path(request, app)
        elif status == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} does not work on {request.url.path}; {allowed} does"
        body = ErrorBody(ErrorDetail(message, error_type(status), None, _CODES.get(status)))
        return _respond(status, body, error.headers)

    app.add_exception_handler(ShoalError, on_shoal_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _respond(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.encode(), status, {**error_headers(status), **(headers or {})}, "application/json")


def _no_such_path(request: Request, app: FastAPI) -> str:
    path = request.url.path
    near = difflib.get_close_matches(path, [*app.openapi()["paths"]], n=1)
    hint = f"did you mean {near[0]}?" if near else "/docs lists what there is"
    return f"there is no {path[:200]} here; {hint}"
