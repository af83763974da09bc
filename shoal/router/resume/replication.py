"""What routers tell each other of kept requests: the messages, how they are made, and how they are taken in.

POST /router/replicate carries a Batch in MessagePack, and the answer is a Reply. Version 1. A link (peers.py) keeps a
Cursor for each request: what its peer has. A request is told of whole again when the peer does not know it.

POST /router/claim carries a Claim: a client has come to this router whose text only the other one has. Who has it, and
answered until then, tells all of it in a Given, and lets go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from shoal.errors import InvalidRequestError
from shoal.protocol.internal import AnswerJournal
from shoal.router.resume.journals import TOKEN_BYTES, TrackedJournal, cost_of
from shoal.router.resume.kept import KeptRequest
from shoal.router.resume.position import AnswerPosition, TextPosition, parse_position
from shoal.router.resume.store import KeptStore
from shoal.router.resume.text import TextState
from shoal.types.outputs import FinishReason, TokenLogprobs

VERSION = 1
PATH = "/router/replicate"
CLAIM_PATH = "/router/claim"
MEDIA_TYPE = "application/x-shoal-replicate"
MAX_BATCH_BYTES = 256 * 1024 * 1024
MAX_CLAIM_BYTES = 64 * 1024

_Message = TypeVar("_Message")


class Head(msgspec.Struct, array_like=True):
    """What a request is; never its body, nor a secret. digest: of its path and body."""

    digest: bytes
    request_id: str
    seed: int
    created: int
    streams: bool


class AnswerNews(msgspec.Struct, omit_defaults=True):
    """As AnswerJournal, of which the peer has `start` tokens (and their log-probabilities)."""

    index: int
    start: int = 0
    token_ids: list[int] = []
    num_characters: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class News(msgspec.Struct, omit_defaults=True):
    """Of one request. head: the first time; what the peer had of it before counts no more then.

    text: of an answer by text, of which the peer has `first_piece` pieces. gone: it is not kept any more.
    """

    scope: str
    key: str
    head: Head | None = None
    prompts: list[list[int]] | None = None
    num_crashes: int = 0
    answers: list[AnswerNews] = []
    first_piece: int = 0
    text: TextState | None = None
    ended: bool = False
    failure: tuple[int, bytes] | None = None
    gone: bool = False


class Batch(msgspec.Struct):
    """router: who tells, new with each start. An empty one says that it lives."""

    version: int
    router: str
    news: list[News]


class Reply(msgspec.Struct):
    """By their place in the batch: requests to be told of whole, and requests that are not to be told of any more."""

    version: int
    router: str
    unknown: list[int]
    refused: list[int]


class Claim(msgspec.Struct):
    """router: who is to answer the request. position: the id of the last event that its client has, without the key."""

    version: int
    router: str
    scope: str
    key: str
    digest: bytes
    position: str

    def read_position(self) -> TextPosition:
        """Raises InvalidRequestError."""
        try:
            position = parse_position(self.position)
        except ValueError as error:
            raise InvalidRequestError(f"the claim has no position: {error}") from None
        if not isinstance(position, TextPosition):
            raise InvalidRequestError(f"{self.position[:40]!r} is no position in a text, which alone is given away")
        return position


class Given(msgspec.Struct):
    """router: who gives. news: the request whole; None: it has no such text."""

    version: int
    router: str
    news: News | None


class _Versioned(msgspec.Struct):
    version: int


encode = msgspec.msgpack.Encoder().encode
_decode_version = msgspec.msgpack.Decoder(_Versioned).decode
_decode_batch = msgspec.msgpack.Decoder(Batch).decode
_decode_claim = msgspec.msgpack.Decoder(Claim).decode
decode_given = msgspec.msgpack.Decoder(Given).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def decode_batch(data: bytes) -> Batch:
    """Raises InvalidRequestError for what is none, or of another version."""
    return _decode(data, _decode_batch, "batch", PATH)


def decode_claim(data: bytes) -> Claim:
    """Raises InvalidRequestError for what is none, or of another version."""
    return _decode(data, _decode_claim, "claim", CLAIM_PATH)


def _decode(data: bytes, decode: Callable[[bytes], _Message], what: str, path: str) -> _Message:
    try:
        version = _decode_version(data).version
        if version != VERSION:
            raise InvalidRequestError(f"the {what} is of version {version}; this router speaks {VERSION} on {path}")
        return decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is no {what} in MessagePack: {error}") from None


# --- telling ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cursor:
    """What a peer has of a request. answers: by index."""

    has_head: bool = False
    has_prompts: bool = False
    num_crashes: int = 0
    answers: Mapping[int, AnswerPosition] = dataclasses.field(default_factory=dict)
    num_pieces: int = 0
    num_events: int = 0
    ended: bool = False
    refused: bool = False


def news_of(kept: KeptRequest, cursor: Cursor) -> tuple[News | None, Cursor]:
    """What is new for a peer, if anything is, and what it has when it has taken that in."""
    journal = kept.journal
    positions = {index: AnswerPosition.of(answer) for index, answer in journal.answers.items()}
    answers = [
        _answer_news(answer, cursor.answers.get(index))
        for index, answer in journal.answers.items()
        if positions[index] != cursor.answers.get(index)
    ]
    text = kept.text_since(cursor.num_pieces)
    has_text = bool(text.pieces) or text.num_events != cursor.num_events
    has_prompts = journal.prompts is not None
    after = Cursor(
        has_head=True,
        has_prompts=has_prompts,
        num_crashes=journal.num_crashes,
        answers=positions,
        num_pieces=cursor.num_pieces + len(text.pieces),
        num_events=text.num_events,
        ended=kept.ended,
    )
    if after == cursor:
        return None, cursor
    head = Head(kept.digest, kept.request_id, kept.seed, kept.created, kept.streams)
    news = News(
        scope=kept.name[0],
        key=kept.key,
        head=None if cursor.has_head else head,
        prompts=journal.prompts if has_prompts and not cursor.has_prompts else None,
        num_crashes=journal.num_crashes,
        answers=answers,
        first_piece=cursor.num_pieces,
        text=text if has_text else None,
        ended=kept.ended,
        failure=kept.failure if kept.ended and not kept.may_be_tried_again else None,
    )
    return news, after


def _answer_news(answer: AnswerJournal, there: AnswerPosition | None) -> AnswerNews:
    start = there.num_tokens if there is not None else 0
    return AnswerNews(
        index=answer.index,
        start=start,
        token_ids=answer.token_ids[start:],
        num_characters=answer.delivered_characters,
        logprobs=None if answer.logprobs is None else answer.logprobs[start:],
        prompt_logprobs=answer.prompt_logprobs if there is None else None,
        num_cached_tokens=answer.num_cached_tokens,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )


# --- taking in -------------------------------------------------------------------------------------------------------


def take_batch(store: KeptStore, batch: Batch, own_name: str, max_ring_bytes: int, now: float) -> Reply:
    """Keep what a peer tells of."""
    store.heard_of(batch.router, now)
    reply = Reply(VERSION, own_name, [], [])
    for place, news in enumerate(batch.news):
        match _take(store, news, batch.router, max_ring_bytes, now):
            case "unknown":
                reply.unknown.append(place)
            case "refused":
                reply.refused.append(place)
    return reply


def _take(store: KeptStore, news: News, router: str, max_ring_bytes: int, now: float) -> str:
    name = (news.scope, news.key)
    kept = store.get(name)
    if news.gone:
        if kept is not None and kept.owner == router and not kept.in_use:
            store.drop(kept)
        return ""
    if kept is not None and _stays(kept, news):
        return "refused"  # both answer it: each goes on by itself
    if news.head is not None:
        if kept is not None:
            for reader in kept.readers:
                reader.replaced = True
            store.silently_drop(kept)
        elif not store.has_room():
            return "refused"
        head = news.head
        kept = KeptRequest(name, head.digest, head.request_id, head.seed, head.created, head.streams, max_ring_bytes)
        kept.owner = router
        store.add(kept, now)
    elif kept is None or kept.owner != router:
        return "unknown"
    return "" if _add(kept, news) else "unknown"


def _stays(kept: KeptRequest, news: News) -> bool:
    """Whether what a peer tells of a request does not replace what is here."""
    if news.head is not None and news.text is not None and news.text.runs and kept.text.runs:
        ours, theirs = kept.text, news.text
        if ours.follows(theirs.runs[-1]):
            return True  # what is here took over from it
        if kept.owner is None and not kept.attaching.locked() and (after := theirs.follows(ours.runs[-1])):
            # It took over from what is here, as the client went there: only who came since then still reads here.
            return any(reader.start >= after.start for reader in kept.readers if not reader.replaced)
    return kept.in_use or (kept.owner is None and news.head is None)


def replace(kept: KeptRequest, given: Given) -> None:
    """Know of a request what a peer gave, which answered it until now. Nothing may run now."""
    news = given.news
    assert news is not None and news.head is not None
    kept.owner, kept.seed, kept.created = given.router, news.head.seed, news.head.created
    kept.request_id = news.head.request_id
    kept.replace(TrackedJournal(kept.key), TextState())
    _add(kept, news)


def _add(kept: KeptRequest, news: News) -> bool:
    """Whether the news follow what is here."""
    journal, size = kept.journal, 0
    if news.prompts is not None:
        journal.prompts = news.prompts
        journal.num_prompt_tokens = sum(map(len, news.prompts))
        size += TOKEN_BYTES * journal.num_prompt_tokens
    journal.num_crashes = news.num_crashes
    for one in news.answers:
        answer = journal.answers.get(one.index)
        if answer is None:
            answer = journal.answers[one.index] = AnswerJournal(index=one.index)
        if len(answer.token_ids) != one.start:
            return False
        answer.token_ids += one.token_ids
        if one.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + one.logprobs
        if one.prompt_logprobs is not None:
            answer.prompt_logprobs = one.prompt_logprobs
        answer.delivered_characters = one.num_characters
        answer.num_cached_tokens = one.num_cached_tokens
        answer.finish_reason, answer.stop_reason = one.finish_reason, one.stop_reason
        size += TOKEN_BYTES * len(one.token_ids) + cost_of(one.logprobs) + cost_of(one.prompt_logprobs)
    if news.text is not None:
        old = kept.text.pieces
        if len(old) != news.first_piece:
            return False
        size += sum(TOKEN_BYTES + len(piece) for piece in news.text.pieces)
        old += news.text.pieces
        kept.text = msgspec.structs.replace(news.text, pieces=old)
    kept.failure = news.failure
    kept.ended = news.ended
    kept.resize(size)
    return True
