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

A plain request is asked anew from the start. There are no beats: a silent server is noticed by its probes, and by half
of the deadline without a token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec

from shoal.protocol import sse
from shoal.router.asgi import Answer
from shoal.router.body_reader import BodyReader, Rest
from shoal.router.flight import Flight
from shoal.router.outcome import CannotContinue, Ended, Lost, Refused
from shoal.router.request import GenerationRequest
from shoal.router.text_journal import Chunk, TextJournal, Usage
from shoal.router.upstream import as_error_object, backend_headers, read_refusal

_MAX_ANSWER_BYTES = 256 * 1024 * 1024
MAX_EVENT_BYTES = 8 * 1024 * 1024
_EVENT_STREAM = "text/event-stream"
_DONE = b"[DONE]"

_decode_chunk = msgspec.json.Decoder(Chunk).decode


class _Whole(msgspec.Struct):
    usage: Usage | None = None


class EventReader:
    """Takes bytes as they come and returns the data of whole events (WHATWG HTML, section 9.2.6), several lines of it
    joined by line feeds. What is left over was cut off."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._ends_in_return = False

    def feed(self, data: bytes) -> list[bytes]:
        """Raises Lost for an event that is too large."""
        if b"\r" in data or self._ends_in_return:
            data = self._with_line_feeds(data)
        if self._rest:
            seen = len(self._rest) - 1
            self._rest += data
            if self._rest.find(b"\n\n", max(seen, 0)) < 0:
                if len(self._rest) > MAX_EVENT_BYTES:
                    raise Lost(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
                return []
            data = bytes(self._rest)
        *events, rest = data.split(b"\n\n")
        self._rest = bytearray(rest)
        return [found for event in events if (found := _data_of(event))]

    def _with_line_feeds(self, data: bytes) -> bytes:
        """A line may end in CR LF, LF or CR; what follows a CR at the end of a read is not known yet."""
        if self._ends_in_return:
            data = data.removeprefix(b"\n")
        self._ends_in_return = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


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
        self._events = EventReader()

    async def run(self, session: aiohttp.ClientSession) -> None:
        request, journal, backend = self._request, self._journal, self._flight.backend
        if journal.has_ended:
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
        flight = self._flight
        with BodyReader(response) as reader:
            flight.begin_wait(flight.backend.clock())
            if not await reader.read(self._take):
                flight.waiting_since = None
                raise Lost("its stream ended before it was whole")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        flight = self._flight
        flight.begin_wait(flight.backend.clock())
        chunk = await response.content.readany()
        flight.waiting_since = None
        flight.last_sign = flight.backend.last_sign = flight.backend.clock()
        return chunk

    def _take(self, piece: bytes) -> Rest | None:
        """Take in what was received, and pass it on; what has to wait for something is left to the rest."""
        flight, journal = self._flight, self._journal
        now = flight.last_sign = flight.backend.last_sign = flight.backend.clock()
        parts: list[bytes] = []
        before, other = journal.num_tokens, journal.num_other
        failure: Lost | Refused | Ended | None = None
        done = False
        for data in self._events.feed(piece):
            if data == _DONE:
                done = True
                break
            # Clients get it in one line: within JSON's strings there is no line feed.
            data = data.replace(b"\n", b" ")
            try:
                chunk = _decode_chunk(data)
            except msgspec.DecodeError as error:
                failure = Lost(f"it sent an event that is none of the OpenAI API ({error})")
                break
            if chunk.error is not None:
                failure = _failure(chunk.error, data)
                break
            told = journal.add(chunk, data)
            if told:
                parts.append(sse.PREFIX + told + sse.END)
        if journal.num_tokens > before:
            flight.progress(journal.num_tokens - before, now)
        elif journal.num_other > other:
            flight.last_progress = now
        send = None
        if not done and failure is None:
            send = self._answer.begin_data(b"".join(parts)) if parts else None
            if send is None:
                return None
            parts = []
        flight.waiting_since = None
        return self._take_rest(send, parts, failure, done)

    async def _take_rest(
        self,
        send: Callable[[], Awaitable[None]] | None,
        parts: list[bytes],
        failure: Lost | Refused | Ended | None,
        done: bool,
    ) -> bool:
        """Returns whether the stream has ended well."""
        flight, journal = self._flight, self._journal
        if send is not None:  # the client is slow, or gets its first bytes
            await send()
        if done:
            if journal.usage is not None:
                flight.num_prompt_tokens = journal.usage.prompt_tokens
            await self._answer.end(b"".join(parts) + sse.DONE)
            return True
        if parts:
            await self._answer.data(b"".join(parts))
        if failure is not None:
            raise failure
        flight.begin_wait(flight.backend.clock())
        return False


def _failure(error: Any, event: bytes) -> Refused | Ended:
    """What an error event means. Below 500 it is the request's own end; another server would say the same."""
    status = _status_of(error)
    body = as_error_object(status, event)
    return Ended(status, body) if status < 500 else Refused(status, body, {}, in_stream=True)


def _status_of(error: Any) -> int:
    """The HTTP status of an error object: its code where that is one, as vLLM has it; else told by its type."""
    if isinstance(error, dict):
        code = str(error.get("code"))
        if code.isdecimal() and 400 <= int(code[:4]) < 600:
            return int(code)
        if error.get("type") == "invalid_request_error":
            return 400
    return 500
