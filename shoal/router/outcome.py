"""How an attempt on one backend can end other than well. Raised by native.py and foreign.py, handled by failover.py."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.errors import EngineError, UnavailableError


class AttemptError(Exception):
    """The request is not answered yet, and may go on elsewhere."""


class Lost(AttemptError):
    """The backend did not come to the end. crashed: its engine, or all of it, ended while it worked on the request.

    broke: the connection did, and whose fault that was is not known. stalled: it is there, but nothing comes from any
    of its requests. engine_lost: it says so itself. slow: it may just have been slow with this request.
    """

    def __init__(
        self,
        reason: str,
        *,
        crashed: bool = False,
        broke: bool = False,
        stalled: bool = False,
        engine_lost: bool = False,
        slow: bool = False,
    ) -> None:
        super().__init__(reason)
        self.crashed = crashed
        self.broke = broke
        self.stalled = stalled
        self.engine_lost = engine_lost
        self.slow = slow


class Moved(AttemptError):
    """The backend shuts down in order."""


class Realign(AttemptError):
    """Nothing failed: the request goes on from an exact place in its journal, by an attempt of its own."""


class Refused(AttemptError):
    """The backend answered with an error before it took the request in; in_stream: after it, as an event of a stream.
    headers: those worth passing on."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str], *, in_stream: bool = False) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body
        self.headers = headers
        self.in_stream = in_stream


class Ended(Exception):
    """The request's own end is an error: OpenAI's error object, for its client."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body


class CannotContinue(EngineError):
    """A stream was cut off that cannot go on by its text."""

    code = "cannot_continue"


class DeadlineError(UnavailableError):
    """The request made no progress for as long as it may."""

    code = "deadline_exceeded"


class QueryOfDeathError(EngineError):
    """Engines ended again and again while they worked on this request."""

    code = "query_of_death"


class ClientGone(Exception):
    """Nobody is there any more to answer to."""
