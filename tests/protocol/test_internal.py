"""Frames of the internal endpoint: whole events whatever the pieces they come in, and a journal that adds up."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.internal import (
    Accepted,
    AnswerJournal,
    Beat,
    ContinueRequest,
    Failed,
    Finished,
    FrameReader,
    Progress,
    decode_request,
    encode_request,
    frame,
)
from shoal.types.outputs import FinishReason, TokenLogprobs

EVENTS = [
    Accepted([[1, 2], [3]], 2, 16),
    Progress(1, b"data: x\n\n", [5, 6], 3, [TokenLogprobs([5, 7], [-0.5, -1.0], 1)]),
    Beat(1.5),
    Progress(0, finish_reason=FinishReason.STOP, stop_reason="END"),
    Finished(b"data: [DONE]\n\n", 2, 3),
    Failed(503, b"{}", lost=True),
]


@given(st.lists(st.integers(0, 400), max_size=20))
def test_events_are_whole_whatever_the_pieces(cuts: list[int]) -> None:
    data = b"".join(map(frame, EVENTS))
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    reader = FrameReader()
    found = []
    for start, end in zip(places, places[1:], strict=False):
        found += reader.feed(data[start:end])
    assert found == EVENTS and not reader.partial


def test_an_event_that_was_cut_off_is_none() -> None:
    reader = FrameReader()
    assert list(reader.feed(frame(Beat(1.0))[:-1])) == [] and reader.partial


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"HTTP/1.1 200 OK\r\n"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        list(FrameReader().feed(data))


def test_events_before_a_broken_one_are_kept() -> None:
    reader = FrameReader()
    found = []
    with pytest.raises(ValueError):
        for event in reader.feed(frame(Beat(1.0)) + b"\x00\x00\x00\x01\xc1"):
            found.append(event)
    assert found == [Beat(1.0)]


def test_a_journal_is_the_sum_of_its_frames() -> None:
    journal = AnswerJournal(index=1)
    logprobs = [TokenLogprobs([5], [-0.5], 1)]
    journal.add(Progress(1, b"a", [5], 1, logprobs, [None], 2))
    journal.add(Progress(1, b"b", [6, 7], 4, logprobs))
    journal.add(Progress(1, b"", [8], 0, None, finish_reason=FinishReason.LENGTH))
    assert journal == AnswerJournal(
        index=1,
        token_ids=[5, 6, 7, 8],
        delivered_characters=5,
        logprobs=logprobs * 2,
        prompt_logprobs=[None],
        num_cached_tokens=2,
        finish_reason=FinishReason.LENGTH,
    )
    assert logprobs == [TokenLogprobs([5], [-0.5], 1)], "the frame's own list is not the journal's"


def test_a_request_goes_there_and_back() -> None:
    request = ContinueRequest(
        version=1, path="/v1/completions", body=b"{}", request_id="a", seed=2**63, created=1,
        prompts=[[1]], answers=[AnswerJournal(index=0, token_ids=[3])],
    )  # fmt: skip
    assert decode_request(encode_request(request)) == request
    with pytest.raises(msgspec.DecodeError):
        decode_request(b"{}")
