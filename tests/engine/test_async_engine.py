"""AsyncEngine over a fake core: what is accepted, how it streams, and that every request ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal.config.parallel import ParallelConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest
from shoal.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from shoal.messages import AbortRequests, AddRequest, EngineStats
from shoal.types import FinishReason, RequestUpdate, SamplingParams
from shoal.types.seeds import derive_seed
from tests.engine.fake_client import FakeClient, Script, counting, make_config, say
from tests.engine.tokenizers_for_tests import hugging_face, tokenizer

END = hugging_face("byte_level").convert_tokens_to_ids("<|im_end|>")
FOX = tokenizer().encode("The quick brown fox jumps over the lazy dog")


@contextlib.asynccontextmanager
async def running(
    script: Script = counting, *, tokens_per_step: int = 1, with_tokenizer: bool = True, **options: Any
) -> AsyncIterator[tuple[AsyncEngine, FakeClient]]:
    config = make_config(**options.pop("config", {}))
    client = FakeClient(config, script, tokens_per_step)
    engine = AsyncEngine(client, config, tokenizer() if with_tokenizer else None, **options)
    await engine.start()
    try:
        yield engine, client
    finally:
        await engine.close()
        assert client.closed
        assert engine.num_unfinished == 0


async def updates_of(engine: AsyncEngine, prepared: PreparedRequest) -> list[RequestUpdate]:
    return [update async for update in engine.stream(prepared)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


# --- streaming -------------------------------------------------------------------------------------------------------


async def test_a_stream_brings_the_text_and_one_ending() -> None:
    async with running(say(FOX, END)) as (engine, _):
        updates = await updates_of(engine, engine.prepare("tell me", SamplingParams(max_tokens=50)))
    assert "".join(update.text for update in updates) == "The quick brown fox jumps over the lazy dog"
    assert [id_ for update in updates for id_ in update.token_ids] == [*FOX, END]
    assert [update.finish_reason for update in updates if update.finish_reason] == [FinishReason.STOP]
    assert updates[-1].finish_reason is FinishReason.STOP
    assert len(updates) > 5


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
async def test_collect_equals_the_stream_whatever_the_steps(tokens_per_step: int) -> None:
    params = SamplingParams(max_tokens=50, logprobs=2, prompt_logprobs=1, stop="lazy")
    async with running(say(FOX, END), tokens_per_step=tokens_per_step) as (engine, _):
        updates = await updates_of(engine, engine.prepare("tell me", params))
        output = await engine.collect(engine.prepare("tell me", params))
    answer = output.outputs[0]
    assert answer.text == "".join(update.text for update in updates) == "The quick brown fox jumps over the "
    assert answer.token_ids == [id_ for update in updates for id_ in update.token_ids]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "lazy")
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    assert answer.logprobs[0][FOX[0]].decoded_token == "The"[: len(tokenizer().token_text(FOX[0]))]
    assert answer.cumulative_logprob == pytest.approx(-0.5 * len(answer.token_ids))
    assert output.prompt == "tell me" and output.finished
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


async def test_a_stop_string_ends_the_request_in_the_core_silently() -> None:
    async with running(say(FOX, END)) as (engine, client):
        prepared = engine.prepare("x", SamplingParams(max_tokens=50, stop=" fox"), request_id="r")
        updates = await updates_of(engine, prepared)
        await until(lambda: not client.running)
    assert updates[-1].stop_reason == " fox"
    assert client.sent[-1] == AbortRequests(["r-0"], silent=True)


async def test_n_answers_have_seeds_of_their_own_and_come_through_one_stream() -> None:
    def by_answer(request: Any, position: int) -> int:
        return FOX[position] if position <= int(request.request_id[-1]) else END

    async with running(by_answer) as (engine, client):
        params = SamplingParams(n=3, seed=11, max_tokens=9, prompt_logprobs=0)
        updates = await updates_of(engine, engine.prepare("x", params, request_id="r"))
        output = await engine.collect(engine.prepare("x", params))
    requests = [message.request for message in client.sent if isinstance(message, AddRequest)][:3]
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert [request.sampling.seed for request in requests] == [derive_seed(11, index) for index in range(3)]
    assert [request.sampling.prompt_logprobs for request in requests] == [0, None, None]
    endings = [update.index for update in updates if update.finish_reason]
    assert sorted(endings) == [0, 1, 2]
    assert [answer.text for answer in output.outputs] == [tokenizer().decode(FOX[: index + 1]) for index in range(3)]


async def test_a_slow_consumer_gets_merged_updates() -> None:
    async with running(say(FOX, END)) as (engine, client):
        stream = engine.stream(engine.prepare("x", SamplingParams(max_tokens=50, logprobs=0)))
        first = await anext(stream)
        await until(lambda: not client.running)
        await asyncio.sleep(0.01)
        rest = [update async for update in stream]
    assert len(rest) == 1
    assert first.text + rest[0].text == tokenizer().decode(FOX)
    assert [*first.token_ids, *rest[0].token_ids] == [*FOX, END]
    assert rest[0].logprobs is not None and len(rest[0].logprobs) == len(rest[0].token_ids)


async def test_chats_are_rendered_and_not_begun_twice() -> None:
    async with running(say(FOX, END)) as (engine, _):
        prepared = engine.prepare_chat([{"role": "user", "content": "你好"}], SamplingParams())
    assert prepared.prompt == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert prepared.prompt_token_ids == tokenizer().encode(prepared.prompt, add_special_tokens=False)


# --- leaving early ---------------------------------------------------------------------------------------------------


async def test_closing_the_iterator_frees_the_request() -> None:
    async with running() as (engine, client):
        stream = engine.stream(engine.prepare("x", SamplingParams(max_tokens=200, n=2), request_id="r"))
        await anext(stream)
        await stream.aclose()
        assert engine.num_unfinished == 0
        steps = client.num_steps
        await until(lambda: not client.running)
        assert client.num_steps <= steps + 2
    assert client.sent[-1] == AbortRequests(["r-0", "r-1"], silent=True)


async def test_cancelling_the_consumer_frees_the_request() -> None:
    async with running() as (engine, client):
        client.gate.clear()
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", SamplingParams(max_tokens=200))))
        await until(lambda: client.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        client.gate.set()
        await until(lambda: not client.running)
        assert engine.num_unfinished == 0


async def test_a_stream_that_is_never_read_queues_nothing() -> None:
    async with running() as (engine, client):
        engine.stream(engine.prepare("x", SamplingParams()))
        await asyncio.sleep(0.01)
        assert not client.sent


async def test_abort_ends_the_stream_with_its_tokens() -> None:
    async with running() as (engine, client):
        prepared = engine.prepare("x", SamplingParams(max_tokens=200), request_id="r")
        task = asyncio.create_task(updates_of(engine, prepared))
        await until(lambda: client.num_steps > 3)
        await engine.abort("r")
        updates = await task
        await engine.abort("unknown")
    assert [update.finish_reason for update in updates if update.finish_reason] == [FinishReason.ABORT]
    assert sum(len(update.token_ids) for update in updates) >= 3


# --- the core dies ---------------------------------------------------------------------------------------------------


async def test_when_the_core_dies_every_request_gets_one_ending() -> None:
    async with running() as (engine, client):
        tasks = [
            asyncio.create_task(updates_of(engine, engine.prepare("x", SamplingParams(max_tokens=200, n=n))))
            for n in (1, 2, 3)
        ]
        collecting = asyncio.create_task(engine.collect(engine.prepare("x", SamplingParams(max_tokens=200))))
        prepared = engine.prepare("x", SamplingParams())
        await until(lambda: client.num_steps > 3)
        client.die()
        for n, task in zip((1, 2, 3), tasks, strict=True):
            updates = await task
            endings = [update for update in updates if update.finish_reason]
            assert sorted(update.index for update in endings) == list(range(n))
            assert all(update.finish_reason is FinishReason.ERROR for update in endings)
            assert all(update.error == "the engine core was killed by signal 9" for update in endings)
            assert sum(len(update.token_ids) for update in updates) >= 3 * n, "what came before is kept"
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collecting
        assert not engine.alive and not engine.admitting and not engine.progressing
        with pytest.raises(EngineDeadError, match="signal 9"):
            engine.prepare("x", SamplingParams())
        late = await updates_of(engine, prepared)
        assert [update.finish_reason for update in late] == [FinishReason.ERROR]


async def test_a_fault_of_one_request_touches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def push(self, token_ids: Any) -> str:
            raise RuntimeError("no text")

        def flush(self) -> str:
            return ""

    async with running(say(FOX, END)) as (engine, client):
        make = tokenizer().detokenizer
        broken_prompt = tokenizer().encode("broken")

        def detokenizer(prompt: list[int], **options: Any) -> Any:
            return Broken() if prompt == broken_prompt else make(prompt, **options)

        monkeypatch.setattr(engine.tokenizer, "detokenizer", detokenizer)
        good = asyncio.create_task(engine.collect(engine.prepare("fine", SamplingParams(max_tokens=50))))
        with pytest.raises(EngineError, match="cannot make text of the tokens: no text"):
            await engine.collect(engine.prepare("broken", SamplingParams(max_tokens=50)))
        assert (await good).outputs[0].finish_reason == "stop"
        assert engine.alive
        await until(lambda: not client.running)


async def test_outputs_of_an_older_generation_are_dropped() -> None:
    async with running(config={"generation": 3}) as (engine, client):
        client.config = make_config(generation=2)
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", SamplingParams(max_tokens=200))))
        await until(lambda: client.num_steps > 5)
        client.config = make_config(generation=3)
        updates = await task
    assert 200 - sum(len(update.token_ids) for update in updates) >= 5


# --- what is accepted ------------------------------------------------------------------------------------------------


async def test_parameters_are_resolved() -> None:
    async with running() as (engine, _):
        prepared = engine.prepare([5, 6, 7], SamplingParams(max_tokens=None))
        assert prepared.params.max_tokens == 256 - 3
        assert prepared.params.seed is not None
        assert prepared.params.eos_token_ids == sorted({0, END})
        again = engine.prepare([5, 6, 7], SamplingParams(max_tokens=9999, ignore_eos=True, seed=5))
        assert (again.params.max_tokens, again.params.eos_token_ids, again.params.seed) == (253, [], 5)
        seeds = {engine.prepare([5], SamplingParams()).params.seed for _ in range(20)}
        assert len(seeds) == 20
        special = engine.prepare([5], SamplingParams(stop=["<|im_start|>", "plain"], stop_token_ids=[9]))
        start = tokenizer().special_token_id("<|im_start|>")
        assert special.params.stop_token_ids == sorted([9, start])
        assert special.params.stop == ["<|im_start|>", "plain"]


async def test_prompts_come_in_four_shapes() -> None:
    async with running() as (engine, _):
        ids = tokenizer().encode("The fox")
        for prompt in ("The fox", ids, {"prompt": "The fox"}, {"prompt_token_ids": ids}):
            assert engine.prepare(prompt, SamplingParams()).prompt_token_ids == ids


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5] * 256, {}, r"256 tokens; this model takes 256 .*at most 255"),
        ([5, 512], {}, "512, which is not a token id"),
        ([5, -1], {}, "-1, which is not a token id"),
        ([5, "6"], {}, "'6', which is not a token id"),
        ([True], {}, "True, which is not a token id"),
        pytest.param([5, 10**5000], {}, "an integer of thousands of digits, which is not a token id", id="digits"),
        (17, {}, "must be a string, a list of token ids"),
        (b"bytes", {}, "got bytes"),
        ({"text": "x"}, {}, "got the keys 'text'"),
        ({"prompt": "x", "multi_modal_data": {}}, {}, "multi_modal_data"),
        ({"prompt": "x", 1: 2, "z": 3}, {}, "got the keys 'prompt', 1, 'z'"),
        ([5] * 250, {"min_tokens": 10, "max_tokens": None}, "min_tokens is 10, .* only 6 fit"),
        ([5], {"stop": "x", "detokenize": False}, "need detokenize=True"),
        ([5], {"stop_token_ids": [600]}, "stop_token_ids must hold token ids of this model"),
        ([5], {"logit_bias": {512: 1.0}}, "logit_bias"),
    ],
)
async def test_bad_requests_are_refused_and_nothing_is_queued(prompt: Any, params: dict[str, Any], words: str) -> None:
    async with running() as (engine, client):
        with pytest.raises(InvalidRequestError, match=words):
            engine.prepare(prompt, SamplingParams(**params))
        assert not client.sent


@pytest.mark.parametrize("priority", [2**63, -(10**30), pytest.param(10**5000, id="digits"), 1.5, "high", True])
async def test_a_priority_that_no_message_can_carry_is_refused(priority: Any) -> None:
    async with running() as (engine, client):
        with pytest.raises(InvalidRequestError, match="priority must be an integer"):
            engine.prepare([5], SamplingParams(), priority=priority)
        assert not client.sent


async def test_an_id_that_is_running_is_refused() -> None:
    async with running() as (engine, client):
        one = engine.prepare("x", SamplingParams(max_tokens=200), request_id="same")
        two = engine.prepare("x", SamplingParams(max_tokens=200), request_id="same")
        stream = engine.stream(one)
        await anext(stream)
        with pytest.raises(InvalidRequestError, match="'same' is running"):
            engine.prepare("x", SamplingParams(), request_id="same")
        with pytest.raises(InvalidRequestError, match="'same' is running"):
            await anext(engine.stream(two))
        assert (await anext(stream)).finish_reason is None, "the one that runs is not touched"
        await stream.aclose()


async def test_without_a_tokenizer_only_token_ids_are_taken() -> None:
    async with running(with_tokenizer=False) as (engine, _):
        with pytest.raises(InvalidRequestError, match="a text prompt needs a tokenizer"):
            engine.prepare("x", SamplingParams())
        with pytest.raises(InvalidRequestError, match="a stop string needs a tokenizer"):
            engine.prepare([5], SamplingParams(stop="x"))
        with pytest.raises(InvalidRequestError, match="a chat needs a tokenizer"):
            engine.prepare_chat([{"role": "user", "content": "x"}], SamplingParams())
        output = await engine.collect(engine.prepare([5], SamplingParams(max_tokens=4, logprobs=1)))
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [300, 301, 302, 303])


async def test_a_full_queue_refuses() -> None:
    async with running(max_num_waiting=2, config={"max_num_seqs": 2}) as (engine, client):
        client.gate.clear()
        params = SamplingParams(max_tokens=3)
        tasks = [asyncio.create_task(engine.collect(engine.prepare("x", params))) for _ in range(4)]
        await until(lambda: len(client.running) == 4)
        with pytest.raises(UnavailableError, match="2 requests wait already and at most 2 may"):
            engine.prepare("x", params)
        client.gate.set()
        await asyncio.gather(*tasks)
        assert (await engine.collect(engine.prepare("x", SamplingParams(n=5, max_tokens=1)))).finished


# --- health, draining, observing -------------------------------------------------------------------------------------


async def test_a_core_of_several_ranks_that_hangs_gets_longer_and_both_times_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.engine.watch.EXECUTORS_OWN_SECONDS", 0.3)
    parallel = ParallelConfig(tensor_size=2, backend="mp", step_timeout=0.2)
    async with running(config={"parallel": parallel}) as (engine, client):
        client.gate.clear()
        said = "made no step for 0.5 s .*--step-timeout is 0.2 s, and the core itself did not act on it., and was ended"
        with pytest.raises(EngineDeadError, match=said):
            await engine.collect(engine.prepare("x", SamplingParams(max_tokens=20)))


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async with running() as (engine, client):
        client.gate.clear()
        task = asyncio.create_task(engine.collect(engine.prepare("x", SamplingParams(max_tokens=20))))
        prepared = engine.prepare("x", SamplingParams(max_tokens=2))
        await until(lambda: client.running)
        engine.begin_drain()
        assert engine.alive and not engine.admitting
        with pytest.raises(UnavailableError, match="shutting down"):
            engine.prepare("x", SamplingParams())
        with pytest.raises(UnavailableError, match="shutting down"):
            engine.prepare_chat([], SamplingParams())
        assert not await engine.wait_drained(0.01)
        client.gate.set()
        assert await engine.wait_drained(5)
        assert len((await task).outputs[0].token_ids) == 20
        assert (await engine.collect(prepared)).finished, "it was accepted before"


async def test_closing_ends_what_runs() -> None:
    async with running() as (engine, client):
        client.gate.clear()
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", SamplingParams(max_tokens=20, n=2))))
        await until(lambda: len(client.running) == 2)
        await engine.close()
        updates = await task
        assert [update.finish_reason for update in updates] == [FinishReason.ABORT] * 2
        with pytest.raises(EngineDeadError, match="shut down"):
            engine.prepare("x", SamplingParams())


async def test_progressing_means_steps_while_there_is_work() -> None:
    async with running(progress_timeout=0.05) as (engine, client):
        await asyncio.sleep(0.1)
        assert engine.progressing, "idle is fine"
        client.gate.clear()
        task = asyncio.create_task(engine.collect(engine.prepare("x", SamplingParams(max_tokens=30))))
        await until(lambda: client.running)
        assert engine.progressing
        await until(lambda: not engine.progressing)
        assert engine.alive and engine.admitting
        client.gate.set()
        await task
        assert engine.progressing
        stats = await engine.stats()
    assert isinstance(stats, EngineStats) and stats.num_steps_total >= 30
    assert engine.latest_stats.num_steps_total >= 30


class Recorder(EngineObserver):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def request_started(self, request: PreparedRequest) -> None:
        self.events.append(("started", request.request_id))

    def first_token(self, request: PreparedRequest, index: int, seconds: float) -> None:
        assert seconds >= 0
        self.events.append(("first", request.request_id, index))

    def tokens(self, request: PreparedRequest, index: int, num_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.events.append(("tokens", request.request_id, index, num_tokens))

    def finished(
        self, request: PreparedRequest, index: int, reason: FinishReason, num_tokens: int, seconds: float
    ) -> None:
        self.events.append(("finished", request.request_id, index, reason, num_tokens))


async def test_an_observer_sees_each_request_once_from_start_to_end() -> None:
    recorder = Recorder()
    async with running(say(FOX[:3], END), observer=recorder) as (engine, client):
        await engine.collect(engine.prepare("x", SamplingParams(max_tokens=50), request_id="a"))
        client.gate.clear()
        stream = engine.stream(engine.prepare("x", SamplingParams(max_tokens=50, n=2), request_id="b"))
        waiting = asyncio.create_task(anext(stream))
        await until(lambda: len(client.running) == 2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
    tokens = [("first", "a", 0), ("tokens", "a", 0, 1), ("tokens", "a", 0, 1), ("tokens", "a", 0, 1)]
    assert recorder.events[:6] == [("started", "a"), *tokens, ("finished", "a", 0, FinishReason.STOP, 4)]
    assert recorder.events[6:] == [
        ("started", "b"),
        ("finished", "b", 0, FinishReason.ABORT, 0),
        ("finished", "b", 1, FinishReason.ABORT, 0),
    ]


async def test_sixty_four_streams_with_random_departures_all_end_once() -> None:
    chance = random.Random(0)
    ends: list[int] = []

    async def one(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=chance.randint(1, 60), n=chance.choice([1, 1, 2]))
        leave_after = chance.choice([None, None, 0, 1, 7])
        seen, endings = 0, []
        async with contextlib.aclosing(engine.stream(engine.prepare("x", params))) as stream:
            async for update in stream:
                seen += 1
                endings += [update.index] if update.finish_reason else []
                if seen == leave_after:
                    return
                if chance.random() < 0.1:
                    await asyncio.sleep(0.001)
        assert sorted(endings) == list(range(params.n))
        ends.append(1)

    async with running() as (engine, client):
        await asyncio.gather(*(one(engine) for _ in range(64)))
        assert engine.num_unfinished == 0
        await until(lambda: not client.running)
    assert len(ends) > 20
