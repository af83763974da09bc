"""route: from settings to a running router and to its end. Called by `shoal router`.

At the end new requests get 503 while running ones finish, then connections close. The settings' file is looked at each
second; one that is wrong changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import signal
import socket

from shoal.config.router_settings import RouterSettings, SettingsSource
from shoal.errors import ConfigError
from shoal.garbage import spare_what_lives
from shoal.log import get_logger
from shoal.network import format_url, internal_secret, listen, port_of
from shoal.network.http_server import Cors, HttpServer, check_tls, http_config, loop_factory
from shoal.router.app import RouterApp
from shoal.router.core import Router, make_keys, make_policy

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FILE_SECONDS = 1.0

logger = get_logger(__name__)


def route(source: SettingsSource, settings: RouterSettings) -> None:
    """Route until Ctrl-C, SIGTERM or the end of the terminal (SIGHUP), then return.

    Raises ConfigError, or StartupError for a port that is taken.
    """
    make_keys(settings)
    make_policy(settings)
    check_tls(settings.options)
    internal_secret(settings.options.internal_token)
    listening = contextlib.closing(listen(settings.options.host, settings.options.port))
    with listening as listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(RouterService(source, settings, listener).run())


class RouterService:
    """One run of a router. Signals only set events; `run` reads like what happens."""

    def __init__(self, source: SettingsSource, settings: RouterSettings, listener: socket.socket) -> None:
        self.source = source
        self.settings = settings
        self.listener = listener
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    async def run(self) -> None:
        # From here on: what changes in the file later is seen.
        self._seen = self.source.fingerprint()
        options = self.settings.options
        router = Router(self.settings, internal_secret(options.internal_token))
        http = HttpServer(http_config(Cors(RouterApp(router), options=options), options))
        loop = asyncio.get_running_loop()
        # What nohup has this process ignore stays so.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals = [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(http.serve(sockets=[self.listener]), name="http")
        serving.add_done_callback(lambda _: self.stop.set())  # should it ever end by itself, so does the rest
        watching = asyncio.create_task(self._watch_file(router), name="config file")
        try:
            router.start()
            spare_what_lives()
            self._announce()
            await self.stop.wait()
            await self._drain(router)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            http.force_exit = self.hurry.is_set()
            http.should_exit = True
            await serving
            await router.close()
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    async def _drain(self, router: Router) -> None:
        router.begin_drain()
        if not router.num_running:
            return
        seconds = self.settings.options.shutdown_timeout
        logger.info("%d requests may finish within %g s; Ctrl-C again ends them now", router.num_running, seconds)
        idle = asyncio.create_task(router.wait_idle())
        hurry = asyncio.create_task(self.hurry.wait())
        await asyncio.wait((idle, hurry), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()
        await asyncio.gather(idle, hurry, return_exceptions=True)
        if router.num_running:
            logger.warning("%d requests are ended before they are finished", router.num_running)
            router.end_requests()

    # --- the settings' file ------------------------------------------------------------------------------------------

    async def _watch_file(self, router: Router) -> None:
        while True:
            await asyncio.sleep(_FILE_SECONDS)
            fingerprint = self.source.fingerprint()
            if fingerprint == self._seen:
                continue
            self._seen = fingerprint
            if fingerprint is None:
                logger.error("%s is gone; the settings stay as they are", self.source.path)
                continue
            await self._reload(router)

    async def _reload(self, router: Router) -> None:
        try:
            new = self.source.load()
            await router.apply(new)
        except ConfigError as error:
            logger.error("%s; the settings stay as they are", error)
            return
        except Exception:
            logger.exception("%s could not be read; the settings stay as they are", self.source.path)
            return
        logger.info("%s was read again: %d backends", self.source.path, len(new.backends))
        waiting = self.settings.differences_that_wait(new)
        if waiting:
            logger.warning("%s count from the next start on", ", ".join(waiting))

    def _announce(self) -> None:
        options = self.settings.options
        if options.host not in _LOOPBACK and not len(make_keys(self.settings)):
            logger.warning("everybody who reaches %s can use this router; --api-key asks for a key", options.host)
        url = format_url(options.host, port_of(self.listener), "https" if options.ssl_certfile else "http")
        insecure = " -k" if options.ssl_certfile else ""
        body = shlex.quote(json.dumps({"model": "MODEL", "prompt": "Hello", "max_tokens": 32}))
        lines = [
            f"The router of {len(self.settings.backends)} servers is at {url}/v1. Its servers: shoal router status"
            + ("" if options.port == 9000 and not options.ssl_certfile else f" --router {url}"),
            f"  curl{insecure} {url}/v1/completions -H 'Content-Type: application/json' -d {body}",
            "Ctrl-C lets running requests finish; a second Ctrl-C does not.",
        ]
        print("\n".join(lines), flush=True)
