"""What a replica's server says of itself, under either prefix, and when it is given up."""

from __future__ import annotations

import httpx
import pytest

from shoal.cluster.deploy.look import Looker, read_metrics
from shoal.messages import EngineStats
from shoal.observability.metrics import EngineMetrics


@pytest.mark.parametrize("prefix", ["shoal", "vllm"])
def test_the_numbers_are_those_of_the_metrics(prefix):
    metrics = EngineMetrics("a model", prefix)
    metrics.replicas_up = {0: True, 1: True}
    metrics.take_stats(EngineStats(num_requests_running=3, num_requests_waiting=2, kv_cache_usage=0.25), 0)
    metrics.take_stats(EngineStats(num_requests_running=4, num_requests_waiting=0, kv_cache_usage=0.5), 1)
    assert read_metrics(metrics.render().decode()) == (2, 7, 0.5)


def test_another_page_is_none():
    with pytest.raises(ValueError, match="no num_requests_waiting"):
        read_metrics("other:num_requests_waiting 3\n")


class Server:
    def __init__(self) -> None:
        self.ready = httpx.Response(200, json={"status": "ok"})
        self.is_there = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.is_there:
            raise httpx.ConnectError("refused")
        if request.url.path == "/readyz":
            return self.ready
        metrics = EngineMetrics("m")
        metrics.take_stats(EngineStats(num_requests_running=1), 0)
        return httpx.Response(200, content=metrics.render())


def test_looks_at_a_server_from_its_start_to_its_end():
    server, now = Server(), [0.0]
    looker = Looker(lambda: now[0], httpx.MockTransport(server))
    server.is_there = False
    found = looker("http://a")
    assert found.why == "does not answer: refused" and not found.hopeless
    now[0] = 1000.0
    assert not looker("http://a").hopeless, "it has never been there: it may take its time"
    server.is_there = True
    server.ready = httpx.Response(503, json={"error": {"message": "the server is starting"}})
    assert looker("http://a").why == "the server is starting"
    server.ready = httpx.Response(200)
    found = looker("http://a")
    assert found.ready and (found.running, found.waiting) == (1, 0)
    server.is_there = False
    now[0] += 29
    assert not looker("http://a").hopeless
    now[0] += 2
    assert looker("http://a").hopeless
    assert not looker("http://b").hopeless, "the next life begins anew"


def test_an_answer_that_is_no_error_object():
    server = Server()
    server.ready = httpx.Response(502, text="bad gateway")
    assert Looker(transport=httpx.MockTransport(server))("http://a").why == "/readyz answers 502"
