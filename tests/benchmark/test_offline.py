from __future__ import annotations

import json

import pytest

from shoal.benchmark.offline import run_program
from shoal.benchmark.offline_report import Start, latency_report, startup_report, throughput_report, token_gaps
from shoal.benchmark.workload import TokenRequest
from shoal.cli.main import main
from shoal.errors import EngineError, ModelError
from shoal.messages import BenchRun
from shoal.network.child_program import error_of
from tests.checkpoints import make_checkpoint

REQUESTS = [TokenRequest([2, 3, 4], 4), TokenRequest([5, 6], 2)]


def test_latency_is_the_median_run_over_the_longest_output():
    slow = BenchRun(9.0, [[(5.0, 1), (6.0, 1), (9.0, 2)], [(5.0, 1), (6.0, 1)]], False)
    fast = BenchRun(2.0, [[(1.0, 1), (1.2, 1), (2.0, 2)], [(0.5, 1), (1.5, 1)]], False)
    report = latency_report(REQUESTS, [slow, fast, fast])
    assert report.batch_ms == 2000 and report.ms_per_token == 500
    assert report.first_token_ms == pytest.approx(750)
    assert report.between_tokens_ms.count == 3 * 4 and report.between_tokens_ms.maximum == pytest.approx(1500)
    assert report.runs_ms == [9000, 2000, 2000]


def test_one_token_each_has_nothing_between():
    report = latency_report([TokenRequest([2], 1)], [BenchRun(1.0, [[(1.0, 1)]], False)])
    assert report.between_tokens_ms is None


def test_tokens_that_come_together_share_their_time():
    assert token_gaps([(1.0, 1), (2.0, 4), (3.0, 1)]) == [0.25] * 4 + [1.0]


def test_throughput_counts_prompts_in_the_total_only():
    report = throughput_report(REQUESTS, [BenchRun(seconds, [], False) for seconds in (1.0, 2.0, 9.0)])
    assert (report.seconds, report.num_prompt_tokens, report.num_output_tokens) == (2.0, 5, 6)
    assert report.prompt_tokens_per_second == 2.5
    assert (report.output_tokens_per_second, report.total_tokens_per_second, report.requests_per_second) == (3, 5.5, 1)


def test_startup_takes_medians_of_each_kind():
    report = startup_report([Start(9, 1), Start(5, 1), Start(6, 3)], [Start(2, 0.5)])
    assert (report.cold_seconds, report.again_seconds, report.cold_first_token_ms) == (6, 2, 1000)


def test_errors_keep_their_kind():
    assert type(error_of("ModelError", "x")) is ModelError
    assert type(error_of("SystemExit", "x")) is EngineError and type(error_of("annotations", "x")) is EngineError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


def test_the_program_measures_a_real_engine(model):
    options = {"model": model, "skip_tokenizer_init": True, "kv_cache_memory": "4MiB", "device": "cpu"}
    news = []
    ready, runs = run_program(options, REQUESTS, num_warmups=1, num_runs=2, token_times=True, on_news=news.append)
    assert ready > 0 and len(runs) == 2 and len(news) == 1 + 3
    for run in runs:
        assert [sum(count for _, count in times) for times in run.arrivals] == [4, 2]
        assert all(0 < when <= run.seconds for times in run.arrivals for when, _ in times)


def test_the_program_says_what_the_engine_says(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        run_program({"model": str(tmp_path / "none")}, REQUESTS)


def test_throughput_from_the_command_line(model, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["bench", "throughput", "--model", model, "--requests", "3", "--prompt-tokens", "4-8"]
    arguments += ["--output-tokens", "5", "--repeat", "1", "--warmup", "0", "--kv-cache-memory", "4MiB"]
    assert main([*arguments, "--device", "cpu", "--json", str(file)]) == 0
    assert "output tok/s" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["benchmark"] == "throughput" and figures["workload"]["num_requests"] == 3
    result = figures["result"]
    assert result["num_output_tokens"] == 15 and 12 <= result["num_prompt_tokens"] <= 24
    assert result["output_tokens_per_second"] == pytest.approx(15 / result["seconds"])


def test_a_preset_small_enough_for_a_cpu(capsys):
    arguments = ["bench", "latency", "--preset", "small1", "--scale", "0.03", "--output-tokens", "4", "--repeat", "1"]
    assert main([*arguments, "--kv-cache-memory", "8MiB", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "small1 (Qwen3-0.6B × 0.03): 1 · 128 · 4, temperature 0" in out and "ms/token" in out


def test_startup_is_measured_cold_and_again(model, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["bench", "startup", "--model", model, "--repeat", "1", "--kv-cache-memory", "4MiB", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())["result"]
    assert len(result["cold_runs"]) == len(result["again_runs"]) == 1 and result["cold_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--preset", "nano"], "--preset must be one of small1, lat8b, lat8b-tp2"),
        (["latency", "--output-tokens", "none-3"], "--output-tokens must be a number of tokens or a range"),
        (["throughput", "--scale", "2"], "--scale must be a number from 0.001 to 1"),
        (["throughput", "--json", "/no/such/directory/x"], "there is no such directory"),
        (["startup", "--nnodes", "2"], "leave out --nnodes"),
        (["speed"], "'speed' is not a command of shoal bench; there is shoal bench serve or"),
    ],
)
def test_wrong_input_is_clear(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
