"""What a client of the OpenAI API gets, the same from every target: the answers, their streams, and their ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.conformance.answers import (
    GENERATING,
    GREEDY,
    MESSAGES,
    ON,
    PROMPT,
    body_for,
    check_chunks,
    check_error,
    check_usage,
    check_whole,
    events_of,
)
from tests.conformance.targets import LACKS, MAX_MODEL_LEN, TARGETS, Target, backends, needs, without
from tests.router.fakes.native import MODEL

both_paths = pytest.mark.parametrize("path", GENERATING)


def test_the_table_names_targets():
    assert all(set(lacking) <= set(TARGETS) for lacking in LACKS.values())


# --- answers ---------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("num_choices", [1, 3])
def test_an_answer(http: httpx.Client, path: str, num_choices: int):
    response = http.post(path, json=body_for(path, n=num_choices, temperature=1), headers={"x-request-id": "mine-1"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "mine-1"
    check_whole(response.json(), path, num_choices)
    assert response.json()["usage"]["completion_tokens"] == 8 * num_choices


@both_paths
@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_stream(http: httpx.Client, path: str, num_choices: int):
    body = body_for(path, n=num_choices, temperature=1, stream=True)
    response = http.post(path, json=body, headers={"x-request-id": "mine-2"})
    assert response.headers["x-request-id"] == "mine-2"
    events = events_of(response)
    check_chunks(events, path, num_choices)
    assert all(event.get("usage") is None for event in events), "nobody asked for usage"


@both_paths
@needs("one-model")
def test_a_stream_says_what_the_whole_answer_says(http: httpx.Client, path: str):
    body = body_for(path, max_tokens=30)
    (text,) = check_whole(http.post(path, json=body).json(), path)
    events = events_of(http.post(path, json={**body, "stream": True}))
    assert check_chunks(events, path) == [text]
    assert len(events) > 5, "it comes in pieces"
    if "\ufffd" not in text:
        assert "\ufffd" not in json.dumps(events, ensure_ascii=False), "a character was cut in two"


@both_paths
def test_usage_comes_with_a_stream_when_asked_for(http: httpx.Client, path: str):
    body = body_for(path, stream=True, n=2, stream_options={"include_usage": True})
    *events, last = events_of(http.post(path, json=body))
    check_chunks(events, path, 2)
    assert all("usage" in event and event["usage"] is None for event in events)
    assert last["choices"] == [] and last["id"] == events[0]["id"]
    check_usage(last["usage"])
    assert last["usage"]["completion_tokens"] == 16


@both_paths
def test_usage_comes_with_each_event_when_asked_for(http: httpx.Client, path: str):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(http.post(path, json=body_for(path, stream=True, stream_options=options)))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 8
    for event in events:
        check_usage(event["usage"])


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(
    ("path", "name"),
    [(GENERATING[0], "max_tokens"), (GENERATING[0], "max_completion_tokens"), (GENERATING[1], "max_tokens")],
)
def test_the_limit_of_tokens(http: httpx.Client, path: str, name: str, num_tokens: int):
    body = body_for(path)
    del body["max_tokens"]
    answer = http.post(path, json={**body, name: num_tokens}).json()
    check_whole(answer, path)
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_completion_has_16_tokens_where_nothing_is_said(http: httpx.Client):
    body = body_for(GENERATING[1])
    del body["max_tokens"]
    assert http.post(GENERATING[1], json=body).json()["usage"]["completion_tokens"] == 16


@both_paths
@needs("one-model")
def test_a_seed(http: httpx.Client, path: str):
    def say(**fields: Any) -> str:
        body = body_for(path, temperature=1.5, max_tokens=12, **fields)
        return check_whole(http.post(path, json=body).json(), path)[0]

    one, *others = (say(seed=number) for number in (1, 2, 3))
    assert say(seed=1) == one and set(others) != {one}
    assert len({say() for _ in range(3)}) > 1, "without a seed each request has its own"


@both_paths
@needs("one-model")
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(http: httpx.Client, path: str, stream: bool):
    (text,) = check_whole(http.post(path, json=body_for(path, max_tokens=24)).json(), path)
    stop = text[10:13]
    response = http.post(path, json=body_for(path, max_tokens=24, stop=["\x00", stop], stream=stream))
    if stream:
        events = events_of(response)
        texts, reason = check_chunks(events, path), events[-1]["choices"][0]["finish_reason"]
    else:
        texts, reason = check_whole(response.json(), path), response.json()["choices"][0]["finish_reason"]
    assert texts == [text[: text.index(stop)]] and reason == "stop"


@needs("one-model")
def test_a_stop_token(http: httpx.Client):
    body = body_for(GENERATING[1], logprobs=0, return_token_ids=True)
    ids = http.post(GENERATING[1], json=body).json()["choices"][0]["token_ids"]
    answer = http.post(GENERATING[1], json={**body, "stop_token_ids": [ids[4]]}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(ids[4]) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(http: httpx.Client, stream: bool):
    body = body_for(GENERATING[1], prompt=["one", "two and more"], n=2, echo=True, stream=stream)
    response = http.post(GENERATING[1], json=body)
    if stream:
        texts = check_chunks(events_of(response), GENERATING[1], 4)
    else:
        texts = check_whole(response.json(), GENERATING[1], 4)
    assert [text.startswith("one") for text in texts] == [True, True, False, False]
    assert all(text.startswith("two and more") for text in texts[2:])
    assert all(len(text) > len("two and more") for text in texts[2:])


@needs("one-model")
def test_prompts_of_token_ids(http: httpx.Client):
    ids = http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()["tokens"]
    assert http.post("/detokenize", json={"model": MODEL, "tokens": ids}).json()["prompt"] == PROMPT
    bodies = [body_for(GENERATING[1], prompt=prompt) for prompt in (PROMPT, ids, [ids])]
    texts = [check_whole(http.post(GENERATING[1], json=body).json(), GENERATING[1]) for body in bodies]
    assert texts[0] == texts[1] == texts[2]


def test_prompts_count(http: httpx.Client):
    def count(**fields: Any) -> int:
        answer = http.post(GENERATING[1], json=body_for(GENERATING[1], max_tokens=1, **fields)).json()
        return int(answer["usage"]["prompt_tokens"])

    assert count(prompt=[1, 2, 3]) == 3 and count(prompt=[[1, 2], [3]]) == 3
    assert count(prompt="x" * 400) > count(prompt="x" * 200) > 1


def test_a_message_that_is_to_be_continued(http: httpx.Client):
    begun = [*MESSAGES, {"role": "assistant", "content": "there are"}]
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    check_whole(http.post(GENERATING[0], json=body_for(GENERATING[0], **fields)).json(), GENERATING[0])


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat(http: httpx.Client):
    body = body_for(GENERATING[0], logprobs=True, top_logprobs=3, ignore_eos=False)
    answer = http.post(GENERATING[0], json=body).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"] > 2
    for entry in entries:
        assert isinstance(entry["token"], str) and entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        assert all(isinstance(top["token"], str) and top["logprob"] <= 0 for top in entry["top_logprobs"])
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    text = answer["choices"][0]["message"]["content"].rstrip("\ufffd")
    assert text and data.decode("utf-8", "replace").startswith(text), "an end token may follow"


def test_log_probabilities_of_a_completion(http: httpx.Client):
    answer = http.post(GENERATING[1], json=body_for(GENERATING[1], logprobs=2)).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {8}
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"]) and logprobs["text_offset"][0] == 0


@both_paths
@needs("one-model")
def test_log_probabilities_are_the_same_in_a_stream(http: httpx.Client, path: str):
    body = body_for(path, **({"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2}))
    whole = http.post(path, json=body).json()["choices"][0]["logprobs"]
    joined: dict[str, list[Any]] = {}
    for event in events_of(http.post(path, json={**body, "stream": True})):
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                joined.setdefault(name, []).extend(values or [])
    for name, values in joined.items():
        assert values == (whole[name] or [])
    assert len(joined) >= 1


def test_a_prompt_comes_back_with_its_log_probabilities(http: httpx.Client):
    body = body_for(GENERATING[1], echo=True, logprobs=1, max_tokens=2)
    (choice,) = http.post(GENERATING[1], json=body).json()["choices"]
    assert choice["text"].startswith(PROMPT)
    values = choice["logprobs"]["token_logprobs"]
    assert values[0] is None and len(values) > 3 and all(value <= 0 for value in values[1:])


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_client_chats(client: openai.OpenAI):
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, max_tokens=12, user="me", extra_body=ON)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12


def test_the_client_streams(client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            **GREEDY, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, n=2,
            extra_body=ON,
        )
    )  # fmt: skip
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant" and "".join(choice.delta.content or "" for choice in choices)
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24


def test_the_clients_stream_helper(client: openai.OpenAI):
    with client.chat.completions.stream(**GREEDY, messages=MESSAGES, max_tokens=12) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text and stream.current_completion_snapshot.choices[0].message.content == text


def test_the_client_completes(client: openai.OpenAI):
    answer = client.completions.create(**GREEDY, prompt=["a", "bc"], max_tokens=4, echo=True, logprobs=1, extra_body=ON)
    assert [choice.text[:1] for choice in answer.choices] == ["a", "b"]
    assert answer.usage is not None and answer.usage.completion_tokens == 8


async def test_the_asynchronous_client_does_many_things_at_once(async_client: openai.AsyncOpenAI):
    async def chat(number: int) -> str:
        options: Any = dict(**GREEDY, messages=[{"role": "user", "content": f"say {number}"}], max_tokens=10)
        if number % 2:
            return (await async_client.chat.completions.create(**options)).choices[0].message.content or ""
        stream = await async_client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert all(await asyncio.gather(*map(chat, range(12))))


def test_vllms_additions_go_through_extra_body(client: openai.OpenAI):
    extra = {
        **ON, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 3, "return_token_ids": True,
        "prompt_logprobs": 1, "priority": 3, "add_special_tokens": False, "skip_special_tokens": True,
    }  # fmt: skip
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0.7, top_p=0.9, presence_penalty=0.1, extra_body=extra
    )
    assert len(answer.choices[0].token_ids) == 6
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_models(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert model.id == MODEL and model.object == "model" and isinstance(model.created, int) and model.owned_by
    assert client.models.retrieve(MODEL).id == MODEL


# --- errors ----------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        ({"model": "no-such-model"}, (404,)),
        ({"temperature": -1}, (400,)),
        ({"max_tokens": -1}, (400,)),
        ({"n": 0}, (400,)),
        ({"top_p": 2}, (400,)),
        ({"max_tokens": "many"}, (400,)),
    ],
)
def test_a_request_that_is_wrong(http: httpx.Client, path: str, stream: bool, fields: Any, statuses: tuple[int, ...]):
    check_error(http.post(path, json=body_for(path, **{"stream": stream, **fields})), *statuses)


@both_paths
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(http: httpx.Client, path: str, stream: bool):
    text = "x y " * 4 * MAX_MODEL_LEN
    subject = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    error = check_error(http.post(path, json=body_for(path, stream=stream, **subject)), 400)
    assert str(MAX_MODEL_LEN) in error["message"]


@both_paths
@pytest.mark.parametrize("content", [b"", b'{"model": ', b"[]", b'"text"', b"\xff\xfe"])
def test_a_body_that_is_no_json_object(http: httpx.Client, path: str, content: bytes):
    check_error(http.post(path, content=content, headers={"content-type": "application/json"}), 400)


@both_paths
def test_a_body_without_its_subject(http: httpx.Client, path: str):
    check_error(http.post(path, json={"model": MODEL, "max_tokens": 4}), 400)


@both_paths
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type(http: httpx.Client, path: str, kind: str):
    content = json.dumps(body_for(path)).encode()
    check_error(http.post(path, content=content, headers={"content-type": kind}), 400, 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_spellings_of_json(http: httpx.Client, kind: str):
    content = json.dumps(body_for(GENERATING[1])).encode()
    response = http.post(GENERATING[1], content=content, headers={"content-type": kind})
    check_whole(response.json(), GENERATING[1])


@pytest.mark.parametrize(("method", "path", "status"), [("GET", GENERATING[0], 405), ("POST", "/v1/nothing", 404)])
def test_paths_and_methods(http: httpx.Client, method: str, path: str, status: int):
    assert http.request(method, path, json={}).status_code == status


@pytest.mark.parametrize("path", ["/v1/models", *GENERATING])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_key_that_is_wrong(target: Target, path: str, key: str | None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    json_body = None if path == "/v1/models" else body_for(path)
    method = "GET" if json_body is None else "POST"
    response = httpx.request(method, target.url + path, json=json_body, headers=headers, trust_env=False)
    assert response.status_code == 401


@needs("error-object-401")
def test_a_key_that_is_wrong_has_an_error_object(target: Target):
    check_error(httpx.get(f"{target.url}/v1/models", headers={"authorization": "Bearer no"}, trust_env=False), 401)


def test_errors_are_the_clients_own(client: openai.OpenAI, target: Target):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**GREEDY, "temperature": -1}, messages=MESSAGES, stream=True)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{target.url}/v1", api_key="wrong", max_retries=0).models.list()


# --- what some have and others do not --------------------------------------------------------------------------------

_TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
_JSON: Any = {"type": "json_object"}


@needs("tools")
def test_a_tool_is_called(client: openai.OpenAI):
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, tools=_TOOLS, tool_choice="required")
    assert answer.choices[0].message.tool_calls and answer.choices[0].finish_reason == "tool_calls"


@needs("json")
def test_an_answer_is_json(client: openai.OpenAI):
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, response_format=_JSON, max_tokens=200)
    json.loads(answer.choices[0].message.content or "")


@without("tools")
def test_tools_are_refused_where_they_would_be_ignored(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, messages=MESSAGES, tools=_TOOLS)
    assert caught.value.param == "tools"


@without("json")
def test_json_is_refused_where_it_would_be_ignored(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, messages=MESSAGES, response_format=_JSON)
    assert caught.value.param == "response_format"


# --- clients that go away --------------------------------------------------------------------------------------------

_LONG = {"max_tokens": 900, "temperature": 0}


@pytest.mark.parametrize(("path", "stream"), [(GENERATING[0], True), (GENERATING[1], False)])
def test_a_client_that_goes_away_ends_its_request(http: httpx.Client, target: Target, path: str, stream: bool):
    _until(lambda: target.num_unfinished() == 0)
    before = target.num_generated()
    if stream:
        with http.stream("POST", path, json=body_for(path, **_LONG, stream=True)) as response:
            lines = response.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            _until(lambda: target.num_unfinished() == 1)  # what a server tells of itself may be a step old
    else:
        with contextlib.suppress(httpx.ReadTimeout):
            http.post(path, json=body_for(path, **_LONG), timeout=0.3)
            pytest.fail("900 tokens came within 0.3 s")
    _until(lambda: target.num_unfinished() == 0)
    assert target.num_generated() - before < 800, "the engine went on for nobody"


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- behind a router -------------------------------------------------------------------------------------------------


@needs("router")
def test_the_router_lost_nothing_and_left_nobody_out(target: Target, http: httpx.Client):
    for _ in range(4):
        check_whole(http.post(GENERATING[1], json=body_for(GENERATING[1])).json(), GENERATING[1])
    found = backends(target.url)
    assert [backend["available"] for backend in found] == [True] * len(target.servers), found
    assert [backend["breaker_opened"] for backend in found] == [0] * len(target.servers), found


@needs("several-servers")
def test_both_servers_answer(target: Target, http: httpx.Client):
    assert {backend["kind"] for backend in backends(target.url)} == {"shoal", "openai"}
    alone = [Target(url, url, (url,)) for url in target.servers]
    before = [one.num_generated() for one in alone]
    for _ in range(6):
        check_whole(http.post(GENERATING[1], json=body_for(GENERATING[1])).json(), GENERATING[1])
    shares = [one.num_generated() - count for one, count in zip(alone, before, strict=True)]
    assert shares == [24, 24], "round robin gives each the half of 48 tokens"
