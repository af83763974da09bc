"""The noise: equal to its definition in plain integers, uniform, and without correlation between neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.sampling.random import mix64_array, negative_exponentials, noise_bits, row_keys, token_hashes
from shoal.types.seeds import derive_seed, mix64, reduce_seed
from tests.sampling import reference
from tests.sampling.helpers import CPU, chi_square

# About one in 30,000 for each check if the noise is perfect; the seeds are fixed, so a pass is a pass for good.
LIMIT = 4.0


def keys_for(seeds: list[int], positions: list[int]) -> torch.Tensor:
    mixed = np.array([mix64(reduce_seed(seed)) for seed in seeds], dtype=np.uint64)
    return torch.from_numpy(row_keys(mixed, np.array(positions, dtype=np.uint64)))


def uniform_rows(seeds: list[int], positions: list[int], vocab_size: int) -> np.ndarray:
    bits = noise_bits(keys_for(seeds, positions), token_hashes(vocab_size, CPU))
    return bits.numpy().astype(np.float64) / 2**31


@given(st.integers(min_value=-(2**70), max_value=2**70), st.integers(0, 2**20), st.integers(0, 200_000))
def test_noise_equals_its_definition_in_plain_integers(seed: int, position: int, token_id: int) -> None:
    hashed = torch.tensor([[reference.to_signed(reference.lowbias32(token_id))]], dtype=torch.int32)
    bits = noise_bits(keys_for([seed], [position]), hashed)
    assert bits.item() == reference.noise_bits(reduce_seed(seed), position, token_id)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_array_mixing_equals_scalar_mixing(values: list[int]) -> None:
    assert mix64_array(np.array(values, dtype=np.uint64)).tolist() == [mix64(value) for value in values]


def test_token_hashes_are_lowbias32() -> None:
    assert token_hashes(1000, CPU).tolist() == [reference.to_signed(reference.lowbias32(i)) for i in range(1000)]


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    table = token_hashes(5000, CPU)
    keys = keys_for([3, 4, 5], [0, 10, 20])
    everything = negative_exponentials(keys, table)
    chosen = torch.tensor([[4999, 0, 17], [1, 2, 3], [800, 4000, 800]])
    assert torch.equal(negative_exponentials(keys, table[chosen]), everything.gather(1, chosen))


def test_exponentials_are_finite_and_negative() -> None:
    # All 31-bit values that matter: 0, 1 and the largest, reached through keys of zero and tables made for them.
    values = negative_exponentials(keys_for(list(range(64)), [0] * 64), token_hashes(50_000, CPU))
    assert bool(torch.isfinite(values).all()) and bool((values < 0).all())
    assert abs(float(values.double().mean()) + 1) < 0.003


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        ([7] * 400, list(range(400))),  # one request, token by token
        (list(range(400)), [5] * 400),  # neighbouring seeds
        ([1 << (i % 64) for i in range(400)], [i // 64 for i in range(400)]),  # seeds that differ in one bit
        ([derive_seed(0, i) for i in range(400)], [0] * 400),  # the n answers of a request
    ],
)
class TestStatistics:
    vocab_size = 4096

    def test_uniform_over_all_in_each_row_and_for_each_token(self, seeds: list[int], positions: list[int]) -> None:
        values = uniform_rows(seeds, positions, self.vocab_size)
        histogram = np.histogram(values, bins=1024, range=(0, 1))[0]
        assert chi_square(histogram, np.full(1024, values.size / 1024)) < LIMIT
        for axis, count in ((1, self.vocab_size), (0, len(seeds))):
            bins = np.stack([(np.floor(values * 16) == b).sum(axis=axis) for b in range(16)], axis=-1)
            scores = np.array([chi_square(line, np.full(16, count / 16)) for line in bins])
            # As many scores as rows or tokens: on average 0, none absurd.
            assert abs(scores.mean()) < 0.15 and scores.max() < 5.5

    def test_low_bits_are_uniform_too(self, seeds: list[int], positions: list[int]) -> None:
        bits = noise_bits(keys_for(seeds, positions), token_hashes(self.vocab_size, CPU)).numpy()
        for shift in (0, 8, 16, 23):
            histogram = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
            assert chi_square(histogram, np.full(256, bits.size / 256)) < LIMIT

    @pytest.mark.parametrize("lag", [1, 2, 3, 64])
    def test_neighbours_are_independent(self, seeds: list[int], positions: list[int], lag: int) -> None:
        values = uniform_rows(seeds, positions, self.vocab_size)
        for one, other in ((values[:, :-lag], values[:, lag:]), (values[:-lag], values[lag:])):
            correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
            assert abs(correlation) * one.size**0.5 < LIMIT
            # Not only linearly: the pairs fill a grid evenly.
            pairs = np.floor(one * 32).astype(int) * 32 + np.floor(other * 32).astype(int)
            histogram = np.bincount(pairs.ravel(), minlength=1024)
            assert chi_square(histogram, np.full(1024, one.size / 1024)) < LIMIT


@pytest.mark.parametrize("difference", [1, 1 << 15, 1 << 31, 0x80008000, 0x7FFF0000, 0xFFFFFFFF])
def test_tokens_whose_hashes_are_alike_get_independent_noise(difference: int) -> None:
    base = np.random.default_rng(0).integers(0, 2**32, size=50_000, dtype=np.uint32)
    other = base ^ np.uint32(difference)
    # One pair of tokens over many steps is one xor difference over many keys; many steps at once are columns here.
    keys = torch.zeros(1, dtype=torch.int32)
    one = noise_bits(keys, torch.from_numpy(base.view(np.int32))).numpy()[0] / 2**31
    two = noise_bits(keys, torch.from_numpy(other.view(np.int32))).numpy()[0] / 2**31
    pairs = np.floor(one * 8).astype(int) * 8 + np.floor(two * 8).astype(int)
    assert chi_square(np.bincount(pairs, minlength=64), np.full(64, one.size / 64)) < LIMIT
