"""A prompt's identity without a tokenizer: chained hashes over blocks of its canonical bytes, alike in every process.

The router calls it once a request. What renders alike has the same bytes: roles, contents, tools, not the sampling
parameters; and the bytes of a conversation begin with those of its earlier turns.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

BLOCK_BYTES = 256
# Hashing a block takes about 2 µs: prompts that agree over this much (128 KiB) are taken for ones that share it all.
MAX_BLOCKS = 512

_FIELD = b"\x1f"
_END = b"\x1e"
_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=repr)


class PromptShape(NamedTuple):
    """blocks: chained hashes of the whole blocks. num_bytes: of everything. num_token_ids: None unless it is of ids."""

    blocks: list[int]
    num_bytes: int
    num_token_ids: int | None


def prefix_blocks(path: str, body: Mapping[str, Any]) -> list[int]:
    """A hash for each whole block of the prompt, which stands for all of the prompt up to there.

    path: of the request, such as /v1/chat/completions. body: its JSON. A body that no server would take has no error
    here: it has few blocks, or none.
    """
    return read_prompt(path, body).blocks


def read_prompt(path: str, body: Mapping[str, Any]) -> PromptShape:
    """The blocks and the size of a request's prompt. A list of prompts counts as one, in order."""
    num_token_ids: int | None = None
    if path.rstrip("/").endswith("/chat/completions"):
        data = _chat_bytes(body)
    else:
        data, num_token_ids = _completion_bytes(body.get("prompt"))
    # Models and salts (a field of vLLM's) never share a cache.
    salt = [body.get("model"), body.get("cache_salt")]
    return PromptShape(chain_hashes(data, hashlib.sha256(_json(salt)).digest()), len(data), num_token_ids)


def chain_hashes(data: bytes, salt: bytes = b"") -> list[int]:
    """64 bits for each whole block, of it and all before it; of at most MAX_BLOCKS blocks."""
    running = hashlib.blake2b(salt, digest_size=8)
    blocks = []
    view = memoryview(data)
    for start in range(0, min(len(data) // BLOCK_BYTES, MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        running.update(view[start : start + BLOCK_BYTES])
        blocks.append(int.from_bytes(running.copy().digest(), "little"))
    return blocks


def _chat_bytes(body: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    # Templates put tools before everything else.
    for name in ("tools", "functions", "documents"):
        if body.get(name):
            parts += (name.encode(), _FIELD, _json(body[name]), _END)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, Mapping):
            parts += (_json(message), _END)
            continue
        parts += (_text(message.get("role")), _FIELD)
        _add_content(parts, message.get("content"))
        for name in ("reasoning_content", "name", "tool_calls", "function_call", "tool_call_id"):
            if message.get(name) is not None:
                parts += (_FIELD, name.encode(), _FIELD, _json(message[name]))
        parts.append(_END)
    return b"".join(parts)


def _add_content(parts: list[bytes], content: Any) -> None:
    """Text as it is, whether alone or in parts; of images and the like, which may be megabytes, their digest."""
    if not isinstance(content, list):
        parts.append(_text(content))
        return
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(_text(part["text"]))
        elif isinstance(part, str):
            parts.append(_text(part))
        else:
            parts += (_FIELD, hashlib.sha256(_json(part)).digest())


def _completion_bytes(prompt: Any) -> tuple[bytes, int | None]:
    """The bytes, and the number of token ids if it is of those."""
    if not isinstance(prompt, list):
        return _text(prompt), None
    try:
        if prompt and isinstance(prompt[0], list):
            return _END.join(map(_id_bytes, prompt)), sum(map(len, prompt))
        return _id_bytes(prompt), len(prompt)
    except (TypeError, OverflowError):
        return _END.join(map(_text, prompt)), None


def _id_bytes(ids: list[int]) -> bytes:
    """Raises TypeError or OverflowError for what are no token ids."""
    packed = array.array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        # JSON may hold halves of surrogate pairs, which UTF-8 has no place for.
        return value.encode("utf-8", "surrogatepass")
    return b"" if value is None else _json(value)


def _json(value: Any) -> bytes:
    try:
        return _encoder.encode(value)
    except RecursionError:
        return b""  # nested beyond what any server takes
    except (UnicodeEncodeError, TypeError, ValueError, OverflowError):
        return repr(value).encode("utf-8", "surrogatepass")
