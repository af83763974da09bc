"""Which layer a rank of several says that it is in, from a real model's forward pass."""

from __future__ import annotations

from typing import Any

from shoal.config.resolve import make_engine_config
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import ParallelGroups
from shoal.distributed.status import GROUPS, StatusBoard
from shoal.kv_transfer.hooks import LayerHooks
from shoal.messages import ScheduledBatch, SlotAssignment, SlotWork
from shoal.types.sampling_params import SamplingParams
from shoal.worker.layer_status import LayerStatus
from shoal.worker.worker import Worker
from tests.rank_threads import on_ranks


def test_the_record_says_which_layer_of_the_step_a_rank_is_in():
    board = StatusBoard.create(1)
    status = board.record(ParallelDims(), 0)
    groups = {name: GroupCoordinator([0], 0, name=name) for name in GROUPS}
    groups["world"] = on_ranks(2, lambda group: group)[0]
    worker = Worker(
        make_engine_config(model="shoal-tiny", device="cpu", max_model_len=64),
        ParallelGroups(ParallelDims(), groups, status, board),
    )
    worker.allocate(worker.load(lambda progress: None)[0], lambda progress: None)
    said: list[tuple[int, str, int]] = []

    def note(*_: Any) -> None:
        (record,) = board.read()
        said.append((record.step, record.phase, record.layer))

    layers = worker.runner.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(note)
    assignment = SlotAssignment(0, "a", [1, 2, 3], 3, SamplingParams(temperature=0.0, max_tokens=4))
    worker.execute(ScheduledBatch(7, 0, [], [assignment], [SlotWork(0, 0, 3, [1], True)]))
    note()
    assert said == [(7, "forward", index) for index in [*range(len(layers)), -1]]
    worker.sample(7)
    assert board.read()[0].layer == -1


def test_hooks_of_a_connector_are_called_as_well():
    called: list[tuple[str, int]] = []

    class Spy(LayerHooks):
        def before_layer(self, layer_index: int, *_: Any) -> None:
            called.append(("before", layer_index))

        def after_layer(self, layer_index: int, *_: Any) -> None:
            called.append(("after", layer_index))

    board = StatusBoard.create(1)
    hooks: Any = LayerStatus(board.record(ParallelDims(), 0), Spy())
    hooks.before_layer(3, None, None)
    hooks.after_layer(3, None, None)
    assert called == [("before", 3), ("after", 3)] and board.read()[0].layer == 3
