"""The batched sampler against the plain reference, in mixed batches and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sampling import rows as rows_module
from shoal.types import SamplingParams
from tests.sampling import reference
from tests.sampling.helpers import Row, sample_ids

VOCAB_SIZE = 40
tokens = st.integers(0, VOCAB_SIZE - 1)
some_tokens = st.lists(tokens, max_size=6)


def mostly(default: object, others: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.just(default), others)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A request with any mixture of features that leaves at least one token to choose."""
    allowed = draw(mostly(None, st.lists(tokens, min_size=1, max_size=8, unique=True)))
    bad = draw(mostly(None, some_tokens))
    stop_ids = draw(mostly(None, some_tokens))
    eos = draw(mostly([], st.lists(tokens, max_size=2)))
    min_tokens = draw(mostly(0, st.integers(0, 8)))
    if allowed is not None and not set(allowed) - set(bad or []) - set(stop_ids or []) - set(eos):
        bad, min_tokens = None, 0
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0, 1.0, 2.5])),
        top_p=draw(mostly(1.0, st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999]))),
        top_k=draw(mostly(0, st.sampled_from([-1, 1, 2, 5, 39, 40, 1000]))),
        min_p=draw(mostly(0.0, st.sampled_from([0.01, 0.2, 1.0]))),
        repetition_penalty=draw(mostly(1.0, st.sampled_from([0.5, 1.2, 2.0]))),
        presence_penalty=draw(mostly(0.0, st.sampled_from([-2.0, 0.5, 2.0]))),
        frequency_penalty=draw(mostly(0.0, st.sampled_from([-0.5, 0.5, 2.0]))),
        logit_bias=draw(mostly(None, st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=5))),
        allowed_token_ids=allowed,
        bad_words_token_ids=bad,
        stop_token_ids=stop_ids,
        eos_token_ids=eos,
        min_tokens=min_tokens,
        max_tokens=100,
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    prompt = draw(st.lists(tokens, min_size=1, max_size=6))
    return Row(params, prompt + draw(st.lists(tokens, max_size=10)), len(prompt))


@settings(deadline=None, max_examples=300)
@given(st.lists(rows(), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 4.0]))
def test_mixed_batches_equal_the_reference(batch: list[Row], logits_seed: int, scale: float) -> None:
    generator = np.random.default_rng(logits_seed)
    logits = (generator.normal(size=(len(batch), VOCAB_SIZE)) * scale).astype(np.float32)
    chosen = sample_ids(batch, logits)
    for row, line, token_id in zip(batch, logits, chosen, strict=True):
        processed = reference.processed_logits(line, row.params, row.token_ids, row.num_prompt_tokens, row.position)
        reference.check_token(token_id, processed, row.params, row.position)


@settings(deadline=None, max_examples=100)
@given(st.lists(rows(), min_size=2, max_size=8), st.integers(0, 2**32 - 1), st.randoms())
def test_a_row_does_not_depend_on_the_others(batch: list[Row], logits_seed: int, random: object) -> None:
    logits = torch.from_numpy(np.random.default_rng(logits_seed).normal(size=(len(batch), VOCAB_SIZE)).astype("f4"))
    together = sample_ids(batch, logits)
    assert together == [sample_ids([row], logits[i : i + 1])[0] for i, row in enumerate(batch)]
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert sample_ids([batch[i] for i in order], logits[order]) == [together[i] for i in order]


@pytest.mark.parametrize("vocab_size", [4096, 32_001])
@pytest.mark.parametrize("flatness", [0.05, 1.0, 6.0])
def test_rows_of_a_real_vocabulary_do_not_depend_on_the_others(vocab_size: int, flatness: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(32, vocab_size, generator=generator) * flatness
    choices = [{}, {"top_p": 0.95}, {"top_k": 50}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.0}]
    batch = [Row(SamplingParams(seed=i, **choices[i % len(choices)]), [1] * (1 + i)) for i in range(32)]
    together = sample_ids(batch, logits)
    assert together == [sample_ids([row], logits[i : i + 1])[0] for i, row in enumerate(batch)]
    order = torch.randperm(32, generator=generator).tolist()
    assert sample_ids([batch[i] for i in order], logits[order]) == [together[i] for i in order]


def test_greedy_and_top_k_take_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 9, 30]] = 5.0
    assert sample_ids([Row(SamplingParams(temperature=0))], logits) == [7]
    assert sample_ids([Row(SamplingParams(top_k=1, seed=1))], logits) == [7]
    two = {sample_ids([Row(SamplingParams(top_k=2, seed=seed))], logits)[0] for seed in range(60)}
    assert two == {7, 9}
    half = {sample_ids([Row(SamplingParams(top_p=0.5, temperature=0.1, seed=seed))], logits)[0] for seed in range(60)}
    assert half == {7, 9}


