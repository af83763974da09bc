"""DistributedExecutor: ranks as processes of their own, on this host or several. The registry makes it with a launcher.

Steps leave as messages at once and results come back in order. A thread takes in what workers say and looks after time;
whatever ends the engine is told through the futures, and to the core, which then shuts this down.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.distributed.status import RankStatus, StatusBoard, read_record
from shoal.errors import EngineDeadError, ShoalError, StartupError
from shoal.executor.base import Executor
from shoal.executor.bring_up import BringUp
from shoal.executor.failure import Evidence, explain_stall
from shoal.executor.hub import WorkerHub
from shoal.executor.launcher import Launcher, WorkerLink
from shoal.log import get_logger
from shoal.messages import (
    BatchResult,
    ExecuteStep,
    IdleDone,
    IdleStep,
    SampleStep,
    ScheduledBatch,
    StartupProgress,
    StepDone,
    StepMessage,
    StopWorker,
    WorkerBeat,
    WorkerExited,
    WorkerFailed,
    WorkerMessage,
)
from shoal.worker.link import BEAT_SECONDS

logger = get_logger(__name__)

_IDLE_SECONDS = 1.0
_TICK_SECONDS = 0.25
# An idle check takes milliseconds, and the next beat of a worker elsewhere has what it said then.
_COUNTING_SECONDS = BEAT_SECONDS + 0.25
_GRACE_SECONDS = 5.0
# Four beats of a worker: when a step does not end, one that has not been heard for so long is why.
_SILENT_SECONDS = 2.0


@dataclasses.dataclass
class _Pending:
    """A step, or an empty one (future None), whose answer has not come."""

    number: int
    future: Future[BatchResult] | None


class DistributedExecutor(Executor):
    # Sooner than a cut link is noticed by anything else; a worker says every half second that it lives.
    lost_seconds = 10.0

    def __init__(self, config: EngineConfig, launcher: Launcher) -> None:
        self._config, self._launcher = config, launcher
        self._step_timeout = config.parallel.step_timeout
        self._hub: WorkerHub | None = None
        self._bring_up: BringUp | None = None
        self._evidence: Evidence | None = None
        self._board: StatusBoard | None = None
        self._beats: dict[int, tuple[WorkerBeat, float]] = {}
        # Answers come in this order, as messages leave in it. The lock is for it, the clock and the failure.
        self._pending: deque[_Pending] = deque()
        self._lock = threading.Lock()
        self._executed: Future[BatchResult] | None = None
        self._clock = time.monotonic()  # when the oldest of them began, or the last answer came
        self._num_idle = 0
        self._noticed: deque[str] = deque()  # what went wrong in sending
        self._failure: EngineDeadError | None = None
        self._on_failure: Callable[[EngineDeadError], None] | None = None
        self._ending = False
        self._threads: list[threading.Thread] = []
        self._result_decoder = msgspec.msgpack.Decoder(WorkerMessage)

    # --- the start ---------------------------------------------------------------------------------------------

    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        parallel = self._config.parallel
        try:
            address = self._launcher.listen_address()
            self._hub = hub = WorkerHub(self._config.generation, parallel.world_size, address, self._launcher.token())
            self._bring_up = BringUp(self._config, self._launcher, hub, on_progress)
            self._evidence = Evidence(self._bring_up.describe)
            self._launcher.start(
                WorkerLink(endpoint=hub.endpoint, generation=self._config.generation, token=hub.token), hub.report_exit
            )
            facts = self._bring_up.run()
            self._beats = self._bring_up.beats
            self._open_board()
        except BaseException as error:
            self._launcher.tell(str(error))
            self._end(grace_seconds=0.0)
            raise
        self._clock = time.monotonic()
        targets = [self._watch] if hub.results is None else [self._watch, self._take_results]
        self._threads = [threading.Thread(target=each, name=each.__name__, daemon=True) for each in targets]
        for thread in self._threads:
            thread.start()
        return facts

    def _open_board(self) -> None:
        """The status records of this host's ranks: to read when a step does not end."""
        assert self._hub is not None and self._bring_up is not None
        for state in self._bring_up.states:
            if state.hello and state.ready and state.ready.status_address:
                if state.hello.host_identity != self._hub.host_identity:
                    continue
                try:
                    self._board = StatusBoard.open(state.ready.status_address)
                except OSError as error:
                    raise StartupError(f"cannot open the status records of {state.hello.hostname}: {error}") from error
                return

    def watch(self, on_failure: Callable[[EngineDeadError], None]) -> None:
        self._on_failure = on_failure

    # --- steps -------------------------------------------------------------------------------------------------

    def execute(self, batch: ScheduledBatch) -> None:
        # Pending from here on: an idle check between this and `sample` would find tokens missing that are not sampled.
        future: Future[BatchResult] = Future()
        self._executed = future
        with self._lock:
            failure = self._failure
            if failure is None:
                self._expect(_Pending(batch.step_id, future))
        if failure is None:
            self._send(ExecuteStep(batch))
        else:
            future.set_exception(failure)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        future, self._executed = self._executed, None
        assert future is not None, "sample follows execute"
        if not future.done():
            self._send(SampleStep(step_id, grammar_masks))
        return future

    def tell_counts(self) -> float:
        self._check_idle_ranks()
        return _COUNTING_SECONDS

    def _check_idle_ranks(self) -> None:
        """Let all ranks meet, unless a step has begun meanwhile: the lock keeps one from being sent before this is."""
        with self._lock:
            if self._failure is None and not self._pending:
                self._num_idle += 1
                self._expect(_Pending(self._num_idle, None))
                self._send(IdleStep(self._num_idle))

    def _expect(self, pending: _Pending) -> None:
        """Before it is asked for, as the answer may come at once. The caller has the lock."""
        if not self._pending:
            self._clock = time.monotonic()
        self._pending.append(pending)

    def _send(self, message: StepMessage) -> None:
        """To all ranks. Where that fails the engine is at its end: the futures tell why, as soon as that is known."""
        assert self._hub is not None
        try:
            self._hub.send_step(message)
        except EngineDeadError as error:
            self._noticed.append(str(error))

    def _answer(self, number: int, result: BatchResult | None) -> None:
        """The oldest of what is pending is done."""
        with self._lock:
            if not self._pending:
                return  # after a failure
            expected = self._pending[0]
            if expected.number != number or (expected.future is None) != (result is None):
                raise EngineDeadError(f"the answer to {number} came in place of the one to {expected.number}")
            self._pending.popleft()
            self._clock = time.monotonic()
        if expected.future is not None and result is not None:
            expected.future.set_result(result)

    # --- threads -----------------------------------------------------------------------------------------------

    def _take_results(self) -> None:
        """Results of an output rank on this host."""
        assert self._hub is not None and self._hub.results is not None
        try:
            while (payload := self._hub.results.receive()) is not None:
                self._take(self._result_decoder.decode(payload))
        except (EngineDeadError, msgspec.MsgspecError) as error:
            self._fail(f"what the output rank sends cannot be taken in: {error}")

    def _watch(self) -> None:
        """What workers say, and time."""
        assert self._hub is not None and self._evidence is not None
        hub, evidence = self._hub, self._evidence
        try:
            while not self._ending and self._failure is None:
                until_verdict = evidence.seconds_left
                if until_verdict == 0.0:
                    self._fail(evidence.cause()[1])
                    return
                wait = _TICK_SECONDS if until_verdict is None else min(until_verdict, _TICK_SECONDS)
                for message in hub.poll(wait):
                    self._take(message)
                for rank, seconds in hub.unheard(self.lost_seconds).items():
                    evidence.lost(rank, seconds)
                while self._noticed:
                    evidence.noticed(self._noticed.popleft())
                self._look_at_the_clock()
        except Exception as error:  # nobody would look after the workers any more
            self._fail(str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}")

    def _take(self, message: WorkerMessage) -> None:
        assert self._evidence is not None
        match message:
            case StepDone(result):
                if result.generation == self._config.generation:
                    self._answer(result.step_id, result)
            case IdleDone(number):
                self._answer(number, None)
            case WorkerBeat(rank):
                self._beats[rank] = message, time.monotonic()
            case WorkerExited(rank, how):
                self._evidence.exited(rank, how)
            case WorkerFailed(rank, kind, text):
                self._evidence.failed(rank, kind, text)

    def _look_at_the_clock(self) -> None:
        with self._lock:
            elapsed = time.monotonic() - self._clock
            pending = self._pending[0] if self._pending else None
        if pending is not None and elapsed > self._step_timeout:
            what = f"step {pending.number}" if pending.future is not None else "the idle check of all ranks"
            self._fail(f"{what} did not end within {self._step_timeout:g} s (--step-timeout): {self.explain_stall()}")
        elif pending is None and elapsed > _IDLE_SECONDS and self._config.parallel.world_size > 1:
            self._check_idle_ranks()

    def explain_stall(self) -> str:
        assert self._bring_up is not None and self._hub is not None
        pids_here = {
            state.rank: state.hello.pid
            for state in self._bring_up.states
            if state.hello is not None and state.hello.host_identity == self._hub.host_identity
        }
        silent = self._hub.unheard(_SILENT_SECONDS)
        return explain_stall(list(self._records().values()), pids_here, silent, self._bring_up.describe)

    def _records(self) -> dict[int, RankStatus]:
        """The status records of all ranks: this host's board, and what the others sent last."""
        records: dict[int, RankStatus] = {}
        now = time.monotonic()
        for beat, received in list(self._beats.values()):
            record = read_record(beat.status, beat.time + now - received)
            if record is not None:
                records[record.rank] = record
        if self._board is not None:
            records |= {record.rank: record for record in self._board.read()}
        return records

    def rank_statuses(self) -> list[RankStatus]:
        return [record for _, record in sorted(self._records().items())]

    def stage_busy_seconds(self) -> list[float]:
        parallel = self._config.parallel
        if parallel.pipeline_size == 1:
            return []
        records = self._records()
        busy = [records[rank].busy_seconds if rank in records else 0.0 for rank in range(parallel.world_size)]
        return [max(busy[start : start + parallel.tensor_size]) for start in range(0, len(busy), parallel.tensor_size)]

    # --- the end -----------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        """Nothing goes on: tell whoever waits."""
        failure = EngineDeadError(reason)
        with self._lock:
            if self._ending or self._failure is not None:
                return
            self._failure = failure
            pending = list(self._pending)
            self._pending.clear()
        assert self._hub is not None
        self._hub.stop_channels()
        self._launcher.tell(reason)
        for each in pending:
            if each.future is not None:
                each.future.set_exception(failure)
        if self._on_failure is not None:
            self._on_failure(failure)

    def abandon(self) -> None:
        self._launcher.abandon()

    def shutdown(self) -> None:
        healthy = self._failure is None and not any(each.future for each in self._pending)
        if healthy and self._threads and not self._ending:
            self._ending = True
            self._send(StopWorker())
        self._end(_GRACE_SECONDS if healthy else 0.0)

    def _end(self, grace_seconds: float) -> None:
        """End threads, workers and sockets, in this order. May be called twice."""
        with self._lock:
            self._ending = True
            pending = list(self._pending)
            self._pending.clear()
        for each in pending:
            if each.future is not None:
                each.future.set_exception(EngineDeadError("the engine was shut down"))
        if self._hub is None:
            self._launcher.stop(grace_seconds)  # it may have joined a cluster
            return
        self._hub.stop_channels()
        for thread in self._threads:
            thread.join()
        if not grace_seconds:
            self._hub.stop_workers()
        self._launcher.stop(grace_seconds)
        self._hub.close()
