"""The fold is a function of the ids alone: any split into steps, any cut and continuation gives the same answer."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.journal import Fold, RequestJournal
from shoal.engine.stop_strings import StopStrings
from shoal.types import FinishReason, SamplingParams
from tests.engine.tokenizers_for_tests import TEXTS, hugging_face, tokenizer

KINDS = ["byte_level", "llama"]


@dataclasses.dataclass
class Answer:
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


def journal(params: SamplingParams, prompt: list[int] | None = None, **fields: object) -> RequestJournal:
    return RequestJournal(request_id="r", prompt_token_ids=prompt or [], sampling=params, **fields)  # type: ignore[arg-type]


def run(
    fold: Fold, ids: list[int], sizes: list[int], finish: FinishReason | None, stop_reason: int | None = None
) -> Answer:
    """Push ids in pieces of these sizes; the last piece has the engine's finish reason."""
    answer, position = Answer(), 0
    while True:
        size = sizes.pop(0) if sizes else len(ids)
        chunk = ids[position : position + size]
        position += size
        last = position >= len(ids)
        folded = fold.push(chunk, finish if last else None, stop_reason if last else None)
        answer.text += folded.text
        answer.token_ids += chunk[: folded.num_tokens]
        answer.finish_reason, answer.stop_reason = folded.finish_reason, folded.stop_reason
        if last or folded.finish_reason is not None:
            return answer


def answer_to(text: str, params: SamplingParams, kind: str = "byte_level") -> Answer:
    ids = tokenizer(kind).encode(text, add_special_tokens=False)
    return run(Fold(journal(params), tokenizer(kind)), ids, [1] * len(ids), FinishReason.LENGTH)


# --- stop strings ----------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_and_is_cut() -> None:
    answer = answer_to("The quick brown fox jumps", SamplingParams(stop="own f"))
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("The quick br", FinishReason.STOP, "own f")
    assert tokenizer().decode(answer.token_ids).startswith("The quick brown f"), "the ids keep what completed it"
    assert "jumps" not in tokenizer().decode(answer.token_ids)


def test_a_stop_string_can_stay_in_the_text() -> None:
    answer = answer_to("The quick brown fox", SamplingParams(stop=["own f"], include_stop_str_in_output=True))
    assert answer.text == "The quick brown f"


def test_the_stop_string_that_begins_first_counts() -> None:
    answer = answer_to("one two three", SamplingParams(stop=["three", "two", "wo thr"]))
    assert (answer.text, answer.stop_reason) == ("one ", "two")


def test_text_that_only_looked_like_a_stop_string_comes_later() -> None:
    fold = Fold(journal(SamplingParams(stop="brown dog")), tokenizer())
    shown = []
    for id_ in tokenizer().encode("a brown fox"):
        shown.append(fold.push([id_]).text)
        assert not "".join(shown).endswith(("b", "br", "bro", "brown", "brown ")), "held back"
    assert "".join(shown) == "a brown fox"


def test_held_text_is_shown_when_the_answer_ends_otherwise() -> None:
    assert answer_to("a brown", SamplingParams(stop="brown dog")).text == "a brown"


def test_no_stop_string_before_min_tokens() -> None:
    ids = tokenizer().encode("stop stop stop")
    per_word = len(ids) // 3
    answer = answer_to("stop stop stop", SamplingParams(stop="stop", min_tokens=per_word, max_tokens=99))
    assert (answer.text, answer.stop_reason) == ("stop ", "stop")
    assert len(answer.token_ids) > per_word
    assert answer_to("stop stop stop", SamplingParams(stop="stop", min_tokens=len(ids), max_tokens=99)).text == (
        "stop stop stop"
    )


def test_a_stop_string_that_was_let_pass_does_not_count_later() -> None:
    """It lies within text that is held back for a longer one."""
    stops = StopStrings(["ab", "xaby"], keep_in_text=False)
    assert stops.push("xab", may_stop=False) == ("", None)
    assert stops.push("z") == ("xabz", None)
    assert stops.push("-ab-") == ("-", "ab")


def test_a_stop_string_in_the_last_token_beats_the_length() -> None:
    answer = answer_to("the end", SamplingParams(stop="end"))
    assert (answer.text, answer.finish_reason) == ("the ", FinishReason.STOP)


