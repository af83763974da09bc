"""Choosing tokens by kernel: what the plain path chooses, whatever the programs, the slices and the rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from shoal.distributed.group import GroupCoordinator
from shoal.distributed.vocabulary import VocabularySlice
from shoal.kernels import sampling as kernel
from shoal.kernels.sampling import Shape, choose_tokens
from shoal.sampling import plan as plan_module
from shoal.sampling import sampler as sampler_module
from shoal.sampling.choice import TokenChoice
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from tests.rank_threads import on_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [Shape(1024, 1024, 4), Shape(256, 1536, 1)]
MIXED = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.05), (1.0, 0.5), (0.0, 0.0), (1.0, 1.0), (1.5, 0.01)]


def parameters(rows: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Temperatures, min_ps and random keys."""
    temperatures, min_ps = torch.tensor(rows, dtype=torch.float32, device=DEVICE).unbind(1)
    keys = torch.randint(-(2**31), 2**31, (len(rows),)).to(torch.int32).to(DEVICE)
    return temperatures.contiguous(), min_ps.contiguous(), keys


def chosen_plainly(logits: torch.Tensor, *rows: torch.Tensor) -> list[int]:
    choice = TokenChoice(VocabularySlice(logits.shape[1]), torch.device("cpu"))
    return choice(logits.cpu(), *(row.cpu() for row in rows)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_rows_equal_the_plain_path(shape: Shape, dtype: torch.dtype) -> None:
    for flatness in (0.3, 4.0):
        logits = (torch.randn(len(MIXED), 3001) * flatness).to(dtype).to(DEVICE)
        rows = parameters(MIXED)
        _, found = choose_tokens(logits, *rows, 0, 3001, shape=shape)
        assert found.tolist() == chosen_plainly(logits, *rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_go_to_the_lowest_id_and_nan_is_the_greatest(shape: Shape) -> None:
    logits = torch.zeros(7, 3000, device=DEVICE)
    logits[1, [1300, 1700, 2999]] = 5.0
    logits[2, [2500, 2700]] = math.nan
    logits[2, 100] = math.inf
    logits[3, 0:1024] = -1.0
    logits[4] = -math.inf
    logits[5, [40, 1100]] = math.inf
    logits[6] = -0.0
    logits[6, 2000] = 0.0
    values, found = choose_tokens(logits, *parameters([(0.0, 0.0)] * 7), 0, 3000, shape=shape)
    assert found.tolist() == [0, 1300, 2500, 1024, 0, 40, 0] == logits.argmax(dim=-1).tolist()
    expected = [0.0, 5.0, math.nan, 0.0, -math.inf, math.inf, 0.0]
    assert values.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_broken_rows_that_draw_get_some_valid_id(shape: Shape, min_p: float) -> None:
    logits = torch.randn(5, 2000, device=DEVICE)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, 1500] = math.nan
    logits[3] = -math.inf
    logits[3, 1999] = -1e30
    rows = parameters([(1.0, min_p)] * 5)
    _, found = choose_tokens(logits, *rows, 0, 2000, shape=shape)
    assert all(0 <= token_id < 2000 for token_id in found.tolist())
    assert found.tolist()[3:] == [1999, *chosen_plainly(logits[4:], *(row[4:] for row in rows))]


def test_padding_does_not_count_and_ids_start_at_the_first() -> None:
    logits = torch.randn(4, 1088, device=DEVICE) * 3
    logits[:, 1003:] = 99.0
    rows = parameters([(0.0, 0.0), (1.0, 0.0), (1.0, 0.2), (0.7, 0.0)])
    _, found = choose_tokens(logits, *rows, 64, 1003)
    whole = torch.full((4, 64 + 1003), -math.inf)
    whole[:, 64:] = logits[:, :1003]
    assert found.tolist() == chosen_plainly(whole, *rows)


def test_slices_of_the_vocabulary_agree_on_what_one_rank_chooses() -> None:
    logits = (torch.randn(len(MIXED), 4000, device=DEVICE) * 3).round()
    rows = parameters(MIXED)
    _, expected = choose_tokens(logits, *rows, 0, 4000)
    best = logits.amax(dim=-1)
    values, found = [], []
    for start in (0, 1024, 2048, 3072):
        width = min(1024, 4000 - start)
        own = logits[:, start : start + width]
        value, token_ids = choose_tokens(own, *rows, start, width, best_logits=best)
        values.append(value)
        found.append(token_ids)
    winners = torch.stack(values).argmax(dim=0, keepdim=True)
    assert torch.stack(found).gather(0, winners).squeeze(0).tolist() == expected.tolist()


def test_only_some_rows_are_read_and_written() -> None:
    logits = torch.randn(6, 1500, device=DEVICE)
    numbers = torch.tensor([4, 1, 2], device=DEVICE)
    rows = parameters([(0.0, 0.0), (1.0, 0.0), (1.0, 0.1)])
    outputs = torch.full((6,), 7.0, device=DEVICE), torch.full((6,), -1, device=DEVICE)
    for shape in SHAPES:
        choose_tokens(logits, *rows, 0, 1500, row_numbers=numbers, outputs=outputs, shape=shape)
        assert outputs[1][numbers].tolist() == chosen_plainly(logits[numbers], *rows)
        assert outputs[1][[0, 3, 5]].tolist() == [-1] * 3 and outputs[0][[0, 3, 5]].tolist() == [7.0] * 3


def test_nothing_is_left_for_the_next_launch() -> None:
    logits = torch.randn(3, 2000, device=DEVICE)
    choose_tokens(logits, *parameters([(1.0, 0.0), (0.0, 0.0), (1.0, 0.3)]), 0, 2000, shape=Shape(256, 512, 1))
    counters, hints = kernel._shared(DEVICE, 256)
    assert not counters.any() and (hints == -math.inf).all()


BATCH: list[dict] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_k": 1500},
    {"top_p": 1e-9},
    {"temperature": 0.0, "logprobs": 2, "repetition_penalty": 1.4},
    {"logit_bias": {5: 3.0}, "top_k": 3},
]


