"""RestartingClient: a core that comes back. When it is lost, another one is started in its place, under the next
generation. Made by `make_client` for the server; AsyncEngine sends again what ran in the lost one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.engine.client import CoreRestarting, EngineClient, ProgressCallback, RestartStatus
from shoal.engine.replica_facts import with_counters
from shoal.engine.restart_budget import RestartBudget, RestartLimits
from shoal.errors import EngineDeadError, ShoalError
from shoal.log import get_logger
from shoal.messages import AddRequest, ClientMessage, CoreOutputs, CoreReady, EngineStats

logger = get_logger(__name__)


class RestartingClient(EngineClient):
    """Errors of the very first start are the caller's; after it, a start that fails counts as an attempt.

    Outputs carry the generation that this client began with; the cores' own are compared here, and nothing that an
    older core still says is handed out.
    """

    def __init__(
        self, config: EngineConfig, make: Callable[[EngineConfig], EngineClient], limits: RestartLimits
    ) -> None:
        """make: the client of one core."""
        self._config = config
        self._make = make
        self._limits = limits
        self._budget = RestartBudget(limits)
        parallel = config.parallel
        self._name = f"replica {parallel.data_rank}" if parallel.data_size > 1 else "the engine"
        self._generation = config.generation
        self._client = make(config)
        self._starting: EngineClient | None = None
        self._up_since = 0.0
        self._restart: RestartStatus | None = None
        self._num_restarts = 0
        self._untold_loss: str | None = None
        self._untold_return = False
        self._failure: str | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closing = False
        self._counted_before = EngineStats()  # by the cores that are gone
        self._last_stats = EngineStats()  # of the core that is there

    @property
    def ready(self) -> CoreReady:
        return msgspec.structs.replace(self._client.ready, generation=self._config.generation)

    @property
    def recovers(self) -> bool:
        return True

    @property
    def restart(self) -> RestartStatus | None:
        return self._restart

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def num_there(self) -> int:
        return int(not self._away and self._failure is None)

    @property
    def num_returning(self) -> int:
        return int(self._away)

    @property
    def _away(self) -> bool:
        """Until whoever receives has heard of a loss, nothing is sent to the core that came after it."""
        return self._restart is not None or self._untold_loss is not None

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        await self._client.start(on_progress)
        self._up_since = time.monotonic()
        return self.ready

    # --- messages --------------------------------------------------------------------------------------------------

    async def send(self, message: ClientMessage) -> None:
        self._check()
        client = self._client
        try:
            await client.send(message)
        except EngineDeadError as error:
            self._lose(client, error)
            self._check()
            raise CoreRestarting(f"{self._name} was restarted meanwhile") from error
        if client is not self._client or self._away:  # it died with the message
            self._check()
            if isinstance(message, AddRequest):
                raise CoreRestarting(f"{self._name} was restarted meanwhile")

    async def receive(self) -> CoreOutputs:
        while True:
            if self._untold_loss is not None:
                reason, self._untold_loss = self._untold_loss, None
                raise CoreRestarting(reason)
            if self._failure is not None:
                raise EngineDeadError(self._failure)
            if self._restart is not None:
                self._changed.clear()
                await self._changed.wait()
                continue
            if self._untold_return:
                self._untold_return = False
                return CoreOutputs(self._config.generation, [])
            client = self._client
            try:
                outputs = await client.receive()
            except EngineDeadError as error:
                self._lose(client, error)
                if client is self._client and self.num_there:  # closing: nobody brings it back
                    raise
                continue
            if client is self._client and self._restart is None and outputs.generation == self._generation:
                return self._own(outputs)

    def _own(self, outputs: CoreOutputs) -> CoreOutputs:
        outputs.generation = self._config.generation
        if outputs.stats is not None:
            outputs.stats = self._whole(outputs.stats)
        return outputs

    def _whole(self, stats: EngineStats) -> EngineStats:
        """With what was counted before the restarts: counters do not go back."""
        self._last_stats = stats
        return with_counters(stats, self._counted_before) if self._num_restarts else stats

    async def utility(self, call: str) -> Any:
        self._check()
        client = self._client
        try:
            result = await client.utility(call)
        except EngineDeadError as error:
            self._lose(client, error)
            self._check()
            raise CoreRestarting(f"{self._name} was restarted meanwhile") from error
        return self._whole(msgspec.convert(result, EngineStats, from_attributes=True)) if call == "stats" else result

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if self._closing:
            raise EngineDeadError("the engine has been shut down")
        if self._away:
            raise CoreRestarting(str(self._restart or self._untold_loss))

    # --- loss and return -------------------------------------------------------------------------------------------

    def _lose(self, client: EngineClient, error: EngineDeadError) -> None:
        """This core is gone: begin to bring up another one, unless that is known already or there were too many."""
        if self._closing or client is not self._client or self._restart is not None or self._failure is not None:
            return
        self._counted_before = with_counters(self._last_stats, self._counted_before)
        self._last_stats = EngineStats()
        self._untold_return = False
        delay = self._next_attempt(str(error), time.monotonic() - self._up_since)
        if delay is not None:
            self._untold_loss = str(error)
            self._task = asyncio.create_task(self._bring_back(delay), name="engine-restart")
        else:
            self._end(client)
        self._changed.set()

    def _next_attempt(self, reason: str, seconds_run: float) -> float | None:
        """The seconds to wait before it; None when there is none: then all is over."""
        delay = self._budget.take(seconds_run)
        limits = self._limits
        if delay is None:
            self._restart = None
            self._failure = (
                f"{reason}; it is not started again after {limits.max_restarts} restarts within {limits.window:g} s "
                "(--max-engine-restarts, --engine-restart-window)"
            )
            logger.error("%s is lost: %s", self._name, self._failure)
            return None
        self._restart = RestartStatus(self._budget.attempt, limits.max_restarts, reason)
        logger.error(
            "%s is lost (%s): starting it again%s, attempt %d of %d",
            self._name, reason, f" in {delay:g} s" if delay else "", self._restart.attempt, limits.max_restarts,
        )  # fmt: skip
        return delay

    async def _bring_back(self, delay: float) -> None:
        lost_at = time.monotonic()
        # Whatever it left (other ranks, sockets, a process that still hangs on to memory) goes first.
        await asyncio.shield(self._end(self._client))
        while True:
            await asyncio.sleep(delay)
            self._generation += 1
            try:
                self._starting = client = self._make(dataclasses.replace(self._config, generation=self._generation))
                await client.start()
                break
            except BaseException as error:
                ended = None if self._starting is None else self._end(self._starting)
                if not isinstance(error, Exception):  # cancelled: `close` waits for its end
                    raise
                if not isinstance(error, ShoalError):
                    logger.exception("%s: the start failed", self._name)
                if ended is not None:
                    await ended
                next_delay = self._next_attempt(str(error) or type(error).__name__, 0.0)
                if next_delay is None:
                    self._changed.set()
                    return
                delay = next_delay
            finally:
                self._starting = None
        logger.warning(
            "%s is back as generation %d, %.1f s after it was lost",
            self._name, self._generation, time.monotonic() - lost_at,
        )  # fmt: skip
        self._client = client
        self._up_since = time.monotonic()
        self._num_restarts += 1
        self._restart = None
        self._untold_return = True
        self._changed.set()

    def _end(self, client: EngineClient) -> asyncio.Task[None]:
        task = asyncio.create_task(_close(client))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    def kill(self, reason: str, replica: int | None = None) -> None:
        for client in (self._client, self._starting):
            if client is not None:
                client.kill(reason)

    async def close(self, drain_seconds: float = 0.0) -> None:
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._restart = None
        if self._failure is None:
            self._failure = "the engine has been shut down"
        self._changed.set()
        await self._client.close(drain_seconds)


async def _close(client: EngineClient) -> None:
    try:
        await client.close()
    except Exception:  # what is left of it must not keep the next one from coming
        logger.exception("a lost engine core could not be closed")
