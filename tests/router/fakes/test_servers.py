"""The fake servers as programs: what they answer, what their faults look like from outside, and that nothing stays."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time

import httpx
import pytest

from tests.router.fakes.faults import KINDS
from tests.router.fakes.process import FakeProcess, fake_servers

BODY = {"model": "fake", "prompt": "天地 and", "max_tokens": 20, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def servers():
    with fake_servers("native", "foreign", tokens_per_second=200, shutdown_timeout=5) as servers:
        yield servers


@pytest.fixture(params=["native", "foreign"])
def server(servers, request):
    server = servers[["native", "foreign"].index(request.param)]
    yield server
    server.heal()


@pytest.fixture
def http():
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def complete(http: httpx.Client, server: FakeProcess, **changes) -> httpx.Response:
    return http.post(f"{server.url}/v1/completions", json={**BODY, **changes})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def stream(http: httpx.Client, server: FakeProcess, **changes):
    return http.stream("POST", f"{server.url}/v1/completions", json={**BODY, "stream": True, **changes})


def events(lines) -> list[dict]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_both_say_the_same_streamed_or_not(servers, http):
    texts = {text_of(complete(http, server)) for server in servers}
    for server in servers:
        with stream(http, server) as response:
            lines = list(response.iter_lines())
        assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
        texts.add("".join(event["choices"][0]["text"] for event in events(lines)))
    assert len(texts) == 1


def test_a_text_goes_on_where_it_was_cut(server, http):
    whole = text_of(complete(http, server))
    rest = text_of(complete(http, server, prompt=BODY["prompt"] + whole[:7]))
    assert (whole[:7] + rest).startswith(whole)


def test_a_chat_goes_on_by_its_last_message(server, http):
    def chat(messages, **changes):
        body = {
            "model": "fake",
            "messages": messages,
            "max_tokens": 12,
            "ignore_eos": True,
            "temperature": 0,
            **changes,
        }
        answer = http.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    question = [{"role": "user", "content": "你好"}]
    whole = chat(question)
    begun = [*question, {"role": "assistant", "content": whole[:4]}]
    rest = chat(begun, continue_final_message=True, add_generation_prompt=False)
    assert (whole[:4] + rest).startswith(whole)


def test_vllm_has_its_own_face(servers, http):
    url = servers[1].url
    assert http.get(f"{url}/version").json() == {"version": "0.11.0"}
    health = http.get(f"{url}/health")
    assert health.status_code == 200 and health.content == b""
    assert http.get(f"{url}/readyz").status_code == 404
    assert http.post(f"{url}/internal/v1/continue", content=b"x").status_code == 404
    metrics = http.get(f"{url}/metrics").text
    assert "vllm:num_requests_running" in metrics and "shoal:" not in metrics
    error = http.post(f"{url}/v1/completions", json={**BODY, "model": "other"})
    assert error.status_code == 404 and error.json()["error"]["code"] == 404
    assert http.get(f"{url}/v1/models").json()["data"][0]["owned_by"] == "vllm"


def test_error(server, http):
    server.begin("error")
    assert complete(http, server).status_code == 500
    assert http.get(f"{server.url}/health").status_code == 200
    server.heal()
    assert text_of(complete(http, server))


def test_hang(server, http):
    server.begin("hang")
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{server.url}/v1/completions", json=BODY, timeout=0.3)
    assert server.state()["num_struck"] >= 1


@pytest.mark.parametrize("how", ["stream", "plain"])
def test_half_an_event(server, http, how):
    server.begin("half_event")
    with pytest.raises(httpx.RemoteProtocolError):
        if how == "plain":
            complete(http, server)
        else:
            with stream(http, server) as response:
                list(response.iter_lines())


def test_freeze(server, http):
    server.begin("freeze")
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{server.url}/v1/completions", json=BODY, timeout=0.3)
    assert http.get(f"{server.url}/livez").status_code in (200, 404)  # it is there, and vLLM has no such path


def test_slow(server, http):
    def seconds() -> float:
        began = time.monotonic()
        complete(http, server, max_tokens=10)
        return time.monotonic() - began

    server.begin("slow", factor=10)
    assert seconds() > 0.4  # ten steps of 50 ms, which take 50 ms together otherwise


def test_silent(server, http):
    server.begin("silent")
    with pytest.raises(httpx.ReadTimeout):
        http.get(f"{server.url}/health", timeout=0.3)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, http, server)
        server.heal()
        assert text_of(waiting.result(20))


def test_refuse(server, http):
    server.begin("refuse")
    with pytest.raises(httpx.ConnectError):
        http.get(f"{server.url}/health")
    server.heal()
    assert http.get(f"{server.url}/health").status_code == 200


def test_lost(server, http):
    """The real server's own recovery: it starts another core, and the request goes on there."""
    whole = text_of(complete(http, server, max_tokens=80))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, http, server, max_tokens=80)
        while not server.state()["running"]:
            time.sleep(0.005)
        server.begin("lost")
        assert text_of(running.result(20)) == whole


def test_unknown_faults_are_refused(server):
    with pytest.raises(AssertionError, match="there is no fault 'x'"):
        server.begin("x")
    assert set(KINDS) >= {"error", "hang", "half_event", "freeze", "silent", "slow", "refuse", "lost"}


def test_it_drains_and_comes_back_where_it_was(http):
    with fake_servers("native", tokens_per_second=100) as (server,), concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, http, server, max_tokens=60)
        while not server.state()["running"]:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert len(text_of(running.result(20))) > 20
        assert server.process.wait(20) == 0
        url = server.url
        server.start()
        server.until_up()
        assert server.url == url and text_of(complete(http, server))
