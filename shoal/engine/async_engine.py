"""AsyncEngine: requests in, streams of text out, over the engine core. The server and LLM are built on it.

One task, the pump, takes what the core emits, folds it into text and wakes the consumers: one wake-up per request and
step, whatever the number of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.engine.client import EXECUTORS_OWN_SECONDS, EngineClient, ReplicaStatus
from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest, Prompt, RequestPreparer
from shoal.engine.replica_facts import combine_stats
from shoal.engine.request_output import OutputBuilder
from shoal.engine.streams import Answer, RequestStream
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from shoal.log import get_logger
from shoal.messages import AbortRequests, AddRequest, CoreOutputs, EngineStats
from shoal.types.outputs import FinishReason, RequestOutput, RequestUpdate
from shoal.types.sampling_params import SamplingParams

logger = get_logger(__name__)

DEFAULT_MAX_NUM_WAITING = 4096
# Without a step for so long although there is work, the engine does not progress.
DEFAULT_PROGRESS_TIMEOUT = 60.0
_WATCH_SECONDS = 1.0


class AsyncEngine:
    """Serves many requests at once over one client, on one event loop. Every accepted request ends exactly once."""

    def __init__(
        self,
        client: EngineClient,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        *,
        max_num_waiting: int = DEFAULT_MAX_NUM_WAITING,
        progress_timeout: float = DEFAULT_PROGRESS_TIMEOUT,
        observer: EngineObserver | None = None,
    ) -> None:
        """client: started already. tokenizer: None to work with token ids only. Call `start` on the event loop."""
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = client.ready.max_model_len
        self.latest_stats = EngineStats()
        self._stats: dict[int, EngineStats] = {}  # of each replica
        self._client = client
        self._generation = client.ready.generation
        self._preparer = RequestPreparer(config, tokenizer, self.max_model_len)
        self._max_num_waiting = max_num_waiting
        self._progress_timeout = progress_timeout
        self._observer = observer
        self._answers: dict[str, Answer] = {}
        self._streams: dict[str, RequestStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._pump_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._sends: set[asyncio.Task[None]] = set()
        self._failure: EngineDeadError | None = None
        self._draining = False
        self._last_progress = time.monotonic()

    async def start(self) -> None:
        """Start taking in what the core emits."""
        assert self._pump_task is None, "an engine starts once"
        self._pump_task = asyncio.create_task(self._pump(), name="engine-pump")
        self._watch_task = asyncio.create_task(self._watch(), name="engine-watch")

    # --- accepting -------------------------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> PreparedRequest:
        """Tokenize and validate; nothing is queued yet.

        Long texts take a while (about 2 MB/s): call it from another thread then, the event loop goes on meanwhile.
        prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. Raises InvalidRequestError,
        UnavailableError (draining, queue full) or EngineDeadError.
        """
        self._check_admitting(params.n)
        prepared = self._preparer.prepare(
            prompt, params, request_id=request_id, priority=priority, add_special_tokens=add_special_tokens
        )
        self._check_unknown(prepared.request_id)
        return prepared

    def prepare_chat(
        self,
        messages: Sequence[Any],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> PreparedRequest:
        """Like `prepare`, for a conversation of OpenAI messages. Templates write their special tokens themselves."""
        self._check_admitting(params.n)
        text = self._preparer.require_tokenizer("a chat").apply_chat_template(
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.prepare(
            text, params, request_id=request_id, priority=priority, add_special_tokens=add_special_tokens
        )

    def _check_admitting(self, num_answers: int) -> None:
        self._check_alive()
        if self._draining:
            raise UnavailableError("the server is shutting down and takes no new requests; send them elsewhere")
        # The core's own count is one step old, but knows of requests that wait for KV cache.
        capacity = self.config.max_num_seqs * sum(replica.failure is None for replica in self.replicas)
        num_waiting = max(self.num_unfinished - capacity, self.latest_stats.num_requests_waiting)
        if self.num_unfinished and num_waiting + num_answers > self._max_num_waiting:
            raise UnavailableError(
                f"{num_waiting} requests wait already and at most {self._max_num_waiting} may (--max-num-waiting); "
                "try again later"
            )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))

    def _check_unknown(self, request_id: str) -> None:
        if request_id in self._streams:
            raise InvalidRequestError(f"a request with the id {request_id!r} is running; choose another id")

    # --- serving ---------------------------------------------------------------------------------------------------

    async def stream(self, prepared: PreparedRequest) -> AsyncGenerator[RequestUpdate, None]:
        """Queue the request and yield the updates of its answers as they come, each answer's last with finish_reason.

        Closing the iterator, or cancelling who waits on it, ends the request in the core. Raises InvalidRequestError
        when its id is running already.
        """
        async with self._running(prepared, eager=True) as stream:
            while updates := await stream.next_updates():
                for update in updates:
                    yield update

    async def collect(self, prepared: PreparedRequest) -> RequestOutput:
        """Queue the request and return its whole answers. Raises EngineError when the engine could not finish them."""
        builder = OutputBuilder(prepared, self.tokenizer)
        async with self._running(prepared, eager=False) as stream:
            while updates := await stream.next_updates():
                for update in updates:
                    builder.add(update)
                    if update.finish_reason is FinishReason.ERROR:
                        message = update.error or "the engine failed on this request"
                        raise EngineDeadError(message) if update.lost else EngineError(message)
        return builder.build()

    @contextlib.asynccontextmanager
    async def _running(self, prepared: PreparedRequest, *, eager: bool) -> AsyncIterator[RequestStream]:
        """The request is queued inside of this, and forgotten (in the core too) outside."""
        self._check_unknown(prepared.request_id)
        stream = RequestStream(prepared, self.tokenizer, eager=eager, now=time.monotonic())
        self._open(stream)
        try:
            await self._queue(stream)
            yield stream
        finally:
            self._close(stream)

    def _open(self, stream: RequestStream) -> None:
        if not self._answers:
            self._last_progress = stream.start_time
        self._streams[stream.request.request_id] = stream
        for answer in stream.answers:
            self._answers[answer.request_id] = answer
        self._idle.clear()
        if self._observer is not None:
            self._observer.request_started(stream.request)

    async def _queue(self, stream: RequestStream) -> None:
        try:
            self._check_alive()
            for answer in stream.answers:
                await self._client.send(AddRequest(answer.journal.engine_request()))
        except EngineDeadError as error:
            self._die(error)
            self._fail(stream.answers, FinishReason.ERROR, str(error), lost=True)

    def _close(self, stream: RequestStream) -> None:
        """The consumer is done with it: forget the request, and end in the core what still runs."""
        running = [answer for answer in stream.answers if answer.open]
        for answer in running:
            answer.drop(time.monotonic(), self._observer)
        self._forget(stream.answers)
        self._streams.pop(stream.request.request_id, None)
        if running:
            self._send_soon(AbortRequests([answer.request_id for answer in running], silent=True))

    def _forget(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._answers.pop(answer.request_id, None)
        if not self._answers:
            self._idle.set()

    def _fail(self, answers: Sequence[Answer], reason: FinishReason, message: str, *, lost: bool = False) -> None:
        """End these answers here, because the core will not."""
        now = time.monotonic()
        for answer in answers:
            if answer.open:
                answer.fail(reason, message, now, self._observer, lost=lost)
        self._forget(answers)

    async def abort(self, request_id: str) -> None:
        """End a request; its consumer gets what was generated and FinishReason.ABORT. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None and self.alive:
            running = [answer.request_id for answer in stream.answers if answer.open]
            await self._client.send(AbortRequests(running))

    def _send_soon(self, message: AbortRequests) -> None:
        """Send from a task of its own: whoever closes a stream may be in the middle of being cancelled."""

        async def send() -> None:
            with contextlib.suppress(EngineDeadError):  # nothing runs there any more
                await self._client.send(message)

        if self.alive:
            self._background(send())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)

    # --- the pump --------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        try:
            while True:
                outputs = await self._client.receive()
                if outputs.generation == self._generation:
                    ended_here = self._dispatch(outputs)
                    if ended_here:
                        await self._client.send(AbortRequests(ended_here, silent=True))
                await asyncio.sleep(0)  # let the consumers run, even if the next outputs are there already
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:
            logger.exception("the engine's outputs could not be taken in")
            self._die(EngineDeadError(f"the engine's outputs could not be taken in: {type(error).__name__}: {error}"))

    def _dispatch(self, outputs: CoreOutputs) -> list[str]:
        """Hand the deltas of one step to their answers. Returns the ids that ended here, not in the core."""
        now = time.monotonic()
        if outputs.deltas:
            self._last_progress = now
        if outputs.stats is not None:
            self._take_stats(outputs.stats, outputs.replica, now)
        ended_here: list[str] = []
        answers, observer = self._answers, self._observer
        for delta in outputs.deltas:
            answer = answers.get(delta.request_id)
            if answer is None:  # ended here already; these tokens crossed on the way
                continue
            try:
                if answer.take_delta(delta, now, observer):
                    ended_here.append(delta.request_id)
            except Exception as error:  # a fault of one request must not touch the others
                logger.exception("request %s: cannot make text of its tokens", delta.request_id)
                self._fail([answer], FinishReason.ERROR, f"cannot make text of the tokens: {error}")
                ended_here.append(delta.request_id)
            if not answer.open:
                self._forget([answer])
        return ended_here

    def _take_stats(self, stats: EngineStats, replica: int, now: float) -> None:
        num_steps = self.latest_stats.num_steps_total
        self._stats[replica] = stats
        self.latest_stats = stats if len(self._stats) == 1 else combine_stats(self._stats.values())
        if self.latest_stats.num_steps_total != num_steps:
            self._last_progress = now
        if self._observer is not None:
            self._observer.stats(stats, replica)

    def _die(self, error: EngineDeadError) -> None:
        """The core is gone: every running request gets its ending."""
        if self._failure is None:
            self._failure = error
        self._fail(list(self._answers.values()), FinishReason.ERROR, str(self._failure), lost=True)

    async def _watch(self) -> None:
        """End a core that makes no step any more and cannot say so itself: stopped, or stuck in a driver."""
        parallel = self.config.parallel
        # An executor of several ranks keeps the same deadline, and can say which of them waits for what.
        limit = parallel.step_timeout + (EXECUTORS_OWN_SECONDS if parallel.world_size > 1 else 0.0)
        late: set[int] = set()
        while True:
            await asyncio.sleep(min(limit / 4, _WATCH_SECONDS))
            before, late = late, set()
            for replica in self.replicas:
                if replica.failure is None and replica.seconds_without_progress >= limit:
                    late.add(replica.index)
            # Late twice in a row: the first time it may be this process that was stopped, with the news unread.
            for index in late & before:
                why = "--step-timeout"
                if limit > parallel.step_timeout:
                    why += f" is {parallel.step_timeout:g} s, and the core itself did not act on it"
                self._client.kill(f"made no step for {limit:g} s although it has work ({why}), and was ended", index)

    # --- health and ending -----------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Answers that are queued or running."""
        return len(self._answers)

    @property
    def alive(self) -> bool:
        """The core is there; of several replicas one at least."""
        return self._failure is None and self._pump_task is not None and not self._pump_task.done()

    @property
    def admitting(self) -> bool:
        """New requests are taken."""
        return self.alive and not self._draining

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """How each engine core does: one entry, or one for each of --data-parallel-size."""
        if several := self._client.replicas:
            return several
        failure = None if self.alive else str(self._failure or "it has not been started")
        seconds = time.monotonic() - self._last_progress if self._answers else 0.0
        return [ReplicaStatus(0, failure, seconds)]

    @property
    def stalled(self) -> Sequence[int]:
        """The replicas that are there and have work, but made no step for long."""
        return [
            replica.index
            for replica in self.replicas
            if replica.failure is None and replica.seconds_without_progress >= self._progress_timeout
        ]

    @property
    def progressing(self) -> bool:
        """The core has no work, or made a step not long ago; so does every replica that is there."""
        return self.alive and not self.stalled

    async def stats(self) -> EngineStats:
        """The core's numbers of this moment, those of all replicas together. Raises EngineDeadError."""
        result = await self._client.utility("stats")
        return result if isinstance(result, EngineStats) else msgspec.convert(result, EngineStats)

    async def reset_prefix_cache(self) -> None:
        """Forget the KV cache of earlier prompts; running requests keep theirs."""
        await self._client.utility("reset_prefix_cache")

    def begin_drain(self) -> None:
        """Take no new requests; those that run go on."""
        self._draining = True

    async def wait_drained(self, timeout: float | None = None) -> bool:
        """Wait until no request runs; False when `timeout` seconds were not enough."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what still runs (FinishReason.ABORT), then the core. Returns when nothing of it is left."""
        self._draining = True
        if self._failure is None:
            self._failure = EngineDeadError("the engine has been shut down")
        self._fail(list(self._answers.values()), FinishReason.ABORT, "the engine has been shut down")
        own = [task for task in (self._pump_task, self._watch_task) if task is not None]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, *self._sends, return_exceptions=True)
        await self._client.close()
