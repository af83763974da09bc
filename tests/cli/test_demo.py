from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from shoal.cli.client_options import DemoOptions
from shoal.cli.demo import run_demo
from shoal.errors import EngineError, StartupError
from shoal.network import free_port, listen, port_of


@pytest.fixture(autouse=True)
def signals_as_found():
    found = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, found)


def stand_in(behaviour: str) -> Callable[[DemoOptions, int], list[str]]:
    return lambda demo, port: [sys.executable, "-m", "tests.cli.fake_serve", str(port), behaviour]


def assert_nobody_listens(port: int) -> None:
    listen("127.0.0.1", port).close()


def test_once_answers_and_leaves_nothing_behind(capsys):
    port = free_port()
    assert run_demo(DemoOptions(once=True, port=port, question="你好吗"), stand_in("works")) == 0
    out, error = capsys.readouterr()
    assert out == "你好!\n"
    assert "你好吗" in error and "The server is up" in error
    assert_nobody_listens(port)


def test_a_taken_port_is_said_and_another_taken(capsys):
    with contextlib.closing(listen("127.0.0.1", 0)) as holder:
        port = port_of(holder)
        assert run_demo(DemoOptions(once=True, port=port), stand_in("works")) == 0
    assert re.search(rf"Port {port} is taken; taking \d+", capsys.readouterr().err)


def test_a_server_that_does_not_come_up_shows_its_log(capsys):
    with pytest.raises(StartupError, match="ended by itself with exit code 3"):
        run_demo(DemoOptions(once=True, port=0), stand_in("fails"))
    error = capsys.readouterr().err
    assert error.count("no memory for the KV cache") == error.count("loading weights") == 1


def test_no_answer_is_an_error():
    port = free_port()
    with pytest.raises(EngineError, match="answered with nothing"):
        run_demo(DemoOptions(once=True, port=port), stand_in("silent"))
    assert_nobody_listens(port)


@pytest.mark.parametrize(
    ("how", "before"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        # As a shell starts what it puts into the background: only SIGTERM can end it.
        (signal.SIGTERM, "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"),
    ],
)
def test_serves_on_until_it_is_stopped(how, before):
    script = before + (
        "import sys; from shoal.cli.demo import run_demo; from shoal.cli.client_options import DemoOptions;"
        "from tests.cli.test_demo import stand_in;"
        "sys.exit(run_demo(DemoOptions(port=0), stand_in('works')))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("Ctrl-C"):
            break
    assert lines[0] == "你好!"
    assert lines[1].startswith("Talk to it: ") and " chat --url " in lines[1]
    url = re.fullmatch(r"tiny is served at (http://127.0.0.1:\d+)", lines[2])[1]
    assert url in lines[1]
    process.send_signal(how)
    rest, error = process.communicate()
    assert process.returncode == 0
    assert "Stopping the server" in error
    assert_nobody_listens(int(url.rsplit(":", 1)[1]))
