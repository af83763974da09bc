"""The links to the other routers: one task for each, which tells what has changed. core.py owns them.

News wait up to 50 ms for others, unless somebody waits for them. A peer that does not answer is tried again each second
and told of everything when it is back; requests do not wait for it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import aiohttp
import msgspec

from shoal.log import get_logger
from shoal.router.resume.kept import KeptRequest, Name
from shoal.router.resume.position import TextPosition
from shoal.router.resume.replication import (
    CLAIM_PATH,
    MEDIA_TYPE,
    PATH,
    VERSION,
    Batch,
    Claim,
    Cursor,
    Given,
    News,
    decode_given,
    decode_reply,
    encode,
    news_of,
)
from shoal.router.resume.store import KeptStore
from shoal.router.upstream import describe

_GATHER_SECONDS = 0.05
_BEAT_SECONDS = 1.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0, sock_connect=2.0)
# As long may a client's bytes wait for a peer.
_LONGEST_WAIT = 1.0
_MOST_NEWS = 512
_MOST_GONE = 10_000
_NO_REPLY = (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.DecodeError)

logger = get_logger(__name__)


def _why(error: Exception) -> str:
    return describe(error) if str(error) else "it does not answer"


class PeerLink:
    """why_down: why the last message did not arrive; None while they do. lag: how old the oldest news are that the peer
    has not taken in."""

    def __init__(self, url: str, key: str | None, router: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.why_down: str | None = None
        self.num_bytes = 0
        self.num_messages = 0
        self._headers = {"content-type": MEDIA_TYPE, **({"authorization": f"Bearer {key}"} if key else {})}
        self._router = router
        self._session = session
        self._dirty: dict[KeptRequest, float] = {}
        self._down_since = 0.0
        self._gone: list[Name] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()

    def lag(self, now: float) -> float:
        if self.why_down is not None:
            return now - self._down_since
        return now - next(iter(self._dirty.values())) if self._dirty else 0.0

    def touch(self, kept: KeptRequest) -> None:
        # A peer that is away is told of everything when it is back.
        if self.why_down is None and kept not in self._dirty:
            self._dirty[kept] = time.monotonic()
            self._wake.set()

    def forget(self, name: Name) -> None:
        """A peer that is away may still have it, and is told when it is back."""
        if len(self._gone) < _MOST_GONE:
            self._gone.append(name)
            self._wake.set()

    def told(self) -> asyncio.Future[None] | None:
        """Done when the peer has all that is known now, or cannot be told. None: it cannot be told."""
        if self.why_down is not None:
            return None
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._urgent.set()
        self._wake.set()
        return future

    async def run(self, all_kept: Callable[[], Iterable[KeptRequest]]) -> None:
        """Until it is cancelled. all_kept: this router's own requests, for a peer that comes (back)."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_SECONDS):
                    await self._wake.wait()
                    if self.why_down is None:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(_GATHER_SECONDS):
                                await self._urgent.wait()
                    else:
                        await asyncio.sleep(_BEAT_SECONDS)
            was_down = self.why_down is not None
            await self.tell()
            if was_down and self.why_down is None:
                for kept in all_kept():
                    kept.cursors[self] = Cursor()
                    self.touch(kept)

    async def tell(self) -> None:
        """Send what there is. Never raises but when it is cancelled."""
        self._wake.clear()
        self._urgent.clear()
        waiting, self._waiting = self._waiting, []
        try:
            while True:
                more = await self._send()
                if not more or self.why_down is not None:
                    return
        finally:
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _send(self) -> bool:
        """One message. Returns whether another is to follow at once."""
        batch: list[News] = []
        told: list[tuple[KeptRequest, Cursor] | None] = []
        for name in self._gone[:_MOST_NEWS]:
            batch.append(News(*name, gone=True))
            told.append(None)
        num_gone = len(batch)
        dirty = dict(list(self._dirty.items())[:_MOST_NEWS])
        for kept in dirty:
            del self._dirty[kept]
            # It is here before the answer is: what is dropped in between, the peer has to forget.
            cursor = kept.cursors.setdefault(self, Cursor())
            if cursor.refused or kept.dropped or kept.owner is not None:
                continue
            news, after = news_of(kept, cursor)
            if news is not None:
                batch.append(news)
                told.append((kept, after))
        data = encode(Batch(VERSION, self._router, batch))
        try:
            reply = decode_reply(await self._post(PATH, data))
        except _NO_REPLY as error:
            self._down(_why(error), min(dirty.values(), default=None))
            return False
        self._up(len(data))
        del self._gone[:num_gone]
        unknown, refused = set(reply.unknown), set(reply.refused)
        for place, entry in enumerate(told):
            if entry is None:
                continue
            kept, cursor = entry
            if place in refused:
                cursor = Cursor(refused=True)
            elif place in unknown:
                cursor = Cursor()
                self._dirty[kept] = dirty[kept]
            kept.cursors[self] = cursor
        return bool(unknown) or len(self._dirty) + len(self._gone) >= _MOST_NEWS

    async def claim(self, name: Name, digest: bytes, position: TextPosition) -> Given | None:
        """What the peer gives of a request that it answered until now; None: nothing."""
        try:
            claim = Claim(VERSION, self._router, *name, digest, str(position))
            given = decode_given(await self._post(CLAIM_PATH, encode(claim)))
        except _NO_REPLY as error:
            logger.warning("the router %s cannot be asked for a request: %s", self.url, _why(error))
            return None
        return given if given.news is not None else None

    async def _post(self, path: str, data: bytes) -> bytes:
        async with self._session.post(
            self.url + path, data=data, headers=self._headers, timeout=_TIMEOUT, allow_redirects=False
        ) as response:
            body = await response.read()
            if response.status != 200:
                raise ValueError(f"it answers {response.status}: {body[:200].decode('utf-8', 'replace')}")
            return body

    def _up(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.num_messages += 1
        if self.why_down is not None:
            logger.info("the router %s is there again", self.url)
        self.why_down = None

    def _down(self, why: str, oldest: float | None) -> None:
        if self.why_down is None:
            logger.warning("the router %s cannot be told of requests: %s", self.url, why)
            self._down_since = time.monotonic() if oldest is None else oldest
        self.why_down = why
        self._dirty.clear()


class Peers:
    """All links of a router. name: of this router, new with each start. synchronous: every byte waits for the peers."""

    def __init__(
        self, urls: Sequence[str], key: str | None, session: aiohttp.ClientSession, store: KeptStore, synchronous: bool
    ) -> None:
        self.name = uuid.uuid4().hex
        self.links = [PeerLink(url, key, self.name, session) for url in urls]
        self._store = store
        self._synchronous = synchronous
        self._tasks: list[asyncio.Task[Any]] = []
        store.on_gone = self._forget

    def start(self) -> None:
        self._tasks = [asyncio.create_task(link.run(self._own), name=f"peer {link.url}") for link in self.links]

    def watch(self, kept: KeptRequest) -> None:
        """Tell the peers of this request from here on. The first bytes of a run wait until they know it."""
        if not self.links:
            return
        is_first = True

        async def before_bytes() -> None:
            nonlocal is_first
            if is_first or self._synchronous:
                is_first = False
                await self.told(kept)

        kept.before_bytes = before_bytes
        kept.on_change = lambda: self._touch(kept)
        self._touch(kept)

    async def told(self, kept: KeptRequest) -> None:
        """Until every peer that can be reached knows all of it. A peer that is slow ends the wait after a second."""
        self._touch(kept)
        futures = [future for link in self.links if (future := link.told()) is not None]
        if futures:
            await asyncio.wait(futures, timeout=_LONGEST_WAIT)

    async def claim(self, name: Name, digest: bytes, position: TextPosition) -> Given | None:
        """What a peer knows of a request whose client has a text that is not known here; it does not answer it any
        more. None: no peer that can be reached, and answers within a second, has that text."""
        asking = [
            asyncio.create_task(link.claim(name, digest, position)) for link in self.links if link.why_down is None
        ]
        if not asking:
            return None
        try:
            done, _ = await asyncio.wait(asking, timeout=_LONGEST_WAIT)
        finally:
            for task in asking:
                task.cancel()
        return next((given for task in done if (given := task.result()) is not None), None)

    async def close(self) -> None:
        """Tell the last news, where that does not take long."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_WAIT):
                await asyncio.gather(*(link.tell() for link in self.links if link.why_down is None))

    def _touch(self, kept: KeptRequest) -> None:
        for link in self.links:
            link.touch(kept)

    def _forget(self, kept: KeptRequest) -> None:
        for link in self.links:
            if link in kept.cursors:
                link.forget(kept.name)

    def _own(self) -> list[KeptRequest]:
        return [kept for kept in self._store if kept.owner is None]
