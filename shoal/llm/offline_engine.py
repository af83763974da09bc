"""OfflineEngine: an AsyncEngine on an event loop of its own thread, for callers that wait. Used by LLM.

Its own thread, so that it works in a plain script, in a notebook whose loop already runs, and from several threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shoal.config.engine_config import EngineConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import EngineClient, ProgressCallback
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import EngineDeadError

T = TypeVar("T")

_NO_LIMIT = 2**31
_CLEAN_UP_SECONDS = 10.0


class OfflineEngine:
    """Starts the core and the loop; `run` does a coroutine there and waits for it."""

    def __init__(
        self,
        config: EngineConfig,
        make_client: Callable[[], EngineClient],
        load_tokenizer: Callable[[], Tokenizer | None],
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Returns when the core is ready; the tokenizer is loaded meanwhile. Raises what the two raise."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="shoal-offline", daemon=True)
        self._thread.start()
        self._closed = False
        self._client: EngineClient | None = None
        self._engine: AsyncEngine | None = None
        try:
            starting = self.submit(self._start_client(make_client, on_progress))
            self.tokenizer = load_tokenizer()
            wait(starting)
            self.run(self._start_engine(config))
        except BaseException:
            self.close()
            raise

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _start_client(
        self, make_client: Callable[[], EngineClient], on_progress: ProgressCallback | None
    ) -> None:
        self._client = make_client()
        await self._client.start(on_progress)

    async def _start_engine(self, config: EngineConfig) -> None:
        assert self._client is not None
        self._engine = AsyncEngine(self._client, config, self.tokenizer, max_num_waiting=_NO_LIMIT)
        await self._engine.start()

    @property
    def engine(self) -> AsyncEngine:
        """Raises EngineDeadError after `close`."""
        if self._closed or self._engine is None:
            raise EngineDeadError("this LLM has been shut down; make a new one")
        return self._engine

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do a coroutine on the engine's loop and wait for its result."""
        return wait(self.submit(work))

    def cancel(self, future: concurrent.futures.Future[Any]) -> None:
        """Cancel what was submitted, and wait until its requests have left the engine."""
        future.cancel()
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.submit(self.engine.wait_drained(_CLEAN_UP_SECONDS)).result(_CLEAN_UP_SECONDS)

    def close(self) -> None:
        """End the requests, the core and the thread. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        ending = self.submit(self._close())
        if threading.current_thread() is not self._thread:  # the garbage collector may call from anywhere
            with contextlib.suppress(concurrent.futures.TimeoutError):
                ending.result(2 * _CLEAN_UP_SECONDS)
            self._thread.join(_CLEAN_UP_SECONDS)

    async def _close(self) -> None:
        try:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if self._engine is not None:
                await self._engine.close()
            elif self._client is not None:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
                await self._client.close()
        finally:
            self._loop.call_soon(self._loop.stop)


def wait(future: concurrent.futures.Future[T]) -> T:
    """The future's result; the future is cancelled when the wait is interrupted (Ctrl-C)."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
