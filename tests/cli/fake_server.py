"""A server that speaks the OpenAI API as far as the client commands use it, with answers that the test sets."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class FakeServer:
    """`pieces` is what every answer streams; `requests` keeps (path, headers, body) of each POST.

    status and error: answer this instead. cut: end the stream without its end mark. midway: an error event.
    """

    def __init__(self) -> None:
        self.models = ["tiny"]
        self.pieces = ["你", "好", "!"]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.status = 200
        self.error = ""
        self.cut = False
        self.midway: str | None = None
        self.url = ""

    def events(self, path: str) -> list[str]:
        chat = path == "/v1/chat/completions"
        choices = [{"delta": {"content": piece}} if chat else {"text": piece} for piece in self.pieces]
        events = [json.dumps({"choices": [choice]}, ensure_ascii=False) for choice in choices]
        if chat:
            events.insert(0, json.dumps({"choices": [{"delta": {"role": "assistant"}}]}))
        if self.midway:
            events.append(json.dumps({"error": {"message": self.midway}}))
        elif not self.cut:
            events += [json.dumps({"choices": [], "usage": {}}), "[DONE]"]
        return events


@contextlib.contextmanager
def fake_server(port: int = 0) -> Iterator[FakeServer]:
    state = FakeServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/readyz":
                self._answer(state.status, b"")
            else:
                self._answer(state.status, json.dumps({"data": [{"id": name} for name in state.models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            if state.status != 200:
                self._answer(state.status, json.dumps({"error": {"message": state.error}}).encode())
                return
            lines = "".join(f"data: {event}\n\n" for event in state.events(self.path))
            self._answer(200, f": a comment\n\n{lines}".encode(), "text/event-stream")

        def _answer(self, status: int, content: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
