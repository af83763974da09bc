"""A server that looks like vLLM's, as a program: `python -m tests.router.fakes.foreign --port 8001`.

The OpenAI API only, with vLLM's additions, probes, metric names and form of errors. It says what the native fake says.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.router.fakes.native import add_arguments, run_service

VERSION = "0.11.0"
_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/tokenize", "/detokenize"})
_ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailable"}


class Disguise:
    """Puts vLLM's face on a Shoal server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path not in _PATHS and not path.startswith("/v1/"):
            await _send_json(send, 404, {"detail": "Not Found"})
        elif path == "/version":
            await _send_json(send, 200, {"version": VERSION})
        else:
            await self._app(scope, receive, _Rewriter(path, send))


class _Rewriter:
    """Passes streams on as they come; what is not a stream it rewrites as a whole."""

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if self._streams():
                await self._send(message)
        elif self._streams():
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_whole()

    def _streams(self) -> bool:
        content_type = dict(self._start["headers"]).get(b"content-type", b"")
        return bool(content_type.startswith(b"text/event-stream"))

    async def _send_whole(self) -> None:
        status, body = self._start["status"], self._body
        if self._path == "/metrics":
            body = body.replace(b"shoal:", b"vllm:")
        elif self._path in ("/health", "/ping"):
            body = b""
        elif self._path == "/v1/models" and status == 200:
            models = json.loads(body)
            for model in models["data"]:
                model["owned_by"] = "vllm"
            body = json.dumps(models).encode()
        elif status == 401:  # its middleware knows nothing of the API's errors
            body = b'{"error":"Unauthorized"}'
        elif status >= 400:
            body = json.dumps(_error_like_vllm(status, json.loads(body))).encode()
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def _error_like_vllm(status: int, body: dict[str, Any]) -> dict[str, Any]:
    error = body["error"]
    kind = _ERROR_TYPES.get(status, "InternalServerError")
    return {"error": {"message": error["message"], "type": kind, "param": error.get("param"), "code": status}}


async def _send_json(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    sys.exit(run_service(parser.parse_args(), Disguise))
