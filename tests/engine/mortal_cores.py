"""Cores that die and come back, for tests of recovery: the next token depends on the whole answer so far, so that one
that is lost, doubled or replayed wrongly changes all that follow."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import EngineClient, ProgressCallback
from shoal.engine.prepare import PreparedRequest
from shoal.engine.replicas import make_client
from shoal.engine.restart_budget import RestartLimits
from shoal.messages import AddRequest, CoreReady
from shoal.types import RequestUpdate, SamplingParams
from tests.engine.fake_client import FakeClient, _Running, make_config
from tests.engine.test_async_engine import END, until, updates_of
from tests.engine.tokenizers_for_tests import tokenizer

LONG = SamplingParams(max_tokens=120, seed=5, ignore_eos=True)
PROMPT = [300, 301, 302]
NO_LIMIT = RestartLimits(max_restarts=100_000, window=1e-9)


class MortalCore(FakeClient):
    """dies_at: the step at which it is killed. together: the engine ids that ran in each step."""

    def __init__(self, config: EngineConfig, cores: Cores) -> None:
        super().__init__(config)
        self.cores = cores
        self.dies_at: int | None = None
        self.together: list[frozenset[str]] = []

    @property
    def died(self) -> bool:
        return self._failure is not None

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        await self.cores.before_start(self)
        return await super().start(on_progress)

    def _next_token(self, running: _Running) -> int:
        sampling = running.request.sampling
        value = hash((sampling.seed, tuple(running.request.prompt_token_ids), tuple(running.token_ids)))
        return END if value % 61 == 0 else 260 + value % 250

    async def receive(self) -> Any:
        self._kill_if_due()
        outputs = await super().receive()
        self._kill_if_due()
        return outputs

    def _kill_if_due(self) -> None:
        self.together.append(frozenset(self.running))
        poison = self.cores.poison
        if any(running.request.prompt_token_ids == poison for running in self.running.values()):
            self.die("the engine core was poisoned")
        if self.dies_at is not None and self.num_steps >= self.dies_at:
            self.die()
        self._check()


class Cores:
    """All cores that were made, in order. poison: a prompt that kills a core as soon as it runs. prepare: is called
    with each new one. refuse: an error for the start of a core. start_gate: cleared, no start ends."""

    def __init__(self, poison: list[int] | None = None) -> None:
        self.made: list[MortalCore] = []
        self.poison = poison
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.refuse: Callable[[MortalCore], Exception | None] = lambda core: None
        self.prepare: Callable[[MortalCore], None] = lambda core: None

    def make(self, config: EngineConfig) -> EngineClient:
        core = MortalCore(config, self)
        self.made.append(core)
        self.prepare(core)
        return core

    async def before_start(self, core: MortalCore) -> None:
        await self.start_gate.wait()
        if (error := self.refuse(core)) is not None:
            raise error

    @property
    def last(self) -> MortalCore:
        return self.made[-1]

    def added(self) -> list[str]:
        """The engine ids of all that was sent, over all cores."""
        return [
            message.request.request_id for core in self.made for message in core.sent if isinstance(message, AddRequest)
        ]


@contextlib.asynccontextmanager
async def recovering(
    cores: Cores, limits: RestartLimits = NO_LIMIT, *, config: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[AsyncEngine]:
    """An engine whose cores come back. At the end nothing of any request is left, and every core was closed."""
    engine_config = make_config(**(config or {}))
    client = make_client(engine_config, cores.make, limits)
    await client.start()
    engine = AsyncEngine(client, engine_config, tokenizer(), **options)
    await engine.start()
    try:
        yield engine
        await until(lambda: not engine._sends)
        if engine.num_unfinished == 0:
            placement = engine._placement
            assert not placement.in_core and not placement.held and not engine._streams
            for core in cores.made:
                if not core.died:
                    await until(lambda core=core: not core.running)  # type: ignore[misc]
    finally:
        await engine.close()
        assert all(core.closed for core in cores.made)
        assert engine.num_unfinished == 0


def random_prompt(chance: random.Random) -> list[int]:
    return [chance.randint(260, 500) for _ in range(chance.randint(1, 20))]


def seen(updates: list[RequestUpdate]) -> dict[int, dict[str, Any]]:
    """What a consumer got of each answer; fails where an answer ended twice or not at all."""
    answers: dict[int, dict[str, Any]] = {}
    for update in updates:
        answer = answers.setdefault(
            update.index, {"ids": [], "text": "", "logprobs": [], "prompt": [], "end": None, "cached": 0}
        )
        assert answer["end"] is None, "nothing comes after the end"
        answer["ids"] += update.token_ids
        answer["text"] += update.text
        answer["logprobs"] += update.logprobs or []
        answer["prompt"] += [update.prompt_logprobs] if update.prompt_logprobs else []
        answer["cached"] += update.num_cached_tokens
        if update.finish_reason is not None:
            answer["end"] = (update.finish_reason, update.stop_reason, update.error)
    assert all(answer["end"] is not None for answer in answers.values())
    return answers


def begin(engine: AsyncEngine, prepared: PreparedRequest) -> asyncio.Task[list[RequestUpdate]]:
    return asyncio.create_task(updates_of(engine, prepared))


async def undisturbed(prompt: list[int], params: SamplingParams) -> dict[int, dict[str, Any]]:
    async with recovering(Cores()) as engine:
        return seen(await updates_of(engine, engine.prepare(prompt, params)))
