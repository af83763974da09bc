"""The official openai client against a served app: what it sends is taken, and what comes back is what it parses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from shoal.types import EngineRequest
from tests.engine.fake_client import counting, say
from tests.engine.tokenizers_for_tests import hugging_face, tokenizer
from tests.server.live_server import LiveServer, live_server

ANSWER = "给我推荐 the quick “fox” 😀👍🏽 and 北京!"
END = hugging_face("byte_level").convert_tokens_to_ids("<|im_end|>")
IDS = tokenizer().encode(ANSWER)
USER: Any = [{"role": "user", "content": "给我推荐中国适合旅游的地方"}]


TOOLS = [{"type": "function", "function": {"name": "f"}}]
JSON_OBJECT = {"type": "json_object"}
TOO_LONG = [{"role": "user", "content": "x" * 5000}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(say(IDS, END)) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.wait_until(server.idle)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=100, temperature=0, user="me")
    (choice,) = answer.choices
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(IDS) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == ANSWER
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
        assert all("\ufffd" not in (choice.delta.content or "") for choice in choices)
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2 * (len(IDS) + 1)


def test_the_clients_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=USER) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == ANSWER


async def test_async_client(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model="tiny", messages=USER)
        stream = await client.chat.completions.create(model="tiny", messages=USER, stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert (await whole).choices[0].message.content == streamed == ANSWER
        assert [model.id async for model in client.models.list()] == ["tiny"]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "bc"], max_tokens=4, n=2, echo=True, seed=1)
    text = tokenizer().decode(IDS[:4])
    assert [choice.text for choice in answer.choices] == ["a" + text] * 2 + ["bc" + text] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [300, 301], [[300], [301, 302]]])
def test_every_form_of_prompt_streams_what_it_answers(client: openai.OpenAI, prompt: Any) -> None:
    options: Any = dict(model="tiny", prompt=prompt, max_tokens=100, logprobs=2, n=2, echo=True)
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason] == ["stop"]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [entry for part in parts if part.logprobs for entry in getattr(part.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)


def test_chat_logprobs_are_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    options: Any = dict(model="tiny", messages=USER, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**options).choices[0].logprobs
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [entry for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content or []]
    assert whole is not None and whole.content is not None
    assert len(whole.content) == len(IDS) + 1
    assert streamed == whole.content
    assert bytes(byte for entry in whole.content[:-1] for byte in entry.bytes or []).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 3 for entry in whole.content)


def test_only_the_prompts_logprobs(client: openai.OpenAI) -> None:
    """As evaluation harnesses ask: nothing is generated, the prompt comes back with its log-probabilities."""
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "hello"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == "hello"
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] == -1.0
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_vllms_additions_go_through_extra_body(client: openai.OpenAI) -> None:
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [IDS[3]], "ignore_eos": True,
        "min_tokens": 1, "return_token_ids": True, "prompt_logprobs": 1, "priority": 3, "add_special_tokens": False,
    }  # fmt: skip
    answer: Any = client.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
    assert answer.choices[0].stop_reason == IDS[3]
    assert answer.choices[0].token_ids == IDS[:4]
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_stop_strings(client: openai.OpenAI) -> None:
    answer: Any = client.chat.completions.create(model="tiny", messages=USER, stop=["fox", "zzz"])
    assert answer.choices[0].message.content == ANSWER.split("fox")[0]
    assert answer.choices[0].stop_reason == "fox"


def test_messages_of_every_role_and_of_parts(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "x"},
    ]
    assert client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("options", "kind", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", None),
        ({"extra_body": {"tempreture": 1}}, openai.BadRequestError, "tempreture", "unknown_parameter"),
        ({"tools": TOOLS}, openai.BadRequestError, "tools", "unsupported_parameter"),
        ({"response_format": JSON_OBJECT}, openai.BadRequestError, "response_format", "unsupported_parameter"),
        ({"messages": TOO_LONG}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_arrive_as_the_clients_own(
    client: openai.OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
    code: str,
    stream: bool,
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": USER, "stream": stream, **options})
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_models(client: openai.OpenAI) -> None:
    assert client.models.retrieve("tiny").owned_by == "shoal"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_key_that_is_wrong_is_an_authentication_error() -> None:
    with live_server(api_key=["one", "two"]) as server:
        for key in ("one", "two"):
            assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="three").models.list()


async def test_an_engine_that_dies_ends_streams_with_an_error_and_new_requests_with_503() -> None:
    servers = []

    def stall_after_five(request: EngineRequest, position: int) -> int:
        if position == 5:
            servers[0].core.gate.clear()  # nobody gets further before the engine dies
        return counting(request, position)

    with live_server(stall_after_five) as server:
        servers.append(server)
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        waiting = asyncio.create_task(client.chat.completions.create(model="tiny", messages=USER, max_tokens=200))
        stream = await client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        server.do(server.core.die)
        with pytest.raises(openai.APIError, match="killed by signal 9"):
            async for _ in stream:
                pass
        await asyncio.gather(waiting, return_exceptions=True)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="tiny", messages=USER)
        assert caught.value.status_code == 503 and caught.value.code == "engine_lost"
        await client.close()
