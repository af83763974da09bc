"""From a body to SamplingParams."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import InvalidRequestError
from shoal.types import SamplingParams
from tests.protocol.test_parsing import chat, completion


def test_defaults_are_the_apis_unless_the_model_has_its_own() -> None:
    assert chat().to_sampling_params({}) == SamplingParams(max_tokens=None)
    assert completion().to_sampling_params({}) == SamplingParams(max_tokens=16)
    model = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    assert chat().to_sampling_params(model) == SamplingParams(max_tokens=None, **model)  # type: ignore[arg-type]
    assert chat(temperature=0, top_k=-1).to_sampling_params(model).temperature == 0
    assert chat(temperature=0, top_k=-1).to_sampling_params(model).top_k == -1


def test_every_parameter_arrives() -> None:
    given: dict[str, Any] = dict(
        temperature=0.5, top_p=0.8, top_k=7, min_p=0.1, n=3, stop=["a", "b"], seed=-5, presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.5, stop_token_ids=[4], ignore_eos=True, min_tokens=2,
        skip_special_tokens=False, spaces_between_special_tokens=False, include_stop_str_in_output=True,
        allowed_token_ids=[4, 5], bad_words_token_ids=[6], prompt_logprobs=3,
    )  # fmt: skip
    expected = SamplingParams(**given, max_tokens=9, logprobs=4, logit_bias={5: 1.5, 6: -100})
    bias = {"5": 1.5, "6": -100}
    assert (
        chat(**given, max_tokens=9, logprobs=True, top_logprobs=4, logit_bias=bias).to_sampling_params({}) == expected
    )
    assert completion(**given, max_tokens=9, logprobs=4, logit_bias=bias).to_sampling_params({}) == expected


def test_the_two_names_of_max_tokens() -> None:
    assert chat(max_completion_tokens=5).to_sampling_params({}).max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).to_sampling_params({}).max_tokens == 5
    with pytest.raises(InvalidRequestError, match="two names of one limit"):
        chat(max_completion_tokens=5, max_tokens=6).to_sampling_params({})
    with pytest.raises(InvalidRequestError, match="max_completion_tokens must be 1 or more"):
        chat(max_completion_tokens=0).to_sampling_params({})


def test_logprobs() -> None:
    assert chat(logprobs=True).to_sampling_params({}).logprobs == 0
    assert chat(logprobs=False).to_sampling_params({}).logprobs is None
    with pytest.raises(InvalidRequestError, match="top_logprobs needs logprobs"):
        chat(top_logprobs=2).to_sampling_params({})
    for bad in (-1, 21):
        with pytest.raises(InvalidRequestError, match="from 0 to 20"):
            chat(logprobs=True, top_logprobs=bad).to_sampling_params({})
        with pytest.raises(InvalidRequestError, match="from 0 to 20"):
            completion(logprobs=bad).check()
        with pytest.raises(InvalidRequestError, match="from 0 to 20"):
            completion(prompt_logprobs=bad).to_sampling_params({})


def test_echo_takes_the_prompts_logprobs_along() -> None:
    params = completion(echo=True, logprobs=2).to_sampling_params({})
    assert (params.logprobs, params.prompt_logprobs) == (2, 2)
    assert completion(echo=True).to_sampling_params({}).prompt_logprobs is None
    only_echo = completion(echo=True, max_tokens=0, logprobs=1)
    assert only_echo.only_echo
    assert only_echo.to_sampling_params({}).max_tokens == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_what_completions_do_not_do(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields).check()
    assert caught.value.param == param


def test_best_of_may_equal_n() -> None:
    completion(n=2, best_of=2).check()
    completion(best_of=1, suffix="", stream=True, stream_options={"include_obfuscation": False}).check()


@pytest.mark.parametrize("key", ["x", "-1", "1.5", "", "٣"])
def test_logit_bias_keys_are_token_ids(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="no token id"):
        completion(logit_bias={key: 1}).to_sampling_params({})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts() == prompts


def test_no_prompt_at_all() -> None:
    with pytest.raises(InvalidRequestError, match="empty list"):
        completion(prompt=[]).prompts()
