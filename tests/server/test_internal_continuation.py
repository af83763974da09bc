"""A request that is cut off anywhere and goes on on another server reads as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.messages import AddRequest
from shoal.protocol.internal import Finished
from shoal.types import EngineRequest
from shoal.types.seeds import mix64
from tests.engine.tokenizers_for_tests import TEXTS, tokenizer
from tests.server.in_process import InProcessServer, Journal, first_request, in_process_server
from tests.server.reading import joined, whole

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS = ["byte_level", "llama", "word_piece"]
# Parts of what the core says, some longer than a token, some in the middle of a character's tokens.
STOPS = ["旅游", "京旅", "龘靐", "fox is q", "👍🏽", "。", "o, w", "한국어, ไ", "never said", "<|im_end|>", "\n\n", "s"]
PROMPTS = ["hi", "你好，", "Tell me about 北京", "emoji 😀 and", [300, 301, 302], [45], "龘"]


def wandering(kind: str) -> Any:
    """Text in many scripts, from a place that prompt and seed choose. Refuses ids that it would not have emitted."""
    corpus = [id_ for text in TEXTS for id_ in tokenizer(kind).encode(text, add_special_tokens=False)]

    def script(request: EngineRequest, position: int) -> int:
        start = mix64(hash(tuple(request.prompt_token_ids)) ^ (request.sampling.seed or 0)) % len(corpus)
        emitted = request.emitted_token_ids
        assert emitted == [corpus[(start + index) % len(corpus)] for index in range(len(emitted))]
        return corpus[(start + position) % len(corpus)]

    return script


class Servers:
    """Two of the same model, one of which emits several tokens a step, on an event loop that runs on demand."""

    def __init__(self, loop: asyncio.AbstractEventLoop, servers: list[InProcessServer]) -> None:
        self.loop = loop
        self.servers = servers

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))


@pytest.fixture(scope="module", params=KINDS)
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    loop = asyncio.new_event_loop()
    stack = contextlib.AsyncExitStack()

    async def start() -> list[InProcessServer]:
        kind = request.param
        return [
            await stack.enter_async_context(
                in_process_server(wandering(kind), tokens_per_step=size, kind=kind, response_role="assistant")
            )
            for size in (1, 3)
        ]

    yield Servers(loop, loop.run_until_complete(start()))
    loop.run_until_complete(stack.aclose())
    loop.close()


# --- requests of all kinds -------------------------------------------------------------------------------------------


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(1, 3),
        "stop": st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "return_token_ids": st.booleans(),
        "seed": st.integers(0, 2**70),
        "stop_token_ids": st.lists(st.integers(3, 511), min_size=1, max_size=40),
        "temperature": st.sampled_from([0.0, 0.5]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "logit_bias": st.just({"17": 2.5}),
    }
    body = {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
    body |= {"model": "tiny", "max_tokens": draw(st.integers(1, 40)), "stream": draw(st.booleans())}
    if draw(st.booleans()):
        body["min_tokens"] = draw(st.integers(0, body["max_tokens"]))
    if body["stream"] and draw(st.booleans()):
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": draw(st.booleans())}
    if not body["stream"] and draw(st.booleans()):
        body["prompt_logprobs"] = draw(st.integers(0, 2))
    if draw(st.booleans()):
        body["messages"] = [{"role": "user", "content": draw(st.sampled_from(["hi", "你好", "😀 or not"]))}]
        if draw(st.booleans()):
            body |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 3))}
        return CHAT, body
    prompts = draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3))
    texts, ids = ([one for one in prompts if isinstance(one, kind)] for kind in (str, list))
    kept: list[Any] = texts or ids
    body["prompt"] = kept[0] if len(kept) == 1 and draw(st.booleans()) else kept
    if draw(st.booleans()):
        body["echo"] = True
        if draw(st.integers(0, 4)) == 0:
            body["max_tokens"] = 0
            body.pop("min_tokens", None)
    if draw(st.booleans()):
        body["logprobs"] = draw(st.integers(0, 3))
    return COMPLETIONS, body


async def undisturbed(server: InProcessServer, path: str, body: dict[str, Any]) -> bytes:
    reply = await server.post(path, {"seed": 7, **body})
    assert reply.status == 200, reply.data
    return reply.data


def engine_requests(server: InProcessServer) -> dict[tuple[Any, ...], Any]:
    """What the core was asked for since the last call, without what a continuation may change."""
    asked = [message.request for message in server.core.sent if isinstance(message, AddRequest)]
    server.core.sent.clear()
    return {
        (tuple(one.prompt_token_ids), one.sampling.seed): msgspec.structs.replace(one.sampling, prompt_logprobs=None)
        for one in asked
    }


async def continued(servers: list[InProcessServer], path: str, body: dict[str, Any], cuts: list[float]) -> Journal:
    """The request, cut off each time after this part of the bytes that its frames have in all."""
    journal = Journal(first_request(path, body))
    size = len((await servers[0].go_on(journal.request)).data) if cuts else 0
    for turn in range(len(cuts) + 1):
        limit = int(cuts[turn] * size) if turn < len(cuts) else 1 << 40
        reply = await servers[turn % 2].go_on(journal.request, until=lambda data, limit=limit: len(data) >= limit)
        assert reply.status == 200, reply.data
        journal.read(reply.data[:limit])
        await servers[turn % 2].wait_until(servers[turn % 2].idle)
        if journal.end is not None:
            break
    assert isinstance(journal.end, Finished), journal.end
    return journal


CUTS = st.lists(st.floats(0, 1) | st.floats(0, 0.3), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=bodies(), cuts=CUTS)
@example(request=(COMPLETIONS, {"prompt": ["hi", "你好，"], "n": 2, "echo": True, "logprobs": 2, "stream": True,
                                "model": "tiny", "max_tokens": 9}), cuts=[0.1, 0.3, 0.8])  # fmt: skip
@example(request=(CHAT, {"messages": [{"role": "user", "content": "hi"}], "n": 2, "stop": ["旅游", "s"], "stream": True,
                         "model": "tiny", "max_tokens": 40}), cuts=[0.95, 0.5, 0.05])  # fmt: skip
def test_a_request_that_is_cut_off_reads_as_if_it_was_not(
    servers: Servers, request: tuple[str, dict[str, Any]], cuts: list[float]
) -> None:
    path, body = request
    first, second = servers.servers

    async def run() -> None:
        expected = await undisturbed(first, path, body)
        asked = engine_requests(first)
        journal = await continued([first, second], path, body, cuts)
        for server in (first, second):
            for key, sampling in engine_requests(server).items():
                assert sampling == asked[key], "the same seed, penalties and limits"
        if body["stream"]:
            assert joined(journal.data) == joined(expected)
        else:
            assert whole(journal.data) == whole(expected)
            assert json.loads(journal.data)["created"] == 1234
        for answer in journal.request.answers:
            assert answer.finish_reason is not None

    servers.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "never said", "s"])
def test_a_cut_after_every_single_frame(servers: Servers, stream: bool, stop: str | None) -> None:
    """Each attempt brings a frame or two and half of the next."""
    body = {
        "model": "tiny", "prompt": ["你好，", "hi"], "n": 2, "max_tokens": 12, "logprobs": 1, "stream": stream,
        **({"stop": stop} if stop else {}),
    }  # fmt: skip

    async def run() -> None:
        expected = await undisturbed(servers.servers[0], COMPLETIONS, body)
        journal = Journal(first_request(COMPLETIONS, body))
        num_attempts = 0
        while journal.end is None:
            server = servers.servers[num_attempts % 2]
            wanted = 0

            def enough(data: bytes) -> bool:
                if data[:1] == b"{":
                    return False
                nonlocal wanted
                probe = Journal(first_request(COMPLETIONS, body))
                with contextlib.suppress(AssertionError):
                    probe.read(data)
                if probe.num_frames > 2 and not wanted:
                    wanted = len(data)
                return bool(wanted)

            reply = await server.go_on(journal.request, until=enough)
            assert reply.status == 200, (reply.data, journal.request.answers)
            journal.read(reply.data[: wanted - 3] if wanted else reply.data)
            num_attempts += 1
            assert num_attempts < 100
        assert num_attempts > 5
        if stream:
            assert joined(journal.data) == joined(expected)
        else:
            assert whole(journal.data) == whole(expected)

    servers.run(run())