def sample(
    group: GroupCoordinator | None, device: torch.device, changes: list[dict], logits: torch.Tensor
) -> list[int]:
    """One rank's tokens of two steps."""
    num_rows, vocab_size = logits.shape
    state, sampler, vocabulary = (
        SamplingState(num_rows, vocab_size, device, group),
        Sampler(),
        VocabularySlice(vocab_size, group),
    )
    for slot, change in enumerate(changes):
        state.assign(slot, SamplingParams(seed=slot, **change), [1, 66, 130], 2)
    found = []
    for position in (3, 4):
        own = torch.full((num_rows, vocabulary.width), 50.0, dtype=logits.dtype)
        own[:, : vocabulary.num_tokens] = logits[:, vocabulary.tokens]
        metadata = state.prepare(list(range(num_rows)), [position] * num_rows)
        sampled = sampler.sample(own.to(device), metadata)
        state.commit(metadata, sampled.token_ids)
        found += sampled.token_ids.tolist()
    return found


def one_at_a_time(find: Callable[..., Callable[..., object]]) -> Callable[..., Callable[..., object]]:
    """Ranks are threads here, and the interpreter runs one kernel at a time."""
    lock = threading.Lock()

    def find_locked(module: str, name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            with lock:
                return find(module, name)(*arguments, **options)

        return call

    return find_locked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(0, 11), slice(0, 2), slice(2, 4), slice(0, 1)])
def test_the_sampler_finds_the_same_with_and_without_kernels(
    rows: slice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = BATCH[rows]
    logits = (torch.randn(len(changes), 2003) * 2).to(dtype)
    expected = sample(None, torch.device("cpu"), changes, logits)
    monkeypatch.setattr(plan_module, "has_kernels", lambda device: True)
    assert sample(None, DEVICE, changes, logits) == expected
    if DEVICE.type == "cpu":
        monkeypatch.setattr(sampler_module, "_kernel", one_at_a_time(sampler_module._kernel))
        for found in on_ranks(2, lambda group: sample(group, DEVICE, changes, logits)):
            assert found == expected


@pytest.mark.parametrize("flatness", [0.0, 0.05, 1.0, 5.0])
def test_top_k_and_top_p_keep_what_the_plain_path_keeps(flatness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In flat rows the list of candidates is too long, in rounded ones many are equal."""
    monkeypatch.setattr("shoal.kernels.truncated._MOST_LISTED", 300)
    changes = [change for change in BATCH if "top_k" in change or "top_p" in change] * 2
    logits = (torch.randn(len(changes), 1100) * flatness).to(torch.bfloat16).float() + 0.0
    expected = sample(None, torch.device("cpu"), changes, logits)
    monkeypatch.setattr(plan_module, "has_kernels", lambda device: True)
    assert sample(None, DEVICE, changes, logits) == expected
