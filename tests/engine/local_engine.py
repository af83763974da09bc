"""A whole engine core in the test's own process: real scheduler, executor and worker; only the sockets are missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shoal.config.engine_config import EngineConfig
from shoal.engine.core import EngineCore
from shoal.executor.registry import make_executor
from shoal.executor.uniproc import UniprocExecutor
from shoal.messages import AddRequest, CoreOutputs, EngineStats, Shutdown
from shoal.types import EngineRequest, FinishReason, TokenLogprobs
from shoal.worker.worker import Worker
from tests.engine.simulated_executor import InMemoryChannel


@dataclasses.dataclass
class Answer:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reasons: list[FinishReason] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0
    pooled: bytes | None = None


def collect(channel: InMemoryChannel) -> dict[str, Answer]:
    """Everything that the core sent, by request; fails on a token after an ending."""
    answers: dict[str, Answer] = {}
    for message in channel.sent:
        for delta in message.deltas if isinstance(message, CoreOutputs) else []:
            answer = answers.setdefault(delta.request_id, Answer())
            assert not answer.finish_reasons, "news after the end"
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.num_cached_tokens = max(answer.num_cached_tokens, delta.num_cached_tokens)
            if delta.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None
                answer.prompt_logprobs = delta.prompt_logprobs
            answer.pooled = delta.pooled or answer.pooled
            if delta.finish_reason is not None:
                answer.finish_reasons.append(delta.finish_reason)
    return answers


def run_engine(
    config: EngineConfig,
    *waves: list[EngineRequest],
    after_start: Callable[[Worker], None] | None = None,
    channel: InMemoryChannel | None = None,
) -> tuple[dict[str, Answer], EngineStats]:
    """Serve waves of requests one after the other on one engine; each wave is whole before the next begins.

    channel: one that brings requests of its own beside them."""
    channel = channel or InMemoryChannel()
    executor = make_executor(config)
    core = EngineCore(config, executor, channel)
    core.start()
    if after_start is not None:
        assert isinstance(executor, UniprocExecutor)
        after_start(executor._worker)
    pending = [[AddRequest(request) for request in wave] for wave in waves]

    def next_wave() -> object:
        if not pending:
            return Shutdown()
        first, *rest = pending.pop(0)
        channel.push(*rest)
        return first

    channel.on_empty = next_wave  # type: ignore[assignment]
    core.run()
    stats = core.stats()
    assert stats.num_free_blocks == stats.num_blocks, "blocks leaked"
    answers = collect(channel)
    assert all(len(answer.finish_reasons) == 1 for answer in answers.values())
    return answers, stats
