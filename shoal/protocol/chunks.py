"""A stream's updates as the bytes of its events. One object per stream; the server sends what it returns.

Nearly every update is text and nothing else: for these the event is put together around the escaped text, a
microsecond instead of several. Everything else goes through the structs of responses.py; both write the same bytes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from shoal.protocol import sse
from shoal.protocol.logprobs import CompletionLogprobsBuilder, TokenBytes, chat_logprobs
from shoal.protocol.responses import ChatChunkChoice, ChatLogprobs, Chunk, CompletionChoice, Delta, Usage
from shoal.types.outputs import FinishReason, RequestUpdate, TokenLogprobs

_encode = msgspec.json.Encoder().encode
_MARK = "\x1a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamHead:
    """What all chunks of a stream say, and what the client wants to hear besides the text."""

    id: str
    object: str
    created: int
    model: str
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False


class ChunkStream(abc.ABC):
    """What chat and completions share: counting, usage, the template of a plain chunk.

    prompts: the token ids of each prompt. num_answers: answers per prompt; answer i of prompt p has index p * n + i.
    """

    def __init__(self, head: StreamHead, prompts: Sequence[list[int]], num_answers: int) -> None:
        self.head = head
        self.prompts = prompts
        self.num_answers = num_answers
        self.num_tokens = 0
        self._num_cached = [0] * len(prompts)
        # Of each answer that has begun: what stands before and after the text of a plain chunk.
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        self._never_plain = head.return_token_ids or head.continuous_usage

    def render(self, update: RequestUpdate) -> bytes:
        """The events of an update; empty when there is nothing to tell. Its error, if any, is the caller's to send."""
        self.num_tokens += len(update.token_ids)
        plain = self._plain.get(update.index)
        if plain is None:
            return self._begin(update) + self._whole(update)
        if update.finish_reason is None and update.logprobs is None and not self._never_plain:
            return plain[0] + _encode(update.text) + plain[1] if update.text else b""
        return self._whole(update)

    def finish(self) -> bytes:
        """The end of a stream that went well."""
        return (self._event([], self.usage()) if self.head.include_usage else b"") + sse.DONE

    def usage(self) -> Usage:
        """The counts so far."""
        return Usage.of(sum(map(len, self.prompts)), self.num_tokens, sum(self._num_cached))

    def _begin(self, update: RequestUpdate) -> bytes:
        """Learn the template of this answer's plain chunks; return what comes before its first update."""
        prompt_index = update.index // self.num_answers
        self._num_cached[prompt_index] = max(self._num_cached[prompt_index], update.num_cached_tokens)
        before, after = self._event([self._choice(RequestUpdate(update.index, _MARK, []))]).split(_encode(_MARK))
        self._plain[update.index] = before, after
        return self._opening(update)

    def _whole(self, update: RequestUpdate) -> bytes:
        if update.error is not None or update.finish_reason is FinishReason.ERROR:
            update = msgspec.structs.replace(update, finish_reason=None)
        tells = update.text or update.finish_reason or update.logprobs
        if not tells and not (self.head.return_token_ids and update.token_ids):
            return b""
        return self._event([self._choice(update)])

    def _event(self, choices: list[Any], usage: Usage | None = None) -> bytes:
        return sse.event(self._chunk(choices, usage))

    def _chunk(self, choices: list[Any], usage: Usage | None = None) -> Chunk:
        head = self.head
        shown: Usage | UnsetType | None = usage
        if usage is None:
            shown = self.usage() if head.continuous_usage else None if head.include_usage else UNSET
        return Chunk(head.id, head.object, head.created, head.model, choices, shown)

    @abc.abstractmethod
    def _opening(self, update: RequestUpdate) -> bytes:
        """What comes before the first update of an answer."""

    @abc.abstractmethod
    def _choice(self, update: RequestUpdate) -> ChatChunkChoice | CompletionChoice:
        """The choice that tells this update."""


