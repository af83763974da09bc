from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from shoal.cli.main import main


def bench(server, *arguments: str) -> int:
    return main(["bench", "serve", "--url", server.url, *arguments])


def test_the_table_and_the_file(server, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert bench(server, "--requests", "5", "--slo", "ttft=60s", "--api-key", "hidden-key", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "5 answered of 5; at most 16 at a time" in out and "5 kept the SLO" in out
    figures = json.loads(file.read_text())
    assert figures["model"] == "tiny" and figures["interrupted"] is False and "hidden-key" not in file.read_text()
    assert figures["result"]["num_succeeded"] == figures["result"]["num_good"] == 5
    assert len(server.requests) == 6  # one is the warm-up
    path, headers, body = server.requests[-1]
    assert path == "/v1/completions" and headers["authorization"] == "Bearer hidden-key"
    assert body["ignore_eos"] is True and body["max_tokens"] == 128 and 100 <= len(body["prompt"]) <= 500


def test_the_address_has_the_name_that_vllm_gives_it_too(server):
    assert main(["bench", "serve", "--base-url", server.url, "--requests", "1"]) == 0


def test_a_file_of_conversations_goes_to_chat(server, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    extra = ["--no-ignore-eos", "--extra-body", '{"top_p": 0.5}', "--warmup", "0", "--model", "other"]
    assert bench(server, "--dataset", "file", "--file", str(path), "--output-tokens", "9", *extra) == 0
    ((path_asked, _, body),) = server.requests
    assert path_asked == "/v1/chat/completions" and body["model"] == "other" and body["top_p"] == 0.5
    assert body["max_tokens"] == 9 and "ignore_eos" not in body


def test_failures_are_shown(server, capsys):
    server.midway = "core died"
    assert bench(server, "--requests", "2", "--warmup", "0") == 1
    out = capsys.readouterr().out
    assert "0 answered of 2" in out and "failed: error in stream" in out and "core died" in out
    assert bench(server, "--requests", "2") == 1
    assert "the warm-up got no answer (error in stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "x"], "--dataset file and --file FILE go together"),
        (["--endpoint", "chat"], "add --prompt-kind text"),
        (["--request-rate", "0"], "--request-rate must be above 0"),
        (["--request-rate", "nan"], "--request-rate must be above 0 requests a second; got nan"),
        (["--slo", "fast"], "--slo must be limits of ttft, itl, e2e"),
        (["--extra-body", "[1]"], "--extra-body must be a JSON object"),
        (["--concurrency", "0"], "--concurrency must be an integer, 1 or more"),
        (["--prompt-tokens", "9-1"], "--prompt-tokens must be a number of tokens or a range"),
        (["--url", "nowhere"], "must begin with http://"),
    ],
)
def test_wrong_input_is_clear(server, arguments, message, capsys):
    assert bench(server, *arguments) == 2
    assert message in capsys.readouterr().err and not server.requests


def test_ctrl_c_shows_what_was_measured(server):
    """As many requests as nobody waits for: the signal comes once some are answered."""
    arguments = [
        "bench",
        "serve",
        "--url",
        server.url,
        "--requests",
        "1000000",
        "--prompt-tokens",
        "1",
        "--warmup",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.cli", *arguments, "--concurrency", "2"], stdout=subprocess.PIPE, text=True
    )
    while len(server.requests) < 20:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "answered of 1000000" in out and "first token, ms" in out and "Traceback" not in out
