"""KeptStore: all kept requests of a router, its own and those that peers tell of, bounded. Time is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shoal.router.resume.kept import KeptRequest, Name


class KeptStore:
    """seconds: how long a request lives that nobody reads. max_requests, max_bytes: those that somebody reads, and that
    run, count but are never dropped; they are bounded by what the router runs at a time."""

    def __init__(self, seconds: float, max_requests: int, max_bytes: int) -> None:
        self.seconds = seconds
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_dropped = 0
        # Told of each that goes and was this router's own.
        self.on_gone: Callable[[KeptRequest], None] | None = None
        self._requests: dict[Name, KeptRequest] = {}
        self._heard: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[KeptRequest]:
        return iter(self._requests.values())

    def get(self, name: Name) -> KeptRequest | None:
        return self._requests.get(name)

    def add(self, kept: KeptRequest, now: float) -> None:
        assert kept.name not in self._requests
        kept.idle_since = now
        self._requests[kept.name] = kept
        self.num_bytes += kept.num_bytes
        kept.on_growth = self._grown
        self.bound(keep=kept)

    def drop(self, kept: KeptRequest) -> None:
        """Forget it, and end what still works on it; peers forget it, too."""
        if self.silently_drop(kept) and kept.owner is None and self.on_gone is not None:
            self.on_gone(kept)

    def silently_drop(self, kept: KeptRequest) -> bool:
        """As `drop`, of one that a peer answers from here on."""
        if self._requests.get(kept.name) is not kept:
            return False
        del self._requests[kept.name]
        self.num_bytes -= kept.num_bytes
        kept.drop()
        return True

    def heard_of(self, router: str, now: float) -> None:
        """A peer lives: so do the requests that it told of."""
        self._heard[router] = now

    def sweep(self, now: float) -> None:
        """Drop what nobody came back to in time. Called a few times a second."""
        self._heard = {router: heard for router, heard in self._heard.items() if now - heard <= self.seconds}
        for kept in tuple(self._requests.values()):
            if kept.owner is not None:
                if kept.owner not in self._heard and not kept.in_use:
                    self.drop(kept)
            elif not kept.in_use and now - kept.idle_since > self.seconds:
                self.drop(kept)
        self.bound()

    def has_room(self) -> bool:
        """For one more that a peer tells of: nothing of this router's own is dropped for it."""
        return len(self._requests) < self.max_requests and self.num_bytes < self.max_bytes

    def bound(self, keep: KeptRequest | None = None) -> None:
        """Drop the oldest until the bounds hold: what has ended first, then what nobody reads."""
        for may_go in (_has_ended, _is_left):
            if len(self._requests) <= self.max_requests and self.num_bytes <= self.max_bytes:
                return
            for kept in tuple(self._requests.values()):
                if len(self._requests) <= self.max_requests and self.num_bytes <= self.max_bytes:
                    return
                if kept is not keep and not kept.in_use and may_go(kept):
                    self.num_dropped += 1
                    self.drop(kept)

    def _grown(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


def _has_ended(kept: KeptRequest) -> bool:
    return kept.ended


def _is_left(kept: KeptRequest) -> bool:
    return True