# --- end tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_the_text_of_the_token_that_ended_the_answer(keep: bool) -> None:
    end = hugging_face("byte_level").convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=keep)
    ids = [*tokenizer().encode("fox"), end]
    answer = run(Fold(journal(params), tokenizer()), ids, [], FinishReason.STOP)
    assert answer.text == ("fox<|im_end|>" if keep else "fox")
    assert answer.token_ids == ids


def test_a_stop_string_that_is_a_special_token_is_reported_as_the_string() -> None:
    end = hugging_face("byte_level").convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(stop="<|im_end|>", stop_token_ids=[end])
    fold = Fold(journal(params, stop_token_strings={end: "<|im_end|>"}), tokenizer())
    answer = run(fold, [*tokenizer().encode("fox"), end], [], FinishReason.STOP, stop_reason=end)
    assert (answer.text, answer.stop_reason) == ("fox", "<|im_end|>")


def test_without_a_tokenizer_there_is_no_text() -> None:
    answer = run(Fold(journal(SamplingParams()), None), [1, 2, 3], [1], FinishReason.LENGTH)
    assert (answer.text, answer.token_ids) == ("", [1, 2, 3])


# --- a fold ----------------------------------------------------------------------------------------------------------

_stops = st.lists(
    st.sampled_from(["o", " f", "fox", "旅游", "游。", "the lazy", "😀", "\n\n", "is", "s q"]), max_size=3
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[int], list[int], SamplingParams]:
    kind = draw(st.sampled_from(KINDS))
    encode = tokenizer(kind).encode
    prompt = encode(draw(st.sampled_from(["", TEXTS[0], TEXTS[1]])))
    ids = encode(draw(st.sampled_from(TEXTS)), add_special_tokens=False)
    noise = draw(st.lists(st.integers(0, tokenizer(kind).vocab_size - 1), max_size=12))
    params = SamplingParams(
        stop=draw(_stops) or None,
        min_tokens=draw(st.integers(0, 8)),
        max_tokens=999,
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        seed=7,
    )
    return kind, prompt, ids + noise, params


@settings(max_examples=200, deadline=None)
@given(case=cases(), data=st.data())
def test_the_answer_does_not_depend_on_the_steps(
    case: tuple[str, list[int], list[int], SamplingParams], data: st.DataObject
) -> None:
    kind, prompt, ids, params = case
    finish = data.draw(st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]))
    sizes = data.draw(st.lists(st.integers(0, 6), max_size=10))
    one_by_one = run(Fold(journal(params, prompt), tokenizer(kind)), ids, [1] * len(ids), finish)
    assert run(Fold(journal(params, prompt), tokenizer(kind)), ids, [], finish) == one_by_one
    assert run(Fold(journal(params, prompt), tokenizer(kind)), ids, sizes, finish) == one_by_one


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_a_continuation_equals_the_uninterrupted_stream_at_every_cut(
    case: tuple[str, list[int], list[int], SamplingParams], data: st.DataObject
) -> None:
    kind, prompt, ids, params = case
    undisturbed = run(Fold(journal(params, prompt), tokenizer(kind)), ids, [1] * len(ids), FinishReason.LENGTH)
    for cut in range(len(ids)):
        first = journal(params, prompt)
        before = Answer()
        fold = Fold(first, tokenizer(kind))
        if cut:
            before = run(fold, ids[:cut], [1] * cut, None)
        if before.finish_reason is not None:
            break
        # Of what was folded, an arbitrary part had been delivered when the engine was lost.
        first.delivered_characters = data.draw(st.integers(0, len(before.text)))
        first.delivered_tokens = data.draw(st.integers(0, cut))
        delivered = Answer(before.text[: first.delivered_characters], ids[: first.delivered_tokens])
        moved = msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=RequestJournal)
        assert moved.engine_request().emitted_token_ids == ids[:cut]

        continued, rest = Fold.replay(moved, tokenizer(kind))
        delivered.text += rest.text
        delivered.token_ids = [*delivered.token_ids, *ids[cut - rest.num_tokens : cut]]
        after = run(continued, ids[cut:], [], FinishReason.LENGTH)
        joined = Answer(
            delivered.text + after.text, delivered.token_ids + after.token_ids, after.finish_reason, after.stop_reason
        )
        assert joined == undisturbed
        assert moved.emitted_token_ids == undisturbed.token_ids


def test_a_journal_that_claims_too_much_is_refused() -> None:
    claims = journal(SamplingParams(), emitted_token_ids=tokenizer().encode("fox"), delivered_characters=99)
    with pytest.raises(ValueError, match="99 characters"):
        Fold.replay(claims, tokenizer())
