"""/internal/v1/continue: who may, what is refused, and how a stream of frames lives and ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from shoal.messages import AbortRequests, AddRequest
from shoal.protocol import internal
from shoal.protocol.internal import (
    PATH,
    REQUEST_MEDIA_TYPE,
    STREAM_MEDIA_TYPE,
    Accepted,
    AnswerJournal,
    Beat,
    ContinueRequest,
    Failed,
    Finished,
    FrameReader,
    Progress,
    encode_request,
)
from shoal.types import FinishReason, TokenLogprobs
from tests.server.in_process import InProcessServer, Journal, first_request, in_process_server
from tests.server.live_server import error_of, live_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 8, "stream": True}
TYPE = {"content-type": REQUEST_MEDIA_TYPE}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InProcessServer]:
    async with in_process_server() as server:
        yield server
        await server.wait_until(server.idle)


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_it_is_guarded_and_announced_and_streams_over_http() -> None:
    request = encode_request(first_request(COMPLETIONS, BODY))
    with live_server(api_key=["secret"]) as server, server.client() as http:
        assert http.get("/version").json()["internal"] == ["continue/1"]
        assert error_of(http.post(PATH, content=request, headers=TYPE), 401)["code"] == "invalid_api_key"
        key = {"authorization": "Bearer secret"}
        assert error_of(http.get(PATH, headers=key), 405)
        error = error_of(http.post(PATH, json={}, headers=key), 415)
        assert REQUEST_MEDIA_TYPE in error["message"] and "application/json" in error["message"]
        response = http.post(PATH, content=request, headers=TYPE | key)
        assert response.headers["content-type"] == STREAM_MEDIA_TYPE
        accepted, *news, end = FrameReader().feed(response.content)
        assert isinstance(accepted, Accepted) and accepted.n == 1 and accepted.max_tokens == 8
        assert isinstance(end, Finished) and end.num_tokens == 8
        assert end.num_prompt_tokens == len(accepted.prompts[0])
        assert [token for event in news if isinstance(event, Progress) for token in event.token_ids] == [
            *range(300, 308)
        ]
        assert PATH not in http.get("/openapi.json", headers=key).json()["paths"], "not for clients"


def test_a_router_that_goes_away_frees_the_request() -> None:
    request = encode_request(first_request(COMPLETIONS, {**BODY, "max_tokens": 200, "n": 2}))
    with live_server() as server, server.client() as http:
        server.do(server.core.gate.clear)  # the core makes no step: nothing ends by itself
        with http.stream("POST", PATH, content=request, headers=TYPE) as response:
            assert next(response.iter_raw())
        server.wait_until(server.idle)
        aborts = [message for message in server.core.sent if isinstance(message, AbortRequests)]
        assert sum(len(abort.request_ids) for abort in aborts) == 2 and all(abort.silent for abort in aborts)


# --- what is refused -------------------------------------------------------------------------------------------------


async def test_another_version(server: InProcessServer) -> None:
    newer = msgspec.msgpack.encode({"version": 2, "path": 5, "who": "knows"})
    reply = await server.call(PATH, newer, TYPE)
    assert reply.status == 400
    assert "version 2" in reply.error["message"] and "speaks 1" in reply.error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xc1" * 40,
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"version": "1"}),
        msgspec.msgpack.encode({"version": 1}),
        encode_request(first_request(COMPLETIONS, BODY))[:-5],
        encode_request(first_request(COMPLETIONS, BODY)) + b"more",
    ],
)
async def test_garbage(server: InProcessServer, body: bytes) -> None:
    reply = await server.call(PATH, body, TYPE)
    assert reply.status == 400
    assert "no ContinueRequest" in reply.error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "a" * 1000}, "request_id"),
        ({"deadline_seconds": 0.0}, "deadline_seconds"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds"),
        ({"num_crashes": -1}, "num_crashes"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": [[1], [2]]}, "2 prompts; the body has 1"),
        ({"prompts": [[]]}, "prompt is empty"),
        ({"prompts": [[5, 512]]}, "512"),
        ({"prompts": [[5] * 256]}, "max_model_len"),
        ({"answers": [AnswerJournal(index=0)]}, "no prompts"),
    ],
)
async def test_fields_out_of_range(server: InProcessServer, fields: dict[str, Any], said: str) -> None:
    for path, body in ((COMPLETIONS, BODY), (CHAT, {"messages": MESSAGES, "stream": True})):
        reply = await server.go_on(first_request(path, body, **fields))
        assert reply.status == 400
        assert said in reply.error["message"]
    assert not server.core.sent


async def test_what_the_public_route_refuses_is_refused_alike(server: InProcessServer) -> None:
    for path, body, status in (
        (COMPLETIONS, {**BODY, "temperature": -1}, 400),
        (COMPLETIONS, {**BODY, "model": "other"}, 404),
        (COMPLETIONS, {**BODY, "nonsense": 1}, 400),
        (COMPLETIONS, {**BODY, "prompt": []}, 400),
        (CHAT, {"messages": []}, 400),
        (CHAT, {"messages": MESSAGES, "chat_template": "x"}, 400),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, 400),
    ):
        public, reply = await server.post(path, body), await server.go_on(first_request(path, body))
        assert (reply.status, reply.error) == (public.status, public.error)
        assert reply.status == status
    reply = await server.go_on(ContinueRequest(version=1, path="/v1/x", body=b"{}", request_id="r", seed=1, created=1))
    assert reply.status == 400 and COMPLETIONS in reply.error["message"] and CHAT in reply.error["message"]
    reply = await server.go_on(ContinueRequest(version=1, path=CHAT, body=b"{", request_id="r", seed=1, created=1))
    assert reply.status == 400 and reply.error["code"] == "invalid_json"


async def test_size_and_admission() -> None:
    async with in_process_server(max_request_bytes=300, engine={"max_num_waiting": 1}) as server:
        large = {**BODY, "prompt": "x" * 400}
        reply = await server.go_on(first_request(COMPLETIONS, large))
        assert reply.status == 413 and "--max-request-bytes" in reply.error["message"]
        # The bound is on the client's part: a journal may be longer.
        request = first_request(COMPLETIONS, BODY, prompts=[[300] * 200])
        assert len(encode_request(request)) > 600
        assert (await server.go_on(request)).status == 200
        announced = TYPE | {"content-length": str(300 + internal.MAX_JOURNAL_BYTES + 1)}
        assert (await server.call(PATH, b"", announced)).status == 413
        server.engine.begin_drain()
        reply = await server.go_on(first_request(COMPLETIONS, BODY))
        assert reply.status == 503 and reply.headers["retry-after"]


# --- a journal that does not fit -------------------------------------------------------------------------------------

IDS = [300, 301, 302]
ENTRY = TokenLogprobs([300, 0], [-0.5, -0.5], 1)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"index": 0, "token_ids": IDS, "delivered_characters": 1000}], "1000 characters"),
        ([{"index": 0, "delivered_characters": 1}], "1 characters"),
        ([{"index": 0, "token_ids": IDS, "delivered_characters": -1}], "-1 characters"),
        ([{"index": 0, "token_ids": IDS, "num_cached_tokens": -1}], "-1 cached"),
        ([{"index": 2}], "an answer 2; the request has 2"),
        ([{"index": -1}], "an answer -1"),
        ([{"index": 1}, {"index": 1}], "answer 1 twice"),
        ([{"index": 1, "token_ids": [300, 512]}], "answer 1 holds token ids that are not from 0 to 511"),
        ([{"index": 1, "token_ids": [-1]}], "answer 1 holds token ids"),
        ([{"index": 0, "token_ids": [300] * 9}], "9 tokens; max_tokens and max_model_len allow 8"),
        ([{"index": 0, "token_ids": IDS, "finish_reason": FinishReason.STOP}], "were not delivered"),
        ([{"index": 0, "token_ids": IDS, "finish_reason": FinishReason.ABORT}], "ended with abort"),
        ([{"index": 0, "token_ids": IDS, "finish_reason": FinishReason.ERROR}], "ended with error"),
        ([{"index": 0, "token_ids": IDS, "logprobs": [ENTRY]}], "entries for 1 tokens, where there are 0"),
        ([{"index": 0, "prompt_logprobs": [None]}], "entries for"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_journal_that_does_not_fit(
    server: InProcessServer, answers: list[dict[str, Any]], said: str, stream: bool
) -> None:
    journal = [AnswerJournal(**answer) for answer in answers]
    request = first_request(COMPLETIONS, {**BODY, "n": 2, "stream": stream}, prompts=[[300]], answers=journal)
    reply = await server.go_on(request)
    assert reply.status == 400, reply.data
    assert said in reply.error["message"]
    assert not server.core.sent


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"token_ids": IDS}, "logprobs: entries for 0 tokens, where there are 3"),
        ({"token_ids": [300], "logprobs": [TokenLogprobs([], [], 1)]}, "an entry has"),
        ({"token_ids": [300], "logprobs": [TokenLogprobs([300], [], 1)]}, "an entry has"),
        ({"token_ids": [300], "logprobs": [TokenLogprobs([600], [-1.0], 1)]}, "an entry has"),
        ({"token_ids": [300], "logprobs": [ENTRY]}, "prompt_logprobs: entries for 0 tokens, where there are 2"),
        ({"token_ids": [300], "logprobs": [ENTRY], "prompt_logprobs": [ENTRY, ENTRY]}, "begin with null"),
        ({"token_ids": [300], "logprobs": [ENTRY], "prompt_logprobs": [None, None]}, "an entry has"),
    ],
)
async def test_log_probabilities_that_do_not_fit(server: InProcessServer, answer: dict[str, Any], said: str) -> None:
    body = {**BODY, "echo": True, "logprobs": 1}
    journal = [AnswerJournal(index=0, **answer)]
    reply = await server.go_on(first_request(COMPLETIONS, body, prompts=[[300, 301]], answers=journal))
    assert reply.status == 400, reply.data
    assert said in reply.error["message"]


# --- life ------------------------------------------------------------------------------------------------------------


async def test_beats_while_the_core_is_silent(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal, "BEAT_SECONDS", 0.01)
    server.core.gate.clear()

    def three_beats(data: bytes) -> bool:
        return sum(isinstance(event, Beat) for event in FrameReader().feed(data)) == 3

    reply = await server.go_on(first_request(COMPLETIONS, BODY), until=three_beats)
    accepted, *beats = reply.events
    assert isinstance(accepted, Accepted)
    assert all(isinstance(beat, Beat) for beat in beats)
    seconds = [beat.seconds_without_progress for beat in beats if isinstance(beat, Beat)]
    assert seconds == sorted(seconds) and seconds[2] > 0
    await server.wait_until(server.idle)
    server.core.gate.set()


async def test_a_request_that_waits_for_another_to_run_alone_says_so(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of its own should the engine end meanwhile."""
    monkeypatch.setattr(internal, "BEAT_SECONDS", 0.02)
    server.core.gate.clear()

    waiting = asyncio.create_task(server.go_on(first_request(COMPLETIONS, BODY)))
    await server.wait_until(lambda: len(server.core.running) == 1)
    (first,) = server.core.running
    alone = asyncio.create_task(server.go_on(first_request(COMPLETIONS, BODY, alone=True)))
    await server.wait_until(lambda: first not in server.core.running and bool(server.core.running))
    await asyncio.sleep(0.2)
    server.core.gate.set()
    assert isinstance((await alone).events[-1], Finished)
    accepted, *beats = (await waiting).events
    assert isinstance(accepted, Accepted) and accepted.is_running
    assert False in [beat.is_running for beat in beats if isinstance(beat, Beat)]


