"""RandomSchedule: steps that mix everything a worker may be asked, drawn from a seed, for tests of workers.

Prompts go in chunks, requests decode in any order and enter a step as soon as the one after the step that samples for
them, some are preempted and come back, some end early while steps that name them are in flight; slots and blocks are
given to others as soon as the rules allow it. It needs no tokens but those of preempted requests.
"""

from __future__ import annotations

import dataclasses
import random

from shoal.messages import BatchResult, ScheduledBatch, SlotAssignment, SlotWork
from shoal.types import SamplingParams, TokenLogprobs


@dataclasses.dataclass(eq=False)
class Request:
    """One request. num_computed and num_sampled count what has been scheduled; token_ids what has come back.

    num_outputs: where it ends, as if stopped there; steps may have gone on to sampling.max_tokens by then.
    """

    prompt: list[int]
    sampling: SamplingParams
    num_outputs: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    slot: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    num_given: int = 0
    num_computed: int = 0
    num_sampled: int = 0
    last_step: int = -1
    ended: bool = False

    @property
    def max_outputs(self) -> int:
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens


class RandomSchedule:
    """`next_batch` until it gives none and every result has been taken; then `requests` hold their tokens."""

    def __init__(
        self,
        requests: list[Request],
        *,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        seed: int,
        first_step: int = 0,
        preempt: float = 0.05,
    ) -> None:
        self.requests = requests
        self._random = random.Random(seed)
        self._block_size, self._max_tokens, self._preempt = block_size, max_tokens, preempt
        self._slots = list(range(num_slots))
        self._blocks = list(range(1, num_blocks))
        self._released: list[int] = []
        self._waiting = list(requests)
        self._running: list[Request] = []
        self._next_step = first_step
        self._done_step = first_step - 1
        self._rows: dict[int, dict[int, Request]] = {}
        # (last step that names them, slot, blocks)
        self._leaving: list[tuple[int, int, list[int]]] = []

    @property
    def num_in_flight(self) -> int:
        return len(self._rows)

    def next_batch(self) -> ScheduledBatch | None:
        """None: nothing can run before a result has come, or nothing is left."""
        self._free_what_nobody_names()
        if self._running and self._random.random() < self._preempt:
            self._put_back(self._random.choice(self._running))
        assigned = self._admit()
        work: list[SlotWork] = []
        rows: dict[int, Request] = {}
        budget = self._max_tokens
        chosen = [request for request in self._running if self._random.random() < 0.6]
        self._random.shuffle(chosen)
        for request in chosen + self._running:
            if work and request not in chosen or request in rows.values():
                continue  # the others have a turn only when nobody chosen has anything to do
            item = self._work_of(request, budget)
            if item is not None:
                work.append(item)
                rows[request.slot] = request
                budget -= item.num_new_tokens
        if not work:
            assert not assigned, "whoever is new has a prompt to compute"
            return None
        step_id, self._next_step = self._next_step, self._next_step + 1
        for request in rows.values():
            request.last_step = step_id
        self._rows[step_id] = rows
        released, self._released = self._released, []
        return ScheduledBatch(step_id, 0, released, assigned, work)

    def _admit(self) -> list[SlotAssignment]:
        assigned = []
        for request in list(self._waiting):
            ids = request.prompt + request.token_ids
            needed = -(-(len(request.prompt) + request.max_outputs) // self._block_size)
            if request.last_step > self._done_step or not self._slots or needed > len(self._blocks):
                continue
            self._waiting.remove(request)
            self._running.append(request)
            request.slot = self._slots.pop(self._random.randrange(len(self._slots)))
            request.blocks = [self._blocks.pop(self._random.randrange(len(self._blocks))) for _ in range(needed)]
            request.num_given, request.num_computed, request.num_sampled = len(ids), 0, len(request.token_ids)
            assigned.append(SlotAssignment(request.slot, "", ids, len(request.prompt), request.sampling))
        return assigned

    def _work_of(self, request: Request, budget: int) -> SlotWork | None:
        num_known = len(request.prompt) + request.num_sampled
        num_new = min(num_known - request.num_computed, budget)
        if num_new <= 0 or request.num_sampled >= request.max_outputs:
            return None
        if num_new > 1:
            num_new = self._random.randint(1, num_new)
        start, end = request.num_computed, request.num_computed + num_new
        held, needed = -(-start // self._block_size), -(-end // self._block_size)
        sample = end == num_known
        request.num_computed = end
        request.num_sampled += sample
        return SlotWork(request.slot, start, num_new, request.blocks[held:needed], sample)

    def take(self, result: BatchResult) -> None:
        """The result of the oldest step in flight."""
        self._done_step += 1
        rows = self._rows.pop(self._done_step)
        assert result.step_id == self._done_step
        for entry in result.results:
            request = rows[entry.slot]
            if request.ended:
                continue
            request.prompt_logprobs += entry.prompt_logprobs or []
            request.token_ids += entry.token_ids
            request.logprobs += entry.logprobs or []
            if len(request.token_ids) == request.num_outputs:
                request.ended = True
                if request in self._running:
                    self._leave(request)
                else:
                    self._waiting.remove(request)

    def _put_back(self, request: Request) -> None:
        """Preempt: it may come back when no step in flight names it."""
        if request.sampling.prompt_logprobs is not None:
            return  # its prompt would be reported twice
        self._leave(request)
        self._waiting.append(request)

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self._leaving.append((request.last_step, request.slot, request.blocks))
        request.blocks = []

    def _free_what_nobody_names(self) -> None:
        for entry in [entry for entry in self._leaving if entry[0] <= self._done_step]:
            self._leaving.remove(entry)
            self._released.append(entry[1])
            self._slots.append(entry[1])
            self._blocks += entry[2]
