"""RequestState: one request as the scheduler follows it, from the queue to its end."""

from __future__ import annotations

import enum

from shoal.scheduling.block_pool import hash_block
from shoal.types.outputs import FinishReason, TokenLogprobs
from shoal.types.request import EngineRequest


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    WAITING_FOR_KV = enum.auto()  # its blocks are being filled from outside
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class RequestState:
    """Bookkeeping of one sequence. Counts are of tokens.

    token_ids: prompt, then every output id that the host knows.
    num_computed: positions whose KV is computed or being computed by a step in flight.
    num_pending: tokens sampled by steps in flight, whose ids the host does not know yet.
    num_queued: tokens to compute when it joined the waiting queue.
    last_step: the newest step that names this request's slot and blocks.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "block_size",
        "eos",
        "external_ready",
        "finish_reason",
        "hash_root",
        "key",
        "last_step",
        "max_total",
        "min_total",
        "num_cached_tokens",
        "num_committed",
        "num_computed",
        "num_external",
        "num_pending",
        "num_prompt",
        "num_queued",
        "prompt_logprobs",
        "prompt_logprobs_sent",
        "request",
        "request_id",
        "slot",
        "status",
        "stop_ids",
        "token_ids",
        "was_admitted",
    )

    def __init__(self, request: EngineRequest, block_size: int, max_model_len: int, key: tuple[int, int]) -> None:
        sampling = request.sampling
        self.request = request
        self.request_id = request.request_id
        self.block_size = block_size
        self.key = key
        self.status = RequestStatus.WAITING
        self.token_ids: list[int] = request.prompt_token_ids + request.emitted_token_ids
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.num_pending = 0
        self.num_queued = 0
        self.slot = -1
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        # Keys and values of one adapter's tokens are no other's.
        self.hash_root = None if request.adapter is None else request.adapter.uid.encode()
        self.num_committed = 0
        self.last_step = -1
        self.finish_reason: FinishReason | None = None
        self.was_admitted = False
        self.num_cached_tokens = 0
        self.num_external = 0
        self.external_ready = False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            [None] if sampling.prompt_logprobs is not None else None
        )
        self.prompt_logprobs_sent = False
        limit = max_model_len if sampling.max_tokens is None else self.num_prompt + sampling.max_tokens
        self.max_total = min(limit, max_model_len)
        if request.pooling is not None:  # its one "token" is the result, which takes no place
            self.max_total = self.num_prompt + 1
        self.min_total = self.num_prompt + sampling.min_tokens
        self.eos = frozenset(sampling.eos_token_ids)
        self.stop_ids = self.eos | frozenset(sampling.stop_token_ids or ())

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions must be computed here, so that a prefix hit is of no use."""
        return self.prompt_logprobs is not None and not self.prompt_logprobs_sent

    def extend_hashes(self, num_tokens: int) -> list[bytes]:
        """Digests of the full blocks among the first `num_tokens` known ids; computed once each."""
        hashes, size = self.block_hashes, self.block_size
        num_full = min(num_tokens, len(self.token_ids)) // size
        while len(hashes) < num_full:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else self.hash_root
            hashes.append(hash_block(parent, self.token_ids[start : start + size]))
        return hashes[:num_full]

    def append(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Take one sampled token in. Returns why the request ends with it, if it does, and the stop token id."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if token_id in self.stop_ids and num_tokens > self.min_total:
            return FinishReason.STOP, None if token_id in self.eos else token_id
        if num_tokens >= self.max_total:
            return FinishReason.LENGTH, None
        return None, None