@pytest.mark.parametrize("changes", [{"top_p": 1e-12}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_narrowest_settings_still_keep_the_best_token(changes: dict[str, float]) -> None:
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(1))
    batch = [Row(SamplingParams(seed=seed, **changes)) for seed in range(8)]
    assert sample_ids(batch, logits) == logits.argmax(dim=-1).tolist()


def test_top_k_beyond_the_vocabulary_is_no_top_k() -> None:
    logits = torch.randn(64, VOCAB_SIZE)
    plain = [Row(SamplingParams(seed=seed)) for seed in range(64)]
    for top_k in (VOCAB_SIZE, VOCAB_SIZE + 1, 10**9, -1):
        limited = [Row(row.params.clone(top_k=top_k)) for row in plain]
        assert sample_ids(limited, logits) == sample_ids(plain, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_banned_but_one(temperature: float) -> None:
    logits = torch.randn(3, VOCAB_SIZE) * 10
    everything_else = [i for i in range(VOCAB_SIZE) if i != 23]
    shared = {"temperature": temperature, "seed": 5}
    batch = [
        Row(SamplingParams(bad_words_token_ids=everything_else, **shared)),
        Row(SamplingParams(allowed_token_ids=[23], **shared)),
        Row(SamplingParams(allowed_token_ids=[3, 23], bad_words_token_ids=[3], top_p=0.5, **shared)),
    ]
    assert sample_ids(batch, logits) == [23, 23, 23]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_forces_and_of_minus_100_forbids(temperature: float) -> None:
    logits = torch.randn(32, VOCAB_SIZE)
    for bias, wanted in ((100.0, True), (-100.0, False)):
        batch = [Row(SamplingParams(logit_bias={11: bias}, temperature=temperature, seed=seed)) for seed in range(32)]
        assert all((token_id == 11) is wanted for token_id in sample_ids(batch, logits))


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_rows_with_minus_infinity(changes: dict[str, float]) -> None:
    logits = torch.full((4, 300), -math.inf)
    logits[:, 299] = -1e30
    logits[3, :] = -math.inf  # nothing may be chosen: a valid id comes back, and the other rows are not disturbed
    batch = [Row(SamplingParams(seed=seed, **changes)) for seed in range(4)]
    chosen = sample_ids(batch, logits)
    assert chosen[:3] == [299] * 3 and 0 <= chosen[3] < 300


def test_min_tokens_suppresses_end_and_stop_tokens_until_then() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5], logits[0, 6] = 50.0, 40.0
    params = SamplingParams(temperature=0, min_tokens=3, max_tokens=9, eos_token_ids=[5], stop_token_ids=[6])
    for num_outputs in range(6):
        expected = 5 if num_outputs >= 3 else 0
        assert sample_ids([Row(params, [1] * (4 + num_outputs), 4)], logits) == [expected]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("vocab_size", [31, 32, 33, 100])
def test_grammar_mask(packed: bool, vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    allowed = generator.random((16, vocab_size)) < 0.2
    allowed[:, vocab_size - 1] = True
    allowed[0] = True
    mask = torch.from_numpy(allowed)
    if packed:
        words = np.zeros((16, -(-vocab_size // 32)), dtype=np.uint32)
        for row, token_id in zip(*np.nonzero(allowed), strict=True):
            words[row, token_id // 32] |= np.uint32(1) << np.uint32(token_id % 32)
        mask = torch.from_numpy(words.view(np.int32))
    logits = torch.from_numpy(generator.normal(size=(16, vocab_size)).astype("f4"))
    batch = [Row(SamplingParams(temperature=row % 2, seed=row)) for row in range(16)]
    chosen = sample_ids(batch, logits, mask)
    banned = logits.masked_fill(torch.from_numpy(~allowed), -math.inf)
    assert chosen == sample_ids(batch, banned)
    assert all(allowed[row, token_id] for row, token_id in enumerate(chosen))


def test_the_same_seed_and_position_repeat_and_others_do_not() -> None:
    logits = torch.zeros(1, 4096)

    def draw(seed: int, position: int) -> int:
        return sample_ids([Row(SamplingParams(seed=seed), [1] * position)], logits)[0]

    assert draw(9, 7) == draw(9, 7) == draw(9 + 2**64, 7) == draw(9 - 2**64, 7)
    assert len({draw(9, position) for position in range(1, 40)}) > 35
    assert len({draw(seed, 7) for seed in range(40)}) > 35


@pytest.mark.parametrize("num_rows_at_once", [1, 2, 5])
def test_working_in_parts_changes_nothing(num_rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": 2}
    choices = [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1, "temperature": 0.7}, {"temperature": 0.0}]
    logits = torch.randn(24, VOCAB_SIZE, generator=torch.Generator().manual_seed(2)) * 2
    batch = [Row(SamplingParams(seed=i, **choices[i % 5] | shared), [i, 3, 4, 3], 2) for i in range(24)]
    whole = sample_ids(batch, logits)
    monkeypatch.setattr(rows_module, "_ELEMENTS_AT_ONCE_CPU", num_rows_at_once * VOCAB_SIZE)
    assert sample_ids(batch, logits) == whole


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1e300}, {"repetition_penalty": 1e300}, {"repetition_penalty": 1e-300}, {"temperature": 1e-5}],
)
def test_absurd_factors_stay_within_float32(changes: dict[str, float]) -> None:
    logits = torch.randn(16, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 30
    logits[:, 1] = 0.0
    batch = [Row(SamplingParams(seed=i, bad_words_token_ids=[5], **changes), [2, 3, 1], 2) for i in range(16)]
    chosen = sample_ids(batch, logits)
    assert 5 not in chosen and all(0 <= token_id < VOCAB_SIZE for token_id in chosen)
    if changes == {"temperature": 1e300}:
        assert len(set(chosen)) > 4
