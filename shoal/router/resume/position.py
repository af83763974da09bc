"""Positions: how far a client has come in a stream, as the `id:` of an event says it. Used by journals.py, entrance.py.

    KEY:12.47,8.30s     by frames: of each answer its tokens and characters; s, l: it has ended by stop, by length
    KEY:t9.30.8e.1f     by text: events, characters, tokens, and the run whose text it is; e: the answer has ended,
                        u: and its usage was told

An event without an id is a part of what the next one with an id ends: a client has it only when it has that one, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from shoal.protocol.internal import AnswerJournal
from shoal.types.outputs import FinishReason

_ENDINGS = {FinishReason.STOP: "s", FinishReason.LENGTH: "l"}
_REASONS = {"s": FinishReason.STOP, "l": FinishReason.LENGTH, "": None}
_ANSWER = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})([sl]?)")
_TEXT = re.compile(r"t([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})([eu]?)\.([0-9a-z]{1,16})")


class AnswerPosition(NamedTuple):
    """How far one answer is."""

    num_tokens: int
    num_characters: int
    ending: FinishReason | None = None

    @classmethod
    def of(cls, answer: AnswerJournal) -> AnswerPosition:
        return cls(len(answer.token_ids), answer.delivered_characters, answer.finish_reason)

    def __str__(self) -> str:
        return f"{self.num_tokens}.{self.num_characters}{_ENDINGS[self.ending] if self.ending else ''}"

    def is_within(self, other: AnswerPosition) -> bool:
        """Whether what is here can be a beginning of what is there."""
        if self.ending is not None:
            return self == other
        return self.num_tokens <= other.num_tokens and self.num_characters <= other.num_characters


class FramePosition(NamedTuple):
    """answers: by index; one that has not begun is not there."""

    answers: Mapping[int, AnswerPosition]


class TextPosition(NamedTuple):
    """A stream that servers of the OpenAI API answer; num_events counts those that the client got.

    run: the name of the run that the last of them came from. told_usage: of an answer that has ended.
    """

    num_events: int
    num_characters: int
    num_tokens: int
    run: str
    ended: bool = False
    told_usage: bool = False

    def __str__(self) -> str:
        ending = "" if not self.ended else "u" if self.told_usage else "e"
        return f"t{self.num_events}.{self.num_characters}.{self.num_tokens}{ending}.{self.run}"


Position = FramePosition | TextPosition


def join_answers(answers: Mapping[int, str]) -> str:
    """The position of all answers from that of each."""
    if len(answers) == 1 and 0 in answers:
        return answers[0]
    return ",".join(answers.get(index, "") for index in range(max(answers, default=-1) + 1))


def parse_position(text: str) -> Position:
    """Raises ValueError for what is no position."""
    if found := _TEXT.fullmatch(text):
        events, characters, tokens, ending, run = found.groups()
        return TextPosition(int(events), int(characters), int(tokens), run, bool(ending), ending == "u")
    answers: dict[int, AnswerPosition] = {}
    for index, part in enumerate(text.split(",")):
        if not part:
            continue
        found = _ANSWER.fullmatch(part)
        if found is None:
            raise ValueError(f"{part[:40]!r} is no position of an answer")
        num_tokens, num_characters, ending = found.groups()
        answers[index] = AnswerPosition(int(num_tokens), int(num_characters), _REASONS[ending])
    return FramePosition(answers)


def parse_event_id(text: str) -> tuple[str, Position]:
    """The key and the position of an event's id. Raises ValueError."""
    key, colon, position = text.rpartition(":")
    if not colon or not key:
        raise ValueError("it has no key")
    return key, parse_position(position)
