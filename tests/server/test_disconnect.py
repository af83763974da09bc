"""A client that goes away frees its request, whatever it was waiting for; the others notice nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from shoal.messages import AbortRequests, AddRequest
from tests.engine.fake_client import counting
from tests.engine.tokenizers_for_tests import tokenizer
from tests.server.live_server import LiveServer, live_server

MESSAGES = [{"role": "user", "content": "hi"}]
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 230}


@pytest.fixture
def server() -> Iterator[LiveServer]:
    """Of its own for each test: what was sent to the core is counted."""
    with live_server() as server:
        yield server


def num_added(server: LiveServer) -> int:
    return sum(isinstance(message, AddRequest) for message in server.core.sent)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "num_requests"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, 1),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 3}, 3),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, 6),
    ],
)
def test_a_client_that_leaves_frees_what_it_asked_for(
    server: LiveServer, path: str, body: dict[str, Any], num_requests: int, stream: bool
) -> None:
    server.do(server.core.gate.clear)  # nothing is answered: the client can only give up
    with server.client(timeout=0.3) as http, pytest.raises(httpx.ReadTimeout):
        http.post(path, json={**LONG, **body, "stream": stream})
    assert num_added(server) == num_requests
    server.wait_until(server.idle)  # while the core still makes no step
    (abort,) = [message for message in server.core.sent if isinstance(message, AbortRequests)][:1]
    assert abort.silent
    aborted = {id_ for message in server.core.sent if isinstance(message, AbortRequests) for id_ in message.request_ids}
    assert len(aborted) == num_requests


def test_leaving_in_mid_stream_frees_the_request(server: LiveServer) -> None:
    body = {**LONG, "prompt": "a", "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.do(server.core.gate.clear)
    server.wait_until(server.idle)


def test_an_unfinished_answer_is_not_continued_for_a_client_that_left(server: LiveServer) -> None:
    """Non-streaming: the disconnect is noticed although nothing is ever written to the client."""
    server.do(server.core.gate.clear)
    with server.client(timeout=0.2) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={**LONG, "prompt": "a"})
    server.wait_until(server.idle)
    server.do(server.core.gate.set)
    with server.client() as http:
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


async def test_64_streams_with_random_aborts(server: LiveServer) -> None:
    """Each stream that is read to its end is whole and its own; each that is left is freed."""
    rng = random.Random(0)
    plans = [(30 + i, rng.random() < 0.5, rng.randint(1, 20)) for i in range(64)]
    decode = tokenizer().decode

    async def run(http: httpx.AsyncClient, num_tokens: int, leaves: bool, after: int) -> str | None:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": num_tokens, "stream": True}
        text, num_events = "", 0
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line:
                    continue
                if line == "data: [DONE]":
                    return text
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                num_events += 1
                if leaves and num_events >= after:
                    return None
        raise AssertionError("the stream ended without [DONE]")

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60, trust_env=False) as http:
        texts = await asyncio.gather(*(run(http, *plan) for plan in plans))
    for (num_tokens, leaves, _), text in zip(plans, texts, strict=True):
        expected = decode([counting(None, position) for position in range(num_tokens)])  # type: ignore[arg-type]
        assert text == expected or (leaves and text is None)
    await asyncio.to_thread(server.wait_until, server.idle)
    metrics = await asyncio.to_thread(lambda: httpx.get(f"{server.url}/metrics", trust_env=False).text)
    endings = [line for line in metrics.splitlines() if line.startswith("shoal:request_success_total")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in endings) == 64
    aborted = sum(float(line.rsplit(" ", 1)[1]) for line in endings if 'finished_reason="abort"' in line)
    assert 0 < aborted <= sum(leaves for _, leaves, _ in plans)
