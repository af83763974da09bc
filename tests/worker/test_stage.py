"""When the first stage waits for tokens, by what it asks of a communicator that always has them."""

from __future__ import annotations

import numpy as np
import torch

from shoal.distributed.communicator import DeviceCommunicator, Transfer
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import ParallelGroups
from shoal.distributed.status import GROUPS, StatusRecord
from shoal.worker.clock import STATES, StageClock
from shoal.worker.stage import PipelineStage

CPU = torch.device("cpu")
NUM_STAGES = 3


class LastStage(DeviceCommunicator):
    """The n-th tensor received holds n, n + 1000, n + 2000 …; what is sent is kept. Stages do nothing else together."""

    kind = "scripted"
    all_reduce = all_gather = reduce_scatter = broadcast = gather = barrier = close = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(0, [f"stage {index}" for index in range(NUM_STAGES)], CPU, 1.0)
        self.num_received = 0
        self.sent: list[torch.Tensor] = []
        self.num_waited = 0

    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        assert source == NUM_STAGES - 1 and x.dtype == torch.int32
        x.copy_(torch.arange(x.shape[0]) * 1000 + self.num_received)
        self.num_received += 1
        return x

    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        assert destination == 1
        self.sent.append(x)

        def finish() -> None:
            self.num_waited += 1

        return Transfer(finish)


def first_stage() -> tuple[PipelineStage, LastStage, StageClock]:
    dims = ParallelDims(pipeline_size=NUM_STAGES)
    communicator = LastStage()
    groups = {name: GroupCoordinator([0], 0, name=name) for name in GROUPS}
    groups["pipeline"] = GroupCoordinator(range(NUM_STAGES), 0, communicator, name="pipeline")
    status = StatusRecord(dims)
    clock = StageClock(CPU, status)
    stage = PipelineStage(
        ParallelGroups(dims, groups, status),
        hidden_size=4,
        dtype=torch.float32,
        device=CPU,
        max_num_seqs=8,
        clock=clock,
    )
    return stage, communicator, clock


class Stored:
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def __call__(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        assert slots.dtype == token_ids.dtype == torch.int64
        self.tokens |= dict(zip(slots.tolist(), token_ids.tolist(), strict=True))


def test_tokens_are_taken_when_a_step_reads_them_and_in_order() -> None:
    stage, last, _ = first_stage()
    stored = Stored()
    for step, slots in enumerate(([0, 1], [2], [], [3])):
        stage.fetch_tokens(np.array([], np.int64), stored)
        stage.expect_tokens(step, np.array(slots, np.int64))
    assert last.num_received == 0
    stage.fetch_tokens(np.array([1]), stored)
    assert stored.tokens == {0: 0, 1: 1000}
    stage.fetch_tokens(np.array([0, 1]), stored)
    assert last.num_received == 1
    stage.fetch_tokens(np.array([3]), stored)
    assert stored.tokens == {0: 0, 1: 1000, 2: 1, 3: 2}, "those of the steps between came first"


def test_tokens_that_nobody_reads_do_not_pile_up() -> None:
    stage, last, _ = first_stage()
    stored = Stored()
    for step in range(50):
        stage.fetch_tokens(np.array([], np.int64), stored)
        assert last.num_received == max(0, step - NUM_STAGES), "no later than that, and no earlier"
        stage.expect_tokens(step, np.array([step % 8]))
    stage.settle(stored)
    assert last.num_received == 50 and stored.tokens[49 % 8] == 49


def test_hidden_states_are_held_while_they_may_be_on_their_way() -> None:
    stage, last, _ = first_stage()
    for step in range(20):
        stage.send(torch.full((2, 4), float(step)))
        assert last.num_waited == max(0, step - NUM_STAGES)
    assert [x[0, 0].item() for x in last.sent] == list(range(20))
    stage.settle(Stored())
    assert last.num_waited == 20


def test_time_is_told_apart() -> None:
    _, _, clock = first_stage()
    assert clock.seconds() == {**dict.fromkeys(STATES, 0.0), "num_steps": 0}
    for _ in range(3):
        clock.begin_step()
        for state in ("busy", "tokens", "busy", "hidden", "busy", "messages"):
            clock.enter(state)
    seconds = clock.seconds()
    assert seconds["num_steps"] == 3 and all(seconds[state] > 0 for state in STATES)
