"""`serve` from start to end, as a process: what it prints, how it drains, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shoal.config.options import ModelOptions, ServerOptions
from shoal.errors import ConfigError
from shoal.network.http_server import check_tls
from shoal.server.run import read_chat_template
from shoal.server.state import served_names
from tests.config.model_directory import write_model_directory
from tests.server.serving import Serving, make_model, serving, streaming


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def test_says_what_it_is_and_where_and_serves_and_ends(model: Path) -> None:
    with serving(model, with_tokenizer=True) as server:
        server.until_ready()
        assert f"tiny is served at {server.url}/v1" in server.output
        assert "KV cache: 1,024 tokens (1 MiB), 2.0 requests of the full 512 tokens" in server.output
        assert "float32 on no device" in server.output
        assert "/v1/chat/completions" in server.output
        assert json.loads(run_curl(server))["choices"][0]["message"]["content"]
        assert server.status("/health") == 200
        assert httpx.get(server.url + "/version", trust_env=False).json()["engine"]["device"] == "no device"
        core = server.core()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not core.is_running()
        assert "Traceback" not in server.output


def test_the_curl_line_works_without_a_tokenizer_too(model: Path) -> None:
    with serving(model) as server:
        server.until_ready()
        assert json.loads(run_curl(server))["choices"][0]["finish_reason"] == "length"


def run_curl(server: Serving) -> str:
    curl = next(line for line in server.output.splitlines() if line.strip().startswith("curl"))
    return subprocess.run(["bash", "-c", f"{curl} -s"], capture_output=True, text=True, timeout=30).stdout


def test_says_that_it_is_starting_until_it_is_there(model: Path) -> None:
    with serving(model, "--load-seconds", "4") as server:
        server.until(lambda: "load weights" in server.output)
        assert server.status("/livez") == 200
        for path in ("/readyz", "/health", "/v1/models"):
            response = httpx.get(server.url + path, trust_env=False)
            assert response.status_code == 503 and response.headers["retry-after"]
        assert "starting (load weights)" in response.json()["error"]["message"]
        server.until_ready()
        assert server.status("/readyz") == 200


def test_ctrl_c_while_it_starts_ends_it_at_once(model: Path) -> None:
    with serving(model, "--load-seconds", "60") as server:
        server.until(lambda: "load weights" in server.output)
        core = server.core()
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert not core.is_running()


@contextlib.contextmanager
def ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that start meanwhile begin with these signals ignored, as this process does meanwhile."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_counts_in_the_background_of_a_script_and_hang_up_not_under_nohup(model: Path) -> None:
    """A shell's background jobs begin with SIGINT ignored, what nohup runs with SIGHUP."""
    with ignoring(signal.SIGINT, signal.SIGHUP), serving(model) as server:
        server.until_ready()
        server.process.send_signal(signal.SIGHUP)
        assert server.status("/health") == 200
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_drains_running_requests_finish_and_new_ones_are_sent_away(model: Path, number: signal.Signals) -> None:
    with serving(model, "--pause", "0.02") as server:
        server.until_ready()
        with streaming(server, 100) as stream:
            server.process.send_signal(number)
            server.until(lambda: server.status("/health") == 503)
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, trust_env=False)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert "shutting down" in refused.json()["error"]["message"]
            assert server.status("/livez") == 200
            text = stream.result(40).text
        assert text.endswith("data: [DONE]\n\n")
        assert text.count('"token_ids":[3') == 100
        assert server.wait() == 0


def test_what_does_not_finish_in_time_gets_an_error(model: Path) -> None:
    with serving(model, "--pause", "0.1", shutdown_timeout=0.3) as server:
        server.until_ready()
        with streaming(server, 500) as stream:
            server.process.send_signal(signal.SIGTERM)
            text = stream.result(40).text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert "shut down" in last["error"]["message"]
        assert "[DONE]" not in text
        assert server.wait() == 0
        assert "1 requests were ended" in server.output


def test_a_second_ctrl_c_does_not_wait(model: Path) -> None:
    with serving(model, "--pause", "0.5", shutdown_timeout=1000) as server:
        server.until_ready()
        core = server.core()
        with streaming(server, 500) as stream:
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: server.status("/health") == 503)
            server.process.send_signal(signal.SIGINT)
            assert server.wait() == 0
            with contextlib.suppress(httpx.HTTPError):
                stream.result(10)
        assert not core.is_running()


def test_a_core_that_dies_ends_streams_with_an_error_and_the_server_with_a_reason(model: Path) -> None:
    with serving(model, "--pause", "0.05", max_engine_restarts=0) as server:
        server.until_ready()
        with streaming(server, 500) as stream:
            server.core().kill()
            text = stream.result(40).text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert "killed by signal 9" in last["error"]["message"]
        assert server.wait() == 1
        assert "error: the engine core was killed by signal 9" in server.output
        assert "Traceback" not in server.output


def test_a_server_that_is_killed_takes_its_core_along(model: Path) -> None:
    with serving(model) as server:
        server.until_ready()
        core = server.core()
        server.process.kill()
        assert core.wait(20) is not None or not core.is_running()


def test_a_busy_port_is_known_before_anything_is_loaded(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with serving(model, "--load-seconds", "60", port=port) as server:
            assert server.wait() == 1
            assert f"error: port {port} on 127.0.0.1 is taken" in server.output
            assert "--port" in server.output
            assert "load weights" not in server.output and "Traceback" not in server.output


def test_a_model_without_a_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    directory = write_model_directory(tmp_path / "model", vocab_size=512)
    with serving(directory, "--load-seconds", "60", with_tokenizer=True) as server:
        assert server.wait() == 1
        assert "error: no tokenizer files in" in server.output


def test_tls_files_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --ssl-certfile"):
        check_tls(ServerOptions(ssl_keyfile="key.pem"))
    with pytest.raises(ConfigError, match="no-such-file"):
        check_tls(ServerOptions(ssl_certfile="/no-such-file", ssl_keyfile="/no-such-file"))
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(ConfigError, match="must be PEM files"):
        check_tls(ServerOptions(ssl_certfile=str(broken), ssl_keyfile=str(broken)))
    check_tls(ServerOptions())


def test_chat_template_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ 你 }}", encoding="utf-8")
    assert read_chat_template(ServerOptions(chat_template=str(file))) == "{{ 你 }}"
    assert read_chat_template(ServerOptions()) is None
    with pytest.raises(ConfigError, match="cannot read the chat template /no-such"):
        read_chat_template(ServerOptions(chat_template="/no-such"))


def test_names_of_the_model_are_not_empty() -> None:
    with pytest.raises(ConfigError, match="--served-model-name"):
        served_names(ServerOptions(served_model_name=["a", " "]), ModelOptions())
