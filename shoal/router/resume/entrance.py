"""Entrance: what a client gets that asks to be kept, or comes back. app.py calls it; generate.py makes the answers.

| what comes | what it gets |
|---|---|
| a new key | a run, from its first byte |
| a key whose run is here | the run's bytes from where the client is; a stream's reader before it ends |
| a key whose run has lost those bytes, or is a peer's | a new run, from the journal cut to where the client is |
| the same, with a text that is not known here | a peer that knows it gives it away, and a new run goes on from there |
| a key that nobody knows, with Last-Event-ID | 409: it was too long away |
| a key of another request | 422 |
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec

from shoal.errors import InvalidRequestError, ShoalError
from shoal.log import get_logger
from shoal.observability.router_metrics import RouterMetrics
from shoal.protocol import sse
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type
from shoal.router.admission import ApiKey
from shoal.router.asgi import Answer
from shoal.router.resume import replication
from shoal.router.resume.journals import CannotResume
from shoal.router.resume.kept import KEY_HEADER, KeptRequest, Name, Reader
from shoal.router.resume.peers import Peers
from shoal.router.resume.position import FramePosition, Position, TextPosition, parse_event_id
from shoal.router.resume.replication import VERSION, Claim, Cursor, Given, news_of
from shoal.router.resume.store import KeptStore

EVENT_HEADER = "last-event-id"
ASK_HEADER = "x-shoal-resumable"
_KEY = re.compile(r"[!#-~]{1,255}")  # visible ASCII but quotes
_SEED_BITS = 63

# Answers the request of this client into the answer.
Run = Callable[[KeptRequest, Answer], Coroutine[Any, Any, None]]

logger = get_logger(__name__)


class NotResumed(Exception):
    """The request does not fit what is kept (status 409 or 422)."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorDetail(message, error_type(status), KEY_HEADER, code)).encode()


def asks_to_be_kept(headers: Mapping[str, str]) -> bool:
    return (
        KEY_HEADER in headers or EVENT_HEADER in headers or headers.get(ASK_HEADER, "").strip().lower() in ("true", "1")
    )


