"""/internal/v1/continue: how a router has a request answered, and answered further by another server. Version 1.

The router sends a ContinueRequest, the answer is a stream of frames. A frame is four bytes of length (big-endian) and
an InternalEvent in MessagePack. The server renders what the client is to get (`data`); the router passes it on as it
is, and keeps what the next server needs to go on from there. A frame counts as delivered when all of it was read.

An answer that is not 200 is an ordinary one: OpenAI's error object, and no frame. A stream that ends without Finished
or Failed was cut off.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

import msgspec

from shoal.types.outputs import FinishReason, TokenLogprobs

VERSION = 1
PREFIX = "/internal/"
PATH = "/internal/v1/continue"
# The secret of routers, and the code of the error (401) of one who does not have it.
TOKEN_HEADER = "x-shoal-internal-token"
TOKEN_CODE = "invalid_internal_token"
REQUEST_MEDIA_TYPE = "application/x-shoal-continue"
STREAM_MEDIA_TYPE = "application/x-shoal-events"
# /version lists it under "internal": so a router knows what a server can do.
CAPABILITY = f"continue/{VERSION}"
# The server says at least this often that it is there, so that silence means something.
BEAT_SECONDS = 0.5
MAX_FRAME_BYTES = 256 * 1024 * 1024
# What a request may bring beside the client's body: ids of prompts and answers, log-probabilities.
MAX_JOURNAL_BYTES = 64 * 1024 * 1024

_LENGTH = struct.Struct(">I")


class AnswerJournal(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One answer as far as it was delivered. An answer of which nothing was is not in the journal.

    index: as in the API's choices (answer i of prompt p is p * n + i). delivered_characters: of its text.
    finish_reason: of an answer that has ended. All else as in RequestUpdate, over the whole answer so far.
    """

    index: int
    token_ids: list[int] = []
    delivered_characters: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, progress: Progress) -> None:
        """The journal after this frame. Nothing of an answer comes after its end."""
        assert progress.index == self.index and self.finish_reason is None
        self.token_ids.extend(progress.token_ids)
        self.delivered_characters += progress.num_characters
        if progress.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(progress.logprobs)
        if progress.prompt_logprobs is not None:
            self.prompt_logprobs = progress.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, progress.num_cached_tokens)
        self.finish_reason = progress.finish_reason
        self.stop_reason = progress.stop_reason


class _Versioned(msgspec.Struct):
    """What every version of a request has."""

    version: int


class ContinueRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A client's request, and how far other servers have come with it.

    path, body: as the client sent them (body: JSON). request_id: what the answer's id is made of. created: the answer's
    Unix time. seed: for a request that brings none. prompts: the token ids of each prompt, as the first server rendered
    them; None while no server has said. num_crashes: how many engines ended while they worked on it.
    deadline_seconds: how long it may go without progress. alone: no other request may run beside it.
    """

    version: int
    path: str
    body: bytes
    request_id: str
    seed: int
    created: int
    prompts: list[list[int]] | None = None
    answers: list[AnswerJournal] = []
    num_crashes: int = 0
    deadline_seconds: float = 60.0
    alone: bool = False


class Accepted(msgspec.Struct, tag="accepted", omit_defaults=True):
    """The first frame: the request is valid and queued. prompts: the token ids of each; n: answers to each. is_running:
    whether it is in the engine; while it waits for its turn, the engine's end is no fault of its own."""

    prompts: list[list[int]]
    n: int = 1
    max_tokens: int = 0
    is_running: bool = True


class Progress(msgspec.Struct, tag="progress", omit_defaults=True):
    """News of one answer, and the bytes to pass on to a client that streams (empty for one that does not).

    num_characters: how much text the news brings. Of an answer's frames the one with a finish_reason is the last.
    """

    index: int
    data: bytes = b""
    token_ids: list[int] = []
    num_characters: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Beat(msgspec.Struct, tag="beat", omit_defaults=True):
    """Nothing new, but the server is there. seconds_without_progress: of the engine, although it has work. is_running:
    as in Accepted; sent at once when it changes."""

    seconds_without_progress: float = 0.0
    restarting: bool = False
    is_running: bool = True


class Finished(msgspec.Struct, tag="finished", omit_defaults=True):
    """The last frame of a request that went well. data: the end of the stream, or the whole JSON answer."""

    data: bytes
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0


class Failed(msgspec.Struct, tag="failed", omit_defaults=True):
    """The last frame otherwise. status, body: as they would be in an answer of their own (body: OpenAI's error object).

    lost: the engine is gone, and another server can go on. crashed: it was in the engine then. moved: this server is
    shutting down, and another can go on.
    """

    status: int
    body: bytes
    lost: bool = False
    crashed: bool = False
    moved: bool = False


InternalEvent = Accepted | Progress | Beat | Finished | Failed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[InternalEvent] = msgspec.msgpack.Decoder(InternalEvent)
_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_request_decoder = msgspec.msgpack.Decoder(ContinueRequest)


def encode_request(request: ContinueRequest) -> bytes:
    return _encoder.encode(request)


def version_of(data: bytes) -> int:
    """The version of a request, whatever else that version holds. Raises msgspec.DecodeError for what is none."""
    return _version_decoder.decode(data).version


def decode_request(data: bytes) -> ContinueRequest:
    """Raises msgspec.DecodeError (msgspec.ValidationError among them) for what is none."""
    return _request_decoder.decode(data)


def frame(event: InternalEvent) -> bytes:
    """An event as it goes over the connection."""
    payload = _encoder.encode(event)
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Takes bytes as they come and yields whole events. What is left over is an event that was cut off."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a part of an event has come, without its end."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterable[InternalEvent]:
        """Raises ValueError (msgspec.DecodeError is one) for bytes that are no frames, also while one iterates."""
        size = _LENGTH.size
        if not self._buffer and len(data) > size and _LENGTH.unpack_from(data)[0] == len(data) - size:
            return (_decoder.decode(memoryview(data)[size:]),)  # one whole frame, as nearly always
        return self._walk(data)

    def _walk(self, data: bytes) -> Iterator[InternalEvent]:
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
                end = start + _LENGTH.size + length
                if len(buffer) < end:
                    break
                event = _decoder.decode(memoryview(buffer)[start + _LENGTH.size : end])
                start = end
                yield event
        finally:
            del buffer[:start]
