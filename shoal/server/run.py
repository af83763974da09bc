"""serve: from options to a running server and to its end. Called by `shoal serve`.

The socket comes first, so that a busy port is known before a model is loaded; then HTTP, which says "starting"; then
the engine. At the end new requests get 503 while running ones finish, then the engine ends, then the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from shoal.config.engine_config import EngineConfig
from shoal.config.lora import parse_modules
from shoal.config.model_path import resolve_model_path
from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import EngineClient, SubprocessClient
from shoal.engine.replicas import make_client
from shoal.engine.restart_budget import RestartLimits
from shoal.engine.tokenizer import Tokenizer, load_tokenizer
from shoal.engine.watch import DEFAULT_PROGRESS_TIMEOUT
from shoal.errors import ConfigError, EngineDeadError
from shoal.garbage import spare_what_lives
from shoal.log import get_logger
from shoal.messages import CoreReady
from shoal.network import format_url, internal_secret, listen, port_of
from shoal.network.http_server import HttpServer, check_tls, http_config, loop_factory
from shoal.observability.metrics import EngineMetrics
from shoal.server.adapters import load_and_try
from shoal.server.app import create_app
from shoal.server.observer import MetricsObserver
from shoal.server.startup import Gate, StartupDisplay, describe_address, describe_engine
from shoal.server.state import served_names

CoreMaker = Callable[[EngineConfig], EngineClient]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HURRIED_SECONDS = 1.0
_WATCH_SECONDS = 0.2
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

logger = get_logger(__name__)


def serve(
    config: EngineConfig, options: ServerOptions, model: ModelOptions, *, make_core: CoreMaker = SubprocessClient
) -> None:
    """Serve until Ctrl-C, SIGTERM or the end of the terminal (SIGHUP), then return.

    make_core: the client of one engine core. Raises ConfigError (TLS files, chat template, host, token), StartupError
    (port taken, the engine does not come up), ModelError, or EngineDeadError when the engine core died and is not
    started again.
    """
    check_tls(options)
    names = served_names(options, model)
    chat_template = read_chat_template(options)
    for name in parse_modules(model.lora_modules).keys() & set(names):
        raise ConfigError(f"lora_modules {name}: the model itself is called that; give the adapter another name")
    with contextlib.closing(listen(options.host, options.port)) as listener:
        service = _Service(config, options, model, chat_template, listener, make_core)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(service.run())


def read_chat_template(options: ServerOptions) -> str | None:
    """The text of --chat-template. Raises ConfigError for a file that cannot be read."""
    if options.chat_template is None:
        return None
    try:
        return Path(options.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {options.chat_template}: {error}") from error


def restart_limits(config: EngineConfig, options: ServerOptions) -> RestartLimits:
    """How often a lost core is started again. Never with --nnodes: the other nodes end with their engine, and whoever
    started them starts all again."""
    if config.parallel.num_nodes > 1:
        return RestartLimits(max_restarts=0)
    return RestartLimits(options.max_engine_restarts, options.engine_restart_window)


class _Service:
    """One run of a server. Signals only set events; `run` reads like what happens."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        model: ModelOptions,
        chat_template: str | None,
        listener: socket.socket,
        make_core: CoreMaker,
    ) -> None:
        self.config = config
        self.options = options
        self.model = model
        self.chat_template = chat_template
        self.listener = listener
        self.client = make_client(config, make_core, restart_limits(config, options))
        self.gate = Gate()
        self.http = HttpServer(http_config(self.gate, options))
        self.internal_secret = internal_secret(options.internal_token, config.parallel.token_file)
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        # What nohup has this process ignore stays so.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals = [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        http = asyncio.create_task(self.http.serve(sockets=[self.listener]), name="http")
        http.add_done_callback(lambda _: self.stop.set())  # should it ever end by itself, so does the rest
        failure: BaseException | None = None
        try:
            engine = await self._start_engine_unless_stopped()
            if engine is not None:
                failure = await self._serve_until_stopped(engine)
                await self._end(engine)
        finally:
            self.http.should_exit = True
            await http
            for number in signals:
                loop.remove_signal_handler(number)
        if failure is not None:
            raise failure

    def _on_signal(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
            self.http.force_exit = True
        self.stop.set()

    # --- coming up -------------------------------------------------------------------------------------------------

    async def _start_engine_unless_stopped(self) -> AsyncEngine | None:
        """The engine, or None when Ctrl-C came first."""
        starting = asyncio.create_task(self._start_engine())
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                return starting.result()
            logger.info("stopped while starting")
            return None
        finally:
            for task in (starting, stopped):
                task.cancel()
            await asyncio.gather(starting, stopped, return_exceptions=True)

    async def _start_engine(self) -> AsyncEngine:
        started = time.monotonic()
        with StartupDisplay(self.gate) as display:
            core = asyncio.create_task(self.client.start(display.update))
            tokenizer = asyncio.create_task(asyncio.to_thread(self._load_tokenizer))
            try:
                await asyncio.wait((core, tokenizer), return_when=asyncio.FIRST_EXCEPTION)
                for task in (core, tokenizer):
                    if task.done():
                        task.result()
                ready, loaded = await core, await tokenizer
            except BaseException:
                for task in (core, tokenizer):
                    task.cancel()
                await asyncio.gather(core, tokenizer, return_exceptions=True)
                await self.client.close()
                raise
        metrics = EngineMetrics(served_names(self.options, self.model)[0], self.options.metrics_prefix)
        engine = AsyncEngine(
            self.client,
            self.config,
            loaded,
            max_num_waiting=self.options.max_num_waiting,
            progress_timeout=self.config.parallel.stall_timeout or DEFAULT_PROGRESS_TIMEOUT,
            observer=MetricsObserver(metrics),
        )
        await engine.start()
        for name, path in parse_modules(self.model.lora_modules).items():
            await load_and_try(engine, name, path)
        self.gate.app = create_app(
            engine,
            self.options,
            self.model,
            metrics=metrics,
            facts=ready.info,
            chat_template=self.chat_template,
            internal_secret=self.internal_secret,
        )
        spare_what_lives()
        self._announce(engine, ready, time.monotonic() - started)
        return engine

    def _load_tokenizer(self) -> Tokenizer | None:
        if self.model.skip_tokenizer_init:
            return None
        path = str(resolve_model_path(self.model.tokenizer) if self.model.tokenizer else self.config.model.path)
        tokenizer = load_tokenizer(
            path, trust_remote_code=self.model.trust_remote_code, chat_template=self.chat_template
        )
        tokenizer.check_chat_template()
        return tokenizer

    def _announce(self, engine: AsyncEngine, ready: CoreReady, seconds: float) -> None:
        options = self.options
        if options.host not in _LOOPBACK and not options.api_key:
            logger.warning("everybody who reaches %s can use this server; --api-key asks for a key", options.host)
        url = format_url(options.host, port_of(self.listener), "https" if options.ssl_certfile else "http")
        lines = describe_engine(self.config, ready, seconds)
        name, pooling = served_names(options, self.model)[0], self.config.model.pooling
        lines += describe_address(url, name, options, engine.tokenizer, pooling)
        print("\n".join(lines), flush=True)

    # --- serving and ending ----------------------------------------------------------------------------------------

    async def _serve_until_stopped(self, engine: AsyncEngine) -> EngineDeadError | None:
        """Wait for a signal. Returns the reason when the engine died instead."""
        while engine.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_SECONDS):
                    await self.stop.wait()
                return None
        try:
            await engine.stats()
        except EngineDeadError as error:
            return error
        return EngineDeadError("the engine core is gone")

    async def _end(self, engine: AsyncEngine) -> None:
        """Drain what may be drained, then end engine and core."""
        if engine.alive:
            await self._drain(engine)
        closing = asyncio.create_task(engine.close())
        hurry = asyncio.create_task(self.hurry.wait())
        await asyncio.wait((closing, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not closing.done():
            await asyncio.wait((closing,), timeout=_HURRIED_SECONDS)
            if not closing.done():
                self.client.kill("was not waited for")
        await closing

    async def _drain(self, engine: AsyncEngine) -> None:
        engine.begin_drain()
        if engine.num_unfinished:
            logger.info(
                "%d requests may finish within %g s; Ctrl-C again ends them now",
                engine.num_unfinished,
                self.options.shutdown_timeout,
            )
        drained = asyncio.create_task(engine.wait_drained(self.options.shutdown_timeout))
        hurry = asyncio.create_task(self.hurry.wait())
        await asyncio.wait((drained, hurry), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, hurry):
            task.cancel()
        await asyncio.gather(drained, hurry, return_exceptions=True)
        if engine.num_unfinished:
            logger.warning("%d requests were ended before they were finished", engine.num_unfinished)
