"""FakeClient: an engine core that is a few lines of Python, for tests of what stands on EngineClient."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.config.model_config import ModelConfig
from shoal.engine.client import EngineClient, ProgressCallback
from shoal.errors import EngineDeadError
from shoal.messages import AbortRequests, AddRequest, ClientMessage, CoreOutputs, CoreReady, EngineStats, TokenDelta
from shoal.types import EngineRequest, FinishReason, TokenLogprobs

# (request, position of the output token) -> token id
Script = Callable[[EngineRequest, int], int]


def counting(request: EngineRequest, position: int) -> int:
    """Output tokens 300, 301, 302 …: in the vocabulary of every test tokenizer, and no end token."""
    return 300 + position % 50


def say(ids: list[int], end: int) -> Script:
    """These tokens, then the end token."""
    return lambda request, position: ids[position] if position < len(ids) else end


@dataclasses.dataclass
class _Running:
    request: EngineRequest
    num_emitted: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)  # of the answer so far


class FakeClient(EngineClient):
    """Emits one token per running request and step, as `script` says; ends them as the scheduler would.

    tokens_per_step: how many come in one delta. `gate`: cleared, no step is made. die(): the core is gone.
    """

    def __init__(self, config: EngineConfig, script: Script = counting, tokens_per_step: int = 1) -> None:
        self.config = config
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent: list[ClientMessage] = []
        self.running: dict[str, _Running] = {}
        self.num_steps = 0
        self.closed = False
        self._early: list[TokenDelta] = []
        self._work = asyncio.Event()
        self._failure: str | None = None

    @property
    def ready(self) -> CoreReady:
        return CoreReady(self.config.generation, self.config.max_model_len, 100, self.config.block_size, {})

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        return self.ready

    def die(self, how: str = "the engine core was killed by signal 9") -> None:
        self._failure = how
        self._work.set()
        self.gate.set()

    async def send(self, message: ClientMessage) -> None:
        self._check()
        self.sent.append(message)
        match message:
            case AddRequest(request):
                emitted = list(request.emitted_token_ids)
                self.running[request.request_id] = _Running(request, len(emitted), emitted)
            case AbortRequests(request_ids, silent):
                for request_id in request_ids:
                    if self.running.pop(request_id, None) is not None and not silent:
                        self._early.append(TokenDelta(request_id, finish_reason=FinishReason.ABORT))
        self._work.set()

    async def receive(self) -> CoreOutputs:
        while not self.running and not self._early:
            self._work.clear()
            self._check()
            await self._work.wait()
        await self.gate.wait()
        await asyncio.sleep(0)
        self._check()
        self.num_steps += 1
        deltas, self._early = self._early, []
        for running in list(self.running.values()):
            deltas.append(self._step(running))
        stats = EngineStats(num_requests_running=len(self.running), num_steps_total=self.num_steps)
        return CoreOutputs(self.config.generation, deltas, stats)

    def _next_token(self, running: _Running) -> int:
        return self.script(running.request, running.num_emitted)

    def _step(self, running: _Running) -> TokenDelta:
        request, sampling = running.request, running.request.sampling
        delta = TokenDelta(request.request_id, [])
        stops = {*sampling.eos_token_ids, *(sampling.stop_token_ids or ())}
        if len(running.token_ids) == len(request.emitted_token_ids) and sampling.prompt_logprobs is not None:
            ids = request.prompt_token_ids
            delta.prompt_logprobs = [None, *(TokenLogprobs([id_], [-1.0], 1) for id_ in ids[1:])]
        for _ in range(self.tokens_per_step):
            token_id = self._next_token(running)
            running.num_emitted += 1
            running.token_ids.append(token_id)
            delta.token_ids.append(token_id)
            if sampling.logprobs is not None:
                top = [token_id, *range(sampling.logprobs)]
                delta.logprobs = [*(delta.logprobs or []), TokenLogprobs(top, [-0.5] * len(top), 1)]
            if token_id in stops and running.num_emitted > sampling.min_tokens:
                delta.finish_reason = FinishReason.STOP
                delta.stop_reason = token_id if token_id in (sampling.stop_token_ids or ()) else None
            elif running.num_emitted >= (sampling.max_tokens or 0):
                delta.finish_reason = FinishReason.LENGTH
            if delta.finish_reason is not None:
                del self.running[request.request_id]
                break
        return delta

    async def utility(self, call: str) -> Any:
        self._check()
        return {"num_requests_running": len(self.running), "num_steps_total": self.num_steps}

    def kill(self, reason: str, replica: int | None = None) -> None:
        self.die(f"the engine core {reason}")

    async def close(self, drain_seconds: float = 0.0) -> None:
        self.closed = True

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(self._failure)


def make_config(**changes: Any) -> EngineConfig:
    """A config for a model that is never loaded."""
    model = ModelConfig(
        path="", architecture="Qwen2ForCausalLM", model_type="qwen2", vocab_size=512, hidden_size=8,
        intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, max_position_embeddings=256,
        norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True, attention_bias=True, rope=None,
        sliding_windows=(None,), dtype="float32", bos_token_id=None, eos_token_ids=(0,), generation_defaults={}, raw={},
    )  # fmt: skip
    settings: dict[str, Any] = dict(
        model=model, device="cpu", dtype="float32", load_format="dummy", seed=0, deterministic=True,
        enforce_eager=True, max_model_len=256, block_size=16, gpu_memory_utilization=0.9, kv_cache_memory=None,
        num_blocks_override=None, enable_prefix_caching=True, max_num_seqs=64, max_num_batched_tokens=512,
        enable_chunked_prefill=True, long_prefill_token_threshold=0, scheduling_policy="fcfs", async_scheduling=True,
    )  # fmt: skip
    return EngineConfig(**(settings | changes))
