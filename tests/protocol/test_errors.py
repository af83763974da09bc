"""Each error of our tree has a status, and the client is told nothing else."""

from __future__ import annotations

import inspect
import json

import pytest

from shoal import errors
from shoal.errors import ShoalError
from shoal.protocol.errors import error_body, error_headers, status_of

STATUS = {
    "ShoalError": 500, "ConfigError": 500, "ModelError": 500, "StartupError": 500, "EngineError": 500,
    "CollectiveError": 500, "NodeError": 500,
    "InvalidRequestError": 400, "AuthenticationError": 401, "NotFoundError": 404, "RequestTooLargeError": 413,
    "UnsupportedMediaTypeError": 415,
    "RateLimitedError": 429, "UnavailableError": 503, "EngineDeadError": 503,
}  # fmt: skip
CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ShoalError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_an_object(kind: type[ShoalError]) -> None:
    error = kind("what was found; what would work")
    status = STATUS[kind.__name__]  # a new error needs a decision here
    assert status_of(error) == status
    body = json.loads(error_body(error).encode())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "what was found; what would work"
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_param_and_code_come_along() -> None:
    error = errors.NotFoundError("no", "model", "model_not_found")
    assert error_body(error).error.param == "model"
    assert error_body(error).error.code == "model_not_found"


def test_headers() -> None:
    assert "retry-after" in error_headers(503)
    assert error_headers(429, 2.01) == error_headers(503, 2.01) == {"retry-after": "3"}
    assert error_headers(429, 0.0) == {"retry-after": "1"}
    assert error_headers(401)["www-authenticate"] == "Bearer"
    assert error_headers(413)["connection"] == "close"
    assert error_headers(400) == {}
