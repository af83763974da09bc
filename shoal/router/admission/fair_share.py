"""Who is next among those that wait: by priority, then fairly between keys by weight. Used by the queue.

Within a priority: start-time fair queueing (Goyal, Vin, Cheng, 1996). A key's tag is the virtual time at which its next
request may start, and moves on by tokens / weight with each; the lowest tag goes first. So a key's share of the tokens
is that of its weight, however many requests it has waiting, and nothing is saved up by not asking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from shoal.router.admission.entry import Entry


class _Flow:
    """What waits of one key at one priority, in the order of arrival."""

    __slots__ = ("num_bytes", "tag", "waiting")

    def __init__(self, tag: float) -> None:
        self.waiting: OrderedDict[int, Entry] = OrderedDict()
        self.num_bytes = 0
        self.tag = tag

    @property
    def head(self) -> Entry:
        return next(iter(self.waiting.values()))

    def add(self, entry: Entry) -> None:
        self.waiting[entry.number] = entry
        self.num_bytes += entry.num_bytes

    def remove(self, entry: Entry) -> None:
        del self.waiting[entry.number]
        self.num_bytes -= entry.num_bytes


class _Level:
    """One priority. virtual_time: the tag of the request that started last."""

    __slots__ = ("flows", "num_running", "virtual_time")

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self.virtual_time = 0.0
        self.num_running = 0


class FairShare:
    """Entries that wait, and the numbers of those that were taken from it and have not ended."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.waiting_bytes = 0
        self._levels: dict[int, _Level] = {}
        self._running: dict[str, int] = {}

    def push(self, entry: Entry) -> None:
        level = self._levels.setdefault(entry.priority, _Level())
        flow = level.flows.get(entry.key)
        if flow is None:
            flow = level.flows[entry.key] = _Flow(level.virtual_time)
        elif not flow.waiting:
            flow.tag = max(flow.tag, level.virtual_time)
        flow.add(entry)
        self._count(entry, 1)

    def pop(self) -> Entry | None:
        """Take the next one; None when nothing waits but keys that have `max_concurrent` running."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            best: _Flow | None = None
            blocked = []
            for flow in level.flows.values():
                if not flow.waiting:
                    continue
                if self._is_blocked(flow.head):
                    blocked.append(flow)
                elif best is None or (flow.tag, flow.head.number) < (best.tag, best.head.number):
                    best = flow
            if best is None:
                continue
            entry = best.head
            best.remove(entry)
            self._count(entry, -1)
            level.virtual_time = max(level.virtual_time, best.tag)
            best.tag += max(entry.num_tokens, 1) / entry.weight
            for flow in blocked:
                # Held back by its own limit: no reason to overtake others later.
                flow.tag = max(flow.tag, level.virtual_time)
            level.num_running += 1
            self._running[entry.key] = self._running.get(entry.key, 0) + 1
            self._tidy(priority)
            return entry
        return None

    def ended(self, entry: Entry) -> None:
        """One that was taken by `pop` has ended."""
        self._levels[entry.priority].num_running -= 1
        self._running[entry.key] -= 1
        if not self._running[entry.key]:
            del self._running[entry.key]
        self._tidy(entry.priority)

    def remove(self, entry: Entry) -> None:
        """It does not wait any more."""
        self._levels[entry.priority].flows[entry.key].remove(entry)
        self._count(entry, -1)
        self._tidy(entry.priority)

    def displace(self, newcomer: Entry, share: Callable[[int, int], float], fits: Callable[[], bool]) -> list[Entry]:
        """Take out others until there is room for `newcomer`, which waits here; none when that cannot be.

        Those of lower priority go first, then those of the same priority of keys that take up more of the queue for
        their weight, the youngest of the largest first. share(number, bytes): the part of the queue that these are.
        """
        own = self._levels[newcomer.priority].flows[newcomer.key]
        victims: list[Entry] = []
        while not fits():
            victim = self._victim(newcomer, share(len(own.waiting), own.num_bytes) / newcomer.weight, share)
            if victim is None:
                for entry in reversed(victims):
                    self._levels[entry.priority].flows[entry.key].add(entry)
                    self._count(entry, 1)
                return []
            self._levels[victim.priority].flows[victim.key].remove(victim)
            self._count(victim, -1)
            victims.append(victim)
        for priority in {entry.priority for entry in victims}:
            self._tidy(priority)
        return victims

    def __iter__(self) -> Iterator[Entry]:
        """All that wait."""
        return (
            entry for level in self._levels.values() for flow in level.flows.values() for entry in flow.waiting.values()
        )

    def _victim(self, newcomer: Entry, own_share: float, share: Callable[[int, int], float]) -> Entry | None:
        for priority in sorted(self._levels, reverse=True):
            if priority < newcomer.priority:
                return None
            flows = [flow for flow in self._levels[priority].flows.values() if flow.waiting]
            if not flows:
                continue
            sizes = [share(len(flow.waiting), flow.num_bytes) / flow.head.weight for flow in flows]
            largest = max(range(len(flows)), key=sizes.__getitem__)
            if priority > newcomer.priority or sizes[largest] > own_share:
                return next(reversed(flows[largest].waiting.values()))
        return None

    def _is_blocked(self, entry: Entry) -> bool:
        return entry.max_concurrent is not None and self._running.get(entry.key, 0) >= entry.max_concurrent

    def _count(self, entry: Entry, sign: int) -> None:
        self.num_waiting += sign
        self.waiting_bytes += sign * entry.num_bytes

    def _tidy(self, priority: int) -> None:
        """Forget a priority at which nothing waits or runs: there is nothing left to be fair about."""
        level = self._levels[priority]
        if not level.num_running and not any(flow.waiting for flow in level.flows.values()):
            del self._levels[priority]