class Entrance:
    """secret: what the scopes of clients without a key of this router are made with; the same in all peers."""

    def __init__(
        self, store: KeptStore, peers: Peers, metrics: RouterMetrics, max_ring_bytes: int, secret: str | None
    ) -> None:
        self.store = store
        self.peers = peers
        self.max_ring_bytes = max_ring_bytes
        self._metrics = metrics
        self._secret = (secret or "shoal").encode()

    async def answer(
        self,
        path: str,
        key: ApiKey,
        headers: Mapping[str, str],
        fields: Mapping[str, Any],
        answer: Answer,
        run: Run,
    ) -> None:
        """Until the client has its answer; cancelled when it went away. Raises ShoalError, NotResumed."""
        own_key, position, event_id = _asked(headers)
        name = (self._scope(key, headers), own_key)
        digest = _digest(path, fields)
        streams = fields.get("stream") is True
        if event_id is not None and not streams:
            raise InvalidRequestError(f"{EVENT_HEADER} is of a stream; the request asks for none (stream)", "stream")
        try:
            kept, reader = await self._attach(name, digest, streams, position, event_id, answer.request_id, run)
        except CannotResume as error:
            # The stream has begun: an error is an event of it.
            await answer.start(200, {"content-type": sse.MEDIA_TYPE, **sse.HEADERS, KEY_HEADER: own_key})
            await answer.error(error)
            return
        try:
            await kept.read(reader, answer, {KEY_HEADER: own_key})
        finally:
            kept.detach(reader, time.monotonic())
            self.store.bound()

    async def _attach(
        self,
        name: Name,
        digest: bytes,
        streams: bool,
        position: Position | None,
        event_id: str | None,
        request_id: str,
        run: Run,
    ) -> tuple[KeptRequest, Reader]:
        while True:
            kept = self.store.get(name)
            if kept is None:
                if position is not None and _has_something(position):
                    raise NotResumed(
                        409,
                        f"nothing is known of the request {name[1]!r} (any more: it is kept {self.store.seconds:g} s); "
                        f"send it without {EVENT_HEADER}, under a new key, to have it answered from the start",
                        "not_resumable",
                    )
                kept = self._new(name, digest, streams, request_id)
                self._start(kept, None, run)
                return kept, kept.attach(0)
            if not hmac.compare_digest(kept.digest, digest):
                raise NotResumed(
                    422,
                    f"the key {name[1]!r} belongs to another request, which had another path or body; "
                    "each request needs a key of its own",
                    "idempotency_key_reused",
                )
            async with kept.attaching:
                if self.store.get(name) is not kept:
                    continue  # it went while others came back to it
                start = position.num_characters if isinstance(position, TextPosition) else 0
                cursor = kept.find(event_id) if kept.can_be_read else None
                if cursor is not None:
                    self._metrics.num_resumed += 1
                    return kept, kept.attach(cursor, start)
                if isinstance(position, TextPosition) and _has_something(position) and not kept.text.has(position):
                    await self._claim(kept, position)
                await self._begin_again(kept, position, run)
                return kept, kept.attach(0, start)

    def _new(self, name: Name, digest: bytes, streams: bool, request_id: str) -> KeptRequest:
        seed = uuid.uuid4().int >> (128 - _SEED_BITS)
        kept = KeptRequest(name, digest, request_id, seed, int(time.time()), streams, self.max_ring_bytes)
        self.store.add(kept, time.monotonic())
        return kept

    async def _claim(self, kept: KeptRequest, position: TextPosition) -> None:
        """Get the text that a client has from the peer that has it; what is here is older, or of another run.

        Raises CannotResume, and changes nothing, where nobody has it.
        """
        given = await self.peers.claim(kept.name, kept.digest, position)
        if given is not None:
            await _end_run(kept)
            replication.replace(kept, given)
        kept.text.check(position)

    async def give(self, claim: Claim) -> Given:
        """What is known of a request, to a peer that a client has come to whose text is here; no run goes on here then.
        It stays this router's until the peer tells of its own run, which it may not begin any more.

        Raises InvalidRequestError.
        """
        position = claim.read_position()
        kept = self.store.get((claim.scope, claim.key))
        if kept is None or not hmac.compare_digest(kept.digest, claim.digest) or not kept.text.has(position):
            return Given(VERSION, self.peers.name, None)
        if kept.owner is None:
            await _end_run(kept)
        if not kept.text.has(position):  # a client came back here meanwhile, with less of it
            return Given(VERSION, self.peers.name, None)
        if kept.owner is None and not kept.is_running and not kept.ended:
            logger.info("request %s: given to another router", kept.request_id)
            kept.let_go(time.monotonic())
        news, _ = news_of(kept, Cursor())
        return Given(VERSION, self.peers.name, news)

    async def _begin_again(self, kept: KeptRequest, position: Position | None, run: Run) -> None:
        """From the journal, where the client is."""
        if kept.owner is not None:
            self._metrics.num_taken_over += 1
            logger.info("request %s: taken over from another router", kept.request_id)
        else:
            self._metrics.num_rerun += 1
        if kept.failure is not None and not kept.may_be_tried_again:
            run = _again(*kept.failure)  # what ended it then would end it now
        await _end_run(kept)
        self._start(kept, position, run)

    def _start(self, kept: KeptRequest, position: Position | None, run: Run) -> None:
        answer = kept.begin_run(position)
        self.peers.watch(kept)
        kept.task = asyncio.create_task(self._run(kept, answer, run), name=f"kept {kept.request_id}")

    async def _run(self, kept: KeptRequest, answer: Answer, run: Run) -> None:
        try:
            await kept.begin_stream(answer)
            await run(kept, answer)
        except ShoalError as error:
            await answer.error(error)
        except Exception:
            logger.exception("request %s failed", kept.request_id)
            message = f"internal error of the router; its log has the details under the request id {kept.request_id}"
            await answer.failure(500, ErrorBody(ErrorDetail(message, error_type(500), None, "internal_error")).encode())
        finally:
            if not kept.readers:
                kept.idle_since = time.monotonic()

    async def close(self) -> None:
        """The router ends: what runs ends here, and the peers know all of it."""
        await self.peers.close()
        tasks = []
        for kept in tuple(self.store):
            if kept.task is not None:
                tasks.append(kept.task)
            self.store.silently_drop(kept)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _scope(self, key: ApiKey, headers: Mapping[str, str]) -> str:
        """Whose request it is: never a secret."""
        if key.name:
            return key.name
        given = headers.get("authorization", "")
        return hmac.digest(self._secret, given.encode("utf-8", "surrogatepass"), "sha256").hex() if given else ""


async def _end_run(kept: KeptRequest) -> None:
    if kept.task is not None and not kept.task.done():
        kept.task.cancel()
        await asyncio.gather(kept.task, return_exceptions=True)


def _asked(headers: Mapping[str, str]) -> tuple[str, Position | None, str | None]:
    """The key, and what the client has: its position and the event's id. Raises InvalidRequestError."""
    given = headers.get(KEY_HEADER)
    if given is not None:
        given = given.strip()
        if len(given) >= 2 and given[0] == given[-1] == '"':
            given = given[1:-1]
        if not _KEY.fullmatch(given):
            raise InvalidRequestError(
                f"{KEY_HEADER} must be 1 to 255 visible ASCII characters without quotes; got {given[:80]!r}"
            )
    event_id = headers.get(EVENT_HEADER, "").strip() or None
    if event_id is None:
        return given or uuid.uuid4().hex, None, None
    try:
        key, position = parse_event_id(event_id)
    except ValueError as error:
        raise InvalidRequestError(f"{EVENT_HEADER} is no id of an event of this router: {error}") from None
    if given is not None and key != given:
        raise InvalidRequestError(f"{EVENT_HEADER} is of the request {key[:80]!r}, {KEY_HEADER} of {given[:80]!r}")
    return key, position, event_id


def _again(status: int, body: bytes) -> Run:
    """A run that ends as an earlier one did."""

    async def run(_: KeptRequest, answer: Answer) -> None:
        await answer.failure(status, body)

    return run


def _has_something(position: Position) -> bool:
    return bool(position.answers) if isinstance(position, FramePosition) else position.num_events > 0


def _digest(path: str, fields: Mapping[str, Any]) -> bytes:
    content = msgspec.json.encode(fields, order="deterministic")
    return hashlib.sha256(path.encode() + b"\n" + content).digest()
