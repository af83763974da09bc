"""RequestStream: one request on its way, with its answers. Filled by AsyncEngine's pump, emptied by one consumer.

A slow consumer costs no memory beyond its tokens: news of an answer that nobody took yet grow into one update.
"""

from __future__ import annotations

import asyncio

from shoal.engine.journal import Fold, Folded, RequestJournal
from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest
from shoal.engine.tokenizer import Tokenizer
from shoal.messages import TokenDelta
from shoal.types.outputs import FinishReason, RequestUpdate


class Answer:
    """One of the n answers: its journal, its fold, and the news that the consumer has not taken yet."""

    __slots__ = ("_fold", "_last_time", "_parts", "index", "journal", "open", "owner", "pending")

    def __init__(self, owner: RequestStream, index: int, journal: RequestJournal, tokenizer: Tokenizer | None) -> None:
        self.owner = owner
        self.index = index
        self.journal = journal
        self.open = True
        self.pending: RequestUpdate | None = None
        self._fold = Fold(journal, tokenizer)
        self._parts: list[str] = []  # the text of `pending`
        self._last_time = 0.0

    @property
    def request_id(self) -> str:
        return self.journal.request_id

    def take_delta(self, delta: TokenDelta, now: float, observer: EngineObserver | None) -> bool:
        """Fold the engine's news in. True when the answer ended here while the engine still works on it."""
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

    eager: wake the consumer for every step; otherwise only when all answers have ended.
    """

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer | None, *, eager: bool, now: float) -> None:
        self.request = request
        self.start_time = now
        self.num_open = request.params.n
        self._eager = eager
        self._ready: list[Answer] = []
        self._waiter: asyncio.Future[None] | None = None
        self.answers = [Answer(self, index, request.journal(index), tokenizer) for index in range(request.params.n)]

    def notify(self, answer: Answer) -> None:
        """There is news of this answer."""
        if answer not in self._ready:
            self._ready.append(answer)
        waiter = self._waiter
        if waiter is not None and (self._eager or self.num_open == 0):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def next_updates(self) -> list[RequestUpdate]:
        """Wait for news; one update per answer that has any. Empty when all answers have ended and were taken."""
        while not self._ready or (self.num_open and not self._eager):
            if self.num_open == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return [update for answer in ready if (update := answer.take()) is not None]