async def test_no_beat_while_there_is_news(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal, "BEAT_SECONDS", 30.0)
    reply = await server.go_on(first_request(COMPLETIONS, {**BODY, "max_tokens": 100}))
    assert not any(isinstance(event, Beat) for event in reply.events)


async def test_a_slow_reader_gets_joined_news_and_no_beats(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internal, "BEAT_SECONDS", 0.001)
    body = {**BODY, "max_tokens": 200, "n": 2}
    hold = asyncio.Event()
    reading = asyncio.create_task(server.go_on(first_request(COMPLETIONS, body), hold=hold))
    await server.wait_until(lambda: len(server.core.running) == 2)
    await server.wait_until(lambda: not server.core.running)
    await asyncio.sleep(0.02)
    hold.set()
    reply = await reading
    assert [type(event) for event in reply.events] == [Accepted, Progress, Progress, Finished]
    journal = Journal(first_request(COMPLETIONS, body))
    journal.read(reply.data)
    assert [len(answer.token_ids) for answer in journal.request.answers] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["lost", "moved"])
async def test_a_server_that_cannot_go_on_says_so_and_another_one_can(stream: bool, how: str) -> None:
    body = {**BODY, "stream": stream, "n": 2, "max_tokens": 30, "return_token_ids": True}
    journal = Journal(first_request(COMPLETIONS, body))
    async with in_process_server() as first, in_process_server() as second:
        ending: list[asyncio.Task[None]] = []

        def some(data: bytes) -> bool:
            if len(list(FrameReader().feed(data))) >= 7 and not ending:
                if how == "lost":
                    first.core.die()
                ending.append(asyncio.create_task(asyncio.sleep(0) if how == "lost" else first.engine.close()))
            return False

        reply = await first.go_on(journal.request, until=some)
        await ending[0]
        journal.read(reply.data)
        assert isinstance(journal.end, Failed)
        assert (journal.end.lost, journal.end.moved) == (how == "lost", how == "moved")
        assert journal.end.crashed == (how == "lost")
        assert journal.end.status == 503
        error = json.loads(journal.end.body)["error"]
        assert error["code"] == ("engine_lost" if how == "lost" else "unavailable")
        assert all(answer.finish_reason is None and answer.token_ids for answer in journal.request.answers)
        after = await first.go_on(journal.request)
        assert after.status == 503, "and it takes no more"

        num_tokens = [len(answer.token_ids) for answer in journal.request.answers]
        journal.end = None
        journal.read((await second.go_on(journal.request)).data)
        assert isinstance(journal.end, Finished) and journal.end.num_tokens == 60
        sent = [message.request for message in second.core.sent if isinstance(message, AddRequest)]
        assert [len(request.emitted_token_ids) for request in sent] == num_tokens
        if not stream:
            choices = json.loads(journal.data)["choices"]
            assert [choice["token_ids"] for choice in choices] == [[*range(300, 330)]] * 2


