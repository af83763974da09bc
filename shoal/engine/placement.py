"""Placement: which answers are in an engine core, which wait here, and who goes next. Filled by AsyncEngine.

An answer waits while no core is there, or beside a request that must run alone: one that was in the core at two crashes
(or whose sender asks for it) gets a core to itself, one after the other, until it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

from shoal.engine.client import CoreRestarting, EngineClient
from shoal.engine.streams import Answer, RequestStream
from shoal.log import get_logger
from shoal.messages import AbortRequests, AddRequest
from shoal.types.outputs import FinishReason

logger = get_logger(__name__)

# A request that was in the core at so many crashes does not run again, if it was alone at the last one. (Its answers
# may be in several cores: when all of them are killed at once, that says nothing of it.)
MAX_CRASHES = 3

# (answers, why, in words, whether another engine could go on)
End = Callable[[Sequence[Answer], FinishReason, str | None, bool], None]


class Placement:
    """`end` ends answers that no core will end; `end_by_journal` one whose ids are complete. Both call `forget`."""

    def __init__(self, client: EngineClient, end: End, end_by_journal: Callable[[Answer], None]) -> None:
        self.num_continued = 0  # answers that were sent again
        self.num_tokens_replayed = 0  # that a core was told with them
        self.in_core: dict[str, Answer] = {}  # by engine id; those on their way too
        self.busy_since = 0.0  # time.monotonic() of the last time that something came to cores without work
        self._client = client
        self._end = end
        self._end_by_journal = end_by_journal
        self._held: dict[str, Answer] = {}  # by request id
        self._alone: RequestStream | None = None  # the one that has a core to itself
        self._orders = itertools.count()
        self._wake = asyncio.Event()

    @property
    def held(self) -> Sequence[Answer]:
        """Answers that wait here."""
        return list(self._held.values())

    # --- new and ended requests ------------------------------------------------------------------------------------

    async def queue(self, stream: RequestStream) -> None:
        """Send its answers, or let them wait for their turn. Raises EngineDeadError when no core will ever come."""
        stream.order = next(self._orders)
        for answer in stream.answers:
            if not answer.open:
                continue
            if stream.runs_alone or self._held or not self._num_free:
                self._hold(answer)
            else:
                await self._send(answer)

    def forget(self, answer: Answer) -> str | None:
        """It has ended. Returns its engine id if a core may still work on it."""
        self._held.pop(answer.request_id, None)
        engine_id = self._take_out(answer)
        self.wake()
        return engine_id

    def wake(self) -> None:
        """Something has changed: see who may go now."""
        if self._held or self._alone is not None:
            self._wake.set()

    def _take_out(self, answer: Answer) -> str | None:
        """Nothing that a core says of it from now on is believed: it comes under another id next time."""
        engine_id, answer.engine_id = answer.engine_id, None
        if engine_id is not None:
            self.in_core.pop(engine_id, None)
        return engine_id

    def _hold(self, answer: Answer) -> None:
        self._take_out(answer)
        if answer.aborting:
            self._end([answer], FinishReason.ABORT, None, False)
            return
        if not self._client.num_there and not answer.owner.request.held:
            why = self._client.restart
            self._end([answer], FinishReason.ERROR, str(why or "the engine is restarting"), True)
            return
        self._held[answer.request_id] = answer
        self._wake.set()

    # --- sending ---------------------------------------------------------------------------------------------------

    @property
    def _num_free(self) -> int:
        """Cores that any request may go to."""
        return self._client.num_there - (self._alone is not None)

    async def _send(self, answer: Answer) -> None:
        self._held.pop(answer.request_id, None)
        if answer.was_sent:
            if answer.journal.end_by_engine()[0] is not None:
                self._end_by_journal(answer)
                return
            self.num_continued += 1
            self.num_tokens_replayed += len(answer.journal.emitted_token_ids)
        if not self.in_core:
            self.busy_since = time.monotonic()
        request = answer.engine_request()
        engine_id = request.request_id
        self.in_core[engine_id] = answer
        send = self._client.send_apart if answer.owner is self._alone else self._client.send
        try:
            await send(AddRequest(request))
            arrived = True
        except CoreRestarting:
            arrived = False
        if answer.engine_id != engine_id:  # it has ended, or was set aside, while it was on its way
            return
        answer.arrived = arrived
        if not arrived:
            self._hold(answer)

    async def run(self) -> None:
        """Send those that wait, in order of arrival, as soon as they may go. Runs until it is cancelled.

        Raises EngineDeadError when no core will ever come.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            with contextlib.suppress(CoreRestarting):  # its return wakes this again
                while await self._send_some():
                    pass

    async def _send_some(self) -> bool:
        """Send all that may go now. False when there are none."""
        self._leave_alone()
        if not self._client.num_there:
            return False
        ready: list[Answer] = []
        if (suspect := self._next_suspect()) is not None:
            await self._isolate(suspect)
            ready = [answer for answer in self._in_order() if answer.owner is suspect]
        elif self._num_free > 0:
            ready = [answer for answer in self._in_order() if not answer.owner.runs_alone]
        for answer in ready:
            if answer.request_id in self._held and self._client.num_there:
                await self._send(answer)
        return bool(ready)

    def _in_order(self) -> list[Answer]:
        return sorted(self._held.values(), key=lambda answer: (answer.owner.order, answer.index))

    def _leave_alone(self) -> None:
        """The core that was one request's own is everybody's again when nothing of that request is in it."""
        if self._alone is not None and not any(answer.engine_id for answer in self._alone.answers):
            self._alone = None
            self._client.rejoin()

    def _next_suspect(self) -> RequestStream | None:
        """Who gets a core to itself now: not the last core while others come back, the rest needs it."""
        if self._alone is not None or (self._client.num_there == 1 and self._client.num_returning):
            return None
        return next((answer.owner for answer in self._in_order() if answer.owner.runs_alone), None)

    async def _isolate(self, stream: RequestStream) -> None:
        """Give it a core; what runs there is ended silently and goes on afterwards."""
        index = self._client.set_apart()
        self._alone = stream
        aside = [
            answer
            for engine_id, answer in self.in_core.items()
            if answer.owner is stream or self._client.replica_of(engine_id) == index
        ]
        logger.warning(
            "request %s runs alone (%s); %d answers are set aside meanwhile",
            stream.request.request_id,
            f"it was in the engine at {stream.num_crashes} crashes" if stream.num_crashes else "as asked for",
            len(aside),
        )
        engine_ids = [engine_id for answer in aside if (engine_id := answer.engine_id) is not None]
        for answer in aside:
            self._hold(answer)
        if engine_ids:
            await self._client.send(AbortRequests(engine_ids, silent=True))

    # --- a core is lost --------------------------------------------------------------------------------------------

    def lose_all(self, reason: str) -> None:
        """The only core is gone; what was on its way to it is told so by `send`."""
        self.lose([answer for answer in self.in_core.values() if answer.arrived], reason)
        for answer in self.held:  # they waited beside a request that ran alone
            if not answer.owner.request.held:
                self._hold(answer)

    def count_crash(self) -> None:
        """A core died that will not come back, with all that was in it."""
        for stream in dict.fromkeys(answer.owner for answer in self.in_core.values() if answer.arrived):
            stream.num_crashes += 1

    def lose(self, answers: Iterable[Answer], reason: str) -> None:
        """These were in a core when it died. They go on, in another one or when it is back, as far as they may."""
        lost = sorted(answers, key=lambda answer: (answer.owner.order, answer.index))
        for answer in lost:
            self._take_out(answer)
        for stream in dict.fromkeys(answer.owner for answer in lost):
            stream.num_crashes += 1
        going_on = 0
        for answer in lost:
            stream = answer.owner
            if not answer.open:  # it ended with another answer of its request
                continue
            if not self._client.recovers:
                self._end([answer], FinishReason.ERROR, reason, True)
            elif stream.num_crashes >= MAX_CRASHES and stream is self._alone:
                self._give_up(stream, reason)
            else:
                self._hold(answer)
                going_on += answer.open
        if lost and self._client.recovers:
            logger.warning("%d of the %d answers that were in the lost core go on", going_on, len(lost))

    def _give_up(self, stream: RequestStream, reason: str) -> None:
        message = (
            f"request {stream.request.request_id} was in the engine at {stream.num_crashes} crashes and does not run "
            f"again; the last one: {reason}"
        )
        logger.error("%s", message)
        self._end([answer for answer in stream.answers if answer.open], FinishReason.ERROR, message, False)
