"""ReplicatedClient: several engine cores as one. A request goes to the core with the least to do; the end of a core
touches its own requests only, and one that is started again takes part as soon as it is back. Made by `make_client`,
for the server and for LLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.engine.client import (
    CoreRestarting,
    EngineClient,
    ProgressCallback,
    ReplicaStatus,
    RestartStatus,
    SubprocessClient,
)
from shoal.engine.pulse import Pulse
from shoal.engine.recovery import RestartingClient
from shoal.engine.replica_facts import CombinedProgress, combine_ready, combine_stats, stats_of_the_lost
from shoal.engine.restart_budget import RestartLimits
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


def make_client(
    config: EngineConfig,
    one: Callable[[EngineConfig], EngineClient] = SubprocessClient,
    restarts: RestartLimits | None = None,
) -> EngineClient:
    """The client of the cores that `config` asks for. one: makes the client of a single core. restarts: how often a
    core that is lost is started again; None: never."""

    def make(config: EngineConfig) -> EngineClient:
        return one(config) if not restarts or not restarts.max_restarts else RestartingClient(config, one, restarts)

    parallel = config.parallel
    if parallel.data_size == 1:
        return make(config)
    ranks = [dataclasses.replace(parallel, data_rank=rank) for rank in range(parallel.data_size)]
    return ReplicatedClient([make(dataclasses.replace(config, parallel=rank)) for rank in ranks])


class _Replica:
    """One core, and what is known of it."""

    def __init__(self, index: int, client: EngineClient) -> None:
        self.index = index
        self.client = client
        self.workload = Workload()
        # Requests on their way to it: should it be gone when they arrive, another replica gets them.
        self.sending: set[str] = set()
        self.failure: str | None = None
        self.returning = False  # while it is gone: whether it is being started again
        self.num_losses = 0
        self.stats = EngineStats()
        self.pulse = Pulse()

    def add(self, message: AddRequest) -> None:
        if not self.workload:
            self.pulse.begin()
        self.workload.add(message.request)
        self.sending.add(message.request.request_id)

    def drop(self, request_id: str) -> None:
        self.workload.drop(request_id)
        self.sending.discard(request_id)

    def take(self, outputs: CoreOutputs) -> None:
        """Note what came, and take out what is of no request here any more."""
        outputs.replica = self.index
        outputs.deltas = [delta for delta in outputs.deltas if self.workload.take(delta)]
        self.pulse.take(outputs)
        if outputs.stats is not None:
            self.stats = outputs.stats

    @property
    def is_there(self) -> bool:
        return self.failure is None and self.client.num_there > 0

    @property
    def is_gone(self) -> bool:
        """For good."""
        return self.failure is not None and not self.returning

    @property
    def status(self) -> ReplicaStatus:
        if not self.workload or self.failure is not None:
            return ReplicaStatus(self.index, self.failure, 0.0, 0.0)
        return ReplicaStatus(self.index, self.failure, self.pulse.seconds_without_progress, self.pulse.seconds_unheard)


class ReplicatedClient(EngineClient):
    """Balances by what each core has to do, in live counts; equal ones take turns."""

    def __init__(self, clients: Sequence[EngineClient], *, avoid_after: float = _AVOID_AFTER_SECONDS) -> None:
        """avoid_after: seconds; a replica that does nothing for so long although it has work gets no more of it while
        another one gets on."""
        self._avoid_after = avoid_after
        self._replicas = [_Replica(index, client) for index, client in enumerate(clients)]
        self._owners: dict[str, _Replica] = {}
        self._next = 0
        self._apart: _Replica | None = None
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
        return [replica.status for replica in self._replicas]

    @property
    def recovers(self) -> bool:
        return any(replica.client.recovers for replica in self._replicas)

    @property
    def restart(self) -> RestartStatus | None:
        if self.num_there:
            return None
        return next((status for replica in self._replicas if (status := replica.client.restart) is not None), None)

    @property
    def num_restarts(self) -> int:
        return sum(replica.client.num_restarts for replica in self._replicas)

    @property
    def num_there(self) -> int:
        return sum(replica.is_there for replica in self._replicas)

    @property
    def num_returning(self) -> int:
        return sum(not replica.is_there and not replica.is_gone for replica in self._replicas)

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
        while not await self._add_to(self._least_busy(), message):
            pass

    async def send_apart(self, message: AddRequest) -> None:
        replica = self._apart
        if replica is None or not replica.is_there or not await self._add_to(replica, message):
            raise CoreRestarting("the replica that was set apart is gone")

    async def _add_to(self, replica: _Replica, message: AddRequest) -> bool:
        """False when the replica is gone and the request has to go to another one."""
        request_id = message.request.request_id
        num_losses = replica.num_losses
        replica.add(message)
        self._owners[request_id] = replica
        try:
            await replica.client.send(message)
            if replica.num_losses == num_losses:
                return True
        except EngineDeadError as error:
            self._note(replica, error)
        finally:
            wanted = request_id in replica.sending
            replica.sending.discard(request_id)
        if wanted:
            replica.drop(request_id)
            self._owners.pop(request_id, None)
        return not wanted  # it was ended meanwhile

    def _least_busy(self) -> _Replica:
        self._check_alive()
        alive = [replica for replica in self._replicas if replica.is_there and replica is not self._apart]
        if not alive:
            raise CoreRestarting("the replica that is left works on one request alone")
        moving = [replica for replica in alive if replica.status.seconds_without_progress < self._avoid_after]
        total = len(self._replicas)
        chosen = min(
            moving or alive, key=lambda replica: (*replica.workload.cost, (replica.index - self._next) % total)
        )
        self._next = (chosen.index + 1) % total
        return chosen

    def set_apart(self) -> int:
        self._apart = None
        self._apart = self._least_busy()
        return self._apart.index

    def rejoin(self) -> None:
        self._apart = None

    def replica_of(self, request_id: str) -> int:
        owner = self._owners.get(request_id)
        return -1 if owner is None else owner.index

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
                self._note(replica, error)

    async def utility(self, call: str) -> Any:
        self._check_alive()
        results = await self._ask_all(lambda client: client.utility(call))
        if call == "stats":
            return combine_stats(msgspec.convert(result, EngineStats, from_attributes=True) for result in results)
        return results[0]

    async def _ask_all(self, ask: Callable[[EngineClient], Coroutine[Any, Any, Any]]) -> list[Any]:
        """What each core answers; one that is lost meanwhile is left out. Raises EngineDeadError when all are."""
        alive = [replica for replica in self._replicas if replica.is_there]
        results = await asyncio.gather(*(ask(replica.client) for replica in alive), return_exceptions=True)
        for replica, result in zip(alive, results, strict=True):
            if isinstance(result, EngineDeadError):
                self._note(replica, result)
            elif isinstance(result, BaseException):
                raise result
        self._check_alive()
        return [result for result in results if not isinstance(result, BaseException)]

    # --- receiving -------------------------------------------------------------------------------------------------

    async def receive(self) -> CoreOutputs:
        while not self._outputs:
            if self._closing or all(replica.is_gone for replica in self._replicas):
                self._check_alive()
            await self._news.wait()
            self._news.clear()
        return self._outputs.popleft()

    async def _read(self, replica: _Replica) -> None:
        try:
            while replica.failure is None or replica.returning:
                try:
                    outputs = await replica.client.receive()
                except CoreRestarting as error:
                    self._lose(replica, error)
                    continue
                if replica.returning:
                    self._take_back(replica)
                if replica.failure is None and outputs.generation == replica.client.ready.generation:
                    replica.take(outputs)
                    self._hand_out(outputs)
        except EngineDeadError as error:
            self._lose(replica, error)
        except Exception as error:  # nothing of what comes later would be seen: say so, instead of waiting for ever
            logger.exception("what replica %d sends cannot be taken in", replica.index)
            self._lose(replica, EngineDeadError(f"its outputs cannot be taken in: {type(error).__name__}: {error}"))

    def _take_back(self, replica: _Replica) -> None:
        replica.failure, replica.returning = None, False
        logger.warning("replica %d is there again: %d of %d", replica.index, self.num_there, len(self._replicas))

    def _hand_out(self, outputs: CoreOutputs) -> None:
        for delta in outputs.deltas:
            if delta.finish_reason is not None:
                self._owners.pop(delta.request_id, None)
        self._outputs.append(outputs)
        self._news.set()

    def _note(self, replica: _Replica, error: EngineDeadError) -> None:
        """A message did not reach this core. Where another one comes up in its place, `_read` hears of it in order."""
        if not isinstance(error, CoreRestarting):
            self._lose(replica, error)

    def _lose(self, replica: _Replica, error: EngineDeadError) -> None:
        """This core is gone: its requests are told so, the others never notice."""
        if self._closing:
            return
        returning = isinstance(error, CoreRestarting)
        if replica.failure is None:
            self._drop(replica, str(error))
        elif returning or not replica.returning:  # known already
            return
        replica.failure, replica.returning = str(error), returning
        self._news.set()
        if not returning:
            # Whatever it left (other ranks, sockets, a process that still hangs on to memory) goes too.
            task = asyncio.create_task(replica.client.close())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _drop(self, replica: _Replica, reason: str) -> None:
        replica.failure = reason
        replica.num_losses += 1
        lost = [request_id for request_id in replica.workload.drop_all() if request_id not in replica.sending]
        logger.error(
            "replica %d is gone (%s): %d of its requests %s; %d of %d replicas go on",
            replica.index, reason, len(lost), "are moved" if self.recovers else "end with an error",
            self.num_there, len(self._replicas),
        )  # fmt: skip
        message = f"replica {replica.index} is gone: {reason}"
        deltas = [
            TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=message, lost=True) for request_id in lost
        ]
        replica.stats = stats_of_the_lost(replica.stats)
        self._hand_out(CoreOutputs(self.ready.generation, deltas, replica.stats, replica.index))

    def _check_alive(self) -> None:
        if self._closing:
            raise EngineDeadError("the engine has been shut down")
        if self.num_there:
            return
        if not all(replica.is_gone for replica in self._replicas):
            raise CoreRestarting(str(self.restart or "no replica is there for the moment"))
        causes = "; ".join(f"replica {replica.index}: {replica.failure}" for replica in self._replicas)
        raise EngineDeadError(f"all {len(self._replicas)} replicas are gone: {causes}")