async def test_a_fault_of_one_answer_is_told(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of which no text can be made."""
    monkeypatch.setattr(server.core, "script", lambda request, position: 300 if position < 3 else "not a token")
    for stream in (False, True):
        reply = await server.go_on(first_request(COMPLETIONS, {**BODY, "stream": stream}))
        end = reply.events[-1]
        assert isinstance(end, Failed)
        assert (end.status, end.lost, end.moved) == (500, False, False)
        assert json.loads(end.body)["error"]["code"] == "engine_error"


# --- what is known of the request reaches the engine -----------------------------------------------------------------


async def test_what_the_router_says_reaches_the_engine(
    server: InProcessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    running = server.engine.running

    def watch(prepared: Any, **options: Any) -> Any:
        seen.append(prepared)
        return running(prepared, **options)

    monkeypatch.setattr(server.engine, "running", watch)
    fields = {"num_crashes": 1, "deadline_seconds": 12.5, "alone": True}
    assert (await server.go_on(first_request(COMPLETIONS, {**BODY, "prompt": ["a", "b"]}, **fields))).status == 200
    assert [(one.num_crashes, one.deadline_seconds, one.alone, one.held) for one in seen] == [
        (1, 12.5, True, False)
    ] * 2
    assert [one.params.seed for one in seen] == [7, 7]
    seen.clear()
    assert (await server.post(COMPLETIONS, BODY)).status == 200
    assert [(one.num_crashes, one.alone, one.held) for one in seen] == [(0, False, True)]
    seen.clear()
    assert (await server.go_on(first_request(COMPLETIONS, {**BODY, "seed": 99}))).status == 200
    assert seen[0].params.seed == 99


async def test_prompts_that_were_rendered_elsewhere_are_not_rendered_again(server: InProcessServer) -> None:
    ids = [310, 311, 312]
    for path, body in ((CHAT, {"messages": MESSAGES, "max_tokens": 2}), (COMPLETIONS, {**BODY, "stream": False})):
        reply = await server.go_on(first_request(path, body, prompts=[ids]))
        accepted, *_, end = reply.events
        assert isinstance(accepted, Accepted) and accepted.prompts == [ids]
        assert isinstance(end, Finished) and json.loads(end.data)["usage"]["prompt_tokens"] == 3
        assert {tuple(message.request.prompt_token_ids) for message in server.core.sent} == {tuple(ids)}  # type: ignore[union-attr]
    reply = await server.go_on(first_request(COMPLETIONS, {**BODY, "echo": True, "stream": False}, prompts=[ids]))
    end = reply.events[-1]
    assert isinstance(end, Finished)
    assert json.loads(end.data)["choices"][0]["text"].startswith("hi"), "the client's own text is what is echoed"


# --- answers that had ended ------------------------------------------------------------------------------------------


async def whole_journal(server: InProcessServer, body: dict[str, Any]) -> Journal:
    journal = Journal(first_request(COMPLETIONS, body))
    journal.read((await server.go_on(journal.request)).data)
    server.core.sent.clear()
    return journal


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_ended_and_were_delivered_are_not_run_again(server: InProcessServer, stream: bool) -> None:
    """Only the last frame was lost."""
    body = {**BODY, "n": 2, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    journal = await whole_journal(server, body)
    assert isinstance(journal.end, Finished)
    reply = await server.go_on(journal.request)
    accepted, end = reply.events
    assert isinstance(accepted, Accepted)
    assert end == journal.end
    assert not server.core.sent


@pytest.mark.parametrize("stop", [None, [], "fox", "<|im_end|>"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_end_that_was_not_told_is_told_without_the_engine(stream: bool, stop: Any) -> None:
    """The ids hold it: the length, an end token, a stop string, a stop string that is a special token."""
    ids = [300, 301, 2] if stop in ([], "<|im_end|>") else [300, 301, 302, 303]
    body = {**BODY, "max_tokens": 4, "stream": stream, "ignore_eos": stop == "<|im_end|>"}
    async with in_process_server(lambda request, position: ids[position]) as server:
        if stop == "fox":
            text = json.loads((await server.post(COMPLETIONS, {**body, "stream": False})).data)["choices"][0]["text"]
            body["stop"] = text[-2:]
        elif stop:
            body["stop"] = stop
        journal = await whole_journal(server, body)
        (answer,) = journal.request.answers
        told = (answer.finish_reason, answer.stop_reason)
        assert told[0] == (FinishReason.LENGTH if stop is None else FinishReason.STOP)
        answer.finish_reason = answer.stop_reason = None
        removed = min(2, answer.delivered_characters)
        answer.delivered_characters -= removed  # and a piece of the text
        reply = await server.go_on(journal.request)
        _, progress, end = reply.events
        assert isinstance(progress, Progress)
        assert (progress.finish_reason, progress.stop_reason) == told
        assert (progress.token_ids, progress.num_characters) == ([], removed)
        assert bool(progress.data) == stream
        assert end == journal.end
        assert not server.core.sent, "no engine was asked"
