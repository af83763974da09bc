"""The harness's own judgement: an answer that is wrong in any way must not pass for a right one."""

from __future__ import annotations

import pytest

from tests.chaos.cases import make_cases
from tests.chaos.client import AnswerFold, difference


def chunk(text="", *, index=0, ids=(), finish=None, id="cmpl-1", **more):
    return {
        "id": id,
        "choices": [{"index": index, "text": text, "token_ids": list(ids), "finish_reason": finish, **more}],
    }


def fold(*chunks):
    answer = AnswerFold()
    for one in chunks:
        answer.add(one)
    return answer.content()


def test_a_stream_and_a_whole_answer_fold_to_the_same():
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached": 1}}
    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0]}
    more = {"tokens": ["b"], "token_logprobs": [-2.0]}
    streamed = fold(
        chunk("a", ids=[1], logprobs=logprobs),
        chunk("b", ids=[2], finish="length", logprobs=more),
        {"id": "cmpl-1", "choices": [], "usage": usage},
    )
    both = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
    whole = fold({**chunk("ab", ids=[1, 2], finish="length", logprobs=both), "usage": usage})
    assert streamed == whole and difference(streamed, whole) is None
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_chat_folds_its_deltas():
    def delta(finish=None, **content):
        return {"id": "c", "choices": [{"index": 0, "delta": content, "finish_reason": finish}]}

    content = fold(delta(role="assistant", content=""), delta(content="你"), delta("stop", content="好"))
    assert content["choices"][0]["text"] == "你好" and content["choices"][0]["role"] == "assistant"
    with pytest.raises(ValueError, match="begins twice"):
        fold(delta(role="assistant"), delta(role="assistant"))


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([chunk("a")], "without an end"),
        ([], "without an end"),
        ([chunk("a", finish="stop"), chunk("b")], "after its end"),
        ([chunk("a", finish="stop"), chunk("b", finish="stop", index=1), chunk("c", index=1)], "after its end"),
        ([chunk("a"), chunk("b", finish="stop", id="cmpl-2")], "id changed"),
        ([chunk("a"), {"error": {"message": "lost"}}], "lost"),
    ],
)
def test_broken_answers_are_refused(chunks, words):
    with pytest.raises(ValueError, match=words):
        fold(*chunks)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (chunk("aab", ids=[1, 1, 2], finish="stop"), "text"),
        (chunk("ab", ids=[1, 2, 2], finish="stop"), "token_ids"),
        (chunk("ab", ids=[1, 2], finish="length"), "finish_reason"),
        (chunk("ab", ids=[1, 2], finish="stop", logprobs={"tokens": ["a"]}), "logprobs"),
        ({**chunk("ab", ids=[1, 2], finish="stop"), "usage": dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "total_tokens"), 1)}, "usage"),
    ],
)  # fmt: skip
def test_differences_are_named(other, words):
    right = fold(chunk("ab", ids=[1, 2], finish="stop"))
    found = difference(fold(other), right)
    assert found is not None and words in found


def test_cases_are_the_same_for_a_seed_and_of_every_kind():
    cases = make_cases("m", 200, 3)
    assert cases == make_cases("m", 200, 3) and cases != make_cases("m", 200, 4)
    for wanted in (
        "n",
        "logprobs",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "stream",
        "return_token_ids",
    ):
        assert 0 < sum(wanted in case.body for case in cases) < len(cases)
    assert len({case.path for case in cases}) == 2
    reproducible = all(case.body.get("temperature") == 0 or "seed" in case.body for case in cases)
    assert reproducible and any("你" in str(case.body) for case in cases)
    assert b'"user": "chaos-1"' in cases[0].marked("chaos-1") and "user" not in cases[0].body
