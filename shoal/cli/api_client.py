"""A small client of the OpenAI API: models, chat and completions, streamed. chat, complete and demo use it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx

from shoal.errors import (
    AuthenticationError,
    ConfigError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    RequestTooLargeError,
    ShoalError,
    UnavailableError,
)

# Between two tokens of a busy server, or before the first of a long prompt, minutes can pass.
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_ERRORS: dict[int, type[ShoalError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitedError,
    503: UnavailableError,
}


class ApiClient:
    """Talks to one server. `url` with or without /v1; a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises ConfigError for what is no http(s) URL."""
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"--url must begin with http:// or https://; got {url!r}")
        self.url = base
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # The address is one the user named: proxies of the environment are for other places than local servers.
        local = any(f"//{host}" in base for host in ("127.0.0.1", "localhost", "[::1]"))
        self._http = httpx.Client(base_url=base, headers=headers, timeout=_TIMEOUT, trust_env=not local)

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """The names that the server serves."""
        with self._translated():
            response = self._http.get("/v1/models")
            _raise_for(response)
            return [entry["id"] for entry in response.json()["data"]]

    def ready(self) -> bool:
        """Whether the server admits requests now; False too while nobody listens."""
        try:
            return self._http.get("/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stream_chat(self, model: str, messages: list[dict[str, str]], **parameters: Any) -> Iterator[str]:
        """The answer's text, piece by piece."""
        body = {"model": model, "messages": messages, "stream": True, **parameters}
        for chunk in self._events("/v1/chat/completions", body):
            for choice in chunk.get("choices", []):
                yield choice["delta"].get("content") or ""

    def stream_completion(self, model: str, prompt: str, **parameters: Any) -> Iterator[str]:
        """The continuation's text, piece by piece."""
        body = {"model": model, "prompt": prompt, "stream": True, **parameters}
        for chunk in self._events("/v1/completions", body):
            for choice in chunk.get("choices", []):
                yield choice["text"]

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a server-sent event stream, up to [DONE]. Closing the iterator ends the request."""
        with self._translated(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                _raise_for(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise EngineError(_message(event) or "the server ended the stream with an error")
                yield event
        raise EngineError(f"the stream of {self.url} ended before its end mark: the server may have stopped")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise UnavailableError(f"no server answers at {self.url} ({error}); `shoal serve` starts one") from error
        except httpx.TimeoutException as error:
            raise UnavailableError(f"{self.url} did not answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise EngineError(f"the connection to {self.url} broke: {error or type(error).__name__}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url} does not answer like an OpenAI API: {error!r}") from error


def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    try:
        message = _message(response.json())
    except json.JSONDecodeError:
        message = response.text[:200]
    kind = _ERRORS.get(response.status_code, EngineError)
    hint = "; give the key with --api-key or SHOAL_API_KEY" if response.status_code == 401 else ""
    raise kind(f"the server answered {response.status_code}: {message or 'no reason given'}{hint}")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", ""))
    return str(error or (body.get("detail", "") if isinstance(body, dict) else body))
