from __future__ import annotations

import asyncio
import collections
import statistics

import pytest

from shoal.benchmark.datasets import ServeRequest
from shoal.benchmark.load import LoadRun, Pace, Target, run_on_loop
from shoal.benchmark.serve_report import serve_report
from tests.benchmark.fake_openai import ANSWER, DONE, FakeOpenAI, chunk, event, fake_openai, usage


def requests(count: int) -> list[ServeRequest]:
    return [ServeRequest(prompt=[index + 2], num_output=3) for index in range(count)]


async def run_load(fake: FakeOpenAI, count: int = 1, pace: Pace | None = None, **target) -> LoadRun:
    ended = []
    run = LoadRun(Target(fake.url, "tiny", **target), requests(count), pace or Pace(), ended.append)
    await run.run()
    assert len(ended) == count
    return run


async def test_concurrency_is_reached_and_held():
    async with fake_openai() as fake:
        fake.gate = 3  # fewer at a time would wait for ever
        run = await run_load(fake, 10, Pace(concurrency=3))
    assert fake.most_running == 3
    assert len(run.records) == 10 and all(record.succeeded for record in run.records)
    assert serve_report(run.records).peak_concurrency == 3


def test_the_loop_for_speed_runs_work_too():
    async def load() -> LoadRun:
        async with fake_openai() as fake:
            return await run_load(fake, 30)

    run = run_on_loop(load())
    assert all(record.succeeded for record in run.records)
    assert run.cpu_share > 0


async def test_without_limits_all_come_at_once():
    async with fake_openai() as fake:
        fake.gate = 12
        await run_load(fake, 12)
    assert fake.most_running == 12


async def test_a_rate_is_held():
    pace = Pace(rate=200.0, seed=3)
    async with fake_openai() as fake:
        run = await run_load(fake, 10, pace)
    first = run.records[0].scheduled
    expected = pace.arrival_times(10)
    assert [record.scheduled - first for record in run.records] == pytest.approx(expected)
    assert all(record.start >= record.scheduled for record in run.records)


def test_arrivals_are_a_poisson_process():
    times = Pace(rate=20.0, seed=1).arrival_times(20000)
    gaps = [now - before for before, now in zip(times, times[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.03)  # an exponential's mean is its deviation
    assert times[0] == 0 and times == Pace(rate=20.0, seed=1).arrival_times(20000)
    assert times != Pace(rate=20.0, seed=2).arrival_times(20000)


async def test_what_is_sent():
    async with fake_openai() as fake:
        target = Target(fake.url, "tiny", "secret", {"ignore_eos": True}, continuous_usage=True)
        talk = [{"role": "user", "content": "hi"}]
        both = [ServeRequest(prompt=[2, 3], num_output=9), ServeRequest(messages=talk)]
        await LoadRun(target, both, Pace(concurrency=1), lambda _: None).run()
        chat = Target(fake.url, "tiny", chat=True)
        await LoadRun(chat, [ServeRequest(prompt="hi")], Pace(), lambda _: None).run()
    (path, headers, body), (path_2, _, body_2), (path_3, headers_3, body_3) = fake.requests
    assert path == "/v1/completions" and headers["authorization"] == "bearer secret"
    options = {"include_usage": True, "continuous_usage_stats": True}
    same = {"model": "tiny", "stream": True, "stream_options": options, "ignore_eos": True}
    assert body == {**same, "prompt": [2, 3], "max_tokens": 9}
    assert path_2 == "/v1/chat/completions" and body_2 == {**same, "messages": talk}
    assert path_3 == path_2 and body_3["messages"] == talk
    assert "authorization" not in headers_3 and body_3["stream_options"] == {"include_usage": True}


async def test_usage_is_counted_and_chunks_are_timed():
    async with fake_openai() as fake:
        fake.answer = lambda path, body: (200, chunk("") + chunk("ab") + chunk("cd") + usage(11, 8) + DONE)
        (record,) = (await run_load(fake)).records
    assert record.succeeded
    assert (record.prompt_tokens, record.output_tokens, len(record.arrivals)) == (11, 8, 2)
    assert record.start <= record.arrivals[0][0] <= record.arrivals[1][0] <= record.end


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (503, b'{"error": {"message": "queue full"}}', "HTTP 503", "queue full"),
        (200, chunk("a") + event({"error": {"message": "core died"}}), "error in stream", "core died"),
        (200, chunk("a"), "cut off", "without a finish_reason"),
        (200, b"data: {nonsense\n\n", "bad answer", "nonsense"),
        (200, usage(3, 0) + DONE, "empty answer", "without any choice"),
    ],
)
async def test_errors_are_told_apart(status, content, kind, message):
    async with fake_openai() as fake:
        fake.answer = lambda path, body: (status, content)
        (record,) = (await run_load(fake)).records
    assert record.error == kind and message in record.message and not record.succeeded
    assert record.end is not None


async def test_errors_are_counted_beside_answers():
    async with fake_openai() as fake:
        fake.answer = lambda path, body: (500, b"broken") if body["prompt"][0] % 3 == 0 else (200, ANSWER)
        run = await run_load(fake, 9, Pace(concurrency=2))
    report = serve_report(run.records)
    assert (report.num_succeeded, report.errors, report.error_examples) == (6, {"HTTP 500": 3}, {"HTTP 500": "broken"})
    assert (report.num_prompt_tokens, report.num_output_tokens) == (6 * 7, 6 * 3)


async def test_nobody_there_and_silence():
    async with fake_openai() as fake:
        fake.gate = 2  # one request alone gets no answer
        silent = await run_load(fake, 1, timeout=0.05)
    gone = await run_load(fake, 2)
    assert collections.Counter(record.error for record in silent.records + gone.records) == {
        "timeout": 1,
        "no connection": 2,
    }


async def test_stopping_keeps_what_was_measured():
    async with fake_openai() as fake:
        ended = asyncio.Event()
        run = LoadRun(Target(fake.url, "tiny"), requests(50), Pace(concurrency=1), lambda _: ended.set())
        running = asyncio.ensure_future(run.run())
        await ended.wait()
        run.stop()
        await running
    report = serve_report(run.records)
    assert 1 <= report.num_succeeded < 50 and not report.errors
    assert report.num_succeeded + report.num_unfinished == report.num_requests
