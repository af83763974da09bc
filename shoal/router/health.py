"""Monitor: a task for each backend that probes it, keeps its three states, and lets it in by the golden prompt.

Attempts that fail wake it (`Backend.suspect`), so what they met is looked at at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from shoal.config.router_settings import GoldenSpec
from shoal.log import get_logger
from shoal.router.backend import Backend, Health
from shoal.router.golden import GoldenJudge
from shoal.router.pool import Pool
from shoal.router.probes import Model, ProbeError, Prober

# Of silent probes so many in a row say that a server is not alive; a refused connection says it at once.
_SILENT_PROBES = 2
# Its models may change while it is up: adapters are loaded, say.
_PROBES_PER_LIST = 10
# Servers that are started together are waited for so long, before the votes that are there decide.
_TOGETHER_SECONDS = 10.0
# One whose answer was wrong is asked again now and then: somebody may have set it right.
_WRONG_ANSWER_SECONDS = 30.0

logger = get_logger(__name__)


class Monitor:
    """golden: None when servers enter without. All of it lives on the router's event loop."""

    def __init__(
        self,
        pool: Pool,
        prober: Prober,
        *,
        interval: float,
        golden: GoldenSpec | None,
    ) -> None:
        self._pool = pool
        self._prober = prober
        self._interval = interval
        self._judge = None if golden is None else GoldenJudge(golden, [backend.url for backend in pool])
        self._tasks: dict[Backend, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin with the backends that are in the pool now: those are started together."""
        self.add(self._pool)
        if self._judge is not None:
            self._timer = asyncio.get_running_loop().call_later(_TOGETHER_SECONDS, self._judge.give_up_all)

    def add(self, backends: Iterable[Backend]) -> None:
        for backend in backends:
            self._tasks[backend] = asyncio.create_task(_Watch(self, backend).run(), name=f"probe {backend.url}")

    async def remove(self, backends: Iterable[Backend]) -> None:
        tasks = []
        for backend in backends:
            if self._judge is not None and self._pool.get(backend.url) is None:
                self._judge.forget(backend.url)
            if (task := self._tasks.pop(backend, None)) is not None:
                tasks.append(task)
        await _end(tasks)

    def set_pace(self, interval: float, timeout: float) -> None:
        """Probe this often from now on, and wait so long for each answer."""
        self._interval = interval
        self._prober.timeout = timeout

    def use_golden(self, golden: GoldenSpec | None) -> None:
        """Another prompt from now on: every server is asked again when it enters the next time."""
        if (None if self._judge is None else self._judge.spec) != golden:
            self._judge = None if golden is None else GoldenJudge(golden)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks.values())
        self._tasks.clear()
        await _end(tasks)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Watch:
    """One backend's task."""

    def __init__(self, monitor: Monitor, backend: Backend) -> None:
        self._monitor = monitor
        self._backend = backend
        self._wake = asyncio.Event()
        self._num_silent = 0
        self._until_list = 0
        self._asks_golden: asyncio.Task[None] | None = None
        self._next_golden = 0.0
        self._said = ""
        backend.suspect = self._wake.set

    async def run(self) -> None:
        try:
            while True:
                self._wake.clear()
                try:
                    await self._look()
                except Exception:
                    # A fault of ours must not leave a server unwatched.
                    logger.exception("probing %s failed", self._backend.url)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._monitor._interval):
                        await self._wake.wait()
        finally:
            if self._asks_golden is not None:
                await _end([self._asks_golden])

    async def _look(self) -> None:
        backend, prober = self._backend, self._monitor._prober
        try:
            if backend.native is None or (not backend.entered and backend.spec.kind == "auto"):
                backend.native = await prober.is_native(backend)
            health = await prober.health(backend)
            is_old = self._until_list <= 0 or not backend.entered or backend.models_are_old
            if health.good and not backend.spec.models and is_old:
                backend.models_are_old = False
                models = await prober.models(backend)
                if not backend.models_are_old:  # nothing was loaded or unloaded meanwhile
                    self._set_models(models)
                self._until_list = _PROBES_PER_LIST
            self._until_list -= 1
            if health.good and backend.native and not backend.entered and (why := await prober.why_shut_out(backend)):
                health = Health(alive=True, progressing=True, admitting=False, why=why)
            self._num_silent = 0
        except ProbeError as error:
            self._num_silent += error.silent
            if error.silent and self._num_silent < _SILENT_PROBES and backend.health.alive:
                return
            health = Health(alive=False, progressing=False, admitting=False, why=str(error))
        self._set_health(health)
        if health.good and not backend.entered:
            self._let_in()
        elif not health.good and self._monitor._judge is not None:
            self._monitor._judge.give_up(backend.url)

    def _set_models(self, models: dict[str, Model]) -> None:
        backend, names = self._backend, tuple(models)
        backend.max_lengths = {
            name: model.max_model_len for name, model in models.items() if model.max_model_len is not None
        }
        backend.adapters = {name: model.parent for name, model in models.items() if model.parent}
        if names != backend.models:
            backend.models = names
            self._monitor._pool.changed()

    def _set_health(self, health: Health) -> None:
        backend, before = self._backend, self._backend.health
        backend.health = health
        if not backend.was_asked:
            backend.was_asked = True
            self._monitor._pool.changed()
        if before.alive and not health.alive:
            backend.dead_since = backend.clock()
        if (before.alive and not health.alive) or (before.admitting and not health.admitting):
            # It may come back as another process, or with another engine: with an empty cache, with other weights. (One
            # that shuts down in order says the same as one whose engine restarts, and comes back as another process.)
            backend.leave("was gone, and has not answered the golden prompt since")
            if self._monitor._judge is not None:
                self._monitor._judge.withdraw(backend.url)
            self._monitor._pool.policy.removed(backend.url)
        if before.good and not health.good:
            logger.warning("%s is left out: %s", backend.url, health.why)
        elif health.good != before.good:
            self._monitor._pool.changed()
        elif not health.good and health.why != before.why:
            logger.info("%s: %s", backend.url, health.why)

    # --- the golden prompt -------------------------------------------------------------------------------------------

    def _let_in(self) -> None:
        """It is well and not in: ask it, unless that is under way."""
        if self._monitor._judge is None:
            self._enter()
            return
        if self._asks_golden is not None and self._asks_golden.done():
            self._asks_golden = None
        if self._asks_golden is None and self._backend.clock() >= self._next_golden:
            self._asks_golden = asyncio.create_task(self._ask_golden(self._monitor._judge))

    async def _ask_golden(self, judge: GoldenJudge) -> None:
        backend, url = self._backend, self._backend.url
        judge.withdraw(url)
        try:
            answers = await self._monitor._prober.golden(backend, judge.spec)
        except ProbeError as error:
            judge.give_up(url)
            self._stay_out(str(error))
            return
        judge.vote(url, answers)
        while (verdict := judge.verdict(url)) is None:
            await asyncio.sleep(min(self._monitor._interval, 0.05))
        if not backend.health.good:
            return
        right, why_not = verdict
        if right:
            self._enter()
        else:
            self._next_golden = backend.clock() + _WRONG_ANSWER_SECONDS
            self._stay_out(why_not)

    def _enter(self) -> None:
        backend = self._backend
        backend.entered = True
        # What it did before it was out is over; it has just answered.
        backend.breaker.succeeded(backend.clock())
        backend.why_not_entered = self._said = ""
        logger.info(
            "%s is in: %s, %s",
            backend.url,
            ", ".join(backend.models),
            "by frames" if backend.native else "by the OpenAI API",
        )
        self._monitor._pool.changed()

    def _stay_out(self, why: str) -> None:
        self._backend.leave(why)
        if why != self._said:
            self._said = why
            logger.error("%s stays out: it %s", self._backend.url, why)
