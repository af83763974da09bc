"""What operators see: probes, metrics, version, documentation, the log."""

from __future__ import annotations

import logging
import re

import httpx
import pytest

from shoal.version import __version__
from tests.server.live_server import error_of, in_background, live_server


def test_probes_tell_the_truth() -> None:
    with live_server(engine={"progress_timeout": 0.2}) as server, server.client() as http:
        paths = ("/livez", "/readyz", "/health", "/ping")

        def statuses() -> list[int]:
            found = [http.get(path).status_code for path in paths]
            assert [http.head(path).status_code for path in paths] == found
            return found

        assert statuses() == [200] * 4
        server.do(server.core.gate.clear)  # the engine hangs …
        with in_background(server, {"prompt": "a"}):
            server.wait_until(lambda: server.engine.num_unfinished == 1 and not server.engine.progressing)
            assert statuses() == [503, 200, 503, 503]  # … and if it stays so, a new server is better
            for path in ("/livez", "/health"):
                assert "no progress" in error_of(http.get(path), 503)["message"]
            server.do(server.core.gate.set)
        assert statuses() == [200] * 4
        server.do(server.engine.begin_drain)
        assert statuses() == [200, 503, 503, 503]
        error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)
        server.do(server.core.die)
        server.wait_until(lambda: not server.engine.alive)
        assert statuses() == [503] * 4


def test_version_and_documentation(http: httpx.Client) -> None:
    assert http.get("/version").json()["version"] == __version__
    page = http.get("/docs").text
    assert "swagger" in page
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) >= 2
    for link in links:  # all of it comes from this server
        assert link.startswith("/") and http.get(link).status_code == 200, link
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= set(document["paths"])
    reference = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert reference["$ref"].rsplit("/", 1)[1] in document["components"]["schemas"]
    assert "temperature" in document["components"]["schemas"]["CompletionRequest"]["properties"]


def test_metrics_count_what_was_served() -> None:
    with live_server() as server, server.client() as http:
        http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5})
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
        assert float(lines['shoal:request_success_total{finished_reason="length",model_name="tiny"}']) == 1
        assert float(lines['shoal:time_to_first_token_seconds_count{model_name="tiny"}']) == 1
        assert float(lines['shoal:inter_token_latency_seconds_count{model_name="tiny"}']) == 4
        assert float(lines['shoal:request_generation_tokens_sum{model_name="tiny"}']) == 5
        assert float(lines['shoal:engine_steps_total{model_name="tiny",replica="0"}']) >= 5


def test_requests_are_logged_with_their_id_and_probes_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shoal.server"):
        logging.getLogger("shoal").propagate = True
        with live_server() as server, server.client() as http:
            http.get("/health")
            http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "seen"})
    (line,) = [record.getMessage() for record in caplog.records if "/" in record.getMessage()]
    assert line.startswith("POST /v1/completions 200 ") and line.endswith(" seen")
