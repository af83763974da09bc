"""Estimates of tokens come near to what servers count, whatever they were before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.policies.tokens import OutputEstimate, TokenRatio, estimate_tokens


def test_four_bytes_a_token_at_first() -> None:
    assert [estimate_tokens(num) for num in (0, 1, 4, 5, 4000)] == [0, 1, 1, 2, 1000]
    assert TokenRatio().estimate(4000) == 1000


@given(st.floats(0.5, 20), st.lists(st.integers(500, 5000), min_size=20, max_size=60))
def test_the_ratio_follows_the_counts(bytes_per_token: float, sizes: list[int]) -> None:
    ratio = TokenRatio()
    for size in sizes * 40:
        ratio.learn(size, max(round(size / bytes_per_token), 1))
    assert ratio.estimate(100_000) == pytest.approx(100_000 / bytes_per_token, rel=0.25)


def test_what_is_new_outweighs_what_is_old() -> None:
    ratio = TokenRatio()
    for bytes_per_token in (8, 2):
        for _ in range(5000):
            ratio.learn(1000, 1000 // bytes_per_token)
        assert ratio.bytes_per_token == pytest.approx(bytes_per_token, rel=0.03)


def test_empty_prompts_teach_nothing() -> None:
    ratio = TokenRatio()
    for num_bytes, num_tokens in ((0, 5), (5, 0), (0, 0), (-1, 3)):
        ratio.learn(num_bytes, num_tokens)
    assert ratio.bytes_per_token == 4.0


def test_outputs() -> None:
    outputs = OutputEstimate()
    assert outputs.estimate(None) == 128
    assert outputs.estimate(16) == 16 and outputs.estimate(16, num_answers=3) == 48
    for _ in range(50):
        outputs.learn(40)
    assert outputs.estimate(None) == 40 and outputs.estimate(1000) == 40
    for _ in range(1500):
        outputs.learn(400)
    assert outputs.estimate(None) == pytest.approx(400, rel=0.01)
