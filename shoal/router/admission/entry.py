"""One request at the router's entrance, as the admission queue knows it."""

from __future__ import annotations

import dataclasses
import enum
import math


class EntryState(enum.Enum):
    """Where an entry is. RELEASED, REFUSED, EXPIRED and CANCELLED are ends; an entry has one end."""

    NEW = "new"
    QUEUED = "queued"
    ADMITTED = "admitted"
    RELEASED = "released"
    REFUSED = "refused"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """What the queue needs to know of a request; offered once.

    key: the name of its API key ("" for none), between which the queue is fair. priority: lower goes first. weight: the
    key's share within a priority. num_tokens: estimated, prompt and answer. num_bytes: what it holds in memory while it
    waits. max_wait: seconds it may wait. max_concurrent: requests of its key that may run at once; None: no limit.

    All else is the queue's. waited: seconds from the offer to the admission. retry_after: of one that was refused or
    has expired, seconds after which to try again.
    """

    key: str = ""
    priority: int = 0
    weight: float = 1.0
    num_tokens: int = 1
    num_bytes: int = 0
    max_wait: float = math.inf
    max_concurrent: int | None = None

    state: EntryState = dataclasses.field(default=EntryState.NEW, init=False)
    waited: float = dataclasses.field(default=0.0, init=False)
    retry_after: float = dataclasses.field(default=0.0, init=False)
    offered_at: float = dataclasses.field(default=0.0, init=False)
    deadline: float = dataclasses.field(default=math.inf, init=False)
    # Of two entries with equal claims the one that was offered first goes first.
    number: int = dataclasses.field(default=0, init=False)
