from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.resume.position import (
    AnswerPosition,
    FramePosition,
    TextPosition,
    join_answers,
    parse_event_id,
    parse_position,
)
from shoal.types.outputs import FinishReason

COUNTS = st.integers(0, 999_999_999)
ANSWERS = st.builds(AnswerPosition, COUNTS, COUNTS, st.sampled_from([None, FinishReason.STOP, FinishReason.LENGTH]))
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)


@given(st.dictionaries(st.integers(0, 20), ANSWERS), KEYS)
def test_answers_are_read_as_they_were_written(answers, key):
    text = join_answers({index: str(answer) for index, answer in answers.items()})
    assert parse_event_id(f"{key}:{text}") == (key, FramePosition(answers))


RUNS = st.text("0123456789abcdef", min_size=1, max_size=16)
ENDINGS = st.sampled_from([(False, False), (True, False), (True, True)])


@given(COUNTS, COUNTS, COUNTS, RUNS, ENDINGS)
def test_positions_in_text(events, characters, tokens, run, ending):
    position = TextPosition(events, characters, tokens, run, *ending)
    assert parse_position(str(position)) == position


@pytest.mark.parametrize(
    "text",
    ["1", "1.2.3", "1.2x", "-1.2", "1.-2", "t1.2", "t1.2.3", "t1.2.3.A", "t1.2.3.4.5", "1.2,3", "1234567890.1", "a"],
)
def test_what_is_no_position(text):
    with pytest.raises(ValueError, match="position"):
        parse_position(text)


@given(st.text())
def test_any_text_is_a_position_or_an_error(text):
    with contextlib.suppress(ValueError):
        parse_event_id(text)


def test_what_lies_within():
    target = AnswerPosition(5, 20, FinishReason.STOP)
    assert AnswerPosition(5, 20).is_within(target) and AnswerPosition(4, 20).is_within(target)
    assert target.is_within(target) and not target.is_within(AnswerPosition(5, 20))
    assert not AnswerPosition(6, 20).is_within(target) and not AnswerPosition(5, 21).is_within(target)
    assert not AnswerPosition(4, 18, FinishReason.STOP).is_within(target), "it ended before"
