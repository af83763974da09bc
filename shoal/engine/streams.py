"""RequestStream: one request on its way, with its answers. Filled by AsyncEngine's pump, emptied by one consumer.

A slow consumer costs no memory beyond its tokens: news of an answer that nobody took yet grow into one update.
"""

from __future__ import annotations

import asyncio

from shoal.engine.answer_so_far import AnswerSoFar
from shoal.engine.journal import Fold, Folded, RequestJournal
from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import InvalidRequestError
from shoal.messages import TokenDelta
from shoal.types.outputs import FinishReason, RequestUpdate
from shoal.types.request import EngineRequest

# A request that was in the core at so many crashes runs alone.
_CRASHES_OF_A_SUSPECT = 2


class Answer:
    """One of the n answers: its journal, its fold, and the news that the consumer has not taken yet.

    engine_id: what a core calls it while it is in one or on its way there; each sending has its own, so that what is
    still said of an earlier one finds nobody. arrived: it is in the core. aborting: the core was asked to end it.
    """

    __slots__ = (
        "_begun", "_fold", "_last_time", "_num_sent", "_parts", "aborting", "arrived", "engine_id", "index", "journal",
        "open", "owner", "pending", "replayed",
    )  # fmt: skip

    def __init__(self, owner: RequestStream, index: int, journal: RequestJournal, tokenizer: Tokenizer | None) -> None:
        self.owner = owner
        self.index = index
        self.journal = journal
        self.open = True
        self.pending: RequestUpdate | None = None
        self.engine_id: str | None = None
        self.arrived = False
        self.aborting = False
        self._num_sent = 0
        self._fold = Fold(journal, tokenizer)
        self._parts: list[str] = []  # the text of `pending`
        self._last_time = 0.0
        # Of a continuation: what was delivered elsewhere.
        self.replayed: RequestUpdate | None = None
        begun = owner.request.begun.get(index)
        self._begun = begun is not None
        if begun is not None:
            self._replay(begun, tokenizer)

    @property
    def request_id(self) -> str:
        return self.journal.request_id

    @property
    def was_sent(self) -> bool:
        """To a core, at least once."""
        return self._num_sent > 0

    def engine_request(self) -> EngineRequest:
        """What a core is asked for now: the answer, or the rest of it; under an id of its own, which is kept."""
        request = self.journal.engine_request()
        if self._num_sent:
            request.request_id += f"#{self._num_sent}"
        self._num_sent += 1
        self.engine_id = request.request_id
        self.arrived = False
        return request

    def _replay(self, begun: AnswerSoFar, tokenizer: Tokenizer | None) -> None:
        """Take up the answer where others left it; what they did not deliver of it, its end perhaps, is news."""
        reason, stop_reason = self.journal.end_by_engine()
        if reason is None and not isinstance(begun.stop_reason, str):  # a stop string is found by the fold itself
            reason = begun.finish_reason
        try:
            self._fold, rest = Fold.replay(self.journal, tokenizer, reason, stop_reason)
        except ValueError as error:
            raise InvalidRequestError(f"the journal does not fit the request: {error}") from None
        self.replayed = RequestUpdate(
            self.index, rest.delivered_text, list(begun.token_ids), begun.logprobs, begun.prompt_logprobs,
            begun.finish_reason, begun.stop_reason, begun.num_cached_tokens,
        )  # fmt: skip
        if begun.finish_reason is not None and rest.text:
            raise InvalidRequestError(
                f"the journal does not fit the request: answer {self.index} has ended, but {len(rest.text)} characters "
                f"of its {len(rest.text) + begun.num_characters} were not delivered"
            )
        if begun.finish_reason is not None or rest.finish_reason is not None:
            self.open = False
            self.owner.num_open -= 1
        if begun.finish_reason is None and (rest.text or rest.finish_reason is not None):
            self.pending = RequestUpdate(
                self.index, "", [], finish_reason=rest.finish_reason, stop_reason=rest.stop_reason
            )
            self._parts.append(rest.text)
            self.owner.notify(self)

    def tell_end_by_replay(self, observer: EngineObserver) -> None:
        """Its end was found in the ids, and no engine is asked for more."""
        if self.pending is not None and self.pending.finish_reason is not None:
            num_tokens = len(self.journal.emitted_token_ids)
            observer.finished(self.owner.request, self.index, self.pending.finish_reason, num_tokens, 0.0)

    def take_delta(self, delta: TokenDelta, now: float, observer: EngineObserver | None) -> bool:
        """Fold the engine's news in. True when the answer ended here while the engine still works on it."""
        if delta.num_cached_tokens and (self._begun or self.journal.emitted_token_ids):
            delta.num_cached_tokens = 0  # counted when the answer began
        if delta.prompt_logprobs is not None:  # once: a continuation does not ask for them
            self.journal.sampling = self.journal.sampling.clone(prompt_logprobs=None)
        folded = self._fold.push(delta.token_ids, delta.finish_reason, delta.stop_reason)
        if folded.num_tokens < len(delta.token_ids):
            del delta.token_ids[folded.num_tokens :]
            if delta.logprobs is not None:
                del delta.logprobs[folded.num_tokens :]
        if observer is not None and folded.num_tokens:
            self._tell_tokens(observer, folded.num_tokens, now)
        if folded.finish_reason is not None:
            self._end(folded.finish_reason, now, observer)
        self._add(folded, delta)
        return folded.finish_reason is not None and delta.finish_reason is None

    def fail(
        self, reason: FinishReason, message: str | None, now: float, observer: EngineObserver | None, *, lost: bool
    ) -> None:
        """The engine will not end this answer: end it here. lost: because the core is gone."""
        pending = self._pending()
        pending.finish_reason = reason
        pending.error = message
        pending.lost = lost
        self._end(reason, now, observer)
        self.owner.notify(self)

    def drop(self, now: float, observer: EngineObserver | None) -> None:
        """Nobody listens any more."""
        self._end(FinishReason.ABORT, now, observer)

    def take(self) -> RequestUpdate | None:
        """The news since the last call; they count as delivered."""
        update, self.pending = self.pending, None
        if update is None:
            return None
        parts = self._parts
        update.text = parts[0] if len(parts) == 1 else "".join(parts)
        self._parts = []
        self.journal.delivered_characters += len(update.text)
        self.journal.delivered_tokens += len(update.token_ids)
        return update

    def _pending(self) -> RequestUpdate:
        if self.pending is None:
            self.pending = RequestUpdate(self.index, "", [])
        return self.pending

    def _add(self, folded: Folded, delta: TokenDelta) -> None:
        if folded.text:
            self._parts.append(folded.text)
        pending = self.pending
        if pending is None:
            self.pending = RequestUpdate(
                self.index,
                "",
                delta.token_ids,
                delta.logprobs,
                delta.prompt_logprobs,
                folded.finish_reason,
                folded.stop_reason,
                delta.num_cached_tokens,
                delta.error,
                delta.lost,
                delta.pooled,
            )
            self.owner.notify(self)
            return
        pending.token_ids.extend(delta.token_ids)
        if pending.logprobs is None:
            pending.logprobs = delta.logprobs
        elif delta.logprobs is not None:
            pending.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            pending.prompt_logprobs = delta.prompt_logprobs
        pending.finish_reason = folded.finish_reason
        pending.stop_reason = folded.stop_reason
        pending.num_cached_tokens = max(pending.num_cached_tokens, delta.num_cached_tokens)
        pending.error = delta.error
        pending.lost = delta.lost
        pending.pooled = delta.pooled
        if folded.finish_reason is not None:
            self.owner.notify(self)

    def _tell_tokens(self, observer: EngineObserver, num_tokens: int, now: float) -> None:
        request = self.owner.request
        if self._last_time == 0.0:
            observer.first_token(request, self.index, now - self.owner.start_time)
        else:
            observer.tokens(request, self.index, num_tokens, now - self._last_time)
        self._last_time = now

    def _end(self, reason: FinishReason, now: float, observer: EngineObserver | None) -> None:
        self.open = False
        self.owner.num_open -= 1
        if observer is not None:
            num_tokens = len(self.journal.emitted_token_ids)
            observer.finished(self.owner.request, self.index, reason, num_tokens, now - self.owner.start_time)


