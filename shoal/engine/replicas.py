"""ReplicatedClient: several engine cores as one. A request goes to the core with the least to do; the end of a core is
the end of its own requests only. Made by `make_client`, for the server and for LLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.engine.client import EngineClient, ProgressCallback, ReplicaStatus, SubprocessClient
from shoal.engine.replica_facts import CombinedProgress, combine_ready, combine_stats, stats_of_the_lost
from shoal.engine.workload import Workload
from shoal.errors import EngineDeadError, ShoalError
from shoal.log import get_logger
from shoal.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    CoreOutputs,
    CoreReady,
    EngineStats,
    StartupProgress,
    TokenDelta,
)
from shoal.types.outputs import FinishReason

logger = get_logger(__name__)

_AVOID_AFTER_SECONDS = 10.0


def make_client(config: EngineConfig, one: Callable[[EngineConfig], EngineClient] = SubprocessClient) -> EngineClient:
    """The client of the cores that `config` asks for. one: makes the client of a single core."""
    parallel = config.parallel
    if parallel.data_size == 1:
        return one(config)
    ranks = [dataclasses.replace(parallel, data_rank=rank) for rank in range(parallel.data_size)]
    return ReplicatedClient([one(dataclasses.replace(config, parallel=rank)) for rank in ranks])


class _Replica:
    """One core, and what is known of it."""

    def __init__(self, index: int, client: EngineClient) -> None:
        self.index = index
        self.client = client
        self.workload = Workload()
        # Requests on their way to it: should it be gone when they arrive, another replica gets them.
        self.sending: set[str] = set()
        self.failure: str | None = None
        self.stats = EngineStats()
        self._last_progress = time.monotonic()

    def add(self, message: AddRequest) -> None:
        if not self.workload:
            self._last_progress = time.monotonic()
        self.workload.add(message.request)
        self.sending.add(message.request.request_id)

    def drop(self, request_id: str) -> None:
        self.workload.drop(request_id)
        self.sending.discard(request_id)

    def take(self, outputs: CoreOutputs) -> None:
        """Note what came, and take out what is of no request here any more."""
        outputs.replica = self.index
        outputs.deltas = [delta for delta in outputs.deltas if self.workload.take(delta)]
        stats = outputs.stats
        if outputs.deltas or (stats is not None and stats.num_steps_total != self.stats.num_steps_total):
            self._last_progress = time.monotonic()
        if stats is not None:
            self.stats = stats

    @property
    def seconds_without_progress(self) -> float:
        return time.monotonic() - self._last_progress if self.workload and self.failure is None else 0.0


class ReplicatedClient(EngineClient):
    """Balances by what each core has to do, in live counts; equal ones take turns."""

    def __init__(self, clients: Sequence[EngineClient], *, avoid_after: float = _AVOID_AFTER_SECONDS) -> None:
        """avoid_after: seconds; a replica that does nothing for so long although it has work gets no more of it while
        another one gets on."""
        self._avoid_after = avoid_after
        self._replicas = [_Replica(index, client) for index, client in enumerate(clients)]
        self._owners: dict[str, _Replica] = {}
        self._next = 0
        self._ready: CoreReady | None = None
        self._outputs: deque[CoreOutputs] = deque()
        self._news = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def ready(self) -> CoreReady:
        assert self._ready is not None, "start has not returned"
        return self._ready

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        return [
            ReplicaStatus(replica.index, replica.failure, replica.seconds_without_progress)
            for replica in self._replicas
        ]

    # --- coming up and ending --------------------------------------------------------------------------------------

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        """All at once. The first that cannot come up ends the others."""
        progress = CombinedProgress(len(self._replicas))

        async def start_one(replica: _Replica) -> CoreReady:
            def tell(news: StartupProgress) -> None:
                combined = progress.add(replica.index, news)
                if combined is not None and on_progress is not None:
                    on_progress(combined)

            try:
                return await replica.client.start(tell)
            except ShoalError as error:
                raise type(error)(f"replica {replica.index} of {len(self._replicas)}: {error}") from error

        starting = [asyncio.create_task(start_one(replica)) for replica in self._replicas]
        try:
            self._ready = combine_ready(await asyncio.gather(*starting))
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.close()
            raise
        self._readers = [asyncio.create_task(self._read(replica)) for replica in self._replicas]
        return self._ready

    async def close(self, drain_seconds: float = 0.0) -> None:
        self._closing = True
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await asyncio.gather(*(replica.client.close(drain_seconds) for replica in self._replicas), *self._ending)
        self._news.set()

    def kill(self, reason: str, replica: int | None = None) -> None:
        for one in self._replicas:
            if replica in (None, one.index):
                one.client.kill(reason)

    # --- sending ---------------------------------------------------------------------------------------------------

    async def send(self, message: ClientMessage) -> None:
        self._check_alive()
        match message:
            case AddRequest():
                await self._add(message)
            case AbortRequests(request_ids, silent):
                await self._abort(request_ids, silent)
            case _:
                await self._ask_all(lambda client: client.send(message))

    async def _add(self, message: AddRequest) -> None:
        request_id = message.request.request_id
        while True:
            replica = self._least_busy()
            replica.add(message)
            self._owners[request_id] = replica
            try:
                await replica.client.send(message)
                return
            except EngineDeadError as error:
                wanted = request_id in replica.sending
                self._lose(replica, error)
                if not wanted:  # it was ended meanwhile
                    return
            finally:
                replica.sending.discard(request_id)

    def _least_busy(self) -> _Replica:
        self._check_alive()
        alive = [replica for replica in self._replicas if replica.failure is None]
        moving = [replica for replica in alive if replica.seconds_without_progress < self._avoid_after]
        total = len(self._replicas)
        chosen = min(
            moving or alive, key=lambda replica: (*replica.workload.cost, (replica.index - self._next) % total)
        )
        self._next = (chosen.index + 1) % total
        return chosen

    async def _abort(self, request_ids: Sequence[str], silent: bool) -> None:
        by_replica: dict[int, list[str]] = {}
        for request_id in request_ids:
            replica = self._owners.get(request_id)
            if replica is None:  # it has ended: this crossed on the way
                continue
            by_replica.setdefault(replica.index, []).append(request_id)
            on_its_way = request_id in replica.sending
            if silent or on_its_way:
                replica.drop(request_id)
                del self._owners[request_id]
            if on_its_way and not silent:  # the core may never hear of it
                delta = TokenDelta(request_id, finish_reason=FinishReason.ABORT)
                self._hand_out(CoreOutputs(self.ready.generation, [delta], replica=replica.index))
        for index, own in by_replica.items():
            replica = self._replicas[index]
            try:
                await replica.client.send(AbortRequests(own, silent))
            except EngineDeadError as error:
                self._lose(replica, error)

    async def utility(self, call: str) -> Any:
        self._check_alive()
        results = await self._ask_all(lambda client: client.utility(call))
        if call == "stats":
            return combine_stats(msgspec.convert(result, EngineStats, from_attributes=True) for result in results)
        return results[0]

    async def _ask_all(self, ask: Callable[[EngineClient], Coroutine[Any, Any, Any]]) -> list[Any]:
        """What each core answers; one that is lost meanwhile is left out. Raises EngineDeadError when all are."""
        alive = [replica for replica in self._replicas if replica.failure is None]
        results = await asyncio.gather(*(ask(replica.client) for replica in alive), return_exceptions=True)
        for replica, result in zip(alive, results, strict=True):
            if isinstance(result, EngineDeadError):
                self._lose(replica, result)
            elif isinstance(result, BaseException):
                raise result
        self._check_alive()
        return [result for result in results if not isinstance(result, BaseException)]

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self) -> CoreOutputs:
        while not self._outputs:
            self._check_alive()
            await self._news.wait()
            self._news.clear()
        return self._outputs.popleft()

    async def _read(self, replica: _Replica) -> None:
        try:
            while replica.failure is None:
                outputs = await replica.client.receive()
                if replica.failure is None and outputs.generation == self.ready.generation:
                    replica.take(outputs)
                    self._hand_out(outputs)
        except EngineDeadError as error:
            self._lose(replica, error)
        except Exception as error:  # nothing of what comes later would be seen: say so, instead of waiting for ever
            logger.exception("what replica %d sends cannot be taken in", replica.index)
            self._lose(replica, EngineDeadError(f"its outputs cannot be taken in: {type(error).__name__}: {error}"))

    def _hand_out(self, outputs: CoreOutputs) -> None:
        for delta in outputs.deltas:
            if delta.finish_reason is not None:
                self._owners.pop(delta.request_id, None)
        self._outputs.append(outputs)
        self._news.set()

    def _lose(self, replica: _Replica, error: EngineDeadError) -> None:
        """This core is gone: its requests get their endings, the others never notice."""
        if replica.failure is not None or self._closing:
            return
        replica.failure = str(error)
        lost = [request_id for request_id in replica.workload.drop_all() if request_id not in replica.sending]
        num_alive = sum(other.failure is None for other in self._replicas)
        logger.error(
            "replica %d is gone (%s): %d of its requests end with an error; %d of %d replicas go on",
            replica.index, error, len(lost), num_alive, len(self._replicas),
        )  # fmt: skip
        message = f"replica {replica.index} is gone: {error}"
        deltas = [
            TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=message, lost=True) for request_id in lost
        ]
        replica.stats = stats_of_the_lost(replica.stats)
        self._hand_out(CoreOutputs(self.ready.generation, deltas, replica.stats, replica.index))
        # Whatever it left (other ranks, sockets, a process that still hangs on to memory) goes too.
        task = asyncio.create_task(replica.client.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _check_alive(self) -> None:
        if self._closing:
            raise EngineDeadError("the engine has been shut down")
        if all(replica.failure is not None for replica in self._replicas):
            causes = "; ".join(f"replica {replica.index}: {replica.failure}" for replica in self._replicas)
            raise EngineDeadError(f"all {len(self._replicas)} replicas are gone: {causes}")
