"""One attempt on a server that speaks /internal/v1/continue: its frames into the journal and on to the client.

The frame's way is walked for every token: one decode, one addition to the journal, and one send for all that came in
one read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import msgspec

from shoal.protocol import internal
from shoal.protocol.internal import (
    Accepted,
    AnswerJournal,
    Beat,
    ContinueRequest,
    Failed,
    Finished,
    FrameReader,
    Progress,
)
from shoal.router.asgi import Answer
from shoal.router.body_reader import BodyReader, Rest
from shoal.router.flight import Flight
from shoal.router.outcome import Ended, Lost, Moved, Realign, Refused
from shoal.router.request import GenerationRequest
from shoal.router.upstream import as_error_object, backend_headers, internal_headers, read_refusal

URL_PATH = internal.PATH


class Journal:
    """What is known of a request's answers: all that the next server needs to go on.

    num_crashes: engines that ended while they worked on it.
    """

    def __init__(self) -> None:
        self.prompts: list[list[int]] | None = None
        self.answers: dict[int, AnswerJournal] = {}
        self.num_crashes = 0
        self.num_prompt_tokens = 0
        self.num_tokens = 0

    def add(self, progress: Progress) -> None:
        """Raises ValueError for what cannot follow what is there."""
        answer = self.answers.get(progress.index)
        if answer is None:
            answer = self.answers[progress.index] = AnswerJournal(index=progress.index)
        elif answer.finish_reason is not None:
            raise ValueError(f"news of answer {progress.index}, which has ended")
        answer.add(progress)
        self.num_tokens += len(progress.token_ids)

    def check_whole(self) -> None:
        """Called at the end of a request that went well; raises ShoalError where it did not."""

    def request(self, request: GenerationRequest, alone: bool) -> ContinueRequest:
        """What to send to the next server."""
        return ContinueRequest(
            version=internal.VERSION,
            path=request.path,
            body=request.body,
            request_id=request.request_id,
            seed=request.seed,
            created=request.created,
            prompts=self.prompts,
            answers=list(self.answers.values()),
            num_crashes=self.num_crashes,
            deadline_seconds=request.deadline,
            alone=alone,
        )


class NativeAttempt:
    """What it raises is in outcome.py; it returns when all is sent."""

    def __init__(
        self, request: GenerationRequest, journal: Journal, flight: Flight, answer: Answer, stall_timeout: float
    ) -> None:
        self._request = request
        self._journal = journal
        self._flight = flight
        self._answer = answer
        self._stall_timeout = stall_timeout
        self._frames = FrameReader()

    async def run(self, session: aiohttp.ClientSession, alone: bool, internal_secret: str | None) -> None:
        flight, backend = self._flight, self._flight.backend
        body = internal.encode_request(self._journal.request(self._request, alone))
        headers = backend_headers(backend.spec, self._request) | internal_headers(internal_secret)
        headers["content-type"] = internal.REQUEST_MEDIA_TYPE
        clock = backend.clock
        flight.waiting_since = clock()
        async with session.post(backend.url + URL_PATH, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise await read_refusal(response)
            if response.content_type != internal.STREAM_MEDIA_TYPE:
                raise Refused(502, as_error_object(502, b"the server answered with something else than frames"), {})
            flight.has_beats = True
            flight.last_sign = clock()
            with BodyReader(response) as reader:
                flight.begin_wait(clock())
                if not await reader.read(self._take):
                    flight.waiting_since = None
                    rest = " within a frame" if self._frames.partial else ""
                    raise Lost(f"its answer ended{rest} before it was whole", broke=True)

    def _take(self, piece: bytes) -> Rest | None:
        """Take in what was received, and pass it on; what has to wait for something is left to the rest."""
        flight, journal = self._flight, self._journal
        now = flight.last_sign = flight.backend.last_sign = flight.backend.clock()
        parts: list[bytes] = []
        end: Finished | Exception | None = None
        num_tokens = 0
        try:
            for event in self._frames.feed(piece):
                if type(event) is Progress:
                    journal.add(event)
                    num_tokens += len(event.token_ids)
                    if event.num_cached_tokens:
                        flight.num_cached_tokens = event.num_cached_tokens
                    if event.data:
                        parts.append(event.data)
                else:
                    end = self._control(event, now)
                    if end is not None:
                        break
        except (ValueError, msgspec.DecodeError) as error:
            end = Lost(f"it sent what is no frame: {error}")
        except Realign as realign:
            end = realign
        if num_tokens:
            flight.progress(num_tokens, now)
        send = None
        if end is None:
            if parts:
                send = self._answer.begin_data(parts[0] if len(parts) == 1 else b"".join(parts))
            if send is None:
                return None
            parts = []
        flight.waiting_since = None
        return self._take_rest(send, parts, end)

    async def _take_rest(
        self, send: Callable[[], Awaitable[None]] | None, parts: list[bytes], end: Finished | Exception | None
    ) -> bool:
        """Returns whether the request has ended; raises when that was no good end."""
        if send is not None:  # the client is slow, or gets its first bytes
            await send()
        if type(end) is Finished:
            await self._finish(parts, end)
            return True
        if parts:
            await self._answer.data(b"".join(parts))
        if isinstance(end, Exception):
            raise end
        self._flight.begin_wait(self._flight.backend.clock())
        return False

    def _control(
        self, event: Accepted | Beat | Finished | Failed | Progress, now: float
    ) -> Finished | Exception | None:
        """Everything but progress. Returns what ends the attempt."""
        match event:
            case Accepted():
                self._flight.is_running = event.is_running
                self._journal.prompts = event.prompts
                self._journal.num_prompt_tokens = sum(map(len, event.prompts))
                self._flight.num_prompt_tokens = self._journal.num_prompt_tokens
            case Beat():
                self._flight.is_running = event.is_running
                if not (event.is_running or event.restarting):
                    # It waits beside a request that runs alone: that is no time without progress of its own.
                    self._flight.last_progress = now
                if event.seconds_without_progress >= self._stall_timeout:
                    seconds = event.seconds_without_progress
                    return Lost(
                        f"its engine makes no progress for {seconds:.1f} s although there is work",
                        crashed=self._flight.is_running,  # the request may be why
                        stalled=True,
                    )
            case Finished():
                self._flight.num_cached_tokens = event.num_cached_tokens
                return event
            case Failed():
                if event.lost:
                    return Lost("its engine is lost", crashed=event.crashed, engine_lost=True)
                if event.moved:
                    return Moved("it is shutting down")
                return Ended(event.status, event.body)
        return None

    async def _finish(self, parts: list[bytes], end: Finished) -> None:
        self._journal.check_whole()
        self._journal.num_prompt_tokens = end.num_prompt_tokens or self._journal.num_prompt_tokens
        self._journal.num_tokens = end.num_tokens or self._journal.num_tokens
        if self._request.stream:
            await self._answer.end(b"".join([*parts, end.data]))
        else:
            await self._answer.whole(200, end.data)
