from __future__ import annotations

import pytest

from shoal.cli.api_client import ApiClient
from shoal.errors import (
    AuthenticationError,
    ConfigError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    RequestTooLargeError,
    UnavailableError,
)
from shoal.network import free_port


def test_streams_text_with_and_without_v1_in_the_url(server):
    messages = [{"role": "user", "content": "hi"}]
    for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
        with ApiClient(url) as client:
            assert client.models() == ["tiny"] and client.ready()
            assert "".join(client.stream_chat("tiny", messages, temperature=0)) == "你好!"
            assert "".join(client.stream_completion("tiny", "x")) == "你好!"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body == {"model": "tiny", "messages": messages, "stream": True, "temperature": 0}


def test_presents_the_key(server):
    with ApiClient(server.url, "secret") as client:
        list(client.stream_completion("tiny", "x"))
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (404, NotFoundError),
        (413, RequestTooLargeError),
        (503, UnavailableError),
        (500, EngineError),
    ],
)
def test_error_objects_become_our_errors(server, status, kind):
    server.status, server.error = status, "what is wrong"
    with ApiClient(server.url) as client, pytest.raises(kind, match=f"answered {status}: what is wrong"):
        list(client.stream_chat("tiny", []))


def test_an_error_in_midstream_comes_after_the_text(server):
    server.midway = "the engine is lost"
    seen = []
    with ApiClient(server.url) as client, pytest.raises(EngineError, match="the engine is lost"):
        seen.extend(client.stream_completion("tiny", "x"))


def test_a_stream_that_breaks_off_is_no_answer(server):
    server.cut = True
    with ApiClient(server.url) as client, pytest.raises(EngineError, match="ended before its end mark"):
        list(client.stream_completion("tiny", "x"))


def test_nobody_there():
    with ApiClient(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.ready()
        with pytest.raises(UnavailableError, match="no server answers at http://127.0.0.1:.*shoal serve"):
            client.models()


def test_not_an_address():
    with pytest.raises(ConfigError, match="must begin with http:// or https://; got 'localhost:8000'"):
        ApiClient("localhost:8000")
