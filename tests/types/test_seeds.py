"""Seeds: any integer works, answers get seeds of their own, and the values never change between versions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.types.seeds import MASK_64, derive_seed, mix64, reduce_seed

any_integer = st.integers(min_value=-(2**200), max_value=2**200)


@given(any_integer, st.integers(0, 127))
def test_any_integer_gives_a_64_bit_seed(seed: int, index: int) -> None:
    assert 0 <= derive_seed(seed, index) <= MASK_64
    assert derive_seed(seed, index) == derive_seed(seed + 2**64, index) == derive_seed(reduce_seed(seed), index)


@given(any_integer)
def test_answers_of_a_request_have_different_seeds(seed: int) -> None:
    assert len({derive_seed(seed, index) for index in range(128)} | {reduce_seed(seed)}) == 129


def test_neighbouring_seeds_share_no_answers() -> None:
    assert len({derive_seed(seed, index) for seed in range(-100, 400) for index in range(16)}) == 500 * 16


def test_mixing_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0, as published with java.util.SplittableRandom and xoshiro.
    gamma = 0x9E3779B97F4A7C15
    assert [mix64(gamma * i) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_values_are_fixed_for_good() -> None:
    """A continuation on another version draws the same tokens."""
    found = [derive_seed(0, 0), derive_seed(42, 3), derive_seed(-1, 0)]
    assert found == [5951869966060537718, 560116233686290028, 13157453766737105327]


@given(st.integers(0, MASK_64), st.integers(0, 63))
def test_one_input_bit_changes_many_output_bits(value: int, bit: int) -> None:
    assert 8 <= (mix64(value) ^ mix64(value ^ (1 << bit))).bit_count() <= 56
