"""The scheduler against a simulated worker: exact outputs, exactly one ending each, no block lost, under any order."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduling import Scheduler, SchedulerConfig
from shoal.types import EngineRequest, FinishReason, SamplingParams
from tests.scheduling.simulated_worker import VOCAB_SIZE, SimulatedWorker, next_token


def make_config(**changes: object) -> SchedulerConfig:
    values: dict = dict(num_blocks=40, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32)
    values.update(changes)
    return SchedulerConfig(**values)


def make_request(request_id: str, prompt: list[int], **sampling: object) -> EngineRequest:
    params = SamplingParams(**{"max_tokens": 8, "eos_token_ids": [0], **sampling})  # type: ignore[arg-type]
    return EngineRequest(request_id, prompt, params)


def expected_output(request: EngineRequest, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What the rule says, computed without any engine."""
    history, sampling = list(request.prompt_token_ids), request.sampling
    limit = min(max_model_len, len(history) + (sampling.max_tokens or max_model_len))
    output: list[int] = []
    while True:
        token = next_token(history)
        history.append(token)
        output.append(token)
        if token in sampling.eos_token_ids and len(output) > sampling.min_tokens:
            return output, FinishReason.STOP
        if len(history) >= limit:
            return output, FinishReason.LENGTH


class Harness:
    """Scheduler and worker with a pipeline of `depth` steps; results are taken in one step late."""

    def __init__(self, config: SchedulerConfig, depth: int = 2) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.worker = SimulatedWorker(
            config.num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.num_stages,
            config.async_scheduling,
        )
        self.depth = depth
        self.results: deque = deque()
        self.outputs: dict[str, list[int]] = {}
        self.endings: dict[str, list[FinishReason]] = {}
        self.prompt_logprobs: dict[str, list] = {}

    def add(self, request: EngineRequest) -> None:
        self.outputs.setdefault(request.request_id, [])
        self.endings.setdefault(request.request_id, [])
        self.scheduler.add(request)

    def take(self, deltas: list) -> None:
        for delta in deltas:
            assert not self.endings[delta.request_id], "a token after the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.prompt_logprobs is not None:
                assert delta.request_id not in self.prompt_logprobs
                self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs
            if delta.finish_reason is not None:
                self.endings[delta.request_id].append(delta.finish_reason)

    def step(self) -> bool:
        batch = self.scheduler.schedule() if len(self.results) < self.depth else None
        if batch is not None:
            self.results.append(self.worker.run(batch))
        if self.results and (batch is None or len(self.results) >= self.depth):
            result = self.results.popleft()
            self.worker.last_known_step = result.step_id
            self.take(self.scheduler.update(result))
            return True
        self.take(self.scheduler.take_early_deltas())
        return batch is not None

    def run(self, max_steps: int = 5000) -> None:
        while self.scheduler.has_work():
            assert self.step(), "no progress with work to do"
            max_steps -= 1
            assert max_steps > 0, "livelock"
        self.check_empty()

    def check_empty(self) -> None:
        self.scheduler.pool.check()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert sorted(self.scheduler._free_slots) == list(range(self.config.max_num_seqs))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_do_not_depend_on_batching(depth: int) -> None:
    harness = Harness(make_config(num_blocks=200), depth)
    requests = [make_request(f"r{i}", [(i * 7 + j) % VOCAB_SIZE for j in range(1 + i * 3)]) for i in range(15)]
    for request in requests:
        harness.add(request)
    harness.run()
    for request in requests:
        output, reason = expected_output(request, 64)
        assert harness.outputs[request.request_id] == output
        assert harness.endings[request.request_id] == [reason]


def test_equal_prompts_share_blocks() -> None:
    harness = Harness(make_config(max_num_batched_tokens=64))
    prompt = list(range(1, 34))
    for i in range(3):
        harness.add(make_request(f"r{i}", prompt))
    batch = harness.scheduler.schedule()
    assert batch is not None
    # The second and third hit the eight full blocks of the first within the same step.
    assert [item.num_new_tokens for item in batch.work] == [33, 1, 1]
    assert harness.scheduler.counters.prefix_cache_hits == 64
    harness.results.append(harness.worker.run(batch))
    harness.run()
    assert harness.outputs["r0"] == harness.outputs["r1"] == harness.outputs["r2"]


def test_preemption_recomputes_and_changes_nothing() -> None:
    harness = Harness(make_config(num_blocks=17, max_num_batched_tokens=16, enable_prefix_caching=False))
    requests = [make_request(f"r{i}", [i + 1] * 9, max_tokens=40, eos_token_ids=[]) for i in range(6)]
    for request in requests:
        harness.add(request)
    harness.run()
    assert harness.scheduler.counters.num_preemptions > 0
    for request in requests:
        assert harness.outputs[request.request_id] == expected_output(request, 64)[0]


def test_priority_is_served_first_and_preempted_last() -> None:
    harness = Harness(make_config(max_num_seqs=1, by_priority=True), depth=1)
    first = make_request("low", [1, 2, 3], max_tokens=2, eos_token_ids=[])
    second = make_request("high", [1, 2, 4], max_tokens=2, eos_token_ids=[])
    first.priority, second.priority = 5, 1
    harness.add(first)
    harness.add(second)
    harness.step()
    assert harness.outputs["high"] and not harness.outputs["low"]
    harness.run()


