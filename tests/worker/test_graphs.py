"""Steps laid out for graphs: on a CPU run without capturing them, on a GPU captured, against steps without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.attention.registry import create_attention_backend
from shoal.distributed.group import GroupCoordinator
from shoal.layers.attention import Attention
from shoal.messages import ScheduledBatch, SlotAssignment, SlotWork
from shoal.sampling.choice import TokenChoice
from shoal.types import SamplingParams
from shoal.worker import input_batch
from shoal.worker.graphs import StepGraphs, unpack_rows
from shoal.worker.input_batch import InputBatch, TokenRows
from shoal.worker.model_runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.rank_threads import on_ranks
from tests.worker.test_pipeline import NUM_SLOTS, Alone, make_config, make_requests, serve

CPU = torch.device("cpu")


class Laid(Alone):
    """A worker on a CPU whose decode steps are laid out as for graphs of few sizes, and run anew each time."""

    def __init__(self, config, token_sizes=()) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config)
        runner = self.worker.runner
        backend = create_attention_backend("reference")
        runner.backend = backend
        for module in runner.model.modules():
            if isinstance(module, Attention):
                module.backend = backend
        shape = backend.kv_cache_shape(
            self.facts_blocks, config.block_size, config.model.num_kv_heads, config.model.head_dim
        )
        runner.set_kv_caches([torch.zeros(shape) for _ in runner.model.layer_range])
        runner.batch = InputBatch(
            config.max_num_seqs, config.max_model_len, config.block_size, CPU, keeps_device_table=True
        )
        self.num_laid, self.num_laid_tokens = 0, 0
        runner.graphs = StepGraphs(
            runner.model,
            runner.batch,
            runner.kv_caches,
            backend.prepare,
            TokenChoice(runner.model.vocabulary, CPU),
            sizes=[1, 3, NUM_SLOTS],
            token_sizes=[*token_sizes],
            hidden_size=config.model.hidden_size,
            dtype=torch.float32,
        )
        forward, forward_tokens = runner.graphs.forward, runner.graphs.forward_tokens

        def count(*arguments):  # type: ignore[no-untyped-def]
            self.num_laid += 1
            return forward(*arguments)

        def count_tokens(*arguments):  # type: ignore[no-untyped-def]
            self.num_laid_tokens += 1
            return forward_tokens(*arguments)

        runner.graphs.forward = count  # type: ignore[method-assign]
        runner.graphs.forward_tokens = count_tokens  # type: ignore[method-assign]

    @property
    def facts_blocks(self) -> int:
        return int(self.worker.config.num_blocks_override or 0)


@pytest.mark.parametrize("token_sizes", [(), (4, 20), (8, 32, 64)])
def test_tokens_are_those_of_steps_without(tmp_path: Path, token_sizes: tuple[int, ...]) -> None:
    """Greedy and drawn, with penalties, log-probabilities and masks beside; chunks, preemptions, early ends."""
    path = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=3)
    for seed in range(3):
        config = make_config(path, 1, 1, deterministic=False)
        expected = serve(Alone(config), make_requests(seed), in_flight=1, seed=seed)
        laid = Laid(config, token_sizes)
        requests = serve(laid, make_requests(seed), in_flight=2, seed=seed + 50)
        assert laid.num_laid > 3 and bool(laid.num_laid_tokens) == bool(token_sizes)
        assert [each.token_ids for each in requests] == [each.token_ids for each in expected]


def test_the_last_layer_of_a_graph_has_as_many_rows_as_there_may_be_requests(tmp_path: Path) -> None:
    """Of steps in which nobody samples as well; what pads them is not one token again and again."""
    laid = Laid(
        make_config(make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2), 1, 1, deterministic=False), (4, 20)
    )
    runner, seen = laid.worker.runner, []
    runner.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assigned = [SlotAssignment(0, "a", [*range(5, 17)], 12, SamplingParams(temperature=0.0))]
    runner._change_slots(ScheduledBatch(0, 0, [], assigned, []))
    for step_id, (start, count, blocks) in enumerate([(0, 3, [1]), (3, 8, [2, 3]), (11, 1, [])]):
        batch = ScheduledBatch(step_id, 0, [], [], [SlotWork(0, start, count, blocks, start + count == 12)])
        executed = runner._run_by_graph(batch)
        assert executed is not None and executed.hidden is not None
        assert executed.hidden.shape[0] == (step_id == 2)
        if step_id == 1:
            assert runner.graphs._wanted.tolist() == [*range(NUM_SLOTS)]  # type: ignore[union-attr]
    assert seen == [4, NUM_SLOTS, 1]


def make_outputs(num_rows: int, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    kinds = {"token_ids": torch.int64, "positions": torch.int64, "slots": torch.int64, "slot_mapping": torch.int64}
    kinds |= {"table_rows": torch.int32, "seq_lens": torch.int32, "row_keys": torch.int32}
    kinds |= {"temperatures": torch.float32, "min_ps": torch.float32}
    return {name: torch.full((num_rows,), -7, dtype=dtype, device=device) for name, dtype in kinds.items()}


def test_first_token_after_a_whole_prefix_hit_is_given_by_the_host() -> None:
    batch = InputBatch(4, 64, 4, CPU, keeps_device_table=True)
    batch.assign(SlotAssignment(2, "a", [7, 8, 9, 10, 11], 5, SamplingParams()))
    rows = batch.decode_rows(ScheduledBatch(0, 0, [], [], [SlotWork(2, 4, 1, [5, 6], True)]))
    assert rows is not None and rows.ends.tolist() == [5]
    outputs = make_outputs(1)
    assert batch.device_table is not None
    unpack_rows(torch.from_numpy(rows.packed), batch.last_token, batch.device_table, outputs, 4)
    assert outputs["token_ids"].tolist() == [11] and outputs["slot_mapping"].tolist() == [6 * 4]
    assert batch.device_table[2].tolist()[:3] == [5, 6, 0]
    assert batch.decode_rows(ScheduledBatch(1, 0, [], [], [SlotWork(2, 5, 2, [], True)])) is None
    assert batch.decode_rows(ScheduledBatch(1, 0, [], [], [SlotWork(2, 5, 1, [], False)])) is None


def test_a_long_decode_beside_a_prompt_is_left_to_steps_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph for many tokens nobody splits its context."""
    monkeypatch.setattr(input_batch, "_LONGEST_DECODE", 20)
    batch = InputBatch(4, 64, 4, CPU, keeps_device_table=True)
    for slot, length in ((0, 30), (1, 40)):
        batch.assign(SlotAssignment(slot, f"{slot}", [1] * length, length, SamplingParams()))
    first, second = [*range(1, 9)], [*range(9, 19)]

    def rows_of(start: int, blocks: list[int]) -> TokenRows | None:
        prompt = SlotWork(1, 0, 40, second, True)
        return batch.token_rows(ScheduledBatch(0, 0, [], [], [SlotWork(0, start, 1, blocks, True), prompt]), 64)

    assert rows_of(20, first) is None, "and no block is entered"
    assert rows_of(19, first) is not None


