"""Server-sent events, as the OpenAI API uses them: `data: JSON`, a blank line; at the end `data: [DONE]`.

(WHATWG HTML, section 9.2.) A stream that fails after its first byte ends with an event `data: {"error": {…}}` instead
of [DONE]; a stream that ends with neither was cut off.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

MEDIA_TYPE = "text/event-stream; charset=utf-8"
HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx passes on each event at once
}
DONE = b"data: [DONE]\n\n"
PREFIX = b"data: "
END = b"\n\n"

_encode = msgspec.json.Encoder().encode


def event(content: msgspec.Struct) -> bytes:
    """One event. JSON text has no line breaks of its own, so it is always one line."""
    return b"data: " + _encode(content) + b"\n\n"
