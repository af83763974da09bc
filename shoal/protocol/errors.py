"""OpenAI's error object, and the HTTP status of each error of our tree."""

from __future__ import annotations

import math

import msgspec

from shoal import errors
from shoal.errors import ShoalError

# Of a class and of the classes below it that are not named: the nearest one counts.
_STATUS: dict[type[ShoalError], int] = {
    errors.ShoalError: 500,
    errors.InvalidRequestError: 400,
    errors.UnsupportedMediaTypeError: 415,
    errors.AuthenticationError: 401,
    errors.NotFoundError: 404,
    errors.RequestTooLargeError: 413,
    errors.RateLimitedError: 429,
    errors.UnavailableError: 503,
    errors.EngineError: 500,
    errors.EngineDeadError: 503,
}
_CODES: dict[type[ShoalError], str] = {
    errors.UnsupportedMediaTypeError: "unsupported_media_type",
    errors.AuthenticationError: "invalid_api_key",
    errors.RequestTooLargeError: "request_too_large",
    errors.RateLimitedError: "rate_limit_exceeded",
    errors.UnavailableError: "unavailable",
    errors.EngineDeadError: "engine_lost",
    errors.EngineError: "engine_error",
}
# Text was asked of a model for vectors, or the other way round.
NOT_THIS_KIND = "model_kind"
# Seconds after which a client may try again, where an error does not say.
RETRY_AFTER = 1


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """{"error": {"message", "type", "param", "code"}} (OpenAI API reference, "Error codes")."""

    error: ErrorDetail

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def error_type(status: int) -> str:
    """The `type` that belongs to a status: whose fault it is."""
    return "invalid_request_error" if status < 500 else "server_error"


def status_of(error: ShoalError) -> int:
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def error_body(error: ShoalError) -> ErrorBody:
    """What a client is told. Our errors are written for users; nothing of a traceback is in them."""
    code = getattr(error, "code", None)
    if code is None:
        code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), None)
    return ErrorBody(ErrorDetail(str(error), error_type(status_of(error)), getattr(error, "param", None), code))


def error_headers(status: int, retry_after: float | None = None) -> dict[str, str]:
    """Headers that a status asks for. retry_after: seconds, as an error carries them; whole ones are sent."""
    match status:
        case 401:
            return {"www-authenticate": "Bearer"}
        case 413:
            return {"connection": "close"}  # what is left of the body is not read
        case 429 | 503:
            return {"retry-after": str(RETRY_AFTER if retry_after is None else max(math.ceil(retry_after), 1))}
    return {}