def test_who_has_got_its_prompts_probabilities_decodes_in_graphs(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    laid = Laid(make_config(path, 1, 1, deterministic=False), (32,))
    runner = laid.worker.runner
    wants, other = SamplingParams(temperature=0.0, prompt_logprobs=1), SamplingParams(temperature=0.0)
    assigned = [SlotAssignment(0, "a", [3] * 6, 6, wants), SlotAssignment(1, "b", [4] * 9, 9, other)]
    runner._change_slots(ScheduledBatch(0, 0, [], assigned, []))
    first, second = SlotWork(0, 0, 6, [1, 2], True), SlotWork(1, 0, 9, [3, 4, 5], True)
    assert runner._run_by_graph(ScheduledBatch(1, 0, [], [], [first])) is None
    decode = SlotWork(0, 6, 1, [1, 2], True)
    assert runner._run_by_graph(ScheduledBatch(2, 0, [], [], [decode, second])) is not None
    assert laid.num_laid_tokens == 1


def test_ranks_capture_steps_together_or_not_at_all() -> None:
    """Ranks may hold experts differently, which the checkpoint alone tells."""

    def agree(group: GroupCoordinator, could: tuple[bool, bool], experts: object) -> bool:
        model = SimpleNamespace(experts=experts)
        runner: Any = SimpleNamespace(
            device=CPU, config=SimpleNamespace(model=model), _captures=could[group.rank_in_group]
        )
        ModelRunner.agree_on_graphs(runner, SimpleNamespace(tensor=group))  # type: ignore[arg-type]
        return bool(runner._captures)

    for could, expected in (((True, True), True), ((True, False), False), ((False, False), False)):
        assert on_ranks(2, lambda group, each=could: agree(group, each, "some")) == [expected] * 2  # type: ignore[misc]
    assert on_ranks(2, lambda group: agree(group, (True, True), None)) == [True, True]  # nobody is asked


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "llama", "opt"])
def test_captured_steps_give_the_tokens_of_eager_ones(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path, family, num_hidden_layers=3)
    for seed in range(3):
        options: dict = {"device": "cuda", "deterministic": False}
        eager = Alone(make_config(path, 1, 1, enforce_eager=True, **options))
        assert eager.worker.runner.graphs is None
        expected = serve(eager, make_requests(seed), in_flight=1, seed=seed)
        captured = Alone(make_config(path, 1, 1, **options))
        assert captured.worker.runner.graphs is not None
        requests = serve(captured, make_requests(seed), in_flight=2, seed=seed + 50)
        assert [each.token_ids for each in requests] == [each.token_ids for each in expected]
