"""One attempt on a server that speaks the OpenAI API alone (vLLM and others), by its text.

Until the first byte has gone to the client a request moves freely. After it, a stream goes on elsewhere by its text:
a completion with prompt + text so far, a chat with the text so far as a last message that is to be continued. What it
promises is less than frames do:

- the next server tokenizes the text anew, so ids may differ at the seam; a seed gives other draws there, penalties
  count what is prompt now differently, and a stop string of which a part was delivered already is not seen;
- max_tokens counts pieces delivered (or the usage that comes with each), so a server that sends several tokens in a
  piece may send some more; usage is summed, its prompt_tokens are what the last server says less what was delivered;
- what cannot go on so ends with an error event: several answers (n, best_of, several prompts), token ids as prompt,
  logprobs, echo, tools, structured output, reasoning text.

A plain request is asked anew from the start. There are no beats: a silent server is noticed by its probes.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec

from shoal.protocol import sse
from shoal.router.asgi import Answer
from shoal.router.flight import Flight
from shoal.router.outcome import CannotContinue, Ended, Lost, Refused
from shoal.router.request import GenerationRequest
from shoal.router.text_journal import Chunk, TextJournal, Usage
from shoal.router.upstream import as_error_object, backend_headers, read_refusal

_MAX_ANSWER_BYTES = 256 * 1024 * 1024
_EVENT_STREAM = "text/event-stream"
_DONE = b"[DONE]"

_decode_chunk = msgspec.json.Decoder(Chunk).decode


class _Whole(msgspec.Struct):
    usage: Usage | None = None


class EventReader:
    """Takes bytes as they come and returns the data of whole events. What is left over was cut off."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        return [found for event in events if (found := _data_of(event))]


def _data_of(event: bytes) -> bytes:
    """Of one event; empty for comments."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


class ForeignAttempt:
    """What it raises is in outcome.py; it returns when all is sent."""

    def __init__(self, request: GenerationRequest, journal: TextJournal, flight: Flight, answer: Answer) -> None:
        self._request = request
        self._journal = journal
        self._flight = flight
        self._answer = answer

    async def run(self, session: aiohttp.ClientSession) -> None:
        request, journal, backend = self._request, self._journal, self._flight.backend
        if journal.finish_reason is not None or journal.remaining_tokens() == 0:
            await self._answer.end(journal.ending() + sse.DONE)
            return
        body = request.body
        if self._answer.started:
            if why_not := journal.why_not():
                raise CannotContinue(
                    f"the server was lost in mid-stream, and the answer cannot go on by its text: {why_not}"
                )
            body = journal.continuation()
        journal.begin_attempt()
        url, headers = backend.url + request.path, backend_headers(backend.spec, request)
        self._flight.waiting_since = backend.clock()
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise await read_refusal(response)
            self._flight.last_sign = backend.clock()
            if request.stream:
                if response.content_type != _EVENT_STREAM:
                    raise Refused(502, as_error_object(502, b"the server answered a stream with something else"), {})
                await self._stream(response)
            else:
                await self._plain(response)

    async def _plain(self, response: aiohttp.ClientResponse) -> None:
        parts, size = [], 0
        while chunk := await self._read(response):
            parts.append(chunk)
            size += len(chunk)
            if size > _MAX_ANSWER_BYTES:
                raise Ended(502, as_error_object(502, b"the server's answer is too large"))
        whole = b"".join(parts)
        try:
            usage = msgspec.json.decode(whole, type=_Whole).usage
        except msgspec.DecodeError as error:
            raise Lost(f"its answer is not JSON ({error})") from None
        if usage is not None:
            self._flight.num_prompt_tokens = usage.prompt_tokens
            self._flight.progress(usage.completion_tokens, self._flight.backend.clock())
            self._journal.usage = usage
        await self._answer.whole(200, whole)

    async def _stream(self, response: aiohttp.ClientResponse) -> None:
        reader = EventReader()
        while chunk := await self._read(response):
            if await self._take(reader.feed(chunk)):
                return
        raise Lost("its stream ended before it was whole")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        flight = self._flight
        flight.begin_wait(flight.backend.clock())
        chunk = await response.content.readany()
        flight.waiting_since = None
        flight.last_sign = flight.backend.last_sign = flight.backend.clock()
        return chunk

    async def _take(self, events: list[bytes]) -> bool:
        """Deliver the events of one read. Returns whether the stream has ended well."""
        journal, parts = self._journal, []
        before = journal.num_tokens
        failure: Lost | None = None
        done = False
        for data in events:
            if data == _DONE:
                done = True
                break
            try:
                chunk = _decode_chunk(data)
            except msgspec.DecodeError as error:
                failure = Lost(f"it sent an event that is none of the OpenAI API ({error})")
                break
            if chunk.error is not None:
                failure = Lost(f"it ended the stream with an error: {_message(chunk.error)}")
                break
            told = journal.add(chunk, data)
            if told:
                parts.append(sse.PREFIX + told + sse.END)
        if journal.num_tokens > before:
            self._flight.progress(journal.num_tokens - before, self._flight.last_sign)
        if done:
            if journal.usage is not None:
                self._flight.num_prompt_tokens = journal.usage.prompt_tokens
            await self._answer.end(b"".join(parts) + sse.DONE)
            return True
        if parts:
            await self._answer.data(b"".join(parts))
        if failure is not None:
            raise failure
        return False


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