class ChatChunks(ChunkStream):
    """Chunks of /v1/chat/completions. role: of the answers."""

    def __init__(
        self, head: StreamHead, prompt: list[int], num_answers: int, *, role: str, token_bytes: TokenBytes
    ) -> None:
        super().__init__(head, [prompt], num_answers)
        self._role = role
        self._token_bytes = token_bytes

    def _opening(self, update: RequestUpdate) -> bytes:
        chunk = self._chunk([ChatChunkChoice(update.index, Delta(self._role, ""))])
        if self.head.return_token_ids:
            chunk.prompt_token_ids = self.prompts[0]
        return sse.event(chunk)

    def _choice(self, update: RequestUpdate) -> ChatChunkChoice:
        choice = ChatChunkChoice(update.index, Delta(content=update.text) if update.text else Delta())
        if update.logprobs is not None:
            choice.delta.content = update.text
            choice.logprobs = ChatLogprobs(chat_logprobs(update.logprobs, self._token_bytes))
        if update.finish_reason is not None:
            choice.finish_reason = str(update.finish_reason)
            choice.stop_reason = update.stop_reason
        if self.head.return_token_ids:
            choice.token_ids = update.token_ids
        return choice


class CompletionChunks(ChunkStream):
    """Chunks of /v1/completions.

    echo: the text of each prompt where it is to open the answers, else None. make_logprobs: makes the builder of one
    answer where log-probabilities are wanted. only_echo: the generated tokens are not for the client.
    """

    def __init__(
        self,
        head: StreamHead,
        prompts: Sequence[list[int]],
        num_answers: int,
        *,
        echo: list[str] | None = None,
        only_echo: bool = False,
        make_logprobs: Callable[[], CompletionLogprobsBuilder] | None = None,
    ) -> None:
        super().__init__(head, prompts, num_answers)
        self._echo = echo
        self._only_echo = only_echo
        num_choices = len(prompts) * num_answers
        self._builders = None if make_logprobs is None else [make_logprobs() for _ in range(num_choices)]
        # The first of n answers brings the prompt's log-probabilities; the others wait until they are here.
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._held: dict[int, list[RequestUpdate]] = {}

    def render(self, update: RequestUpdate) -> bytes:
        if self._only_echo:
            update = msgspec.structs.replace(update, text="", token_ids=[], logprobs=None)
        if self._echo is None or self._builders is None:
            return super().render(update)
        prompt_index = update.index // self.num_answers
        if update.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = update.prompt_logprobs
        held = self._held.setdefault(prompt_index, [])
        held.append(update)
        if prompt_index not in self._prompt_logprobs:
            return b""
        del self._held[prompt_index]
        return b"".join([super(CompletionChunks, self).render(each) for each in held])

    def _opening(self, update: RequestUpdate) -> bytes:
        if self._echo is None and not self.head.return_token_ids:
            return b""
        prompt_index = update.index // self.num_answers
        choice = CompletionChoice(update.index, "" if self._echo is None else self._echo[prompt_index])
        if self._echo is not None and self._builders is not None:
            builder = self._builders[update.index]
            builder.add_prompt(self.prompts[prompt_index], self._prompt_logprobs[prompt_index], choice.text)
            choice.logprobs = builder.take()
        if self.head.return_token_ids:
            choice.prompt_token_ids = self.prompts[prompt_index]
            choice.token_ids = []
        return self._event([choice])

    def _choice(self, update: RequestUpdate) -> CompletionChoice:
        choice = CompletionChoice(update.index, update.text)
        if update.logprobs is not None and self._builders is not None:
            builder = self._builders[update.index]
            builder.add(update.logprobs)
            choice.logprobs = builder.take()
        if update.finish_reason is not None:
            choice.finish_reason = str(update.finish_reason)
            choice.stop_reason = update.stop_reason
        if self.head.return_token_ids:
            choice.token_ids = update.token_ids
        return choice
