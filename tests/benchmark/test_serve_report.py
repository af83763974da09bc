from __future__ import annotations

import pytest

from shoal.benchmark.record import RequestRecord
from shoal.benchmark.serve_report import RequestTimes, Slo, peak_concurrency, serve_report
from shoal.errors import ConfigError
from tests.benchmark.fake_openai import chunk, usage


def record(
    start: float, arrivals: list[float], end: float, prompt: int = 10, output: int | None = None
) -> RequestRecord:
    return RequestRecord(
        scheduled=start,
        start=start,
        end=end,
        arrivals=[(time, None) for time in arrivals],
        prompt_tokens=prompt,
        output_tokens=output,
        finished=True,
    )


def test_the_figures_of_two_requests():
    records = [record(0.0, [1.0, 1.5, 2.0], 2.0, output=3), record(1.0, [1.5, 1.7], 4.0, prompt=20, output=2)]
    report = serve_report(records, Slo(ttft=0.6))
    assert report.seconds == 4.0
    assert (report.num_prompt_tokens, report.num_output_tokens) == (30, 5)
    assert report.output_tokens_per_second == 5 / 4 and report.total_tokens_per_second == 35 / 4
    assert report.requests_per_second == 0.5
    assert report.ttft_ms.p50 == pytest.approx(750) and report.ttft_ms.p99 == pytest.approx(995)
    assert report.e2e_ms.p50 == pytest.approx(2500)
    assert (
        report.itl_ms.count == 3
        and report.itl_ms.mean == pytest.approx(400)
        and report.itl_ms.p50 == pytest.approx(500)
    )
    assert (report.num_good, report.goodput) == (1, 0.25)
    assert report.peak_concurrency == 2


def test_chunks_of_several_tokens_share_their_gap():
    """8 tokens in 2 chunks: 4 came first, 4 took one second."""
    one = record(0.0, [1.0, 2.0], 2.0, output=8)
    report = serve_report([one])
    assert (
        report.itl_ms.count == 4
        and report.itl_ms.mean == pytest.approx(250)
        and report.itl_ms.p99 == pytest.approx(250)
    )
    assert report.chunk_gap_ms.count == 1 and report.chunk_gap_ms.mean == pytest.approx(1000)
    assert RequestTimes.of(one).mean_itl == pytest.approx(0.25)


def test_counts_in_chunks_are_exact():
    """1 token, then 5 more after 1 s, then text of the same token, then 1 more: 1 s each."""
    one = RequestRecord(0.0, 0.0, 4.0, [(1.0, 1), (2.0, 6), (3.0, 6), (4.0, 7)], 10, 7)
    assert RequestTimes.of(one).gaps == [(pytest.approx(0.2), 5), (pytest.approx(2.0), 1)]
    assert serve_report([one]).itl_ms.mean == pytest.approx(3000 / 6)


def test_fractions_of_tokens_do_not_bend_the_mean():
    """5 tokens in 3 chunks: 2 s for 10/3 tokens. Beside it 2 in 2: 4 s for one."""
    report = serve_report([record(0.0, [1.0, 2.0, 3.0], 3.0, output=5), record(0.0, [1.0, 5.0], 5.0, output=2)])
    assert report.itl_ms.mean == pytest.approx(6000 / (10 / 3 + 1))


def test_without_usage_chunks_count():
    report = serve_report([record(0.0, [1.0, 2.0, 3.0], 3.0)])
    assert (report.num_output_tokens, report.num_uncounted) == (3, 1)
    assert report.itl_ms.mean == pytest.approx(1000)


def test_one_token_has_no_gap():
    report = serve_report([record(0.0, [1.0], 1.0, output=1)], Slo(itl=0.001))
    assert report.itl_ms is None and report.chunk_gap_ms is None and report.num_good == 1


def test_failed_and_unfinished_requests():
    failed, unfinished = record(0.0, [1.0], 8.0, output=1), RequestRecord(3.0, 3.0, None, [(4.0, None)])
    failed.fail("timeout", "ReadTimeout")
    failed.fail("cut off", "later")
    report = serve_report([failed, unfinished, record(1.0, [2.0], 2.0, output=1)], Slo())
    assert report.errors == {"timeout": 1} and report.error_examples == {"timeout": "ReadTimeout"}
    assert (report.num_requests, report.num_succeeded, report.num_unfinished, report.num_good) == (3, 1, 1, 1)
    assert report.seconds == 8.0 and report.num_output_tokens == 1


def test_nothing_at_all():
    report = serve_report([], Slo(ttft=1.0))
    assert (report.seconds, report.num_requests, report.ttft_ms, report.goodput) == (0.0, 0, None, 0.0)


def test_lateness_counts_from_when_it_was_due():
    late = RequestRecord(1.0, 1.5, 3.0, [(2.0, None)], 1, 1)
    report = serve_report([late])
    assert report.start_delay_p99_ms == pytest.approx(500) and report.ttft_ms.p50 == pytest.approx(500)


def test_peak_concurrency_counts_ends_first():
    assert peak_concurrency([record(0, [1], 1), record(1, [2], 2), record(1, [2], 2)]) == 2


@pytest.mark.parametrize(
    ("slo", "good"),
    [("ttft=1s", True), ("ttft=999ms", False), ("itl=250ms", True), ("itl=249ms,ttft=9s", False), ("e2e=1.9s", False)],
)
def test_slo(slo, good):
    times = RequestTimes.of(record(0.0, [1.0, 1.25, 1.5], 2.0, output=3))
    assert Slo.parse(slo).kept_by(times) is good


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "tpot=5ms", "ttft=5ms,ttft=6ms", "ttft=-5ms", "ttft=5ms;itl=1ms"]
)
def test_a_wrong_slo_is_refused(text):
    with pytest.raises(ConfigError, match="such as ttft=200ms"):
        Slo.parse(text)


def test_a_stream_is_folded():
    one = RequestRecord(0.0, 0.0)
    for now, data in enumerate((chunk(""), chunk("a"), chunk("", finish_reason="stop"), usage(4, 2)), 1):
        one.take(data[5:].strip(), float(now))
    assert one.arrivals == [(2.0, None)] and one.finished
    assert (one.prompt_tokens, one.output_tokens, one.token_arrivals()) == (4, 2, [(2.0, 2.0)])


def test_an_answer_without_text_arrives_at_its_end():
    one = RequestRecord(0.0, 0.0)
    one.take(chunk("", finish_reason="stop")[5:].strip(), 3.0)
    assert one.arrivals == [(3.0, None)]


@pytest.mark.parametrize(
    "delta", [{"content": "x"}, {"reasoning_content": "x"}, {"reasoning": "x"}, {"tool_calls": [{}]}]
)
def test_all_kinds_of_chat_content_count(delta):
    import json

    one = RequestRecord(0.0, 0.0)
    one.take(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}).encode(), 1.0)
    one.take(json.dumps({"choices": [{"delta": delta}]}).encode(), 2.0)
    assert one.arrivals == [(2.0, None)]
