"""InputBatch against a plain computation of what a step must contain."""

from __future__ import annotations

import torch

from shoal.messages import ScheduledBatch, SlotAssignment, SlotWork
from shoal.scheduling import Scheduler, SchedulerConfig
from shoal.types import EngineRequest, SamplingParams
from shoal.worker.input_batch import InputBatch, longest_first

BLOCK = 4


def make_batch(work: list[SlotWork], step_id: int = 0) -> ScheduledBatch:
    return ScheduledBatch(step_id, 0, [], [], work)


def assign(batch: InputBatch, slot: int, token_ids: list[int]) -> None:
    batch.assign(SlotAssignment(slot, f"r{slot}", token_ids, len(token_ids), SamplingParams()))


def test_prefill_chunks_and_decodes_in_one_step() -> None:
    batch = InputBatch(4, 64, BLOCK, torch.device("cpu"))
    assign(batch, 2, [10, 11, 12, 13, 14, 15])
    assign(batch, 0, [20, 21])
    batch.prepare(make_batch([SlotWork(0, 0, 2, [7], True)]))
    batch.store_sampled(torch.tensor([0]), torch.tensor([99]))
    inputs = batch.prepare(make_batch([SlotWork(2, 0, 5, [3, 9], False), SlotWork(0, 2, 1, [], True)]))
    assert batch.token_ids(inputs).tolist() == [10, 11, 12, 13, 14, 99]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 2]
    assert inputs.slot_mapping.tolist() == [12, 13, 14, 15, 36, 30]
    assert inputs.block_tables.tolist() == [[3, 9], [7, 0]]
    assert (inputs.seq_lens, inputs.query_lens) == ([5, 3], [5, 1])
    assert inputs.sample_rows.tolist() == [1] and inputs.last_tokens.tolist() == [5]


def test_pure_decode_reads_the_device() -> None:
    batch = InputBatch(3, 64, BLOCK, torch.device("cpu"))
    for slot in range(3):
        assign(batch, slot, [slot])
    batch.prepare(make_batch([SlotWork(slot, 0, 1, [slot + 1], True) for slot in range(3)]))
    batch.store_sampled(torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    inputs = batch.prepare(make_batch([SlotWork(2, 1, 1, [], True), SlotWork(0, 1, 1, [], True)]))
    assert batch.token_ids(inputs).tolist() == [7, 5]
    assert inputs.last_tokens.tolist() == [0, 1]


def test_a_slot_that_is_assigned_again_forgets_its_blocks() -> None:
    batch = InputBatch(1, 64, BLOCK, torch.device("cpu"))
    assign(batch, 0, [1, 2, 3])
    batch.prepare(make_batch([SlotWork(0, 0, 3, [5], True)]))
    batch.release(0)
    assign(batch, 0, [4, 5])
    inputs = batch.prepare(make_batch([SlotWork(0, 0, 2, [6], True)]))
    assert inputs.slot_mapping.tolist() == [24, 25]
    assert batch.token_ids(inputs).tolist() == [4, 5]


def test_the_layout_of_a_step_survives_the_next_one() -> None:
    batch = InputBatch(1, 64, BLOCK, torch.device("cpu"))
    assign(batch, 0, [1, 2, 3, 4, 5])
    first = batch.prepare(make_batch([SlotWork(0, 0, 4, [5], False)]))
    batch.prepare(make_batch([SlotWork(0, 4, 1, [6], True)]))
    assert first.block_tables.tolist() == [[5]]
    assert first.slot_mapping.tolist() == [20, 21, 22, 23]


def test_rows_of_long_contexts_come_first_and_all_else_stays() -> None:
    work = [SlotWork(0, 0, 5, [1], False), SlotWork(1, 9, 1, [], True), SlotWork(2, 0, 3, [2], True)]
    work += [SlotWork(3, 30, 1, [], True), SlotWork(4, 9, 2, [], False)]
    batch = ScheduledBatch(7, 3, [5], [], work)
    ordered = longest_first(batch)
    assert [item.slot for item in ordered.work] == [3, 1, 4, 0, 2]
    assert [item.slot for item in batch.work] == [0, 1, 2, 3, 4], "the scheduler's own stays as it is"
    assert (ordered.step_id, ordered.generation, ordered.released_slots) == (7, 3, [5])
    assert sorted(ordered.work, key=lambda item: item.slot) == work


def test_who_writes_a_shared_prefix_stays_before_who_reads_it_in_a_step_for_halves() -> None:
    """The second request finds the first one's blocks in the prefix cache while the same step computes them."""
    config = SchedulerConfig(
        num_blocks=2000, block_size=16, max_model_len=8192, max_num_seqs=8, max_num_batched_tokens=8192
    )
    scheduler = Scheduler(config)
    prefix = [index % 97 + 1 for index in range(3008)]
    for name, count in (("writes", 1200), ("reads", 1300)):
        own = [len(name) + index % 11 for index in range(count)]
        scheduler.add(EngineRequest(name, prefix + own, SamplingParams(max_tokens=8)))
    ordered = longest_first(scheduler.schedule())
    assert [item.num_computed_tokens for item in ordered.work] == [0, 3008]
