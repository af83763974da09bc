"""Streams: the fast way writes what the structs say, and the chunks joined are the whole answer."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import sse
from shoal.protocol.chunks import ChatChunks, CompletionChunks, StreamHead
from shoal.protocol.logprobs import CompletionLogprobsBuilder
from shoal.protocol.responses import ChatChunkChoice, Chunk, CompletionChoice, Delta
from shoal.types import FinishReason, RequestUpdate, TokenLogprobs

TOKENS = {1: b"a", 2: "é".encode(), 3: "你".encode()[:2], 4: "你".encode()[2:], 5: b"<|end|>", 6: b"\x80"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def token_bytes(token_id: int) -> bytes:
    return TOKENS[token_id]


def builder() -> CompletionLogprobsBuilder:
    return CompletionLogprobsBuilder(token_bytes, lambda token_id: token_id != 5, 1)


def head(**changes: Any) -> StreamHead:
    return StreamHead(id='i"d', object="o", created=7, model="möd\u001ael", **changes)


def chat_chunks(num_answers: int = 1, **changes: Any) -> ChatChunks:
    return ChatChunks(head(**changes), [1, 2], num_answers, role="assistant", token_bytes=token_bytes)


def events(data: bytes) -> list[Any]:
    """The JSON of each event; "[DONE]" as it is."""
    assert data == b"" or data.endswith(b"\n\n")
    lines = data.split(b"\n\n")[:-1]
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    contents = [line.removeprefix(b"data: ") for line in lines]
    return ["[DONE]" if content == b"[DONE]" else json.loads(content) for content in contents]


@given(TEXTS.filter(bool), st.booleans(), st.integers(0, 1))
def test_the_fast_way_writes_the_same_bytes_as_the_structs(text: str, include_usage: bool, index: int) -> None:
    usage = None if include_usage else msgspec.UNSET
    chat = chat_chunks(2, include_usage=include_usage)
    chat.render(RequestUpdate(index, "first", [1]))
    choice = ChatChunkChoice(index, Delta(content=text))
    expected = Chunk(chat.head.id, "o", 7, chat.head.model, [choice], usage)
    assert chat.render(RequestUpdate(index, text, [1])) == sse.event(expected)
    completion = CompletionChunks(head(include_usage=include_usage), [[1]], 2)
    completion.render(RequestUpdate(index, "first", [1]))
    expected.choices = [CompletionChoice(index, text)]
    assert completion.render(RequestUpdate(index, text, [1])) == sse.event(expected)


def test_a_chat_stream_from_role_to_done() -> None:
    chunks = chat_chunks(include_usage=True)
    data = chunks.render(RequestUpdate(0, "", [3], num_cached_tokens=1))
    data += chunks.render(RequestUpdate(0, "", [1]))
    data += chunks.render(RequestUpdate(0, "你", [4]))
    data += chunks.render(RequestUpdate(0, "", [5], finish_reason=FinishReason.STOP, stop_reason=5))
    role, text, end, usage, done = events(data + chunks.finish())
    assert role["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert text["choices"][0]["delta"] == {"content": "你"}
    assert end["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": 5
    }  # fmt: skip
    assert [chunk["usage"] for chunk in (role, text, end)] == [None] * 3
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 1}
    }  # fmt: skip
    assert done == "[DONE]"


def test_usage_is_absent_unless_it_is_wanted_and_continuous_where_it_is() -> None:
    assert "usage" not in events(chat_chunks().render(RequestUpdate(0, "a", [1])))[1]
    chunks = chat_chunks(include_usage=True, continuous_usage=True)
    counts = [
        event["usage"]["completion_tokens"]
        for i in range(3)
        for event in events(chunks.render(RequestUpdate(0, "a", [1])))
    ]
    assert counts == [1, 1, 2, 3]  # the role's chunk comes with the first token's


def test_token_ids_are_returned_where_wanted_even_without_text() -> None:
    chunks = chat_chunks(return_token_ids=True)
    first = events(chunks.render(RequestUpdate(0, "", [3])))
    assert first[0]["prompt_token_ids"] == [1, 2]
    assert first[1]["choices"][0]["token_ids"] == [3]
    assert events(chunks.render(RequestUpdate(0, "你", [4])))[0]["choices"][0]["token_ids"] == [4]
    completion = CompletionChunks(head(return_token_ids=True), [[1], [2]], 1)
    first = events(completion.render(RequestUpdate(1, "a", [1])))
    assert first[0]["choices"][0]["prompt_token_ids"] == [2]


def test_chat_logprobs_have_bytes_and_no_infinity() -> None:
    logprobs = [TokenLogprobs([3, 2, 1], [-0.5, -0.25, float("-inf")], 2)]
    _, event = events(chat_chunks().render(RequestUpdate(0, "", [3], logprobs)))
    (entry,) = event["choices"][0]["logprobs"]["content"]
    assert entry == {
        "token": "\ufffd", "logprob": -0.5, "bytes": [0xE4, 0xBD],
        "top_logprobs": [
            {"token": "é", "logprob": -0.25, "bytes": [0xC3, 0xA9]}, {"token": "a", "logprob": -9999.0, "bytes": [97]}
        ],
    }  # fmt: skip


def test_an_error_still_brings_the_text_that_came_before() -> None:
    chunks = chat_chunks()
    update = RequestUpdate(0, "a", [1], finish_reason=FinishReason.ERROR, error="the core died")
    _, event = events(chunks.render(update))
    assert event["choices"][0]["delta"] == {"content": "a"}
    assert event["choices"][0]["finish_reason"] is None


def test_echo_waits_for_the_prompts_logprobs_that_only_the_first_answer_brings() -> None:
    chunks = CompletionChunks(head(), [[1, 2]], 2, echo=["aé"], make_logprobs=builder)
    logprobs = [TokenLogprobs([1, 2], [-1.0, -0.5], 2)]
    assert chunks.render(RequestUpdate(1, "a", [1], logprobs)) == b""
    entries: list[Any] = [None, TokenLogprobs([2, 1], [-0.25, -0.125], 2)]
    data = chunks.render(RequestUpdate(0, "a", [1], logprobs, entries))
    choices = [event["choices"][0] for event in events(data)]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(1, "aé"), (1, "a"), (0, "aé"), (0, "a")]
    assert choices[0]["logprobs"] == choices[2]["logprobs"] == {
        "tokens": ["a", "é"], "token_logprobs": [None, -0.25], "top_logprobs": [None, {"a": -0.125, "é": -0.25}],
        "text_offset": [0, 1],
    }  # fmt: skip
    assert choices[3]["logprobs"]["text_offset"] == [2]


def test_only_echo_hides_the_token_that_had_to_be_generated() -> None:
    chunks = CompletionChunks(head(include_usage=True), [[1]], 1, echo=["a"], only_echo=True)
    data = chunks.render(RequestUpdate(0, "zzz", [2], finish_reason=FinishReason.LENGTH)) + chunks.finish()
    found = events(data)
    assert "".join(event["choices"][0]["text"] for event in found[:-2]) == "a"
    assert found[-2]["usage"]["completion_tokens"] == 0
