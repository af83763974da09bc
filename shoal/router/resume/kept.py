"""KeptRequest: one request that its client may come back to. Answered into a ring, from which connections read.

The answer is made by a task that knows no client; store.py owns the requests, entrance.py starts and reads them.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from shoal.protocol import sse
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type
from shoal.router.asgi import Answer, Message
from shoal.router.failover import CRASHES_ALONE, Begun
from shoal.router.request import GenerationRequest
from shoal.router.resume.journals import CannotResume, TrackedJournal
from shoal.router.resume.position import FramePosition, Position, TextPosition
from shoal.router.resume.text import TextState, TrackedTextJournal

Name = tuple[str, str]  # whose it is, and its key

# A request without its journal and its ring.
BASE_BYTES = 2048
_CHUNK_BYTES = 120  # beside the bytes themselves
BUSY = (429, 503)  # nothing is wrong with the request: it may be tried again
KEY_HEADER = "idempotency-key"


class Reader:
    """A connection that reads a kept request. cursor: in bytes of the run's answer. replaced: another took over.

    start: characters of the text that its client had before.
    """

    def __init__(self, cursor: int, start: int = 0) -> None:
        self.cursor = cursor
        self.start = start
        self.replaced = False


class KeptRequest:
    """owner: the router that answers it; None for this one. task: answers it now. idle_since: since when nobody reads.

    digest: of path and body. failure: status and body of an end that was none of the good ones.
    """

    def __init__(
        self, name: Name, digest: bytes, request_id: str, seed: int, created: int, streams: bool, max_ring_bytes: int
    ) -> None:
        self.name = name
        self.digest = digest
        self.request_id = request_id
        self.seed = seed
        self.created = created
        self.streams = streams
        self.max_ring_bytes = max_ring_bytes
        self.owner: str | None = None
        self.task: asyncio.Task[None] | None = None
        self.idle_since = 0.0
        self.journal = TrackedJournal(name[1])
        self.failure: tuple[int, bytes] | None = None
        self.failed_for_good = True
        self.ended = False
        self.dropped = False
        self.cursors: dict[Any, Any] = {}  # of the links to peers: what each of them was told
        # Awaited before bytes become readable; told of changes.
        self.before_bytes: Callable[[], Awaitable[None]] | None = None
        self.on_change: Callable[[], None] | None = None
        self.on_growth: Callable[[int], None] | None = None
        self.attaching = asyncio.Lock()
        self.readers: set[Reader] = set()
        self.status = 0
        self._size = BASE_BYTES
        self._headers: dict[str, str] = {}
        self._text: TrackedTextJournal | None = None
        self._text_state = TextState()  # while there is no such journal
        self._ring: deque[tuple[int, bytes]] = deque()
        self._start = self._end = 0
        self._changed = asyncio.Event()
        self._blocked = False
        self._position: Position | None = None
        self._obstacle: CannotResume | None = None

    @property
    def key(self) -> str:
        return self.name[1]

    @property
    def num_bytes(self) -> int:
        """About what it holds in memory."""
        return self._size

    @property
    def in_use(self) -> bool:
        """Somebody reads it, or is just about to."""
        return self.attaching.locked() or any(not reader.replaced for reader in self.readers)

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def can_be_read(self) -> bool:
        """Whether there is a run here, under way or whole, whose bytes a client can get."""
        return self.owner is None and (self.is_running or self.ended) and not self.may_be_tried_again

    @property
    def may_be_tried_again(self) -> bool:
        return self.failure is not None and (self.failure[0] in BUSY or not self.failed_for_good)

    @property
    def text(self) -> TextState:
        """All that is known of an answer by text."""
        return self._text.state() if self._text is not None else self._text_state

    @text.setter
    def text(self, state: TextState) -> None:
        """What another router has told."""
        self._text_state = state

    # --- a run -------------------------------------------------------------------------------------------------------

    def begin_run(self, position: Position | None) -> Answer:
        """Make room for a run that goes on from here, and return where its answer goes. Nothing may run now.

        position: what the client has; None: nothing. Raises CannotResume, and changes nothing, where it has a text that
        is not here. What peers are told from now on is what the client has.
        """
        by_text = position if isinstance(position, TextPosition) else None
        self._text_state, self._text = self.text.begin(by_text, uuid.uuid4().hex[:8]), None
        self.owner = None
        self._obstacle = None
        try:
            if isinstance(position, FramePosition) or (position is None and self.streams):
                self.journal.go_to(position)
            else:
                self.journal.keep_all()
        except CannotResume as error:
            self._obstacle = error
        self.ended, self.failure, self.status = False, None, 0
        self._position = position
        self._headers = {}
        self.journal.grown = self._grown
        self._forget_answer()
        self.cursors.clear()
        return KeptAnswer(self)

    def let_go(self, now: float) -> None:
        """Another router may go on with it; until that says so, whoever comes here does. Nothing may run now."""
        self._text_state, self._text = self.text, None
        self.idle_since = now
        self._forget_answer()

    def replace(self, journal: TrackedJournal, text: TextState) -> None:
        """Know this of it, as another router does, in the place of what was known. Nothing may run now."""
        self.journal, self._text_state, self._text = journal, text, None
        self._forget_answer()
        self.cursors.clear()

    def _forget_answer(self) -> None:
        """The bytes of a run, and who read them."""
        for reader in self.readers:
            reader.replaced = True
        self._ring.clear()
        self._start = self._end = 0
        self.resize(BASE_BYTES + self.journal.num_bytes + self._text_state.num_bytes - self._size)
        self._notify()

    async def begin_stream(self, answer: Answer) -> None:
        """Where the client has a part already, the stream has begun: what fails now is an event of it.

        Raises CannotResume where what the client has cannot be.
        """
        position = self._position
        begun = position is not None and (not isinstance(position, FramePosition) or bool(position.answers))
        if self.streams and begun:
            await answer.start(200, {"content-type": sse.MEDIA_TYPE, **sse.HEADERS})
        if self._obstacle is not None:
            raise self._obstacle

    def begun(self, request: GenerationRequest) -> Begun:
        """For the forwarding."""
        by_frames = None
        match self._position:
            case TextPosition() as position:
                by_frames = False if position.num_events else None
            case FramePosition() as position:
                by_frames = True if position.answers else None
        self._text = TrackedTextJournal(request, self.key, self._text_state, self._grown)
        return Begun(self.journal, self._text, by_frames)

    async def take(self, message: Message) -> None:
        """ASGI's send, for the run's answer. Waiting in it is the back-pressure of a client that reads slowly."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            self._headers.pop("x-request-id", None)
            return
        ends = not message.get("more_body", False)
        if self.before_bytes is not None and self.status == 200:
            await self.before_bytes()
        self._append(message.get("body", b""))
        self.ended = self.ended or ends
        self._notify()
        if ends and self.on_change is not None:
            self.on_change()
        while self.streams and not self.ended and self._unread() > self.max_ring_bytes:
            self._blocked = True
            await self._changed.wait()
        self._blocked = False

    def drop(self) -> None:
        """It is not kept any more: what works on it ends, and so does who reads it."""
        self.dropped = True
        self.on_growth = self.on_change = None
        if self.task is not None:
            self.task.cancel()
        self._notify()

    def fail(self, status: int, body: bytes) -> None:
        self.failure = (status, body)
        # Of a run that began where a client said that it is, an error may be of that place.
        self.failed_for_good = self._position is None or self.journal.num_crashes > CRASHES_ALONE

    def text_since(self, first_piece: int) -> TextState:
        """What other routers are told of an answer by text that have so many pieces."""
        return self._text.state(first_piece) if self._text is not None else self._text_state.since(first_piece)

    def _append(self, data: bytes) -> None:
        if not data:
            return
        self._ring.append((self._end, data))
        self._end += len(data)
        self.resize(len(data) + _CHUNK_BYTES)
        if self.streams:
            self._trim()

    def _trim(self) -> None:
        """Forget the oldest that every reader has had, above the ring's size."""
        read = min((reader.cursor for reader in self.readers), default=self._end)
        while len(self._ring) > 1:
            start, data = self._ring[0]
            if self._end - start - len(data) < self.max_ring_bytes or start + len(data) > read:
                return
            self._ring.popleft()
            self._start = start + len(data)
            self.resize(-len(data) - _CHUNK_BYTES)

    def _unread(self) -> int:
        """By those that read; nobody's slowness counts when nobody is there."""
        return max((self._end - reader.cursor for reader in self.readers if not reader.replaced), default=0)

    def resize(self, num_bytes: int) -> None:
        """It holds so much more, or less."""
        self._size += num_bytes
        if self.on_growth is not None:
            self.on_growth(num_bytes)

    def _grown(self, num_bytes: int) -> None:
        """The journal has news."""
        self.resize(num_bytes)
        if self.on_change is not None:
            self.on_change()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- readers -----------------------------------------------------------------------------------------------------

    def find(self, event_id: str | None) -> int | None:
        """Where the bytes begin that come after this event; None when the ring does not have it (any more)."""
        if event_id is None:
            return 0 if self._start == 0 else None
        held = b"".join(data for _, data in self._ring)
        mark = f"\nid: {event_id}\n\n".encode("latin-1")
        place = held.find(mark)
        return None if place < 0 else self._start + place + len(mark)

    def attach(self, cursor: int, start: int = 0) -> Reader:
        """A stream has one reader: the newest. start: characters of the text that its client has."""
        reader = Reader(cursor, start)
        if self.streams:
            for other in self.readers:
                other.replaced = True
        self.readers.add(reader)
        self._notify()
        return reader

    def detach(self, reader: Reader, now: float) -> None:
        self.readers.discard(reader)
        if not self.readers:
            self.idle_since = now
        if self.streams:
            self._trim()
        self._notify()

    async def read(self, reader: Reader, answer: Answer, headers: Mapping[str, str]) -> None:
        """Send what there is, and what comes, until the end."""
        answer.request_id = self.request_id
        while True:
            changed = self._changed
            if reader.replaced:
                await answer.failure(409, _error(409, "another connection reads this answer now", "taken_over"))
                return
            if self.dropped and not self.ended:
                await answer.failure(503, _error(503, "the router does not keep this request any more", "unavailable"))
                return
            data = self._from(reader.cursor)
            if data or self.ended:
                ends = self.ended
                if not answer.started:
                    await answer.start(self.status, {**self._headers, **headers})
                reader.cursor += len(data)
                if self._blocked and self._unread() <= self.max_ring_bytes:
                    self._notify()
                if ends:
                    if answer.status == 200:
                        answer.stream_error = self.failure
                    await answer.end(data)
                    return
                await answer.data(data)
            else:
                await changed.wait()

    def _from(self, cursor: int) -> bytes:
        parts: list[bytes] = []
        for start, data in reversed(self._ring):
            if start + len(data) <= cursor:
                break
            parts.append(data if start >= cursor else data[cursor - start :])
        parts.reverse()
        return parts[0] if len(parts) == 1 else b"".join(parts)


class KeptAnswer(Answer):
    """Where the forwarding sends its answer to."""

    def __init__(self, kept: KeptRequest) -> None:
        super().__init__(kept.take, kept.request_id)
        self._kept = kept

    def begin_data(self, data: bytes) -> Callable[[], Awaitable[None]]:
        """What it may wait for (other routers, a slow reader) is a task's business."""
        return functools.partial(self.data, data)

    async def failure(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._kept.fail(status, body)
        await super().failure(status, body, headers)


def _error(status: int, message: str, code: str) -> bytes:
    return ErrorBody(ErrorDetail(message, error_type(status), None, code)).encode()
