"""What a core has to do, counted from outside: whatever comes in whatever order, the counts stay right."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.workload import Workload
from shoal.messages import TokenDelta
from shoal.types import EngineRequest, FinishReason, SamplingParams


def request(request_id: str, num_prompt: int = 3, max_tokens: int = 5, num_emitted: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), emitted_token_ids=[2] * num_emitted
    )


@dataclasses.dataclass
class Known:
    """A request as the test sees it."""

    num_prompt: int
    num_to_come: int
    emitted: bool = False


def check(workload: Workload, known: dict[str, Known]) -> None:
    """Everything that is counted, counted anew."""
    waiting = [one for one in known.values() if not one.emitted]
    assert len(workload) == len(known) and all(id in workload for id in known)
    assert workload.num_waiting == len(waiting)
    cost, num_to_come = workload.cost
    assert num_to_come == sum(one.num_to_come for one in known.values())
    assert cost == sum(1024 + one.num_prompt for one in waiting) + 256 * (len(known) - len(waiting))


IDS = st.sampled_from("abcde")
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), IDS, st.integers(1, 5000), st.integers(1, 100), st.integers(0, 3)),
    st.tuples(st.just("tokens"), IDS, st.integers(0, 4), st.sampled_from([None, *FinishReason])),
    st.tuples(st.just("drop"), IDS),
    st.tuples(st.just("all")),
)


@given(st.lists(OPERATIONS, max_size=60))
def test_the_counts_are_those_of_the_requests_that_are_here(operations: list[tuple]) -> None:
    workload, known = Workload(), dict[str, Known]()
    for operation in operations:
        match operation:
            case ("add", id, num_prompt, max_tokens, num_emitted) if id not in known:
                workload.add(request(id, num_prompt, max_tokens, num_emitted))
                known[id] = Known(num_prompt + num_emitted, max(max_tokens - num_emitted, 0))
            case ("tokens", id, num_tokens, finish_reason):
                taken = workload.take(TokenDelta(id, [7] * num_tokens, finish_reason=finish_reason))
                assert taken == (id in known)
                if finish_reason is not None:
                    known.pop(id, None)
                elif id in known:
                    known[id].num_to_come = max(known[id].num_to_come - num_tokens, 0)
                    known[id].emitted |= num_tokens > 0
            case ("drop", id):
                workload.drop(id)
                known.pop(id, None)
            case ("all",):
                assert set(workload.drop_all()) == set(known)
                known.clear()
        check(workload, known)


def test_what_waits_weighs_more_than_what_runs_and_long_prompts_more_than_short_ones() -> None:
    def cost(*requests: EngineRequest, running: int = 0) -> tuple[int, int]:
        workload = Workload()
        for one in requests:
            workload.add(one)
        for index in range(running):
            workload.add(request(f"running {index}", 4000))
            workload.take(TokenDelta(f"running {index}", [1]))
        return workload.cost

    assert cost() < cost(running=1) < cost(request("short")) < cost(request("long", 2000))
    assert cost(running=3) < cost(request("short"))
    assert cost(request("a", max_tokens=10)) < cost(request("a", max_tokens=11)), "nothing else tells them apart"
