"""The clients of a chaos run: so many requests at a time without a pause, each answer compared with the right one."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from tests.chaos.cases import Case
from tests.chaos.client import Door, Outcome, difference, send

_AFTER_FAILURE_SECONDS = 0.2
# Of the requests that may have a key: half have none, a few leave it to the router to make one.
_WAY_WEIGHTS = {"plain": 5, "keyed": 4, "asked": 1}


class Load:
    """Clients that send one case after the other, and compare every answer with the undisturbed one.

    with_keys: requests may come back to their answers. keys_only: from now on all of them may.
    """

    def __init__(
        self,
        doors: Sequence[Door],
        cases: Sequence[Case],
        wanted: dict[int, dict[str, Any]],
        rng: random.Random,
        *,
        with_keys: bool = False,
    ) -> None:
        self._doors, self._cases, self._wanted, self._rng = doors, cases, wanted, rng
        self._with_keys = with_keys
        self.keys_only = False
        self.running: dict[str, Outcome] = {}
        self.failures: list[str] = []
        self.num_checked = 0
        self.num_resumed = 0
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, http: aiohttp.ClientSession, concurrency: int) -> None:
        self._tasks = [asyncio.create_task(self._client(http)) for _ in range(concurrency)]

    async def stop(self) -> None:
        """No new requests; those that run end as they do."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, http: aiohttp.ClientSession) -> None:
        while not self._stopping:
            case = self._rng.choice(self._cases)
            marker = f"chaos-{secrets.token_hex(6)}"
            outcome = self.running[marker] = Outcome(case, marker, time.monotonic(), self._choose_way())
            await send(http, self._doors, outcome)
            del self.running[marker]
            if not self._check(outcome):
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    def _choose_way(self) -> str:
        if not self._with_keys:
            return "plain"
        weights = {way: weight for way, weight in _WAY_WEIGHTS.items() if not (self.keys_only and way == "plain")}
        return self._rng.choices(list(weights), list(weights.values()))[0]

    def _check(self, outcome: Outcome) -> bool:
        self.num_checked += 1
        self.num_resumed += outcome.num_resumed
        case = outcome.case
        fault = outcome.fault
        if fault is None:
            assert outcome.content is not None
            fault = difference(outcome.content, self._wanted[case.number])
        if fault is not None:
            how = "stream" if case.streams else "plain"
            self.failures.append(
                f"case {case.number} ({how} {case.path}, {outcome.way}, {outcome.marker}, "
                f"asked {outcome.num_resumed + 1}x): {fault}"
            )
        return fault is None
