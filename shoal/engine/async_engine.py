"""AsyncEngine: requests in, streams of text out, over the engine core. The server and LLM are built on it.

One task, the pump, takes what the core emits, folds it into text and wakes the consumers: one wake-up per request and
step, whatever the number of tokens. When a core is lost and another one comes, the answers go on there, each from its
journal; placement.py says when.

Long because all of it is about one thing: that every request, from its acceptance on, ends exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.engine.adapters import AdapterRegistry
from shoal.engine.client import CoreRestarting, EngineClient, ReplicaStatus
from shoal.engine.observer import EngineObserver
from shoal.engine.placement import Placement
from shoal.engine.prepare import Params, PreparedRequest, Prompt, RequestPreparer
from shoal.engine.pulse import Pulse
from shoal.engine.replica_facts import combine_stats, stats_of_the_lost
from shoal.engine.request_output import OutputBuilder
from shoal.engine.streams import Answer, RequestStream
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.watch import DEFAULT_PROGRESS_TIMEOUT, watch
from shoal.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from shoal.log import get_logger
from shoal.messages import AbortRequests, CoreOutputs, EngineStats, TokenDelta
from shoal.types.adapter import AdapterRef
from shoal.types.outputs import FinishReason, RequestOutput, RequestUpdate
from shoal.types.sampling_params import SamplingParams

logger = get_logger(__name__)

DEFAULT_MAX_NUM_WAITING = 4096


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
        self._answers: dict[str, Answer] = {}  # that have not ended, by request id
        self._placement = Placement(client, self._end, self._end_by_journal)
        self._streams: dict[str, RequestStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._pump_task: asyncio.Task[None] | None = None
        self._other_tasks: list[asyncio.Task[None]] = []
        self._sends: set[asyncio.Task[None]] = set()
        self._failure: EngineDeadError | None = None
        self._draining = False
        self._pulse = Pulse()  # of a single core
        self.adapters = AdapterRegistry(config.lora, self._names_adapter)
        self._away_since: float | None = None  # no core was there, and no token has come since then

    def _names_adapter(self, uid: str) -> bool:
        journals = (answer.journal for answer in self._answers.values())
        return any(journal.adapter is not None and journal.adapter.uid == uid for journal in journals)

    async def start(self) -> None:
        """Start taking in what the core emits."""
        assert self._pump_task is None, "an engine starts once"
        self._pump_task = asyncio.create_task(self._pump(), name="engine-pump")
        watching = watch(self.config.parallel, lambda: self.replicas, self._client.kill, self._end_overdue)
        self._other_tasks = [
            asyncio.create_task(watching, name="engine-watch"),
            asyncio.create_task(self._send_waiting(), name="engine-sender"),
        ]

    # --- accepting -------------------------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Prompt,
        params: Params,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        adapter: AdapterRef | None = None,
    ) -> PreparedRequest:
        """Tokenize and validate; nothing is queued yet.

        Long texts take a while (about 2 MB/s): call it from another thread then, the event loop goes on meanwhile.
        prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. Raises InvalidRequestError,
        UnavailableError (draining, queue full) or EngineDeadError.
        """
        self._check_admitting(params.n)
        prepared = self._preparer.prepare(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            add_special_tokens=add_special_tokens,
            adapter=adapter,
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
        adapter: AdapterRef | None = None,
    ) -> PreparedRequest:
        """Like `prepare`, for a conversation of OpenAI messages. Templates write their special tokens themselves."""
        self._check_admitting(params.n)
        text = self._preparer.chat_tokenizer().apply_chat_template(
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.prepare(
            text,
            params,
            request_id=request_id,
            priority=priority,
            add_special_tokens=add_special_tokens,
            adapter=adapter,
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
        async with self.running(prepared) as stream:
            while updates := await stream.next_updates():
                for update in updates:
                    yield update

    async def collect(self, prepared: PreparedRequest) -> RequestOutput:
        """Queue the request and return its whole answers. Raises EngineError when the engine could not finish them."""
        builder = OutputBuilder(prepared, self.tokenizer)
        async with self.running(prepared, eager=False) as stream:
            for replayed in stream.take_replayed():
                builder.add(replayed)
            while updates := await stream.next_updates():
                for update in updates:
                    builder.add(update)
                    if update.finish_reason is FinishReason.ERROR:
                        message = update.error or "the engine failed on this request"
                        raise EngineDeadError(message) if update.lost else EngineError(message)
        return builder.build()

    @contextlib.asynccontextmanager
    async def running(self, prepared: PreparedRequest, *, eager: bool = True) -> AsyncIterator[RequestStream]:
        """The request is queued inside of this, and forgotten (in the core too) outside. eager: see RequestStream.

        Raises InvalidRequestError when its id is running already, or the ids of a continuation do not make its text;
        EngineDeadError when the engine is away and the request is not to be held.
        """
        self._check_unknown(prepared.request_id)
        self.adapters.check_is_there(prepared.adapter)
        if self.restarting and not prepared.held:
            raise EngineDeadError(self.why_restarting)
        stream = RequestStream(prepared, self.tokenizer, eager=eager, now=time.monotonic())
        self._open(stream)
        try:
            await self._queue(stream)
            yield stream
        finally:
            self._close(stream)

    def _open(self, stream: RequestStream) -> None:
        self._streams[stream.request.request_id] = stream
        for answer in stream.answers:
            if answer.open:  # those of a continuation may have ended elsewhere
                self._answers[answer.request_id] = answer
        self._idle.clear()
        if self._observer is not None:
            self._observer.request_started(stream.request)
            for answer in stream.answers:
                if not answer.open:
                    answer.tell_end_by_replay(self._observer)

    async def _queue(self, stream: RequestStream) -> None:
        try:
            self._check_alive()
            await self._placement.queue(stream)
        except EngineDeadError as error:
            self._die(error)
            self._fail(stream.answers, FinishReason.ERROR, str(error), lost=True)

    async def _send_waiting(self) -> None:
        try:
            await self._placement.run()
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:
            logger.exception("requests could not be sent to the engine")
            self._die(EngineDeadError(f"requests could not be sent to the engine: {type(error).__name__}: {error}"))

    def _close(self, stream: RequestStream) -> None:
        """The consumer is done with it: forget the request, and end in the core what still runs."""
        for answer in stream.answers:
            if answer.open:
                answer.drop(time.monotonic(), self._observer)
        engine_ids = self._forget(stream.answers)
        self._streams.pop(stream.request.request_id, None)
        if engine_ids:
            self._send_soon(AbortRequests(engine_ids, silent=True))

    def _forget(self, answers: Sequence[Answer]) -> list[str]:
        """Returns the engine ids of those on which a core may still work."""
        engine_ids = []
        for answer in answers:
            self._answers.pop(answer.request_id, None)
            if (engine_id := self._placement.forget(answer)) is not None:
                engine_ids.append(engine_id)
        if not self._answers:
            self._idle.set()
        return engine_ids

    def _fail(
        self, answers: Sequence[Answer], reason: FinishReason, message: str | None, *, lost: bool = False
    ) -> list[str]:
        """End these answers here, because the core will not. Returns the engine ids of those that it may work on."""
        now = time.monotonic()
        for answer in answers:
            if answer.open:
                answer.fail(reason, message, now, self._observer, lost=lost)
        return self._forget(answers)

    def _end(self, answers: Sequence[Answer], reason: FinishReason, message: str | None, lost: bool) -> None:
        if engine_ids := self._fail(answers, reason, message, lost=lost):
            self._send_soon(AbortRequests(engine_ids, silent=True))

    def _end_by_journal(self, answer: Answer) -> None:
        """A core emitted the last token and was gone before it said so."""
        reason, stop_reason = answer.journal.end_by_engine()
        end = TokenDelta(answer.request_id, [], finish_reason=reason, stop_reason=stop_reason)
        answer.take_delta(end, time.monotonic(), self._observer)
        self._forget([answer])

    async def abort(self, request_id: str) -> None:
        """End a request; its consumer gets what was generated and FinishReason.ABORT. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is None or not self.alive:
            return
        running = [answer for answer in stream.answers if answer.open]
        engine_ids = [engine_id for answer in running if (engine_id := answer.engine_id) is not None]
        for answer in running:
            answer.aborting = True
        self._fail([answer for answer in running if answer.engine_id is None], FinishReason.ABORT, None)
        if engine_ids:
            with contextlib.suppress(CoreRestarting):  # they end as soon as that is known
                await self._client.send(AbortRequests(engine_ids))

    def _send_soon(self, message: AbortRequests) -> None:
        """Send from a task of its own: whoever closes a stream may be in the middle of being cancelled."""

        async def send() -> None:
            with contextlib.suppress(EngineDeadError):  # nothing runs there any more
                await self._client.send(message)

        if self.alive:
            task = asyncio.get_running_loop().create_task(send())
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)

    # --- the pump --------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        try:
            while True:
                try:
                    outputs = await self._client.receive()
                except CoreRestarting as error:
                    self._lose_core(str(error))
                    continue
                if outputs.generation == self._generation:
                    ended_here = self._dispatch(outputs)
                    self._placement.wake()  # a core may be back
                    if ended_here:
                        with contextlib.suppress(CoreRestarting):
                            await self._client.send(AbortRequests(ended_here, silent=True))
                await asyncio.sleep(0)  # let the consumers run, even if the next outputs are there already
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:
            logger.exception("the engine's outputs could not be taken in")
            self._die(EngineDeadError(f"the engine's outputs could not be taken in: {type(error).__name__}: {error}"))

    def _lose_core(self, reason: str) -> None:
        """The only core is gone, and another one comes up."""
        now = time.monotonic()
        self._note_away(now)
        self._take_stats(stats_of_the_lost(self.latest_stats), 0, now)
        self._placement.lose_all(reason)

    def _note_away(self, now: float) -> None:
        if self._away_since is None and not self._client.num_there:
            self._away_since = now

    def _dispatch(self, outputs: CoreOutputs) -> list[str]:
        """Hand the deltas of one step to their answers. Returns the ids that ended here, not in the core."""
        now = time.monotonic()
        lost: dict[Answer, str] = {}
        self._pulse.take(outputs)
        if outputs.stats is not None:
            self._take_stats(outputs.stats, outputs.replica, now)
        ended_here: list[str] = []
        answers, observer = self._placement.in_core, self._observer
        for delta in outputs.deltas:
            answer = answers.get(delta.request_id)
            if answer is None:  # ended here already, or sent again; these tokens crossed on the way
                continue
            if delta.lost:
                lost[answer] = delta.error or "its replica is gone"
                continue
            self._away_since = None
            try:
                if answer.take_delta(delta, now, observer):
                    ended_here.append(delta.request_id)
            except Exception as error:  # a fault of one request must not touch the others
                logger.exception("request %s: cannot make text of its tokens", delta.request_id)
                self._fail([answer], FinishReason.ERROR, f"cannot make text of the tokens: {error}")
                ended_here.append(delta.request_id)
            if not answer.open:
                self._forget([answer])
        if lost:
            self._note_away(now)
            self._placement.lose(lost, next(iter(lost.values())))
        return ended_here

    def _take_stats(self, stats: EngineStats, replica: int, now: float) -> None:
        self._stats[replica] = stats
        self.latest_stats = stats if len(self._stats) == 1 else combine_stats(self._stats.values())
        if self._observer is not None:
            self._observer.stats(stats, replica)

    def _die(self, error: EngineDeadError) -> None:
        """The core is gone: every running request gets its ending."""
        if self._failure is None:
            self._failure = error
            self._placement.count_crash()
        self._fail(list(self._answers.values()), FinishReason.ERROR, str(self._failure), lost=True)

    def _end_overdue(self, now: float) -> None:
        """No core is there: whoever has waited for as long as the client would wait hears of it."""
        if not self.restarting:
            return
        self._note_away(now)
        for answer in self._placement.held:
            seconds = now - max(self._away_since or now, answer.owner.start_time)
            limit = answer.journal.deadline_seconds
            if seconds >= limit:
                message = f"no progress for {limit:g} s, the deadline of this request: {self.why_restarting}"
                self._fail([answer], FinishReason.ERROR, message, lost=True)

    # --- health and ending -----------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Answers that are queued or running."""
        return len(self._answers)

    @property
    def alive(self) -> bool:
        """The core is there, or comes back; of several replicas one at least."""
        return self._failure is None and self._pump_task is not None and not self._pump_task.done()

    @property
    def admitting(self) -> bool:
        """New requests are taken; while a core comes back, they wait."""
        return self.alive and not self._draining

    @property
    def restarting(self) -> bool:
        """No core is there, and one comes up: requests wait for it."""
        return self.alive and not self._client.num_there

    @property
    def why_restarting(self) -> str:
        """ "the engine is restarting (attempt 1 of 5): " and the reason; empty while it is there."""
        return str(self._client.restart or "the engine is restarting") if self.restarting else ""

    @property
    def num_restarts(self) -> int:
        """How often a core came back."""
        return self._client.num_restarts

    @property
    def num_requests_continued(self) -> int:
        """Answers that were sent to a core again."""
        return self._placement.num_continued

    @property
    def num_tokens_replayed(self) -> int:
        """Tokens that had been emitted already, and that a core was told with them."""
        return self._placement.num_tokens_replayed

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """How each engine core does: one entry, or one for each of --data-parallel-size."""
        if several := self._client.replicas:
            return several
        failure = self.why_restarting or None
        if not self.alive:
            failure = str(self._failure or "it has not been started")
        if not self._placement.in_core or failure is not None:
            return [ReplicaStatus(0, failure, 0.0)]
        seconds_busy = time.monotonic() - self._placement.busy_since
        return [
            ReplicaStatus(
                0,
                failure,
                min(self._pulse.seconds_without_progress, seconds_busy),
                min(self._pulse.seconds_unheard, seconds_busy),
            )
        ]

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
        return self.alive and not self.restarting and not self.stalled

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
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what still runs (FinishReason.ABORT), then the core. Returns when nothing of it is left."""
        self._draining = True
        if self._failure is None:
            self._failure = EngineDeadError("the engine has been shut down")
        self._fail(list(self._answers.values()), FinishReason.ABORT, "the engine has been shut down")
        own = [*self._other_tasks, *([self._pump_task] if self._pump_task is not None else [])]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, *self._sends, return_exceptions=True)
        await self._client.close()
