"""EngineClient: the API server's end of an engine core. SubprocessClient starts the core and speaks to it over ipc."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq
import zmq.asyncio

from shoal import errors
from shoal.config.engine_config import EngineConfig
from shoal.engine.leftovers import descendants, end_leftovers
from shoal.engine.parent import GOODBYE, LAST_WORDS_SECONDS
from shoal.errors import EngineDeadError, EngineError, ShoalError, StartupError
from shoal.executor.failure import is_stopped
from shoal.executor.launcher import describe_exit
from shoal.log import get_logger
from shoal.messages import (
    AddRequest,
    ClientMessage,
    CoreFailed,
    CoreMessage,
    CoreOutputs,
    CoreReady,
    Shutdown,
    StartupProgress,
    Utility,
    UtilityResult,
)

logger = get_logger(__name__)

# What an executor of several ranks is left to come forward with its own, better reason.
EXECUTORS_OWN_SECONDS = 15.0

ProgressCallback = Callable[[StartupProgress], None]
_LAST_MESSAGES_SECONDS = 0.5
_LAST_OUTPUTS_SECONDS = 0.05  # of a core that was killed: it had no last words
_KILL_AFTER_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How one engine core does, seen from outside.

    failure: why it is gone, None while it is there. seconds_without_progress: since it last did something although it
    has work; seconds_unheard: since it last said anything; both 0 without work.
    """

    index: int
    failure: str | None
    seconds_without_progress: float
    seconds_unheard: float = 0.0


class CoreRestarting(EngineDeadError):
    """The core is gone, with all that ran in it, and another one comes up in its place."""


@dataclasses.dataclass(frozen=True, slots=True)
class RestartStatus:
    """A core is away. attempt, limit: the number of this attempt to start it again, and of the last one. reason: why
    it is gone, or why the attempt before failed."""

    attempt: int
    limit: int
    reason: str

    def __str__(self) -> str:
        return f"the engine is restarting (attempt {self.attempt} of {self.limit}): {self.reason}"


class EngineClient(ABC):
    """Sends messages to an engine core, or to several, and hands out what comes back. Used from one event loop.

    One that `recovers` starts a lost core again. `send` raises CoreRestarting while no core is there; `receive` raises
    it once for each loss and goes on afterwards, first with empty outputs when the core is back. One over several cores
    tells the loss of one by a TokenDelta with `lost` for each of its requests instead.
    """

    @property
    @abstractmethod
    def ready(self) -> CoreReady:
        """What the core said when it came up."""

    @abstractmethod
    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        """Bring the core up. Raises StartupError, ModelError or ConfigError with the core's own words."""

    @abstractmethod
    async def send(self, message: ClientMessage) -> None:
        """Queue a message. Raises EngineDeadError when the core is gone."""

    @abstractmethod
    async def receive(self) -> CoreOutputs:
        """The next outputs. Raises EngineDeadError when the core is gone and all it sent was handed out."""

    @abstractmethod
    async def utility(self, call: str) -> Any:
        """Ask the core something outside the token path ("ping", "stats", "reset_prefix_cache")."""

    @abstractmethod
    async def close(self, drain_seconds: float = 0.0) -> None:
        """End the core; running requests have `drain_seconds` to finish. Nothing of it is left afterwards."""

    @abstractmethod
    def kill(self, reason: str, replica: int | None = None) -> None:
        """End the core at once, or one of several. All who wait for it hear that "the engine core `reason`"."""

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """Each core's own state where there are several behind this client."""
        return ()

    # --- recovery: nothing of it in a client whose core, once lost, stays so ---

    @property
    def recovers(self) -> bool:
        """Whether what a lost core worked on can go on here."""
        return False

    @property
    def restart(self) -> RestartStatus | None:
        """While no core is there, and one comes up."""
        return None

    @property
    def num_restarts(self) -> int:
        """How often a core came back."""
        return 0

    @property
    def num_there(self) -> int:
        """How many cores take requests now."""
        return 1

    @property
    def num_returning(self) -> int:
        """How many cores are being started again."""
        return 0

    # --- a request that must run alone: of several cores, one is set apart for it ---

    def set_apart(self) -> int:
        """Send nothing but what `send_apart` brings to one of the cores. Returns which; what runs there is the caller's
        to end."""
        return 0

    def rejoin(self) -> None:  # noqa: B027 - a client of one core has nothing to do
        """The core that was set apart takes what comes again."""

    async def send_apart(self, message: AddRequest) -> None:
        """Like `send`, to the core that was set apart."""
        await self.send(message)

    def replica_of(self, request_id: str) -> int:
        """The index of the core that has this request; -1 when none has."""
        return 0


