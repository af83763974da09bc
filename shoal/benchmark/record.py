"""What is known of one request to a server: when each chunk came, and token counts: a fold over its stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_content(self) -> bool:
        delta = self.delta
        return bool(self.text) or (
            delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclasses.dataclass
class RequestRecord:
    """One request. Times in seconds of one clock; `end` is None while it runs.

    arrivals: (time, tokens of the answer so far if the chunk said it) of each chunk with content.
    error: the kind of failure; message: in the server's words.
    """

    scheduled: float
    start: float
    end: float | None = None
    arrivals: list[tuple[float, int | None]] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finished: bool = False
    error: str | None = None
    message: str = ""

    @property
    def succeeded(self) -> bool:
        return self.end is not None and self.error is None and bool(self.arrivals)

    def take(self, data: bytes, now: float) -> None:
        """One event of the stream, the bytes after `data:`. What is no OpenAI chunk is an error of this request."""
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail("bad answer", f"{error}: {data[:100]!r}")
            return
        if chunk.error is not None:
            self.fail("error in stream", str(chunk.error))
            return
        if chunk.usage is not None:
            self.prompt_tokens, self.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        ends = any(choice.finish_reason for choice in chunk.choices)
        self.finished = self.finished or ends
        # An answer of special tokens alone has no text: its end is the first that is seen of it.
        if any(choice.has_content() for choice in chunk.choices) or (ends and not self.arrivals):
            self.arrivals.append((now, chunk.usage.completion_tokens if chunk.usage else None))

    def fail(self, kind: str, message: str) -> None:
        """The first failure counts."""
        if self.error is None:
            self.error, self.message = kind, message

    def token_arrivals(self) -> list[tuple[float, float]]:
        """(time, number of tokens) of each chunk with content.

        Where the chunks do not say how many they hold, each has the same share of what the usage says in the end;
        without any usage, one.
        """
        if not self.arrivals:
            return []
        if all(count is not None for _, count in self.arrivals):
            arrivals, before = [], 0
            for time, count in self.arrivals:
                assert count is not None
                arrivals.append((time, float(max(count - before, 0))))
                before = count
            return arrivals
        share = self.num_output_tokens / len(self.arrivals)
        return [(time, share) for time, _ in self.arrivals]

    @property
    def num_output_tokens(self) -> int:
        """By the usage, else one for each chunk."""
        return len(self.arrivals) if self.output_tokens is None else self.output_tokens
