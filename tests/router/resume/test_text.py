"""Answers by text that go to and fro between routers: a client has a beginning of what is known, or that is said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.request import GenerationRequest
from shoal.router.resume.journals import CannotResume
from shoal.router.resume.kept import KeptRequest
from shoal.router.resume.position import TextPosition, parse_event_id
from shoal.router.resume.replication import Batch, Cursor, decode_batch, encode, news_of, take_batch
from shoal.router.resume.store import KeptStore
from shoal.router.resume.text import TextRun, TextState, TrackedTextJournal
from shoal.router.text_journal import Chunk

NAME = ("", "k")
FIELDS = {"prompt": "x", "max_tokens": 100, "stream_options": {"include_usage": True}}


def new_request(**fields):
    return GenerationRequest(
        path="/v1/completions", request_id="r", body=b"", fields={**FIELDS, **fields}, model="m", deadline=9.0
    )


def add(journal, text="", *, finish=None, usage=None, choices=True):
    """An event of a server, as the client gets it."""
    content = {"id": "1", "choices": [{"index": 0, "text": text, "finish_reason": finish}] if choices else []}
    content |= {"usage": usage} if usage is not None else {}
    data = msgspec.json.encode(content)
    return journal.add(msgspec.json.decode(data, type=Chunk), data)


def position_of(told):
    _, position = parse_event_id(told.rpartition(b"\nid: ")[2].decode())
    assert isinstance(position, TextPosition)
    return position


class OneRouter:
    """The request as one router knows it, and the store in which it is."""

    def __init__(self, name):
        self.name = name
        self.store = KeptStore(30.0, 10, 1 << 20)
        self.cursor = Cursor()

    @property
    def kept(self):
        return self.store.get(NAME)

    def begin(self, position):
        if self.kept is None:
            self.store.add(KeptRequest(NAME, b"", "r", 1, 2, True, 1000), 0.0)
        self.kept.begin_run(position)
        self.cursor = Cursor()

    def tell(self, other):
        news, after = news_of(self.kept, self.cursor)
        if news is None or self.cursor.refused:
            return
        reply = take_batch(other.store, decode_batch(encode(Batch(1, self.name, [news]))), other.name, 1000, 0.0)
        self.cursor = Cursor(refused=True) if reply.refused else Cursor() if reply.unknown else after


STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=12)


@given(STEPS)
def test_what_the_peer_knows_is_what_was_said(steps):
    """A client reads some pieces of a run, and takes it over at the other router, at whatever moments that is told."""
    here, there = OneRouter("one"), OneRouter("two")
    had, position, said = "", None, 0
    for num_told, num_pieces, num_read, tells_first in steps:
        here.begin(position)
        if tells_first:
            here.tell(there)  # before the run has a journal
        journal = here.kept.begun(new_request()).text
        assert "".join(here.kept.text.pieces) == had
        positions = []
        for number in range(num_pieces):
            said += 1
            positions.append((position_of(add(journal, f"<{said}>")), "".join(here.kept.text.pieces)))
            if number % 5 == num_told:
                here.tell(there)
        here.tell(there)
        assert there.kept.owner == here.name
        assert there.kept.text == (here.kept.text if here.kept.text.num_events else TextState())
        assert here.kept.text.num_characters == len("".join(here.kept.text.pieces))
        if num_read and positions:
            position, had = positions[min(num_read, len(positions)) - 1]
        if position is not None:
            assert there.kept.text.has(position)
        here, there = there, here


def test_a_text_of_another_run_is_no_beginning():
    state = TextState(
        pieces=["abcdef"], num_events=6, head={}, runs=[TextRun("a", 0), TextRun("b", 2), TextRun("c", 2)]
    )
    has = {
        name: [number for number in range(9) if state.has(TextPosition(1, number, 1, name))] for name in ("a", "b", "c")
    }
    assert has == {"a": [0, 1, 2], "b": [2], "c": [2, 3, 4, 5, 6]}
    with pytest.raises(CannotResume, match="3 characters of a text; 6 are known"):
        state.begin(TextPosition(1, 3, 1, "a"), "d")
    assert state.begin(TextPosition(1, 2, 1, "b"), "d").runs == [TextRun("a", 0), TextRun("b", 2), TextRun("d", 2)]
    assert state.begin(TextPosition(0, 0, 0, "?"), "d") == TextState(runs=[TextRun("d", 0)]), "it has nothing"


def test_runs_are_bounded():
    state = TextState(pieces=["a"], num_events=1, head={}, runs=[TextRun("0", 0)])
    for number in range(1, 200):
        state = state.begin(TextPosition(1, 1, 1, str(number - 1)), str(number))
    assert len(state.runs) == 64 and state.has(TextPosition(1, 1, 1, "198"))


def test_an_end_that_the_client_lacks_is_told_as_it_was():
    first = TrackedTextJournal(new_request(), "k", TextState(runs=[TextRun("a", 0)]))
    here = position_of(add(first, "one"))
    last = position_of(add(first, finish="content_filter"))
    add(first, usage={"prompt_tokens": 7, "completion_tokens": 4}, choices=False)
    second = TrackedTextJournal(new_request(), "k", first.state().begin(here, "b"))
    assert second.has_ended and second.finish_reason is None
    choice, usage = (msgspec.json.decode(event[6:]) for event in second.ending().split(b"\n\n")[:-1])
    assert choice["choices"][0]["finish_reason"] == "content_filter" and choice["id"] == "1"
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    third = TrackedTextJournal(new_request(), "k", first.state().begin(last, "b"))
    assert third.ending().count(b"usage") == 1 and third.finish_reason == "content_filter"


def test_usage_is_told_once():
    first = TrackedTextJournal(new_request(), "k", TextState(runs=[TextRun("a", 0)]))
    add(first, "one", finish="stop")
    told = position_of(add(first, usage={"prompt_tokens": 7, "completion_tokens": 1}, choices=False))
    assert told.ended and told.told_usage
    second = TrackedTextJournal(new_request(), "k", first.state().begin(told, "b"))
    assert second.has_ended and second.ending() == b""
