"""validate_token_ids: ids of another vocabulary, and requests that leave nothing to choose, are refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.types import SamplingParams
from shoal.types.token_ids import validate_token_ids

FIELDS = ["logit_bias", "allowed_token_ids", "bad_words_token_ids", "stop_token_ids"]


def params_with(field: str, token_ids: list[int]) -> SamplingParams:
    value = dict.fromkeys(token_ids, 1.0) if field == "logit_bias" else token_ids
    return SamplingParams(**{field: value})


@pytest.mark.parametrize("field", FIELDS)
@given(token_id=st.integers(100, 2**40))
def test_id_beyond_the_vocabulary_is_refused(field: str, token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{field} .* 0 to 99; got {token_id}") as caught:
        validate_token_ids(params_with(field, [3, token_id]), 100)
    assert caught.value.param == field


@pytest.mark.parametrize("field", ["allowed_token_ids", "bad_words_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token_id", [-1, "7", 7.0, True])
def test_what_is_no_token_id_is_refused(field: str, token_id: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_token_ids(params_with(field, [token_id]), 100)  # type: ignore[list-item]
    assert caught.value.param == field


@pytest.mark.parametrize("field", FIELDS)
@given(token_ids=st.lists(st.integers(0, 99), min_size=1))
def test_ids_of_the_vocabulary_pass(field: str, token_ids: list[int]) -> None:
    if field == "bad_words_token_ids":
        token_ids = token_ids[:99]
    validate_token_ids(params_with(field, token_ids), 100)


def test_no_token_ids_at_all_pass() -> None:
    validate_token_ids(SamplingParams(), 1)
    validate_token_ids(SamplingParams(stop_token_ids=[], bad_words_token_ids=[], logit_bias={}), 1)


def test_end_tokens_above_the_vocabulary_are_the_models_own_business() -> None:
    validate_token_ids(SamplingParams(eos_token_ids=[100_000], min_tokens=1), 100)


def test_nothing_left_to_choose_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="leaves no token to choose") as caught:
        validate_token_ids(SamplingParams(allowed_token_ids=[1, 2], bad_words_token_ids=[1, 2, 3]), 100)
    assert caught.value.param == "allowed_token_ids"
    validate_token_ids(SamplingParams(allowed_token_ids=[1, 2], bad_words_token_ids=[1, 3]), 100)
    with pytest.raises(InvalidRequestError, match="rule out the whole vocabulary"):
        validate_token_ids(SamplingParams(bad_words_token_ids=[0, 1, 2]), 3)


def test_only_end_tokens_allowed_before_min_tokens_is_refused() -> None:
    only_end = {"allowed_token_ids": [2], "eos_token_ids": [2]}
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        validate_token_ids(SamplingParams(**only_end, min_tokens=3), 100)
    validate_token_ids(SamplingParams(**only_end), 100)
