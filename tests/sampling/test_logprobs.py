"""Log-probabilities: raw, ranked with ties to the lowest id, cut to each request's own k."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sampling import rows
from shoal.sampling.logprobs import prompt_logprobs, to_host
from shoal.types import SamplingParams
from shoal.types.outputs import TokenLogprobs
from tests.sampling.helpers import Row, sample_rows

VOCAB_SIZE = 30


def expected_logprobs(logits: np.ndarray, token_id: int, k: int) -> TokenLogprobs:
    values = logits.astype(np.float64)
    values = values - values.max()
    values = values - np.log(np.exp(values).sum())
    order = sorted(range(len(values)), key=lambda i: (-logits[i], i))
    ids = [token_id, *(order if k == -1 else order[:k])]
    return TokenLogprobs(token_ids=ids, logprobs=[float(values[i]) for i in ids], rank=order.index(token_id) + 1)


def assert_close(found: TokenLogprobs | None, expected: TokenLogprobs) -> None:
    assert found is not None
    assert found.token_ids == expected.token_ids and found.rank == expected.rank
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


# A coarse grid, so that ties are common.
grid_logits = st.lists(st.integers(-8, 8).map(lambda value: value / 4), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(grid_logits, st.sampled_from([None, 0, 1, 3, 20, -1]), st.sampled_from([0.0, 1.0, 2.0])),
        min_size=1,
        max_size=6,
    )
)
def test_sampled_logprobs_are_raw_and_ranked(lines: list[tuple[list[float], int | None, float]]) -> None:
    logits = np.array([values for values, _, _ in lines], dtype=np.float32)
    batch = [
        # Everything that changes the logits: the log-probabilities must not see it.
        Row(
            SamplingParams(
                logprobs=k,
                temperature=temperature,
                seed=i,
                logit_bias={2: 3.0},
                bad_words_token_ids=[4],
                repetition_penalty=1.5,
                top_k=7,
            ),
            [5, 6],
            1,
        )
        for i, (_, k, temperature) in enumerate(lines)
    ]
    sampled = sample_rows(batch, logits)
    if all(k is None for _, k, _ in lines):
        assert sampled.logprobs is None
        return
    assert sampled.logprobs is not None
    found = to_host(sampled.logprobs)
    assert len(found) == len(batch)
    for row, (_, k, _) in enumerate(lines):
        if k is None:
            assert found[row] is None
        else:
            assert_close(found[row], expected_logprobs(logits[row], int(sampled.token_ids[row]), k))


@pytest.mark.parametrize("k", [0, 1, 5, -1])
@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_prompt_logprobs(k: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ELEMENTS_AT_ONCE_CPU", at_once * VOCAB_SIZE)
    generator = np.random.default_rng(k + 10)
    logits = generator.normal(size=(7, VOCAB_SIZE)).astype("f4") * 3
    targets = generator.integers(0, VOCAB_SIZE, size=7)
    tensor = torch.from_numpy(logits)
    before = tensor.clone()
    found = to_host(prompt_logprobs(tensor, torch.from_numpy(targets), k))
    assert torch.equal(tensor, before)
    for position, target in enumerate(targets.tolist()):
        assert_close(found[position], expected_logprobs(logits[position], target, k))


def test_more_logprobs_than_the_vocabulary_has() -> None:
    batch = [Row(SamplingParams(logprobs=20, temperature=0))]
    sampled = sample_rows(batch, torch.arange(5, dtype=torch.float32).unsqueeze(0))
    assert sampled.logprobs is not None
    [found] = to_host(sampled.logprobs)
    assert found is not None and found.token_ids == [4, 4, 3, 2, 1, 0]


def test_logprobs_of_a_row_do_not_depend_on_the_others() -> None:
    logits = torch.randn(32, 32_001, generator=torch.Generator().manual_seed(0)) * 4
    batch = [Row(SamplingParams(logprobs=row % 4, temperature=0)) for row in range(32)]
    together = sample_rows(batch, logits).logprobs
    assert together is not None
    for row, line in enumerate(to_host(together)):
        alone = sample_rows([batch[row]], logits[row : row + 1]).logprobs
        assert alone is not None and to_host(alone) == [line]


def test_a_copy_on_another_device_says_the_same() -> None:
    batch = [Row(SamplingParams(temperature=0)), Row(SamplingParams(logprobs=2, temperature=0))]
    tensors = sample_rows(batch, torch.randn(2, VOCAB_SIZE)).logprobs
    assert tensors is not None
    assert to_host(tensors.to("cpu", non_blocking=True)) == to_host(tensors)
    assert [line is None for line in to_host(tensors)] == [True, False]
