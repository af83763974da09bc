"""The API over HTTP: bodies, paths, ids, names, tokenization, and faults of ours."""

from __future__ import annotations

import dataclasses

import httpx
import pytest

from shoal.config.options import ModelOptions
from tests.engine.fake_client import make_config
from tests.server.live_server import LiveServer, error_of, live_server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
JSON = {"content-type": "application/json"}


def test_malformed_bodies(http: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        error = error_of(http.post(path, content=b'{"model": ', headers=JSON), 400)
        assert "not valid JSON" in error["message"]
        assert "empty" in error_of(http.post(path, headers=JSON), 400)["message"]
        assert "JSON object" in error_of(http.post(path, json=[]), 400)["message"]


def test_what_is_not_json_is_refused(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        error = error_of(http.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind}), 415)
        assert "Content-Type: application/json" in error["message"]
    assert http.post(
        "/tokenize", content=b'{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
    )


def test_paths_and_methods(http: httpx.Client) -> None:
    assert "did you mean /v1/completions?" in error_of(http.post("/v1/completion", json={}), 404)["message"]
    assert "/docs lists" in error_of(http.get("/" + "x" * 300), 404)["message"]
    response = http.get("/v1/chat/completions")
    assert "POST does" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


def test_request_ids_are_given_and_kept(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "chatcmpl-mine-1"
    first, second = (http.post("/v1/chat/completions", json=CHAT) for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.json()["id"] == f"chatcmpl-{first.headers['x-request-id']}"
    for bad in ("x" * 200, "a b", "a\tb"):
        assert http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_one_request_id_may_be_used_by_two_at_once(server: LiveServer, http: httpx.Client) -> None:
    """A proxy that tries again uses the id again, while the first attempt may still run."""
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 200},
                     headers={"x-request-id": "again"}) as running:  # fmt: skip
        assert running.status_code == 200
        with server.client() as other:
            assert other.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "again"}).status_code == 200


def test_models_have_served_names() -> None:
    with live_server(served_model_name=["a", "b"]) as server, server.client() as http:
        cards = http.get("/v1/models").json()
        assert [card["id"] for card in cards["data"]] == ["a", "b"]
        assert cards["object"] == "list" and cards["data"][0]["max_model_len"] == 256
        assert http.post("/v1/chat/completions", json={**CHAT, "model": "b"}).json()["model"] == "b"
        body = {key: value for key, value in CHAT.items() if key != "model"}
        assert http.post("/v1/chat/completions", json=body).json()["model"] == "a"
        error = error_of(http.post("/v1/chat/completions", json=CHAT), 404)
        assert error["code"] == "model_not_found" and "there is a, b" in error["message"]
        assert error_of(http.post("/tokenize", json={"model": "x", "prompt": "a"}), 404)["code"] == "model_not_found"


def test_the_model_argument_is_the_name_unless_another_is_given() -> None:
    model = ModelOptions(model="/models/some-model")
    with live_server(served_model_name=[], model=model) as server, server.client() as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "/models/some-model"
        assert http.get("/v1/models//models/some-model").status_code == 200


@pytest.mark.parametrize(("generation_config", "temperature"), [("auto", 0.25), ("shoal", 1.0)])
def test_the_models_own_sampling_defaults(generation_config: str, temperature: float) -> None:
    changed = dataclasses.replace(make_config().model, generation_defaults={"temperature": 0.25})
    model = ModelOptions(model="tiny", generation_config=generation_config)
    with live_server(config={"model": changed}, model=model) as server, server.client() as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        (sent,) = [message for message in server.core.sent if hasattr(message, "request")]
        assert sent.request.sampling.temperature == temperature  # type: ignore[union-attr]


# --- tokenization ----------------------------------------------------------------------------------------------------


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "Hello, 你好 <|im_end|>!"
    tokens = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 256
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    error = error_of(http.post("/detokenize", json={"tokens": [10**6]}), 400)
    assert error["param"] == "tokens"
    assert error_of(http.post("/detokenize", json={"tokens": [-1]}), 400)


def test_tokenize_a_chat_as_the_chat_endpoint_does(http: httpx.Client) -> None:
    messages = CHAT["messages"]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    usage = http.post("/v1/chat/completions", json=CHAT).json()["usage"]
    assert len(tokens) == usage["prompt_tokens"]
    without = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert without == tokens[: len(without)] and len(without) < len(tokens)


def test_templates_of_requests_are_refused_unless_trusted(http: httpx.Client) -> None:
    """A template is a program: `{{ 'a' * 10**9 }}` takes gigabytes."""
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": CHAT["messages"], "chat_template": "{{ 'a' * 10**9 }}"}
        error = error_of(http.post(path, json=body), 400)
        assert error["param"] == "chat_template" and "--trust-request-chat-template" in error["message"]
    with live_server(trust_request_chat_template=True) as server, server.client() as trusting:
        template = {"messages": CHAT["messages"], "chat_template": "{{ x }}", "chat_template_kwargs": {"x": "hi"}}
        expected = trusting.post("/tokenize", json={"prompt": "hi"}).json()
        assert trusting.post("/tokenize", json=template).json() == expected
        error = error_of(trusting.post("/v1/chat/completions", json={**CHAT, "chat_template": "{% oops"}), 400)
        assert "chat template" in error["message"]


def test_long_texts_go_through_a_thread(http: httpx.Client) -> None:
    text = "hello world " * 5000
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_a_server_without_a_tokenizer_takes_token_ids() -> None:
    with live_server(with_tokenizer=False) as server, server.client() as http:
        body = {"prompt": [1, 2], "max_tokens": 2, "logprobs": 0, "return_token_ids": True}
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
        assert choice["token_ids"] == [300, 301]
        assert choice["logprobs"]["tokens"] == ["token_id:300", "token_id:301"]
        text = {"prompt": "a"}
        for path, other in (("/tokenize", text), ("/v1/completions", text), ("/v1/chat/completions", CHAT)):
            assert "tokenizer" in error_of(http.post(path, json=other), 400)["message"]


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_a_500_without_a_traceback(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    with server.client() as http:
        monkeypatch.setattr(server.engine, "prepare", fail)
        error = error_of(http.post("/v1/completions", json={"prompt": "a"}), 500)
        assert error["type"] == "server_error" and "secret" not in error["message"]
        monkeypatch.undo()
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