class SubprocessClient(EngineClient):
    """The core as a subprocess of this process; it ends when this process ends, however that happens."""

    # The core. A benchmark or a test puts another one in its place that speaks the same messages.
    program: Sequence[str] = (sys.executable, "-m", "shoal.engine")

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        # An executor of several ranks keeps the deadline itself, and can say which of them did not come. Its phases
        # are not those that it tells: the first rank that loads begins one while the others may still connect.
        several = config.parallel.world_size > 1
        self._startup_timeout = config.parallel.startup_timeout
        if several:
            self._startup_timeout = 2 * self._startup_timeout + EXECUTORS_OWN_SECONDS
        self._phase = "start"
        self._phase_began = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: str | None = None
        self._context: zmq.asyncio.Context | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._ready: CoreReady | None = None
        self._on_progress: ProgressCallback | None = None
        self._outputs: deque[CoreOutputs] = deque()
        self._news = asyncio.Event()
        self._failure: ShoalError | None = None
        self._exited = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._unsent: set[asyncio.Future[Any]] = set()
        self._call_ids = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._descendants: Sequence[psutil.Process] = ()
        self._closing = False

    @property
    def ready(self) -> CoreReady:
        assert self._ready is not None, "start has not returned"
        return self._ready

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        self._on_progress = on_progress
        self._spawn()
        self._phase_began = time.monotonic()
        try:
            while self._ready is None and self._failure is None:
                left = self._phase_began + self._startup_timeout - time.monotonic()
                try:
                    async with asyncio.timeout(max(left, 0.0)):
                        await self._wait_for_news()
                except TimeoutError:
                    if time.monotonic() >= self._phase_began + self._startup_timeout:
                        self._failure = StartupError(
                            f"the engine core did not finish phase {self._phase!r} within "
                            f"{self._startup_timeout:g} s (--startup-timeout){self._stopped()}"
                        )
        except BaseException:
            await self.close()
            raise
        if self._ready is None:
            failure = self._failure
            await self.close()
            assert failure is not None
            raise failure
        return self._ready

    def _spawn(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="shoal-")  # mode 0700: nobody else can connect
        endpoints = [f"ipc://{Path(self._directory) / name}" for name in ("in", "out")]
        self._context = zmq.asyncio.Context()
        self._input = self._context.socket(zmq.PUSH)
        self._output = self._context.socket(zmq.PULL)
        for socket, endpoint in ((self._input, endpoints[0]), (self._output, endpoints[1])):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        command = [*self.program, "--input", endpoints[0], "--output", endpoints[1]]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its exit is reported
            self._process.stdin.write(self._config.to_json() + b"\n")
            self._process.stdin.flush()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(self._process, loop), name="core-watch", daemon=True).start()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._report_exit())]

    def _watch(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._exited.set)

    async def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(CoreMessage)
        try:
            while True:
                message = decoder.decode(await self._output.recv())
                self._remove_names()
                self._take(message)
        except Exception as error:  # nothing that comes later would be heard: say so, instead of waiting for ever
            logger.exception("what the engine core sends cannot be taken in")
            self._fail(
                EngineDeadError(f"what the engine core sends cannot be taken in: {type(error).__name__}: {error}")
            )

    def _remove_names(self) -> None:
        """Once the core has come to both sockets, nobody needs their names: so nothing is left of them even when this
        process and the core are ended at once, as with their process group or their container."""
        if self._directory is not None and int(self._input.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _take(self, message: CoreMessage) -> None:
        match message:
            case CoreOutputs():
                if message.generation == self._config.generation:
                    self._outputs.append(message)
            case UtilityResult(call_id, result, error):
                future = self._calls.pop(call_id, None)
                if future is not None and not future.done():
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(EngineError(error))
                return
            case StartupProgress(phase):
                if phase != self._phase:
                    self._phase, self._phase_began = phase, time.monotonic()
                if self._on_progress is not None:
                    self._on_progress(message)
                return
            case CoreReady():
                self._ready = message
                assert self._process is not None
                self._descendants = descendants(self._process.pid)
            case CoreFailed(kind, text):
                self._fail(_make_error(kind, text, started=self._ready is not None))
        self._news.set()

    async def _report_exit(self) -> None:
        """When the process has ended, say so after the last messages that it may have sent."""
        await self._exited.wait()
        assert self._process is not None
        was_killed = self._process.returncode < 0
        seconds = _LAST_OUTPUTS_SECONDS if was_killed else _LAST_MESSAGES_SECONDS
        deadline = asyncio.get_running_loop().time() + seconds
        while self._failure is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        how = describe_exit(self._process.returncode)
        self._fail(EngineDeadError(f"the engine core {how}") if self._ready else StartupError(f"the engine core {how}"))

    def _fail(self, failure: ShoalError) -> None:
        if self._failure is None:
            self._failure = failure
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(str(self._failure)))
        self._calls.clear()
        for sending in self._unsent:
            if not sending.done():
                sending.set_exception(EngineDeadError(str(self._failure)))
        self._news.set()

    async def _wait_for_news(self) -> None:
        await self._news.wait()
        self._news.clear()

    async def send(self, message: ClientMessage) -> None:
        self._check_alive()
        sending: asyncio.Future[Any] = asyncio.ensure_future(self._input.send(self._encoder.encode(message)))
        if not sending.done():  # nobody is connected: a core that has died, and whose end is noticed in a moment
            self._unsent.add(sending)
            sending.add_done_callback(self._unsent.discard)
        await sending

    async def receive(self) -> CoreOutputs:
        while not self._outputs:
            self._check_alive()
            await self._wait_for_news()
        return self._outputs.popleft()

    async def utility(self, call: str) -> Any:
        self._check_alive()
        call_id = next(self._call_ids)
        self._calls[call_id] = asyncio.get_running_loop().create_future()
        await self.send(Utility(call_id, call))
        return await self._calls[call_id]

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        if self._closing:
            raise EngineDeadError("the engine has been shut down")

    def kill(self, reason: str, replica: int | None = None) -> None:
        if self._process is not None:
            reason += self._stopped()
            self._process.kill()  # does nothing to a process that has been waited for
        self._fail(EngineDeadError(f"the engine core {reason}"))

    def _stopped(self) -> str:
        if self._process is None or not is_stopped(self._process.pid):
            return ""
        return f"; it was stopped (pid {self._process.pid}: SIGSTOP, or a debugger holds it)"

    async def close(self, drain_seconds: float = 0.0) -> None:
        if self._closing:
            return
        self._closing = True
        if self._process is not None:
            await self._end_process(self._process, drain_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(EngineDeadError("the engine has been shut down"))
        if self._context is not None:
            self._context.destroy(linger=0)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _end_process(self, process: subprocess.Popen[bytes], drain_seconds: float) -> None:
        """Ask it to end, then make it: by message, by SIGTERM's big brother after a deadline."""
        if self._ready is not None and process.poll() is None:
            shutdown = self._encoder.encode(Shutdown(drain_seconds))
            asked: asyncio.Future[Any] = asyncio.ensure_future(self._input.send(shutdown))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds + _KILL_AFTER_SECONDS):
                    await self._exited.wait()
            asked.cancel()  # where it is still not sent, nobody is there to take it
        elif process.poll() is None and self._config.parallel.num_nodes > 1:
            # The other nodes are to hear that it is ended on purpose; it reads no messages while it starts.
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, TimeoutError):
                process.stdin.write(GOODBYE)
                process.stdin.close()
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self._exited.wait()
        if process.poll() is None:
            process.kill()
        await self._exited.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if killed := await end_leftovers(self._descendants):
            logger.warning("processes that the engine core left behind were killed: %s", ", ".join(map(str, killed)))


def _make_error(kind: str, text: str, *, started: bool) -> ShoalError:
    """The error of our tree that the core named; while it starts, anything unforeseen is a StartupError."""
    error_class = getattr(errors, kind, EngineError)
    if not (isinstance(error_class, type) and issubclass(error_class, ShoalError)):
        error_class = EngineError
    if started:
        return EngineDeadError(f"the engine core failed: {text}")
    return StartupError(text) if error_class is EngineError else error_class(text)
