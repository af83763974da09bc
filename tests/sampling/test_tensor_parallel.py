"""Ranks that hold slices of the vocabulary sample what one rank does: the same tokens on all, step after step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.distributed.group import GroupCoordinator
from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.logprobs import to_host
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from shoal.types.outputs import TokenLogprobs
from tests.rank_threads import on_ranks
from tests.sampling.helpers import CPU

NUM_STEPS = 3
END = [3, 70, 200, 299]
# Every feature alone, then mixtures.
FEATURES: list[dict] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"min_p": 0.1},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    {"top_k": 20, "frequency_penalty": 2.0, "repetition_penalty": 0.8},
    {"temperature": 0.0, "logit_bias": {0: -100.0, 70: 3.0, 150: -2.0, 299: 100.0}},
    {"logit_bias": {64: 5.0, 128: 5.0}},
    {"allowed_token_ids": [1, 65, 129, 257]},
    {"temperature": 0.0, "allowed_token_ids": [298, 299]},
    {"bad_words_token_ids": [5, 100, 280]},
    {"temperature": 0.0, "min_tokens": 2, "max_tokens": 50, "eos_token_ids": END},
    {"top_p": 0.9, "min_tokens": 1, "max_tokens": 50, "stop_token_ids": END},
    {"temperature": 0.0, "logprobs": 3},
    {"logprobs": 0, "temperature": 0.7},
    {"logprobs": -1, "top_k": 3, "presence_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 5, "repetition_penalty": 1.2, "logit_bias": {7: 1.0}},
]
Outcome = list[tuple[list[int], list[TokenLogprobs | None] | None]]


@dataclasses.dataclass
class Case:
    """logits fp32 [steps, R, V]; mask: for a grammar, as `Sampler.sample` takes it."""

    batch: list[SamplingParams]
    logits: torch.Tensor
    mask: torch.Tensor | None = None

    def run(self, group: GroupCoordinator) -> Outcome:
        """What one rank of the group finds, over several steps."""
        num_rows, vocab_size = self.logits.shape[1:]
        state, sampler = SamplingState(num_rows, vocab_size, CPU, group), Sampler()
        vocabulary = VocabularySlice(vocab_size, group)
        for slot, params in enumerate(self.batch):
            state.assign(slot, params, [1, 66, 130, 66, 299 % vocab_size], 3)
        outcome: Outcome = []
        for step, logits in enumerate(self.logits):
            own = torch.full((num_rows, vocabulary.width), float("-inf"))
            own[:, : vocabulary.num_tokens] = logits[:, vocabulary.tokens]
            metadata = state.prepare(list(range(num_rows)), [5 + step] * num_rows)
            sampled = sampler.sample(own, metadata, self.mask)
            state.commit(metadata, sampled.token_ids)
            outcome.append((sampled.token_ids.tolist(), sampled.logprobs and to_host(sampled.logprobs)))
        return outcome


def random_logits(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Rounded, so that some tokens of a row are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(NUM_STEPS, num_rows, vocab_size, generator=generator) * 8).round() / 2


def assert_same_on(sizes: tuple[int, ...], case: Case) -> None:
    (expected,) = on_ranks(1, case.run)
    for size in sizes:
        for rank, found in enumerate(on_ranks(size, case.run)):
            assert found == expected, f"rank {rank} of {size}"


@pytest.mark.parametrize("vocab_size", [300, 512, 1003])
def test_every_feature_and_all_together(vocab_size: int) -> None:
    batch = [SamplingParams(seed=i, **changes) for i, changes in enumerate(FEATURES * 2)]
    assert_same_on((2, 3, 8), Case(batch, random_logits(len(batch), vocab_size, vocab_size)))


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(FEATURES), min_size=1, max_size=5),
    st.integers(300, 700),
    st.integers(0, 2**32),
    st.sampled_from([2, 4]),
)
def test_any_batch(features: list[dict], vocab_size: int, seed: int, size: int) -> None:
    batch = [SamplingParams(seed=seed + i, **changes) for i, changes in enumerate(features)]
    assert_same_on((size,), Case(batch, random_logits(len(batch), vocab_size, seed)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("vocab_size", [300, 352])
def test_grammar_masks(packed: bool, vocab_size: int) -> None:
    batch = [
        SamplingParams(seed=i, **changes) for i, changes in enumerate([{}, {"temperature": 0.0}, {"top_k": 4}] * 3)
    ]
    allowed = np.random.default_rng(1).random((len(batch), vocab_size)) < 0.05
    allowed[3] = True
    mask = torch.from_numpy(allowed)
    if packed:
        bits = np.zeros((len(batch), -(-vocab_size // 32) * 32), np.uint8)
        bits[:, :vocab_size] = allowed
        mask = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    case = Case(batch, random_logits(len(batch), vocab_size, 5), mask)
    for token_ids, _ in on_ranks(1, case.run)[0]:
        assert all(allowed[row, token_id] for row, token_id in enumerate(token_ids))
    assert_same_on((2, 4), case)


def test_ties_go_to_the_lowest_id_wherever_it_is() -> None:
    logits = torch.zeros(1, 3, 512)
    logits[0, 0, [70, 300, 500]] = 5.0
    logits[0, 1, [300, 500]] = 5.0
    batch = [SamplingParams(temperature=0)] * 3
    for size in (1, 2, 4, 8):
        for found in on_ranks(size, Case(batch, logits).run):
            assert found == [([70, 300, 0], None)]


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_rows_of_a_broken_model_disturb_no_other(changes: dict) -> None:
    """Rows without any finite logit, or with NaN, get some valid id, the same on all ranks."""
    logits = random_logits(4, 300, 9)
    logits[:, 1] = float("-inf")
    logits[:, 2, 200] = float("nan")
    case = Case([SamplingParams(seed=i, **changes) for i in range(4)], logits)
    (expected,) = on_ranks(1, case.run)
    for size in (2, 4):
        ranks = on_ranks(size, case.run)
        assert all(rank == ranks[0] for rank in ranks)
        for (found, _), (wanted, _) in zip(ranks[0], expected, strict=True):
            assert (found[0], found[3]) == (wanted[0], wanted[3]) and all(0 <= each < 300 for each in found)


def test_only_rows_that_need_all_logits_gather_them() -> None:
    """Greedy rows and plain draws exchange a few numbers, with penalties and masks as well."""
    vocab_size, width = 4096, 2048
    plain: list[dict] = [{"temperature": 0.0}, {}, {"min_p": 0.1}, FEATURES[7], FEATURES[8], FEATURES[12], FEATURES[15]]
    whole: list[dict] = [{"top_k": 5}, {"temperature": 0.0, "logprobs": 1}]

    def exchanged(features: list[dict]) -> list[int]:
        batch = [SamplingParams(seed=i, **changes) for i, changes in enumerate(features)]
        case = Case(batch, random_logits(len(batch), vocab_size, 1)[:1])

        def work(group: GroupCoordinator) -> list[int]:
            case.run(group)
            return sorted(num_bytes for _, num_bytes in group.communicator.calls)  # type: ignore[union-attr]

        first, second = on_ranks(2, work)
        assert first == second
        return first

    assert exchanged(plain[:1] * 7) == [7 * 8]
    assert exchanged(plain) == sorted([4 * 4, 7 * 8])
    assert exchanged(plain + whole) == sorted([4 * 4, 9 * 8, 4 * width, 4 * width])
