"""Router: the parts of a router put together, without its HTTP server. run.py owns one, app.py serves it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Mapping
from random import Random
from typing import Any

from shoal.config.router_settings import RouterSettings
from shoal.errors import ConfigError, NotFoundError, UnavailableError
from shoal.log import get_logger
from shoal.observability.router_metrics import BackendFigures, KeptFigures, PeerFigures, RouterMetrics
from shoal.router.admission import AdmissionQueue, ApiKeys, AsyncAdmission, QueueLimits, RateLimits
from shoal.router.asgi import Receive, while_connected
from shoal.router.failover import ForwardContext
from shoal.router.health import Monitor
from shoal.router.policies import (
    OutputEstimate,
    Policy,
    PolicyOptions,
    RequestView,
    TokenRatio,
    create_policy,
    read_prompt,
)
from shoal.router.pool import Pool
from shoal.router.probes import Prober
from shoal.router.request import GenerationRequest, session_of
from shoal.router.resume import Entrance, KeptStore
from shoal.router.resume.peers import Peers
from shoal.router.upstream import make_session
from shoal.router.watch import watch_forever

_SWEEP_SECONDS = 0.25
_LONGEST_PROBE = 5.0

logger = get_logger(__name__)


class Router:
    """Made and closed on the event loop. admitting: new requests are taken."""

    def __init__(self, settings: RouterSettings, internal_secret: str | None = None) -> None:
        """internal_secret: what servers are shown at /internal/…. Raises ConfigError for keys or a policy that are
        wrong."""
        options = settings.options
        self.settings = settings
        self.keys = make_keys(settings)
        self.pool = Pool(make_policy(settings))
        self.pool.apply(settings.backends, settings.aliases)
        self.metrics = RouterMetrics()
        self.metrics.backends = self._figures
        self.metrics.num_waiting = lambda: self.admission.queue.num_waiting
        self.limits = RateLimits()
        self.admission = AsyncAdmission(
            AdmissionQueue(options.max_running, QueueLimits(max_waiting=options.max_num_waiting))
        )
        self.admitting = True
        self.started = time.time()
        # Adapters are loaded and unloaded one at a time.
        self.adapters_change = asyncio.Lock()
        self._answering: set[asyncio.Future[None]] = set()
        self._ended = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._counter = itertools.count()
        self._ratios: dict[str, TokenRatio] = {}
        self._outputs: dict[str, OutputEstimate] = {}
        self.session = make_session()
        self.context = ForwardContext(
            self.pool, self.session, self.metrics, options.stall_timeout, Random(), internal_secret
        )
        self._monitor = Monitor(
            self.pool,
            Prober(self.session, probe_timeout(settings), internal_secret),
            interval=options.probe_interval,
            golden=settings.golden if options.golden_prompt == "on" else None,
        )
        self.store = KeptStore(options.resume_seconds, options.resume_max_requests, options.resume_max_bytes)
        secret = options.peer_key or options.admin_key
        self.peers = Peers(settings.peers, secret, self.session, self.store, options.replicate_sync)
        self.entrance = Entrance(self.store, self.peers, self.metrics, options.resume_buffer_bytes, secret)
        self.metrics.kept = self._kept_figures
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def keeps_requests(self) -> bool:
        return self.store.seconds > 0

    def start(self) -> None:
        """Begin to look at the servers, and to tell the other routers."""
        self._monitor.start()
        self.peers.start()
        watch = watch_forever(self.pool, lambda: self.context.stall_timeout)
        self._tasks = [
            asyncio.create_task(watch, name="watch"),
            asyncio.create_task(self._sweep(), name="kept requests"),
        ]

    async def apply(self, settings: RouterSettings) -> None:
        """Go on with these settings. Raises ConfigError, and changes nothing, for what is wrong in them."""
        keys, policy = make_keys(settings), make_policy(settings)
        old, self.settings = self.settings, settings
        options = settings.options
        self.keys = keys
        if _policy_fields(old) != _policy_fields(settings):
            self.pool.use_policy(policy)
        self.context.stall_timeout = options.stall_timeout
        self.store.seconds = options.resume_seconds
        self.store.max_requests, self.store.max_bytes = options.resume_max_requests, options.resume_max_bytes
        self.entrance.max_ring_bytes = options.resume_buffer_bytes
        self.admission.queue.limits = QueueLimits(max_waiting=options.max_num_waiting)
        self.admission.set_capacity(options.max_running)
        self._monitor.set_pace(options.probe_interval, probe_timeout(settings))
        self._monitor.use_golden(settings.golden if options.golden_prompt == "on" else None)
        added, gone = self.pool.apply(settings.backends, settings.aliases)
        self._monitor.add(added)
        await self._monitor.remove(gone)

    # --- requests ----------------------------------------------------------------------------------------------------

    def check_admitting(self) -> None:
        if not self.admitting:
            raise UnavailableError("the router is shutting down and takes no new requests")

    @property
    def num_running(self) -> int:
        """Requests being answered, or waiting for that."""
        return len(self._answering)

    async def while_connected(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` as a request that the router's end waits for.

        Raises ClientGone when the client went away, UnavailableError when the end did not wait long enough.
        """
        task = asyncio.ensure_future(work)
        self._answering.add(task)
        self._idle.clear()
        try:
            await while_connected(receive, task)
        except asyncio.CancelledError:
            if not (self._ended and task.cancelled()):
                raise
            raise UnavailableError("the router was shut down before the answer was whole") from None
        finally:
            self._answering.discard(task)
            if not self._answering:
                self._idle.set()

    async def resolve(self, name: str | None, until: float, num_bytes: int) -> str:
        """The servers' name of a model. Waits while no server at all has told its models, or some were not asked yet:
        as one of the queue, with so many bytes.

        Raises NotFoundError; UnavailableError when the queue is full, or when it is not known by then.
        """
        if (model := self._resolve_now(name)) is not None:
            return model
        pool = self.pool
        with self.admission.room(num_bytes):
            while (left := until - pool.clock()) > 0:
                await pool.wait_change(left)
                if (model := self._resolve_now(name)) is not None:
                    return model
        why = pool.why_out(backend for backend in pool if not backend.models)
        again = self.admission.queue.retry_after(pool.clock())
        raise UnavailableError(f"no server has said so far that it has the model: {why}", retry_after=again)

    def _resolve_now(self, name: str | None) -> str | None:
        """None while a server may still say that it has it: while nothing is known, and for an alias, behind which the
        operator has some server, as long as one has not told its models. Raises NotFoundError."""
        pool = self.pool
        try:
            return pool.resolve(name)
        except NotFoundError:
            told = [bool(backend.models) for backend in pool]
            if (name in pool.aliases and not all(told)) or not any(told):
                return None
            if all(backend.was_asked for backend in pool):
                raise
            return None

    def view(self, request: GenerationRequest, headers: Mapping[str, str], priority: int) -> RequestView:
        """What policies see of a request. What is not known of it is estimated by what was seen of others."""
        policy, fields = self.pool.policy, request.fields
        ratio = self._ratios.setdefault(request.model, TokenRatio())
        output = self._outputs.setdefault(request.model, OutputEstimate())
        view = RequestView(
            request_id=f"{request.request_id}-{next(self._counter)}",
            session=session_of(headers, fields) if policy.needs_session else None,
            num_prompt_bytes=len(request.body),
            priority=priority,
        )
        num_ids = None
        if policy.needs_blocks:
            shape = read_prompt(request.path, fields)
            view.blocks, num_ids = shape.blocks, shape.num_token_ids
            view.num_prompt_bytes = shape.num_bytes
        view.num_prompt_tokens = ratio.estimate(len(request.body)) if num_ids is None else num_ids
        view.num_output_tokens = output.estimate(request.max_tokens, request.num_answers)
        return view

    def learn(self, request: GenerationRequest, num_prompt_tokens: int | None, num_tokens: int) -> None:
        """What a request that ended well really had."""
        if num_prompt_tokens:
            self._ratios[request.model].learn(len(request.body), num_prompt_tokens)
        if num_tokens:
            self._outputs[request.model].learn(round(num_tokens / request.num_answers))

    # --- the end -----------------------------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """Take no new requests; those that run, or wait, go on."""
        self.admitting = False

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def end_requests(self) -> None:
        """Those that still run end now, with an error."""
        self._ended = True
        for task in tuple(self._answering):
            task.cancel()

    async def close(self) -> None:
        self.admission.close()
        await self.entrance.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._monitor.close()
        await self.session.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.store.sweep(time.monotonic())

    def _kept_figures(self) -> KeptFigures:
        now = time.monotonic()
        links = self.peers.links
        return KeptFigures(
            num_requests=len(self.store),
            num_bytes=self.store.num_bytes,
            num_dropped=self.store.num_dropped,
            peers=[PeerFigures(link.url, link.why_down is None, link.num_bytes, link.lag(now)) for link in links],
        )

    def _figures(self) -> list[BackendFigures]:
        now = self.pool.clock()
        return [
            BackendFigures(
                url=backend.url,
                num_running=backend.view.num_running,
                outstanding_tokens=backend.view.outstanding_tokens,
                alive=backend.health.alive,
                progressing=backend.health.progressing,
                admitting=backend.health.admitting,
                available=backend.accepts(now),
                breaker=str(backend.breaker.state(now)),
                num_opened=backend.breaker.num_opened,
            )
            for backend in self.pool
        ]


