"""Pacing: which running requests may enter a step, and how many prompt tokens, so that no pipeline stage idles.

Called by the scheduler. With one stage everybody may, with all the step's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.scheduling.request_state import RequestState

# Steps, for each stage, that share the prompts that wait: the last stage idles while the first has the first piece, the
# first while the last has the last, and steps of one length leave no gaps. With more, a prompt waits for more decodes.
_PIECES_PER_STAGE = 2
# But no piece is shorter than this part of a full step just to be even: each step reads all weights.
_SMALLEST_PIECE = 32


@dataclasses.dataclass(slots=True)
class StepBudget:
    """What a step may still take: tokens in all, and among them tokens of prompts."""

    num_tokens: int
    num_prompt_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pacing:
    """Spreads requests over the steps in flight: one for each stage, and one that waits before the first.

    A token that step L samples has reached the first stage when step L + num_stages begins there. A request may enter
    earlier only when the host knows its newest token. A stage runs its steps in order, so everything else is as with
    one stage: a chunk may follow in the next step, and a prefix hit may name blocks that a step in flight fills.
    """

    num_stages: int
    before_known: bool  # whether a request may enter a step before the host knows its newest token

    def ready(self, running: Sequence[RequestState], step_id: int) -> tuple[list[RequestState], int]:
        """Those of `running` that may enter this step, in their order, and how many prompt tokens they still miss.

        Of those that decode, this step's part of all: any `num_stages` steps in a row take each request once. When
        more are ready (others have ended, or came in together) those go first that have waited longest.
        """
        if self.num_stages == 1:
            return list(running), 0
        ready: list[RequestState] = []
        decodes: list[RequestState] = []
        num_decoding = num_prompt_tokens = 0
        latest = step_id - self.num_stages
        for state in running:
            num_total = len(state.token_ids) + state.num_pending
            num_new = num_total - state.num_computed
            if num_new > 1:
                num_prompt_tokens += num_new
                ready.append(state)
            elif num_total < state.max_total:
                num_decoding += 1
                if not state.num_pending or (self.before_known and state.last_step <= latest):
                    decodes.append(state)
                    ready.append(state)
        num_left_out = len(decodes) - self._part(num_decoding, step_id)
        if num_left_out > 0:
            decodes.sort(key=_last_step)
            left_out = set(decodes[-num_left_out:])
            ready = [state for state in ready if state not in left_out]
        return ready, num_prompt_tokens

    def early(self, running: Sequence[RequestState], step_id: int) -> list[RequestState]:
        """Who may enter a step that would be empty: those whose token, still on its way, comes first.

        The first stage then waits for the token on the device, where otherwise it would wait for the host to learn it
        and to send a step: with fewer requests than stages this takes the host out of every token's way. A prompt that
        arrives meanwhile goes behind the step that waits, for one token's time at most and once: therefore no more
        than one token of a request may be on its way. Nobody enters here while the step has something else to do.
        """
        if self.num_stages == 1 or not self.before_known:
            return []
        coming = [state for state in running if state.num_pending == 1 and len(state.token_ids) + 1 < state.max_total]
        if not coming:
            return []
        first_step = min(map(_last_step, coming))
        first = [state for state in coming if state.last_step == first_step]
        return first[: self._part(len(coming), step_id)]

    @property
    def num_pieces(self) -> int:
        """Steps in a row that share the prompts that wait."""
        return _PIECES_PER_STAGE * self.num_stages if self.num_stages > 1 else 1

    def prompt_share(self, budget: int, num_tokens: int) -> int:
        """Prompt tokens for a step of `budget`. num_tokens: those that wait, and those of the num_pieces - 1 steps
        before."""
        if self.num_stages == 1:
            return budget
        return min(budget, max(-(-num_tokens // self.num_pieces), budget // _SMALLEST_PIECE, 1))

    def _part(self, count: int, step_id: int) -> int:
        """A step's part of `count`, at least 1: the parts of any num_stages steps in a row make up `count`."""
        return max(1, (step_id + 1) * count // self.num_stages - step_id * count // self.num_stages)


def _last_step(state: RequestState) -> int:
    return state.last_step
