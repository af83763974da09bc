"""SamplingState: slots come and go, counts follow the sampled tokens on the device, memory grows only on demand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from tests.sampling import reference
from tests.sampling.helpers import CPU, Row, new_state, sample_ids

VOCAB_SIZE = 12
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}


def generate(
    state: SamplingState,
    slots: list[int],
    sequences: list[list[int]],
    logits_at: Callable[[int, int], np.ndarray],
    num_steps: int,
) -> None:
    """Append num_steps tokens to each sequence; logits_at(slot, position) stands for the model."""
    sampler = Sampler()
    for _ in range(num_steps):
        positions = [len(sequence) for sequence in sequences]
        lines = [logits_at(slot, position) for slot, position in zip(slots, positions, strict=True)]
        metadata = state.prepare(slots, positions)
        sampled = sampler.sample(torch.from_numpy(np.stack(lines)), metadata)
        state.commit(metadata, sampled.token_ids)
        for sequence, token_id in zip(sequences, sampled.token_ids.tolist(), strict=True):
            sequence.append(token_id)


def model(slot: int, position: int) -> np.ndarray:
    return np.random.default_rng([slot, position]).normal(size=VOCAB_SIZE).astype("f4") * 2


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.sampled_from(
            [
                SamplingParams(temperature=0, **PENALTIES),
                SamplingParams(seed=4, frequency_penalty=2.0),
                SamplingParams(seed=5, repetition_penalty=0.7, top_p=0.8),
                SamplingParams(seed=6),
                SamplingParams(temperature=0),
            ]
        ),
        min_size=1,
        max_size=5,
    )
)
def test_counts_follow_the_sampled_tokens(all_params: list[SamplingParams]) -> None:
    prompts = [[slot % VOCAB_SIZE, 3] for slot in range(len(all_params))]
    rows = [Row(params, prompt, 2) for params, prompt in zip(all_params, prompts, strict=True)]
    sequences = [list(prompt) for prompt in prompts]
    generate(new_state(rows, VOCAB_SIZE), list(range(len(rows))), sequences, model, 12)
    for slot, (params, sequence) in enumerate(zip(all_params, sequences, strict=True)):
        for position in range(2, len(sequence)):
            logits = reference.processed_logits(model(slot, position), params, sequence[:position], 2, position)
            reference.check_token(sequence[position], logits, params, position)


def test_a_resumed_request_goes_on_as_if_undisturbed() -> None:
    params = SamplingParams(seed=8, min_tokens=10, max_tokens=99, eos_token_ids=[0], **PENALTIES)
    undisturbed, resumed = [1, 2], [1, 2]
    state = new_state([Row(params, [1, 2], 2)], VOCAB_SIZE)
    generate(state, [0], [undisturbed], lambda _, position: model(0, position), 20)
    state = SamplingState(4, VOCAB_SIZE, CPU)
    for slot in (0, 3, 1, 1):
        state.assign(slot, params, list(resumed), 2)
        generate(state, [slot], [resumed], lambda _, position: model(0, position), 5)
        state.release(slot)
    assert resumed == undisturbed
    assert 0 not in undisturbed[2:12]


def test_a_slot_leaves_nothing_behind() -> None:
    state = SamplingState(1, VOCAB_SIZE, CPU)
    for params in (
        SamplingParams(seed=1, logit_bias={3: 100.0}, **PENALTIES),
        SamplingParams(temperature=0),
        SamplingParams(seed=2, **PENALTIES),
        SamplingParams(seed=2, allowed_token_ids=[4]),
    ):
        fresh, reused = [5], [5]
        state.assign(0, params, [5], 1)
        generate(state, [0], [reused], model, 8)
        state.release(0)
        generate(new_state([Row(params)], VOCAB_SIZE), [0], [fresh], model, 8)
        assert reused == fresh


def test_only_penalties_take_memory_and_released_rows_are_used_again() -> None:
    state = SamplingState(64, 1000, CPU)
    for slot in range(64):
        state.assign(slot, SamplingParams(seed=slot), [1, 2, 3], 3)
    assert state._counts.output_counts.numel() == 0
    for slot in range(64):
        state.release(slot)
    for _ in range(20):
        for slot in range(3):
            state.assign(slot, SamplingParams(seed=slot, presence_penalty=1.0), [1, 2, 3, 2], 3)
        assert state._counts.output_counts.shape[0] == 4
        for slot in range(3):
            state.release(slot)


def test_counts_survive_growth() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    alone, among = [1], [1]
    generate(new_state([Row(params)], VOCAB_SIZE), [0], [alone], model, 12)
    state = SamplingState(8, VOCAB_SIZE, CPU)
    state.assign(0, params, [1], 1)
    for newcomer in range(1, 7):
        generate(state, [0], [among], model, 2)
        state.assign(newcomer, params, [1, 1, 1], 1)
    assert among == alone


def test_nothing_is_gathered_again_while_the_slots_stay_the_same() -> None:
    state = new_state([Row(SamplingParams(seed=i, top_p=0.9)) for i in range(4)], VOCAB_SIZE)
    first = state.prepare([0, 1, 2, 3], [1, 1, 1, 1])
    second = state.prepare([0, 1, 2, 3], [2, 2, 2, 2])
    assert second.plan is first.plan
    assert first.row_keys is not None and second.row_keys is not None
    assert not torch.equal(first.row_keys, second.row_keys)
    assert state.prepare([1, 0], [2, 2]).plan is not first.plan
    state.release(3)
    state.assign(3, SamplingParams(temperature=0), [1], 1)
    assert state.prepare([0, 1, 2, 3], [3, 3, 3, 1]).plan is not first.plan


def test_a_greedy_step_uploads_nothing() -> None:
    state = new_state([Row(SamplingParams(temperature=0)), Row(SamplingParams(top_k=1, seed=0))], VOCAB_SIZE)
    metadata = state.prepare([0, 1], [1, 1])
    assert metadata.row_keys is None and metadata.suppressed is None and not metadata.plan.draw_groups


def test_several_positions_of_one_slot_in_one_step() -> None:
    params = SamplingParams(seed=3)
    state = new_state([Row(params)], 500)
    logits = torch.zeros(3, 500)
    together = Sampler().sample(logits.clone(), state.prepare([0, 0, 0], [1, 2, 3])).token_ids.tolist()
    assert together == [sample_ids([Row(params, [1] * position)], logits[:1])[0] for position in (1, 2, 3)]


@pytest.mark.parametrize("slots", [[0], [0, 1]])
def test_misuse_is_caught(slots: list[int]) -> None:
    state = SamplingState(2, VOCAB_SIZE, CPU)
    with pytest.raises(AssertionError, match="no request"):
        state.prepare(slots, [1] * len(slots))
    with pytest.raises(AssertionError, match="free already"):
        state.release(0)
    state.assign(0, SamplingParams(temperature=0), [1], 1)
    with pytest.raises(AssertionError, match="taken"):
        state.assign(0, SamplingParams(temperature=0), [1], 1)
    with pytest.raises(AssertionError, match="draws its seed"):
        state.assign(1, SamplingParams(), [1], 1)
