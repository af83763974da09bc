"""PacedCore: an engine core that is a few lines of Python, paced like a real one. Used by the fake servers.

What it says is a function of the ids so far, the seed and the parameters: a token that is missing or comes twice
changes all that follows. Steps, slots, the prompt's cost, the KV cache and its prefixes are modelled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.engine.client import EngineClient, ProgressCallback
from shoal.errors import EngineDeadError
from shoal.messages import AbortRequests, AddRequest, ClientMessage, CoreOutputs, CoreReady, EngineStats, TokenDelta
from shoal.scheduling.block_pool import hash_block
from shoal.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from shoal.types.seeds import GOLDEN_GAMMA, MASK_64, mix64
from tests.engine.fake_client import make_config
from tests.router.fakes.vocabulary import DEADLY_ID, END, SAYABLE, SIZE, WAY_ON

BLOCK_SIZE = 16
_ONE_IN = 200  # how often the model ends its answer by itself


@dataclasses.dataclass(frozen=True)
class Pace:
    """tokens_per_second: of each request. prompt_tokens_per_second: while a prompt is computed nothing else is.
    start_seconds: until a core is up, the first one or one in place of one that was lost. num_phases: 1 gives all
    requests their tokens at once, as a step does; more spread them over the time of a step, as so many engines would.
    records_times: keep when each token was made."""

    tokens_per_second: float = 50.0
    prompt_tokens_per_second: float = 50_000.0
    max_num_seqs: int = 64
    num_blocks: int = 4096
    max_model_len: int = 2048
    start_seconds: float = 0.3
    num_phases: int = 1
    records_times: bool = False


def core_config(pace: Pace, generation: int = 0) -> EngineConfig:
    """The engine config that a fake server is started with."""
    config = make_config(
        max_model_len=pace.max_model_len, max_num_seqs=pace.max_num_seqs, block_size=BLOCK_SIZE, generation=generation
    )
    model = dataclasses.replace(
        config.model, vocab_size=SIZE, max_position_embeddings=pace.max_model_len, eos_token_ids=(END,)
    )
    return dataclasses.replace(config, model=model)


# --- what it says ------------------------------------------------------------------------------------------------


def after(state: int, token_ids: Sequence[int]) -> int:
    """The state of a text, from the state of its beginning."""
    for token_id in token_ids:
        state = mix64((state ^ (token_id + 1)) * GOLDEN_GAMMA)
    return state


def flavour_of(sampling: SamplingParams) -> int:
    """What of the parameters changes the text. Greedy requests say the same whatever their seed."""
    seed = 0 if sampling.temperature == 0 or sampling.seed is None else sampling.seed & MASK_64
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    numbers = [round(1000 * number) for number in (sampling.temperature, sampling.top_p, *penalties)]
    return after(mix64(seed), [*numbers, sampling.top_k])


def next_token(state: int, flavour: int, last: Sequence[int], num_emitted: int, sampling: SamplingParams) -> int:
    """The token that follows a text in this state, which ends with `last`."""
    value = mix64(state ^ flavour)
    for length in (3, 2, 1):  # within a character there is one way on only
        way_on = WAY_ON.get(tuple(last[-length:]))
        if way_on is not None:
            return way_on
    if sampling.allowed_token_ids:
        return sampling.allowed_token_ids[value % len(sampling.allowed_token_ids)]
    may_end = sampling.eos_token_ids and num_emitted >= sampling.min_tokens
    if may_end and value % _ONE_IN == 0:
        return END
    return SAYABLE[(value >> 20) % len(SAYABLE)]


def logprobs_of(state: int, token_id: int, num_top: int) -> TokenLogprobs:
    """As made up as the token, and as fixed."""
    value = mix64(state)
    top = [(value >> (4 * index)) % SIZE for index in range(num_top)]
    chosen = -(value % 997) / 250
    return TokenLogprobs([token_id, *top], [chosen, *(-0.25 * (index + 1) for index in range(num_top))], 1 + value % 9)


# --- the core ----------------------------------------------------------------------------------------------------


class _Running:
    def __init__(self, request: EngineRequest, phase: int) -> None:
        self.request = request
        self.phase = phase
        self.ids = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.state = after(0, self.ids)
        self.flavour = flavour_of(request.sampling)
        self.num_emitted = len(request.emitted_token_ids)
        self.num_cached = 0
        self.told_of_prompt = False

    @property
    def num_blocks(self) -> int:
        return -(-len(self.ids) // BLOCK_SIZE)


class PacedCore(EngineClient):
    """slow: steps take so many times as long. freeze(): it makes no step any more. die(): it is gone."""

    def __init__(self, config: EngineConfig, pace: Pace) -> None:
        self.config = config
        self.pace = pace
        self.slow = 1.0
        self.running: dict[str, _Running] = {}
        self.waiting: deque[_Running] = deque()
        self.stats = EngineStats(num_blocks=pace.num_blocks, num_free_blocks=pace.num_blocks)
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        self._gate = asyncio.Event()
        self._gate.set()
        self._news = asyncio.Event()
        self._stats_are_old = False
        self._failure: str | None = None
        self._next_step = 0.0
        self._early: list[TokenDelta] = []
        self._num_requests = 0
        self._phase = 0
        # By request (time.monotonic()): what a token's delay is measured from.
        self.token_times: dict[str, list[float]] = {}

    @property
    def ready(self) -> CoreReady:
        info = {"device": "no device", "dtype": "float32", "kv_cache_bytes": 1 << 20}
        return CoreReady(self.config.generation, self.config.max_model_len, self.pace.num_blocks, BLOCK_SIZE, info)

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        await asyncio.sleep(self.pace.start_seconds)
        return self.ready

    def freeze(self) -> None:
        self._gate.clear()

    def thaw(self) -> None:
        self._gate.set()

    def die(self, how: str = "the engine core was killed by signal 9") -> None:
        self._failure = self._failure or how
        self._news.set()
        self._gate.set()

    def kill(self, reason: str, replica: int | None = None) -> None:
        self.die(f"the engine core {reason}")

    async def send(self, message: ClientMessage) -> None:
        self._check()
        match message:
            case AddRequest(request):
                self.waiting.append(_Running(request, self._num_requests % self.pace.num_phases))
                self._num_requests += 1
            case AbortRequests(request_ids, silent):
                for request_id in request_ids:
                    if self._drop(request_id) and not silent:
                        self._early.append(TokenDelta(request_id, finish_reason=FinishReason.ABORT))
                self._stats_are_old = True
        self._news.set()

    def _drop(self, request_id: str) -> bool:
        waits = [one for one in self.waiting if one.request.request_id == request_id]
        for one in waits:
            self.waiting.remove(one)
        return bool(waits) or self.running.pop(request_id, None) is not None

    async def receive(self) -> CoreOutputs:
        while not (self.running or self.waiting or self._early or self._stats_are_old):
            self._news.clear()
            self._check()
            await self._news.wait()
        await self._pass_time(self._admit())
        self._check()
        deltas, self._early = self._early, []
        self._phase = (self._phase + 1) % self.pace.num_phases
        deltas += [self._step(one) for one in list(self.running.values()) if one.phase == self._phase]
        self._stats_are_old = False
        if self.pace.records_times:
            now = time.monotonic()
            for delta in deltas:
                self.token_times.setdefault(delta.request_id, []).append(now)
        return CoreOutputs(self.config.generation, deltas, self._count())

    async def _pass_time(self, num_prompt_tokens: int) -> None:
        """Wait until the step is done; without requests there is nothing to wait for."""
        if self.running:
            seconds = 1 / self.pace.tokens_per_second / self.pace.num_phases
            seconds += num_prompt_tokens / self.pace.prompt_tokens_per_second
            now = time.monotonic()
            # Steps follow each other at an even pace, however busy the event loop is; after a pause they begin anew.
            begin = self._next_step if now - self._next_step < seconds / 2 else now
            self._next_step = begin + self.slow * seconds
            await asyncio.sleep(self._next_step - now)
        await self._gate.wait()

    def _admit(self) -> int:
        """Take in what has a slot and blocks. Returns how many tokens must be computed for it."""
        num_tokens = 0
        free = self.pace.num_blocks - sum(one.num_blocks for one in self.running.values())
        while self.waiting and len(self.running) < self.pace.max_num_seqs and self.waiting[0].num_blocks <= free:
            one = self.waiting.popleft()
            free -= one.num_blocks
            if DEADLY_ID in one.request.prompt_token_ids:
                self.die("the engine core was killed by signal 11")
            one.num_cached = self._look_up(one)
            num_tokens += len(one.ids) - one.num_cached
            self.running[one.request.request_id] = one
        return num_tokens

    def _look_up(self, one: _Running) -> int:
        """How many of its first tokens are cached. From now on all its full blocks are."""
        digest: bytes | None = None
        num_cached, all_hits = 0, True
        for start in range(0, len(one.ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            digest = hash_block(digest, one.ids[start : start + BLOCK_SIZE])
            all_hits = all_hits and digest in self._cached
            num_cached += BLOCK_SIZE * all_hits
            self._cached[digest] = None
            self._cached.move_to_end(digest)
        while len(self._cached) > self.pace.num_blocks:
            self._cached.popitem(last=False)
        num_cached = min(num_cached, len(one.ids) - 1)
        self.stats.prefix_cache_queries_total += len(one.ids)
        self.stats.prefix_cache_hits_total += num_cached
        self.stats.prompt_tokens_total += len(one.request.prompt_token_ids)
        return num_cached

    def _step(self, one: _Running) -> TokenDelta:
        request, sampling = one.request, one.request.sampling
        token_id = next_token(one.state, one.flavour, one.ids[-3:], one.num_emitted, sampling)
        delta = TokenDelta(request.request_id, [token_id])
        if not one.told_of_prompt:
            one.told_of_prompt = True
            delta.num_cached_tokens = one.num_cached
            if sampling.prompt_logprobs is not None:
                delta.prompt_logprobs = _prompt_logprobs(request.prompt_token_ids, sampling.prompt_logprobs)
        if sampling.logprobs is not None:
            delta.logprobs = [logprobs_of(one.state, token_id, sampling.logprobs)]
        one.ids.append(token_id)
        one.state = after(one.state, (token_id,))
        one.num_emitted += 1
        self.stats.generation_tokens_total += 1
        stop_ids = sampling.stop_token_ids or ()
        if one.num_emitted > sampling.min_tokens and (token_id in sampling.eos_token_ids or token_id in stop_ids):
            delta.finish_reason = FinishReason.STOP
            delta.stop_reason = token_id if token_id in stop_ids else None
        elif one.num_emitted >= (sampling.max_tokens or 1):
            delta.finish_reason = FinishReason.LENGTH
        if delta.finish_reason is not None:
            del self.running[request.request_id]
        return delta

    def _count(self) -> EngineStats:
        stats = self.stats
        held = sum(one.num_blocks for one in self.running.values())
        stats.num_requests_running, stats.num_requests_waiting = len(self.running), len(self.waiting)
        stats.num_free_blocks = self.pace.num_blocks - held
        stats.kv_cache_usage = held / self.pace.num_blocks
        stats.num_steps_total += 1
        return _copy(stats)

    async def utility(self, call: str) -> Any:
        self._check()
        if call == "reset_prefix_cache":
            self._cached.clear()
            return None
        return _copy(self.stats)

    async def close(self, drain_seconds: float = 0.0) -> None:
        self.die("the engine has been shut down")

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(self._failure)


def _prompt_logprobs(ids: Sequence[int], num_top: int) -> list[TokenLogprobs | None]:
    return [None, *(logprobs_of(index, id_, num_top) for index, id_ in enumerate(ids[1:]))]


def _copy(stats: EngineStats) -> EngineStats:
    """What was reported must not change afterwards."""
    return EngineStats(**{name: getattr(stats, name) for name in EngineStats.__struct_fields__})
