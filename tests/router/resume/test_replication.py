"""What a peer knows equals what it was told of, at whatever moments it was told."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError
from shoal.protocol.internal import Progress
from shoal.router.resume import replication
from shoal.router.resume.kept import KeptRequest
from shoal.router.resume.replication import Batch, Cursor, News, decode_batch, decode_reply, encode, news_of, take_batch
from shoal.router.resume.store import KeptStore
from shoal.router.resume.text import TextRun, TextState
from shoal.types.outputs import FinishReason, TokenLogprobs

NAME = ("scope", "key")


def new_store(max_requests=10):
    return KeptStore(30.0, max_requests, 10_000_000)


def new_kept(name=NAME):
    return KeptRequest(name, b"digest", "request", 77, 1234, True, 1000)


def tell(store, kept, cursor, router="one"):
    """Over the wire: what the peer has afterwards."""
    news, after = news_of(kept, cursor)
    batch = decode_batch(encode(Batch(1, router, [] if news is None else [news])))
    reply = decode_reply(encode(take_batch(store, batch, "other", 1000, 0.0)))
    return Cursor() if reply.unknown else Cursor(refused=True) if reply.refused else after


def progress(index, number, end):
    return Progress(
        index, b"", [number], 2, [TokenLogprobs([number, 5], [-1.0, -2.0], 1)],
        [None, TokenLogprobs([1], [-3.0], 2)] if number == 0 and index == 0 else None, 3,
        FinishReason.STOP if end else None, "." if end else None,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["", "told", "forgotten"])), max_size=40))
def test_the_peer_has_what_it_was_told(steps):
    kept, store, cursor = new_kept(), new_store(), Cursor()
    kept.journal.prompts = [[1, 2], [3]]
    ended: set[int] = set()
    for number, (index, then) in enumerate(steps):
        if index not in ended:
            end = number % 9 == 8
            kept.journal.add(
                progress(index, len(kept.journal.answers.get(index, progress(0, 0, False)).token_ids), end)
            )
            ended |= {index} if end else set()
        if then == "forgotten" and (there := store.get(NAME)) is not None:
            store.silently_drop(there)
        if then:
            cursor = tell(store, kept, cursor)
    kept.ended = True
    for _ in range(3):
        cursor = tell(store, kept, cursor)
    there = store.get(NAME)
    assert there is not None and there.owner == "one" and there.ended
    assert there.journal.answers == kept.journal.answers and there.journal.prompts == [[1, 2], [3]]
    assert (there.seed, there.created, there.request_id, there.digest) == (77, 1234, "request", b"digest")
    size = there.num_bytes
    there.begin_run(None)
    assert store.num_bytes == there.num_bytes <= size
    assert news_of(kept, cursor) == (None, cursor), "it is told once"


def test_text():
    kept, store = new_kept(), new_store()
    state = TextState(pieces=["a", "b"], num_tokens=2, num_events=3, head={"id": "x"}, runs=[TextRun("r", 0)])
    kept.text = state
    cursor = tell(store, kept, Cursor())
    kept.text = msgspec.structs.replace(state, pieces=["a", "b", "c"], num_tokens=3, num_events=5, finish_reason="stop")
    tell(store, kept, cursor)
    assert store.get(NAME).text == kept.text


def test_secrets_and_bodies_are_not_told():
    news, _ = news_of(new_kept(), Cursor())
    assert set(News.__struct_fields__) == {
        "scope", "key", "head", "prompts", "num_crashes", "answers", "first_piece", "text", "ended", "failure", "gone",
    }  # fmt: skip
    assert len(encode(news)) < 200


def test_two_owners():
    """The one that somebody reads does not take the other's; the one that nobody reads gives way."""
    ours, theirs, store = new_kept(), new_kept(), new_store()
    store.add(ours, 0.0)
    reader = ours.attach(0)
    assert tell(store, theirs, Cursor()).refused and store.get(NAME) is ours
    ours.detach(reader, 0.0)
    assert tell(store, theirs, Cursor(has_head=True, ended=True)).refused
    assert not tell(store, theirs, Cursor()).refused
    assert store.get(NAME).owner == "one" and ours.dropped


def of_runs(*runs):
    kept = new_kept()
    kept.text = TextState(pieces=["abcdef"], num_events=6, head={}, runs=[TextRun(name, start) for name, start in runs])
    return kept


def test_the_run_that_took_over_wins():
    """By text, where it shows who took over from whom, whoever reads and whoever does not."""
    store, ours = new_store(), of_runs(("a", 0), ("b", 3))
    store.add(ours, 0.0)
    assert tell(store, of_runs(("a", 0)), Cursor()).refused, "ours took over from it"
    came_back = ours.attach(0, 5)
    theirs = of_runs(("a", 0), ("b", 3), ("c", 5))
    assert tell(store, theirs, Cursor()).refused, "its client went there with 5 characters, and has come back"
    ours.detach(came_back, 0.0)
    reader = ours.attach(0, 4)
    assert not tell(store, theirs, Cursor()).refused, "it went there after it was here"
    assert reader.replaced and ours.dropped and store.get(NAME).text == theirs.text
    assert tell(store, ours, Cursor(), "two").refused, "nor does a third router bring the older one back"


def test_a_third_router_hears_of_the_new_owner():
    store = new_store()
    tell(store, new_kept(), Cursor(), "one")
    follower = new_kept()
    assert tell(store, follower, Cursor(has_head=True, ended=True), "two") == Cursor(), "it asks for all"
    tell(store, follower, Cursor(), "two")
    assert store.get(NAME).owner == "two"
    take_batch(store, Batch(1, "one", [News(*NAME, gone=True)]), "me", 1000, 0.0)
    assert store.get(NAME) is not None, "the old owner has nothing to say any more"
    take_batch(store, Batch(1, "two", [News(*NAME, gone=True)]), "me", 1000, 0.0)
    assert store.get(NAME) is None and store.num_bytes == 0


def test_a_full_store_takes_no_more_of_peers():
    store = new_store(max_requests=2)
    results = [tell(store, new_kept(("", str(number))), Cursor()).refused for number in range(4)]
    assert results == [False, False, True, True] and len(store) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no batch"),
        (b"\xff", "no batch"),
        (encode({"version": 2, "router": "x"}), "version 2; this router speaks 1"),
        (encode({"version": 1, "router": 5, "news": []}), "no batch"),
    ],
)
def test_what_is_no_batch(data, message):
    with pytest.raises(InvalidRequestError, match=message):
        decode_batch(data)
    assert replication.VERSION == 1
