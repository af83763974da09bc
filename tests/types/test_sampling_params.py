"""SamplingParams as users of vLLM and of the OpenAI API know them, and clear refusals of everything else."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.types import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens) == (16, 0)
    assert params.seed is None and params.stop is None and params.logprobs is None
    assert params.skip_special_tokens and params.detokenize and params.spaces_between_special_tokens
    assert not (params.ignore_eos or params.include_stop_str_in_output or params.uses_penalties or params.greedy)


def test_the_usual_call() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.8, 0.95, 100)


@pytest.mark.parametrize(
    "accepted",
    [
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 10**12},
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1},
        {"min_p": 1},
        {"logprobs": -1},
        {"logprobs": 0},
        {"logprobs": 20},
        {"prompt_logprobs": -1},
        {"max_tokens": None},
        {"min_tokens": 16},
        {"stop": "\n"},
        {"stop": ["a", "b"]},
        {"stop": ("a", "b")},
        {"stop": []},
        {"stop_token_ids": []},
        {"seed": -(10**30)},
        {"seed": 0},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"n": 128},
        {"logit_bias": {5: 100, 6: -100.0}},
        {"logit_bias": {}},
        {"repetition_penalty": 1e-3},
    ],
)
def test_accepted(accepted: dict[str, Any]) -> None:
    params = SamplingParams(**accepted)
    assert all(getattr(params, name) == value for name, value in accepted.items())


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1, 129, 1.5, None, True, "2"]),
        ("temperature", [-0.1, math.nan, math.inf, 10**400, None, "1", True]),
        ("top_p", [0, 0.0, -0.5, 1.01, math.nan, None]),
        ("top_k", [-2, 1.0, None, True, 2**63]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1.0, math.inf, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, "0"]),
        ("seed", [1.5, "1", True]),
        ("min_tokens", [-1, 17, None]),
        ("max_tokens", [0, -5, 1.0, 2**64]),
        ("logprobs", [-2, 21, True]),
        ("prompt_logprobs", [-2, 21, 1.5]),
        ("stop", ["", ["a", ""], [1], 7, [None]]),
        ("stop_token_ids", [["1"], 5, [1.0], [True]]),
        ("allowed_token_ids", [[], ["a"], 3]),
        ("bad_words_token_ids", [[[1]], "ab"]),
        ("eos_token_ids", [None, 2]),
        ("logit_bias", [{"5": 1.0}, {-1: 1.0}, {5: 100.5}, {5: math.nan}, {5: "1"}, [5], {True: 1.0}]),
        ("ignore_eos", ["yes", 1, None]),
        ("skip_special_tokens", [0]),
    ],
)
def test_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError, match=f"^{field} must be .*got") as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == field


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=5)  # type: ignore[call-arg]


def test_a_refusal_does_not_print_a_whole_vocabulary() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop_token_ids=[*range(50_000), "x"])  # type: ignore[list-item]
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("stop", "strings"), [(None, []), ([], []), ("ab", ["ab"]), (["a", "b"], ["a", "b"])])
def test_stop_strings(stop: Any, strings: list[str]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_clone_changes_only_what_is_named_and_shares_nothing() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], stop_token_ids=[3], logit_bias={1: 2.0}, seed=9)
    copied = params.clone(n=3, seed=None)
    assert (copied.n, copied.seed, copied.temperature) == (3, None, 0.5)
    assert (copied.stop, copied.logit_bias) == (["x"], {1: 2.0})
    assert copied.clone(n=1, seed=9) == params
    copied.stop_token_ids.append(4)  # type: ignore[union-attr]
    copied.logit_bias[7] = 1.0  # type: ignore[index]
    copied.eos_token_ids.append(2)
    assert (params.stop_token_ids, params.logit_bias, params.eos_token_ids) == ([3], {1: 2.0}, [])


def test_clone_validates() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        SamplingParams().clone(top_p=2.0)


@given(st.floats(0, 2), st.floats(0.01, 1), st.integers(-1, 1000), st.integers(0, 2**64 - 1), st.booleans())
def test_round_trip_between_processes(
    temperature: float, top_p: float, top_k: int, seed: int, ignore_eos: bool
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        ignore_eos=ignore_eos,
        stop=["停", "stop"],
        logit_bias={7: -1.5},
        stop_token_ids=[1, 2],
        max_tokens=None,
        eos_token_ids=[2],
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_what_comes_from_another_process_is_validated_too() -> None:
    with pytest.raises(msgspec.ValidationError, match="top_p must be above 0"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 5.0}), type=SamplingParams)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-4, False), (1.0, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy
