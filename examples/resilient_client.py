"""A client that goes on when a router ends in the middle of its stream: by the next router, without a gap or a repeat.

shoal router --port 9000 --peer http://127.0.0.1:9001 --backend http://127.0.0.1:8000 &
shoal router --port 9001 --peer http://127.0.0.1:9000 --backend http://127.0.0.1:8000 &
python examples/resilient_client.py --router http://127.0.0.1:9000 http://127.0.0.1:9001 --prompt "Once upon a time"

Each request gets an Idempotency-Key. Each event of its stream has an id, and whoever comes back with the same request
and the last id as Last-Event-ID gets what follows. An event without an id belongs to the next one that has one.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

_LATER = (429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class RequestFailed(Exception):
    """A router's error that another try would not change. status: None for an error in the middle of a stream."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


class _TryAgain(Exception):
    """seconds: as long as the router asks to be left alone."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class ResilientClient:
    """urls: of the routers, each of which knows the others as --peer. patience: seconds without any news after which a
    request is given up. silence: seconds without a byte after which another router is asked."""

    def __init__(
        self, urls: Sequence[str], api_key: str | None = None, *, patience: float = 60.0, silence: float = 30.0
    ) -> None:
        if not urls:
            raise ValueError("no router: give at least one URL such as http://127.0.0.1:9000")
        self.num_resumed = 0
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._turn = 0
        self._patience = patience
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._http = httpx.Client(timeout=httpx.Timeout(silence, connect=min(silence, 3.0)))

    def __enter__(self) -> ResilientClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer, each once. Raises RequestFailed; TimeoutError at the end of patience."""
        content = json.dumps({**body, "stream": True}).encode()
        headers = self._headers | {"idempotency-key": uuid.uuid4().hex}
        tries = _Tries(self._patience)
        while True:
            pieces = self._events(path, content, headers)
            try:
                for chunks, event_id in pieces:
                    tries.had_news()
                    if event_id is not None:
                        headers["last-event-id"] = event_id
                    yield from chunks
                return
            except (_TryAgain, httpx.TransportError) as error:
                self._next(tries, error)
            finally:
                pieces.close()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer; asked for again, it is not computed again. Raises as `stream` does."""
        content = json.dumps(body).encode()
        headers = self._headers | {"idempotency-key": uuid.uuid4().hex}
        tries = _Tries(self._patience)
        while True:
            try:
                response = self._http.post(self._url + path, content=content, headers=headers)
                _check(response)
                answer: dict[str, Any] = response.json()
                return answer
            except (_TryAgain, httpx.TransportError) as error:
                self._next(tries, error)

    @property
    def _url(self) -> str:
        return self._urls[self._turn % len(self._urls)]

    def _next(self, tries: _Tries, error: Exception) -> None:
        """The next router's turn, after a pause."""
        tries.pause(error)
        self._turn += 1
        self.num_resumed += 1

    def _events(
        self, path: str, content: bytes, headers: dict[str, str]
    ) -> Generator[tuple[list[dict[str, Any]], str | None], None, None]:
        """Of one connection: events that belong together, and their id. Returns after the stream's own end."""
        with self._http.stream("POST", self._url + path, content=content, headers=headers) as response:
            if response.status_code != 200:
                response.read()
            _check(response)
            held: list[dict[str, Any]] = []
            for data, event_id in _split(response.iter_bytes()):
                if data == "[DONE]":
                    yield held, None
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    _raise(None, chunk)
                held.append(chunk)
                if event_id is not None:
                    yield held, event_id
                    held = []
        raise _TryAgain("the stream ended before it was whole")


class _Tries:
    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.had_news()

    def had_news(self) -> None:
        self._num = 0
        self._last_news = time.monotonic()

    def pause(self, error: Exception) -> None:
        """Raises TimeoutError instead when there was no news for too long."""
        wanted = error.seconds if isinstance(error, _TryAgain) else None
        seconds = min(_FIRST_PAUSE * 2**self._num, _LONGEST_PAUSE) if wanted is None else wanted
        self._num += 1
        if time.monotonic() + seconds - self._last_news > self._patience:
            raise TimeoutError(f"no router went on with the request for {self._patience:g} s: {error}") from error
        time.sleep(seconds)


def _split(pieces: Iterator[bytes]) -> Iterator[tuple[str, str | None]]:
    """The data and the id of each event that came whole."""
    rest = b""
    for piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            data, event_id = [], None
            for line in event.decode().split("\n"):
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "data":
                    data.append(value)
                elif name == "id":
                    event_id = value
            if data:
                yield "\n".join(data), event_id


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    if response.status_code in _LATER:
        after = response.headers.get("retry-after", "")
        raise _TryAgain(
            f"status {response.status_code}: {response.text[:300]}", float(after) if after.isdigit() else None
        )
    try:
        content = response.json()
    except ValueError:
        content = {"error": {"message": response.text[:300]}}
    _raise(response.status_code, content)


def _raise(status: int | None, content: dict[str, Any]) -> None:
    error = content["error"]
    if status is None and error.get("code") == "unavailable":  # a router that shuts down says so
        raise _TryAgain(error["message"])
    raise RequestFailed(status, error["message"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--router", nargs="+", default=["http://127.0.0.1:9000", "http://127.0.0.1:9001"])
    parser.add_argument("--model", help="default: the first one of the router")
    parser.add_argument("--api-key")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=512)
    arguments = parser.parse_args()
    with ResilientClient(arguments.router, arguments.api_key) as client:
        body = {"prompt": arguments.prompt, "max_tokens": arguments.max_tokens}
        if arguments.model:
            body["model"] = arguments.model
        for chunk in client.stream("/v1/completions", body):
            for choice in chunk["choices"]:
                print(choice["text"], end="", flush=True)
        print(f"\n(went on {client.num_resumed} times)")


if __name__ == "__main__":
    main()