def probe_timeout(settings: RouterSettings) -> float:
    """Seconds for one probe."""
    return min(max(settings.options.stall_timeout, 1.0), _LONGEST_PROBE)


def make_keys(settings: RouterSettings) -> ApiKeys:
    """Those of the file, and the plain ones of --api-key. Raises ConfigError."""
    entries: list[Any] = []
    if settings.keys is not None:
        ApiKeys.parse(settings.keys, settings.keys_source)
        entries += settings.keys
    plain = settings.options.api_key
    if not all(key.strip() for key in plain):
        raise ConfigError("--api-key must not be empty")
    entries += [{"key": key, "name": f"api-key-{number}"} for number, key in enumerate(dict.fromkeys(plain), 1)]
    return ApiKeys.parse(entries, settings.keys_source or "--api-key") if entries else ApiKeys()


def make_policy(settings: RouterSettings) -> Policy:
    """Raises ConfigError."""
    options = settings.options
    given = {name: getattr(options, name) for name in ("by_speed", "load_factor", "max_blocks")}
    return create_policy(
        options.policy, PolicyOptions(**{name: value for name, value in given.items() if value is not None})
    )


def _policy_fields(settings: RouterSettings) -> tuple[Any, ...]:
    options = settings.options
    return options.policy, options.by_speed, options.load_factor, options.max_blocks
