from __future__ import annotations

import io

import pytest

from shoal.cli.main import main


@pytest.fixture
def typed(monkeypatch):
    def type_in(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return type_in


def test_a_conversation_keeps_its_history(server, typed, capsys):
    typed("first\n\nsecond\n/clear\nthird\n/what\n/exit\nnever\n")
    assert main(["chat", "--url", server.url, "--system-prompt", "be short", "--temperature", "0", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "你好!\n" * 3
    histories = [[message["content"] for message in body["messages"]] for _, _, body in server.requests]
    assert histories == [
        ["be short", "first"],
        ["be short", "first", "你好!", "second"],
        ["be short", "third"],
    ]
    assert server.requests[0][2]["temperature"] == 0 and server.requests[0][2]["seed"] == 1
    assert "top_p" not in server.requests[0][2]


def test_quick_question(server, capsys):
    assert main(["chat", "--url", server.url, "-q", "你好", "--model", "other"]) == 0
    assert capsys.readouterr().out == "你好!\n"
    assert server.requests[0][2]["model"] == "other"


def test_an_error_ends_a_script_with_one_line(server, typed, capsys):
    server.status, server.error = 400, "too long"
    server_models, server.models = server.models, []
    typed("hi\n")
    assert main(["chat", "--url", server.url]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("shoal: error: ")
    server.models = server_models


def test_the_key_of_the_environment_is_presented(server, monkeypatch):
    monkeypatch.setenv("SHOAL_API_KEY", "from-env")
    assert main(["chat", "--url", server.url, "-q", "x"]) == 0
    assert server.requests[0][1]["Authorization"] == "Bearer from-env"


def test_complete_takes_an_argument_or_standard_input(server, typed, capsys):
    assert main(["complete", "Once", "--url", server.url, "--max-tokens", "5", "--stop", "a", "b"]) == 0
    typed("upon\n")
    assert main(["complete", "--url", server.url, "--echo"]) == 0
    assert capsys.readouterr().out == "你好!\nupon你好!\n"
    (_, _, first), (path, _, second) = server.requests
    assert path == "/v1/completions"
    assert (first["prompt"], first["max_tokens"], first["stop"]) == ("Once", 5, ["a", "b"])
    assert second == {"model": "tiny", "prompt": "upon", "stream": True}