def test_prompt_logprobs_come_once_and_whole() -> None:
    harness = Harness(make_config(num_blocks=17, max_num_batched_tokens=7))
    prompt = list(range(1, 31))
    harness.add(make_request("warm", prompt, eos_token_ids=[]))
    harness.run()
    for i in range(3):
        harness.add(make_request(f"r{i}", prompt, prompt_logprobs=0, max_tokens=20, eos_token_ids=[]))
    harness.run()
    for i in range(3):
        entries = harness.prompt_logprobs[f"r{i}"]
        assert entries[0] is None
        assert [entry.token_ids[0] for entry in entries[1:]] == prompt[1:]


def test_requests_that_cannot_run_end_at_once() -> None:
    harness = Harness(make_config())
    harness.add(make_request("long", [1] * 64))
    harness.add(make_request("empty", []))
    done = make_request("done", [1, 2], max_tokens=2)
    done.emitted_token_ids = [3, 4]
    harness.add(done)
    full = make_request("full", [1, 2], max_tokens=100)
    full.emitted_token_ids = [3] * 62
    harness.add(full)
    harness.take(harness.scheduler.take_early_deltas())
    assert harness.endings == {
        "long": [FinishReason.ERROR],
        "empty": [FinishReason.ERROR],
        "done": [FinishReason.LENGTH],
        "full": [FinishReason.LENGTH],
    }
    harness.run()


def test_continuation_goes_on_where_it_was() -> None:
    request = make_request("r", [5, 6, 7], max_tokens=12, eos_token_ids=[])
    output, _ = expected_output(request, 64)
    for cut in range(12):
        harness = Harness(make_config())
        rest = make_request("r", [5, 6, 7], max_tokens=12, eos_token_ids=[])
        rest.emitted_token_ids = output[:cut]
        harness.add(rest)
        harness.run()
        assert harness.outputs["r"] == output[cut:]


def test_reset_of_the_prefix_cache_leaves_running_requests_alone() -> None:
    harness = Harness(make_config())
    request = make_request("r", list(range(1, 20)), max_tokens=30, eos_token_ids=[])
    harness.add(request)
    for _ in range(5):
        harness.step()
    harness.scheduler.reset_prefix_cache()
    harness.run()
    assert harness.outputs["r"] == expected_output(request, 64)[0]


requests_strategy = st.lists(
    st.tuples(
        st.integers(0, 3),  # which family of prompts: equal beginnings give prefix hits
        st.integers(1, 40),  # prompt length
        st.integers(1, 24),  # max_tokens
        st.integers(0, 3),  # min_tokens
        st.integers(0, 2),  # priority
        st.booleans(),  # prompt log-probabilities
        st.integers(0, 12),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 30)),  # aborted so many steps later
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests_strategy,
    num_blocks=st.integers(17, 60),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    threshold=st.sampled_from([0, 0, 3]),
    num_stages=st.integers(1, 4),
    num_ahead=st.integers(-1, 2),
    async_scheduling=st.booleans(),
    chunked=st.booleans(),
    caching=st.booleans(),
    by_priority=st.booleans(),
)
def test_every_request_ends_once_with_the_right_tokens_and_no_block_is_lost(
    requests: list,
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    threshold: int,
    num_stages: int,
    num_ahead: int,
    async_scheduling: bool,
    chunked: bool,
    caching: bool,
    by_priority: bool,
) -> None:
    config = make_config(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if chunked else 64,
        enable_chunked_prefill=chunked,
        num_stages=num_stages,
        async_scheduling=async_scheduling,
        enable_prefix_caching=caching,
        long_prefill_token_threshold=threshold,
        by_priority=by_priority,
    )
    harness = Harness(config, max(1, num_stages + (num_ahead if async_scheduling else 0)))
    arrivals: dict[int, list[EngineRequest]] = {}
    aborts: dict[int, list[str]] = {}
    for index, (family, length, max_tokens, min_tokens, priority, wants, arrival, abort) in enumerate(requests):
        request = make_request(
            f"r{index}",
            [(family * 11 + j) % VOCAB_SIZE for j in range(length)],
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            prompt_logprobs=0 if wants else None,
        )
        request.priority = priority
        arrivals.setdefault(arrival, []).append(request)
        if abort is not None:
            aborts.setdefault(arrival + abort, []).append(request.request_id)
    added: list[EngineRequest] = []
    for now in range(60):
        for request in arrivals.get(now, []):
            harness.add(request)
            added.append(request)
        harness.take(harness.scheduler.abort(aborts.get(now, [])))
        harness.step()
        harness.scheduler.pool.check()
    harness.run()
    for request in added:
        output, reason = expected_output(request, config.max_model_len)
        got = harness.outputs[request.request_id]
        assert len(harness.endings[request.request_id]) == 1
        if harness.endings[request.request_id] == [FinishReason.ABORT]:
            assert got == output[: len(got)]
        else:
            assert (got, harness.endings[request.request_id]) == (output, [reason])
