"""A Shoal server over a core without a model, as a program: `python -m tests.router.fakes.native --port 8001`.

All but the core and the tokenizer is the real server: its API, the internal endpoint, how it drains and how it comes
back from the loss of its engine. When it is up it prints one line of JSON: where it is, and where its faults are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from shoal import log
from shoal.config.engine_config import EngineConfig
from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import EngineClient
from shoal.engine.tokenizer import Tokenizer
from shoal.network import listen, port_of
from shoal.network.http_server import HttpServer, loop_factory
from shoal.server import run
from tests.router.fakes.core import Pace, PacedCore, core_config
from tests.router.fakes.faults import Control, FaultyApp
from tests.router.fakes.vocabulary import small_tokenizer

MODEL = "fake"
Wrapper = Callable[[ASGIApp], ASGIApp]


class FakeService(run._Service):
    """`shoal serve` with a fake core, a small tokenizer and faults. disguise: what is put around the app."""

    def __init__(self, options: ServerOptions, pace: Pace, control_port: int = 0, disguise: Wrapper | None = None):
        self.pace = pace
        self.cores: list[PacedCore] = []
        self._control_listener = listen("127.0.0.1", control_port)
        super().__init__(
            core_config(pace), options, ModelOptions(model=MODEL), None, listen(options.host, options.port), self._make
        )
        # All else of the service keeps its own view of the app: faults lie between it and the connection.
        self.faulty = FaultyApp(self.gate if disguise is None else disguise(self.gate))
        self.http.config.app = self.faulty
        self.port, self.control_port = port_of(self.listener), port_of(self._control_listener)
        self._refusing = False
        self._announced = asyncio.Event()

    def _make(self, config: EngineConfig) -> EngineClient:
        self.cores.append(PacedCore(config, self.pace))
        return self.cores[-1]

    @property
    def core(self) -> PacedCore:
        """The newest: an engine that was lost has others before it."""
        return self.cores[-1]

    def _load_tokenizer(self) -> Tokenizer | None:
        return small_tokenizer()

    def _announce(self, engine: AsyncEngine, *facts: Any) -> None:
        where = {"port": self.port, "control_port": self.control_port, "pid": os.getpid()}
        print(json.dumps(where), flush=True)
        self._announced.set()

    async def until_up(self) -> None:
        await self._announced.wait()

    async def run(self) -> None:
        control = uvicorn.Config(Control(self, self.faulty), ws="none", lifespan="off", log_config=None)
        server = HttpServer(control)
        serving = asyncio.create_task(server.serve(sockets=[self._control_listener]))
        try:
            await super().run()
        finally:
            await self.take_connections()
            server.should_exit = True
            await serving
            self.listener.close()

    async def refuse_connections(self) -> None:
        self._refusing = True
        for server in self.http.servers:
            server.close()
        self.http.servers.clear()
        self.listener.close()
        for connection in list(self.http.server_state.connections):
            connection.transport.abort()

    async def take_connections(self) -> None:
        if not self._refusing:
            return
        self._refusing = False
        self.listener = listen(self.options.host, self.port)
        config, http = self.http.config, self.http
        loop = asyncio.get_running_loop()
        protocol = config.http_protocol_class
        http.servers.append(
            await loop.create_server(
                lambda: protocol(config=config, server_state=http.server_state, app_state=http.lifespan.state),
                sock=self.listener,
            )
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Pace()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--tokens-per-second", type=float, default=defaults.tokens_per_second)
    parser.add_argument("--prompt-tokens-per-second", type=float, default=defaults.prompt_tokens_per_second)
    parser.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs)
    parser.add_argument("--num-blocks", type=int, default=defaults.num_blocks)
    parser.add_argument("--max-model-len", type=int, default=defaults.max_model_len)
    parser.add_argument("--start-seconds", type=float, default=defaults.start_seconds)
    parser.add_argument("--num-phases", type=int, default=defaults.num_phases)
    parser.add_argument("--records-times", action="store_true")
    parser.add_argument("--max-num-waiting", type=int, default=4096)
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    parser.add_argument("--max-engine-restarts", type=int, default=5)
    parser.add_argument("--engine-restart-window", type=float, default=600.0)
    parser.add_argument("--internal-token")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--log-level", default="error")


def run_service(arguments: argparse.Namespace, disguise: Wrapper | None = None) -> int:
    log.configure(arguments.log_level)
    pace = Pace(
        arguments.tokens_per_second,
        arguments.prompt_tokens_per_second,
        arguments.max_num_seqs,
        arguments.num_blocks,
        arguments.max_model_len,
        arguments.start_seconds,
        arguments.num_phases,
        arguments.records_times,
    )
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        served_model_name=[MODEL],
        max_num_waiting=arguments.max_num_waiting,
        shutdown_timeout=arguments.shutdown_timeout,
        max_engine_restarts=arguments.max_engine_restarts,
        engine_restart_window=arguments.engine_restart_window,
        internal_token=arguments.internal_token,
        api_key=arguments.api_key,
        disable_log_requests=True,
    )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(options, pace, arguments.control_port, disguise))
    return 0


async def _serve(options: ServerOptions, pace: Pace, control_port: int, disguise: Wrapper | None) -> None:
    await FakeService(options, pace, control_port, disguise).run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    sys.exit(run_service(parser.parse_args()))
