"""The exception tree. Every error a user can meet is a ShoalError and says what was found and what would work."""

from __future__ import annotations


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose."""


class ConfigError(ShoalError, ValueError):
    """A flag, a key of a config file, an environment variable or a combination of them is wrong."""


class ModelError(ShoalError):
    """The model directory is missing, broken, or of a kind that is not supported."""


class InvalidRequestError(ShoalError, ValueError):
    """A request is wrong in itself (HTTP 400). `param` names the offending field where there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is of a type that is not read here (HTTP 415)."""


class AuthenticationError(ShoalError):
    """The API key, or another secret, is missing or wrong (HTTP 401)."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class NotFoundError(ShoalError):
    """The named model or path does not exist (HTTP 404)."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class RequestTooLargeError(ShoalError):
    """The body is larger than the server takes (HTTP 413)."""


class RateLimitedError(ShoalError):
    """An API key has used up its limit (HTTP 429). `retry_after`: seconds after which to try again, where known."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(ShoalError):
    """The server does not admit requests now: starting, draining or overloaded (HTTP 503).

    `retry_after`: seconds after which to try again, where known.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(ShoalError):
    """The engine failed while it worked on a request (HTTP 500)."""


class EngineDeadError(EngineError):
    """The engine core ended or stopped answering; requests in flight cannot go on here."""


class CollectiveError(EngineError):
    """Ranks that work together lost one of them: it is gone, or did not come in time. Their group is of no more use."""


class StartupError(ShoalError):
    """The engine did not come up: which phase failed, and why."""


class NodeError(ShoalError):
    """Another node of the cluster did not answer a question. `reason`: one word that tells what kind it is."""

    def __init__(self, message: str, *, reason: str = "failed") -> None:
        super().__init__(message)
        self.reason = reason