class RequestStream:
    """The answers of one request, and the place where its consumer waits.

    eager: wake the consumer for every step; otherwise only when all answers have ended. num_crashes: how often a core
    died while it worked on it.
    """

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer | None, *, eager: bool, now: float) -> None:
        self.request = request
        self.start_time = now
        self.num_open = request.params.n
        self.num_crashes = request.num_crashes
        self.order = 0  # of arrival
        self._eager = eager
        self._ready: list[Answer] = []
        self._waiter: asyncio.Future[None] | None = None
        self.answers = [Answer(self, index, request.journal(index), tokenizer) for index in range(request.params.n)]

    @property
    def runs_alone(self) -> bool:
        """Nothing else may be in a core with it."""
        return self.request.alone or self.num_crashes >= _CRASHES_OF_A_SUSPECT

    def notify(self, answer: Answer) -> None:
        """There is news of this answer."""
        if answer not in self._ready:
            self._ready.append(answer)
        waiter = self._waiter
        if waiter is not None and (self._eager or self.num_open == 0):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def take_replayed(self) -> list[RequestUpdate]:
        """Of a continuation, one update for each answer that others began: all that they delivered."""
        replayed = [answer.replayed for answer in self.answers if answer.replayed is not None]
        for answer in self.answers:
            answer.replayed = None
        return replayed

    async def next_updates(self) -> list[RequestUpdate]:
        """Wait for news; one update per answer that has any. Empty when all answers have ended and were taken."""
        while not self._ready or (self.num_open and not self._eager):
            if self.num_open == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return [update for answer in ready if (update := answer.take()) is not None]
