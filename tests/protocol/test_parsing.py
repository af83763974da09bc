"""Bodies: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.errors import InvalidRequestError
from shoal.protocol.chat import ChatCompletionRequest, prepare_messages
from shoal.protocol.completions import CompletionRequest
from shoal.protocol.neutral import CHAT_NEUTRAL, COMMON_NEUTRAL
from shoal.protocol.parsing import parse_body
from shoal.protocol.tokenization import TokenizeRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(ChatCompletionRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("data", "message", "param"),
    [
        (b"", "the body is empty", None),
        (b"  ", "the body is empty", None),
        (b"{", "not valid JSON", None),
        (b'{"prompt": "\\ud800"}', "not valid JSON", None),
        (b"\xff\xfe", "not valid JSON", None),
        (b"[" * 100_000, "not valid JSON", None),
        (b"[1]", "must be a JSON object", None),
        (b"null", "must be a JSON object", None),
        (b"{}", "prompt is missing", "prompt"),
        (b'{"prompt": 5}', "prompt must be a string, a list of strings, a list of token ids", "prompt"),
        (b'{"prompt": ["a", 1]}', "prompt must be", "prompt"),
        (b'{"prompt": [[1], "a"]}', "prompt must be", "prompt"),
        (b'{"prompt": [1.5]}', "prompt must be", "prompt"),
        (b'{"prompt": "a", "stop": 5}', "stop must be a string or a list of strings", "stop"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature must be a valid number; got 'hot'", "temperature"),
        (b'{"prompt": "a", "temperature": true}', "temperature must be a valid number", "temperature"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens must be a valid integer; got '5'", "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 5.5}', "max_tokens must be a valid integer", "max_tokens"),
        (b'{"prompt": "a", "stream": 1}', "stream must be a valid boolean", "stream"),
        (b'{"prompt": "a", "logit_bias": {"5": "x"}}', "logit_bias.5 must be a valid number", "logit_bias.5"),
        (b'{"prompt": "a", "stop_token_ids": [1, "x"]}', "stop_token_ids[1] must be", "stop_token_ids[1]"),
        (b'{"prompt": "a", "temprature": 1}', "not known here; did you mean temperature?", "temprature"),
        (b'{"prompt": "a", "xyzzy": 1}', "leave it out", "xyzzy"),
        (b'{"prompt": "a", "stream_options": {"include_usag": 1}}', "include_usage?", "stream_options.include_usag"),
    ],
)  # fmt: skip
def test_bad_bodies_name_the_field_and_what_would_work(data: bytes, message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(CompletionRequest, data)
    assert message in str(caught.value)
    assert caught.value.param == param


def test_a_wrong_list_of_a_million_entries_costs_one_error() -> None:
    with pytest.raises(InvalidRequestError, match="prompt must be"):
        completion(prompt=["a"] * 500_000 + [1])


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(temperature="x" * 10_000)
    assert len(str(caught.value)) < 300


def test_null_is_not_given_for_every_field() -> None:
    names = [*ChatCompletionRequest.model_fields, *CHAT_NEUTRAL]
    body = chat(**{name: None for name in names if name != "messages"})
    assert body.to_sampling_params({}).temperature == 1.0
    names = [*CompletionRequest.model_fields, *COMMON_NEUTRAL]
    assert completion(**{name: None for name in names if name != "prompt"}).to_sampling_params({}).max_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"safety_identifier": "x", "prompt_cache_key": "y", "length_penalty": 1, "use_beam_search": False},
    ],
)
def test_fields_that_change_nothing_are_taken(fields: dict[str, Any]) -> None:
    assert chat(**fields).messages == MESSAGES


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("tools", [{"type": "function"}], "tools are not supported yet"),
        ("tool_choice", "required", "tools are not supported yet"),
        ("functions", [{}], "tools are not supported yet"),
        ("response_format", {"type": "json_object"}, '{"type": "text"}'),
        ("guided_json", {}, "structured output is not supported yet"),
        ("store", True, "not stored"),
        ("store", 0, "not stored"),
        ("service_tier", "priority", "one tier"),
        ("modalities", ["text", "audio"], "answers are text"),
        ("reasoning_effort", "high", "chat_template_kwargs"),
        ("use_beam_search", True, "beam search"),
        ("length_penalty", 0.5, "beam search"),
        ("echo", True, "/v1/completions"),
    ],
)
def test_what_is_not_supported_is_refused_not_ignored(field: str, value: Any, hint: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not supported") as caught:
        chat(**{field: value})
    assert caught.value.param == field
    assert hint in str(caught.value)


def test_every_field_is_either_declared_or_neutral() -> None:
    assert not set(ChatCompletionRequest.model_fields) & set(CHAT_NEUTRAL)
    assert not set(CompletionRequest.model_fields) & set(COMMON_NEUTRAL)


def test_tokenize_takes_a_prompt_or_messages() -> None:
    for data in (b"{}", b'{"prompt": "a", "messages": []}'):
        with pytest.raises(InvalidRequestError, match="either prompt or messages"):
            parse_body(TokenizeRequest, data).check()
    with pytest.raises(InvalidRequestError, match="add_generation_prompt is for messages"):
        parse_body(TokenizeRequest, b'{"prompt": "a", "add_generation_prompt": true}').check()


def test_roles() -> None:
    developer = [{"role": "developer", "content": "be brief"}]
    assert prepare_messages(developer, "plain")[0]["role"] == "system"
    assert prepare_messages(developer, "if role == 'developer'")[0]["role"] == "developer"
    assert prepare_messages([{"role": "ipython"}], "role == 'ipython'")[0]["role"] == "ipython"
    with pytest.raises(InvalidRequestError, match=r"messages\[1\].role is 'usr'; it must be one of system"):
        prepare_messages([*MESSAGES, {"role": "usr", "content": ""}], "plain")
