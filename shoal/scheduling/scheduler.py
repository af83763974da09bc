"""The scheduler: which requests run in a step, with how many tokens, in which slots and blocks. Pure bookkeeping.

Called by the engine core: `schedule` makes a step, `update` takes its result in; `schedule` may be called again
before the results of steps in flight are known, assuming that every running request emits a token.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections import deque

from shoal.messages import BatchResult, ScheduledBatch, SlotAssignment, SlotResult, SlotWork, TokenDelta
from shoal.scheduling.block_pool import BlockPool
from shoal.scheduling.connector import KVConnector, NullConnector
from shoal.scheduling.pacing import Pacing, StepBudget
from shoal.scheduling.request_state import RequestState, RequestStatus
from shoal.scheduling.scheduler_config import SchedulerConfig, SchedulerCounters
from shoal.scheduling.waiting_queue import WaitingQueue
from shoal.types.outputs import FinishReason
from shoal.types.request import EngineRequest


@dataclasses.dataclass(slots=True)
class _StepInFlight:
    step_id: int
    request_of_slot: dict[int, RequestState]
    sampled_slots: set[int]


@dataclasses.dataclass(slots=True)
class _Release:
    """Slot and blocks that come back when step `after_step` is done. slot -1: none."""

    after_step: int
    slot: int
    block_ids: list[int]


def _key(state: RequestState) -> tuple[int, int]:
    return state.key


class Scheduler:
    """Continuous batching over a paged KV cache: chunked prefill, prefix reuse, preemption by recomputation."""

    def __init__(self, config: SchedulerConfig, connector: KVConnector | None = None) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.enable_prefix_caching)
        self.counters = SchedulerCounters()
        self._pacing = Pacing(config.num_stages, config.async_scheduling)
        self._recent_prompt_tokens: deque[int] = deque(maxlen=self._pacing.num_pieces - 1)  # of each step
        self._connector: KVConnector = connector or NullConnector()
        self._requests: dict[str, RequestState] = {}
        self._waiting = WaitingQueue()
        self._running: list[RequestState] = []
        self._loading: dict[str, RequestState] = {}
        # Ended requests whose blocks a transfer still reads (sending) or writes (a load that cannot be recalled).
        self._sending: dict[str, _Release] = {}
        self._abandoned: dict[str, _Release] = {}
        self._free_slots = list(range(config.max_num_seqs))
        self._released_slots: list[int] = []
        self._releases: deque[_Release] = deque()
        self._in_flight: deque[_StepInFlight] = deque()
        self._next_step = 0
        self._next_arrival = 0
        self._early_deltas: list[TokenDelta] = []

    # --- requests in and out ---------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that can never run ends at once: its delta comes with `take_early_deltas`."""
        if request.request_id in self._requests:
            self._refuse(request, f"request id {request.request_id!r} is running already")
            return
        if request.request_id in self._sending or request.request_id in self._abandoned:
            self._refuse(request, f"request id {request.request_id!r} has ended, but its KV cache is still in transfer")
            return
        num_prompt = len(request.prompt_token_ids)
        most = self.config.max_model_len - (request.pooling is None)
        if not 0 < num_prompt <= most:
            self._refuse(request, f"{num_prompt} tokens in, where 1 to {most} can be served")
            return
        key = (request.priority if self.config.by_priority else 0, self._next_arrival)
        self._next_arrival += 1
        state = RequestState(request, self.config.block_size, self.config.max_model_len, key)
        if state.num_tokens >= state.max_total:  # a continuation that had emitted all
            self._early_deltas.append(TokenDelta(request.request_id, finish_reason=FinishReason.LENGTH))
            return
        self._requests[request.request_id] = state
        self._waiting.push(state)

    def abort(self, request_ids: list[str], *, silent: bool = False) -> list[TokenDelta]:
        """End requests; unknown ids are ignored. Their slots and blocks come back when no step names them."""
        deltas = []
        for request_id in request_ids:
            state = self._requests.get(request_id)
            if state is None:
                continue
            self._finish(state, FinishReason.ABORT)
            if not silent:
                deltas.append(TokenDelta(request_id, finish_reason=FinishReason.ABORT))
        return deltas

    def abort_all(self) -> list[TokenDelta]:
        return self.abort(list(self._requests))

    def take_early_deltas(self) -> list[TokenDelta]:
        """Endings of requests that never ran."""
        deltas, self._early_deltas = self._early_deltas, []
        return deltas

    def _refuse(self, request: EngineRequest, reason: str) -> None:
        self._early_deltas.append(TokenDelta(request.request_id, finish_reason=FinishReason.ERROR, error=reason))

    # --- what there is ---------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._loading)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def has_work(self) -> bool:
        """Whether `schedule` may have something to do now or after a result."""
        return bool(self._requests or self._in_flight or self._sending or self._abandoned)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests go on, and what they compute from now on is cached anew."""
        self.pool.reset_cache()
        for state in self._requests.values():
            state.num_committed = len(state.block_ids)

    # --- schedule --------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """Make the next step, or None when nothing can run now."""
        self._poll_connector()
        work: list[SlotWork] = []
        assigned: list[SlotAssignment] = []
        request_of_slot: dict[int, RequestState] = {}
        step_id = self._next_step
        ready, num_missing = self._pacing.ready(self._running, step_id)
        budget = self._make_budget(num_missing)
        num_prompt_tokens = budget.num_prompt_tokens
        starved = self._schedule_running(step_id, ready, budget, work, request_of_slot)
        if not starved:
            self._schedule_waiting(step_id, budget, work, assigned, request_of_slot)
            if not work:
                early = self._pacing.early(self._running, step_id)
                self._schedule_running(step_id, early, budget, work, request_of_slot)
        if not work:
            return None
        self._next_step += 1
        sampled_slots = {item.slot for item in work if item.sample}
        self._recent_prompt_tokens.append(num_prompt_tokens - budget.num_prompt_tokens)
        self._in_flight.append(_StepInFlight(step_id, request_of_slot, sampled_slots))
        released, self._released_slots = self._released_slots, []
        return ScheduledBatch(step_id, self.config.generation, released, assigned, work)

    def _make_budget(self, num_missing: int) -> StepBudget:
        """What the step may take. num_missing: prompt tokens that running requests lack; the next to be admitted count
        as well."""
        limit, num_stages = self.config.max_num_batched_tokens, self.config.num_stages
        if num_stages == 1:
            return StepBudget(limit, limit)
        num_missing += self._waiting.num_tokens_of(len(self._free_slots))
        if not self._in_flight:
            self._recent_prompt_tokens.clear()
        return StepBudget(limit, self._pacing.prompt_share(limit, num_missing + sum(self._recent_prompt_tokens)))

    def _schedule_running(
        self,
        step_id: int,
        ready: list[RequestState],
        budget: StepBudget,
        work: list[SlotWork],
        request_of_slot: dict[int, RequestState],
    ) -> bool:
        """Give every request of `ready`, ordered by key, its next tokens. Returns whether blocks ran out."""
        block_size, threshold = self.config.block_size, self.config.long_prefill_token_threshold
        starved = False
        for state in ready:
            if state.slot < 0 or budget.num_tokens <= 0:
                break  # without slot: it was preempted just now, and all behind it too, as the last go first
            num_total = len(state.token_ids) + state.num_pending
            num_new = num_total - state.num_computed
            if num_new <= 0 or num_total >= state.max_total:
                continue  # its last token is on the way
            of_prompt = num_new > 1
            if of_prompt:
                num_new = min(num_new, budget.num_tokens, budget.num_prompt_tokens, threshold or num_new)
                if num_new <= 0:
                    continue
            end = state.num_computed + num_new
            num_missing = -(-end // block_size) - len(state.block_ids)
            new_blocks: list[int] = []
            if num_missing > 0:
                if starved or not self._make_room(num_missing, state):
                    starved = True
                    if state.status is not RequestStatus.RUNNING:
                        break  # it was itself the last to be preempted
                    continue
                new_blocks = self.pool.allocate(num_missing)
                state.block_ids += new_blocks
            self._put_to_work(state, num_new, new_blocks, step_id, work, request_of_slot)
            budget.num_tokens -= num_new
            if of_prompt:
                budget.num_prompt_tokens -= num_new
        return starved

    def _put_to_work(
        self,
        state: RequestState,
        num_new: int,
        new_blocks: list[int],
        step_id: int,
        work: list[SlotWork],
        request_of_slot: dict[int, RequestState],
    ) -> None:
        """Enter a running request into the step: its tokens count as computed from here on."""
        end = state.num_computed + num_new
        sample = end == len(state.token_ids) + state.num_pending
        work.append(SlotWork(state.slot, state.num_computed, num_new, new_blocks, sample))
        request_of_slot[state.slot] = state
        state.num_computed = end
        state.last_step = step_id
        if sample:
            state.num_pending += 1
        self._commit_blocks(state)

    def _make_room(self, num_blocks: int, wanting: RequestState) -> bool:
        """Preempt from the last in order until `num_blocks` are free. False when they come only after a step in
        flight, or when `wanting` itself had to go."""
        num_coming = sum(len(release.block_ids) for release in self._releases)
        while self.pool.num_free < num_blocks:
            if self.pool.num_free + num_coming >= num_blocks and num_coming:
                return False
            victim = self._running[-1]  # ordered by key, so nobody who is in this step already
            num_free = self.pool.num_free
            num_held = len(victim.block_ids)
            self._preempt(victim)
            if victim is wanting:
                return False
            if self.pool.num_free == num_free:
                num_coming += num_held
        return True

    def _preempt(self, state: RequestState) -> None:
        """Take slot and blocks back; the request queues again, in its old place, with its ids as its prompt."""
        self.counters.num_preemptions += 1
        self._running.remove(state)
        self._release(state)
        state.status = RequestStatus.WAITING
        state.num_computed = 0
        state.num_committed = 0
        state.external_ready = False
        self._waiting.push(state)

    def _schedule_waiting(
        self,
        step_id: int,
        budget: StepBudget,
        work: list[SlotWork],
        assigned: list[SlotAssignment],
        request_of_slot: dict[int, RequestState],
    ) -> None:
        """Admit waiting requests while there are slots, blocks and budget."""
        while budget.num_tokens > 0 and budget.num_prompt_tokens > 0 and self._free_slots:
            state = self._waiting.peek()
            if state is None or self._is_in_flight(state.last_step):
                return  # nothing, or preempted with results on the way: they come first
            num_new = self._admit(state, budget)
            if num_new is None:
                return
            if num_new == 0:
                continue  # it waits for KV from outside
            self._waiting.pop()
            state.status = RequestStatus.RUNNING
            state.slot = heapq.heappop(self._free_slots)
            bisect.insort(self._running, state, key=_key)
            assigned.append(
                SlotAssignment(
                    state.slot,
                    state.request_id,
                    list(state.token_ids),
                    state.num_prompt,
                    state.request.sampling,
                    state.request.pooling,
                    state.request.adapter,
                )
            )
            self._put_to_work(state, num_new, list(state.block_ids), step_id, work, request_of_slot)
            budget.num_tokens -= num_new
            budget.num_prompt_tokens -= num_new

    def _admit(self, state: RequestState, budget: StepBudget) -> int | None:
        """Find the cached prefix of a waiting request and hold blocks for all its tokens.

        Returns how many tokens it computes now, 0 when it left the queue to load KV from outside, None when there
        is no room.
        """
        num_tokens = len(state.token_ids)
        if state.external_ready:  # blocks were allocated before the loading
            return self._first_chunk(num_tokens - state.num_computed, budget)
        hits: list[int] = []
        num_external, asynchronous = 0, False
        if not state.wants_prompt_logprobs:
            hits = self.pool.find(state.extend_hashes(num_tokens - 1))
            num_local = len(hits) * self.config.block_size
            num_external, asynchronous = self._connector.num_matched_tokens(state.request, num_local)
            # The last token is always computed here: its logits choose the next one.
            num_external = min(num_external, num_tokens - 1 - num_local)
        else:
            state.prompt_logprobs = [None]
        num_known = len(hits) * self.config.block_size + num_external
        num_new = self._first_chunk(num_tokens - num_known, budget)
        num_missing = -(-num_tokens // self.config.block_size) - len(hits)
        if num_new is None or self.pool.num_free - self.pool.num_free_among(hits) < num_missing:
            return None
        self.pool.hold(hits)
        state.block_ids = hits + self.pool.allocate(num_missing)
        state.num_computed = num_known
        state.num_committed = len(hits)
        if not state.was_admitted:
            state.was_admitted = True
            state.num_cached_tokens = num_known
            self.counters.prompt_tokens += state.num_prompt
            if not state.wants_prompt_logprobs:
                self.counters.prefix_cache_queries += num_tokens
                self.counters.prefix_cache_hits += num_known
        if num_external:
            self._connector.update_after_allocation(state.request, list(state.block_ids), num_external)
            if asynchronous:
                self._waiting.pop()
                state.status = RequestStatus.WAITING_FOR_KV
                self._loading[state.request_id] = state
                return 0
        return num_new

    def _first_chunk(self, num_new: int, budget: StepBudget) -> int | None:
        """Tokens of a prompt's first piece; None when it must go whole and does not fit in this step."""
        if not self.config.enable_chunked_prefill:
            return num_new if num_new <= budget.num_tokens else None
        longest = self.config.long_prefill_token_threshold or num_new
        return min(num_new, budget.num_tokens, budget.num_prompt_tokens, longest)

    def _poll_connector(self) -> None:
        for request_id in self._connector.finished_loading():
            state = self._loading.pop(request_id, None)
            if state is not None:
                state.status = RequestStatus.WAITING
                state.external_ready = True
                self._waiting.push(state)
            elif (release := self._abandoned.pop(request_id, None)) is not None:
                self._apply_when_done(release)
        for request_id in self._connector.finished_sending():
            if (release := self._sending.pop(request_id, None)) is not None:
                self._apply_when_done(release)

    def _commit_blocks(self, state: RequestState) -> None:
        """Make findable the blocks that are full of known ids and computed, or being computed by a step in flight."""
        size = state.block_size
        num_full = min(state.num_computed, len(state.token_ids)) // size
        if num_full <= state.num_committed:
            return
        hashes = state.extend_hashes(num_full * size)
        for index in range(state.num_committed, num_full):
            self.pool.commit(state.block_ids[index], hashes[index])
        state.num_committed = num_full

    # --- update ----------------------------------------------------------------------------------------------

    def update(self, result: BatchResult) -> list[TokenDelta]:
        """Take in the result of the oldest step in flight: append tokens, end what has ended, give back blocks."""
        step = self._in_flight.popleft()
        assert step.step_id == result.step_id, f"result of step {result.step_id}, waiting for {step.step_id}"
        deltas = []
        for slot_result in result.results:
            state = step.request_of_slot[slot_result.slot]
            if slot_result.slot in step.sampled_slots:
                state.num_pending -= 1
            delta = self._take_result(state, slot_result)
            if delta is not None:
                deltas.append(delta)
        self._return_blocks(step.step_id)
        return deltas

    def _take_result(self, state: RequestState, result: SlotResult) -> TokenDelta | None:
        if state.finished:
            return None  # it was stopped or aborted while this step ran
        if result.error is not None:
            self._finish(state, FinishReason.ERROR)
            return TokenDelta(state.request_id, finish_reason=FinishReason.ERROR, error=result.error)
        if result.prompt_logprobs and state.wants_prompt_logprobs:
            assert state.prompt_logprobs is not None
            state.prompt_logprobs += result.prompt_logprobs
        if result.pooled is not None:
            self._finish(state, FinishReason.STOP)
            return TokenDelta(
                state.request_id,
                finish_reason=FinishReason.STOP,
                num_cached_tokens=state.num_cached_tokens,
                pooled=result.pooled,
            )
        if not result.token_ids:
            return None
        delta = TokenDelta(state.request_id, logprobs=result.logprobs)
        if state.wants_prompt_logprobs:
            delta.prompt_logprobs = state.prompt_logprobs
            state.prompt_logprobs_sent = True
        if len(state.token_ids) == state.num_prompt:
            delta.num_cached_tokens = state.num_cached_tokens
        delta.token_ids = taken = []
        for token_id in result.token_ids:
            taken.append(token_id)
            reason, stop_id = state.append(token_id)
            if reason is not None:
                delta.finish_reason, delta.stop_reason = reason, stop_id
                break
        self.counters.generation_tokens += len(taken)
        if delta.logprobs is not None:
            delta.logprobs = delta.logprobs[: len(taken)]
        if state.status is RequestStatus.RUNNING:
            self._commit_blocks(state)
        if delta.finish_reason is not None:
            self._finish(state, delta.finish_reason)
        return delta

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        state.finish_reason = reason
        keep: dict[str, _Release] | None = None
        if state.status is RequestStatus.WAITING_FOR_KV:
            del self._loading[state.request_id]
            keep = self._abandoned
        elif state.block_ids and self._connector.delay_free(state.request_id, list(state.block_ids)):
            keep = self._sending
        if keep is not None:
            keep[state.request_id] = _Release(state.last_step, -1, state.block_ids)
            state.block_ids = []
        if state.status is RequestStatus.RUNNING:
            self._running.remove(state)
        elif state.status is RequestStatus.WAITING:
            self._waiting.forget(state)
        state.status = RequestStatus.FINISHED
        del self._requests[state.request_id]
        self._release(state)

    def _release(self, state: RequestState) -> None:
        """Give slot and blocks back: now, or when the last step that names them is done."""
        release = _Release(state.last_step, state.slot, state.block_ids)
        state.slot, state.block_ids = -1, []
        self._apply_when_done(release)

    def _apply_when_done(self, release: _Release) -> None:
        if self._is_in_flight(release.after_step):
            self._releases.append(release)
        else:
            self._apply(release)

    def _is_in_flight(self, step_id: int) -> bool:
        return bool(self._in_flight) and self._in_flight[0].step_id <= step_id

    def _apply(self, release: _Release) -> None:
        if release.slot >= 0:
            heapq.heappush(self._free_slots, release.slot)
            self._released_slots.append(release.slot)
        self.pool.release(release.block_ids)

    def _return_blocks(self, done_step: int) -> None:
        if self._releases:
            kept = deque(release for release in self._releases if release.after_step > done_step)
            due = [release for release in self._releases if release.after_step <= done_step]
            self._releases = kept
            for release in due:
                self._apply(release)
