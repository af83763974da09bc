"""Journals that are cut to a client's position and catch up to it, against news of several answers in any grouping."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.internal import Progress
from shoal.router.outcome import Realign
from shoal.router.resume.journals import CannotResume, TrackedJournal
from shoal.router.resume.position import AnswerPosition, FramePosition, parse_event_id
from shoal.types.outputs import FinishReason, TokenLogprobs

STOP = FinishReason.STOP
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=3)


class Answers:
    """What an engine says: token i of answer a is 100 a + i and has i % 3 characters; the end comes with the last one
    or after it."""

    def __init__(self, lengths: list[int], *, late_end: bool = False) -> None:
        self.lengths = lengths
        self.late_end = late_end

    def news(self, journal: TrackedJournal, sizes: list[int]) -> list[Progress]:
        """The rest, from a journal on: in turns, so many tokens at a time."""
        frames, turn = [], 0
        at = [len(journal.answers[i].token_ids) if i in journal.answers else 0 for i in range(len(self.lengths))]
        open_ = [i not in journal.answers or journal.answers[i].finish_reason is None for i in range(len(at))]
        characters = [journal.answers[i].delivered_characters if i in journal.answers else 0 for i in range(len(at))]
        while any(open_):
            for index, length in enumerate(self.lengths):
                if not open_[index]:
                    continue
                size = sizes[turn % len(sizes)]
                turn += 1
                ids = list(range(at[index], min(at[index] + size, length)))
                at[index] += len(ids)
                ends = at[index] == length and (not self.late_end or not ids)
                open_[index] = not ends
                total = sum(i % 3 for i in range(at[index]))
                data = b"data: " + repr([100 * index + i for i in ids]).encode() + b"\n\n" if ids or ends else b""
                frames.append(
                    Progress(
                        index, data, [100 * index + i for i in ids], total - characters[index],
                        [TokenLogprobs([i], [-1.0], 1) for i in ids], finish_reason=STOP if ends else None,
                    )
                )  # fmt: skip
                characters[index] = total
        return frames


def run(journal: TrackedJournal, answers: Answers, sizes: list[int]) -> tuple[list[bytes], int]:
    """What a client gets, and in how many attempts."""
    told: list[bytes] = []
    for attempt in range(1, 4):
        try:
            for progress in answers.news(journal, sizes):
                journal.add(progress)
                if progress.data:
                    told.append(progress.data)
            journal.check_whole()
            return told, attempt
        except Realign:
            continue
    raise AssertionError("it is realigned again and again")


def tokens_of(told: list[bytes]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for data in told:
        for token in msgspec.json.decode(data.split(b"\n")[0][6:]):
            found.setdefault(token // 100, []).append(token)
    return found


def last_position(told: list[bytes]) -> FramePosition | None:
    if not told:
        return None
    _, position = parse_event_id(told[-1].decode().split("\n")[1].removeprefix("id: "))
    assert isinstance(position, FramePosition)
    return position


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(LENGTHS, SIZES, SIZES, SIZES, st.data(), st.booleans())
def test_what_is_cut_anywhere_goes_on_from_any_journal(lengths, first, second, third, data, late_end):
    """The client has a part of a first run; the journal is a part of the same, or of another one, longer or shorter."""
    answers = Answers(lengths, late_end=late_end)
    told, _ = run(TrackedJournal("k"), answers, first)
    had = told[: data.draw(st.integers(0, len(told)))]
    journal = TrackedJournal("k")
    replicated = answers.news(journal, second)
    for progress in replicated[: data.draw(st.integers(0, len(replicated)))]:
        journal.add(progress)
    journal.go_to(last_position(had))
    rest, num_attempts = run(journal, answers, third)
    whole = tokens_of(told)
    assert tokens_of(had + rest) == whole
    assert num_attempts <= 2
    assert last_position(had + rest) == last_position(told) and not journal.catching_up
    for index, length in enumerate(lengths):
        answer = journal.answers[index]
        assert answer.token_ids == [100 * index + i for i in range(length)] and len(answer.logprobs or []) == length
        assert answer.delivered_characters == sum(i % 3 for i in range(length)) and answer.finish_reason is STOP
    assert journal.num_tokens == sum(lengths)


@given(LENGTHS, SIZES)
def test_what_is_counted_is_given_back(lengths, sizes):
    total = 0

    def grown(size: int) -> None:
        nonlocal total
        total += size

    journal = TrackedJournal("k", grown)
    journal.prompts = [[1, 2, 3]]
    run(journal, Answers(lengths), sizes)
    assert total == journal.num_bytes


def test_an_answer_that_is_another_one_is_not_gone_on_with():
    for position in (AnswerPosition(9, 8), AnswerPosition(4, 4, FinishReason.LENGTH), AnswerPosition(2, 1, STOP)):
        journal = TrackedJournal("k")
        journal.go_to(FramePosition({0: position}))
        with pytest.raises(CannotResume, match="what the client has"):
            run(journal, Answers([4]), [1])
    journal = TrackedJournal("k")
    journal.go_to(FramePosition({7: AnswerPosition(1, 0)}))
    with pytest.raises(CannotResume, match="shorter"):
        run(journal, Answers([4]), [1])


def test_the_id_ends_all_events_of_a_frame():
    journal = TrackedJournal("k")
    progress = Progress(0, b"data: 1\n\ndata: 2\n\n", [5], 3)
    journal.add(progress)
    assert progress.data == b"data: 1\n\ndata: 2\nid: k:1.3\n\n"
    silent = Progress(1, b"", [5], 0)
    journal.add(silent)
    assert silent.data == b"" and journal.position == "1.3,1.0"
