"""What answers and errors look like, and bodies that ask for them."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from tests.router.fakes.native import MODEL

GENERATING = ("/v1/chat/completions", "/v1/completions")
PROMPT = "the quick brown fox"
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "count the foxes"}]
GREEDY: Any = {"model": MODEL, "temperature": 0}
# Fields of vLLM's that keep a model from ending by itself.
ON: Any = {"ignore_eos": True}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """A small request."""
    subject = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    return {**GREEDY, **subject, "max_tokens": 8, **ON, **fields}


def check_whole(answer: dict[str, Any], path: str, num_choices: int = 1) -> list[str]:
    """The form of an answer that is not a stream. Returns the texts."""
    is_chat = "chat" in path
    assert answer["object"] == ("chat.completion" if is_chat else "text_completion")
    assert answer["id"].startswith("chatcmpl-" if is_chat else "cmpl-")
    assert answer["model"] == MODEL and abs(answer["created"] - time.time()) < 600
    check_usage(answer["usage"])
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(num_choices))
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
    if is_chat:
        assert {choice["message"]["role"] for choice in choices} == {"assistant"}
        return [choice["message"]["content"] for choice in choices]
    return [choice["text"] for choice in choices]


def check_usage(usage: dict[str, Any]) -> None:
    counts = [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert all(type(count) is int and count >= 0 for count in counts)
    assert counts[0] > 0 and counts[0] + counts[1] == counts[2]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, which ends as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def check_chunks(events: list[dict[str, Any]], path: str, num_choices: int = 1) -> list[str]:
    """The form of a stream. Returns the texts."""
    is_chat = "chat" in path
    assert {event["object"] for event in events} == {"chat.completion.chunk" if is_chat else "text_completion"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert events[0]["id"].startswith("chatcmpl-" if is_chat else "cmpl-") and events[0]["model"] == MODEL
    texts, roles, ends = [""] * num_choices, [0] * num_choices, [""] * num_choices
    for event in events:
        for choice in event["choices"]:
            index = choice["index"]
            assert not ends[index], "something comes after the end of an answer"
            if is_chat and choice["delta"].get("role"):
                assert choice["delta"]["role"] == "assistant" and not texts[index]
                roles[index] += 1
            texts[index] += (choice["delta"].get("content") or "") if is_chat else choice["text"]
            ends[index] = choice["finish_reason"] or ""
    assert set(ends) <= {"stop", "length"}, f"an answer has no end: {ends}"
    assert not is_chat or roles == [1] * num_choices
    return texts


def check_error(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """An error object, as OpenAI's or vLLM's."""
    assert response.status_code in statuses, response.text
    assert response.headers["content-type"].split(";")[0] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert "Traceback" not in response.text
    return error
