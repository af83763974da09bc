"""A tokenizer of a few hundred characters in plain Python, so that a fake server starts without transformers or torch.

A character of the table is one token, any other one is its UTF-8 bytes, a token each. So text and ids map to each other
one to one, and a request that goes on by its text meets the same ids as one that goes on by its tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from shoal.engine.tokenizer import Tokenizer

END, USER, SYSTEM, ASSISTANT = range(4)
_SPECIAL = ("<|end|>", "<|user|>", "<|system|>", "<|assistant|>")
_FIRST_BYTE = len(_SPECIAL)
_FIRST_CHARACTER = _FIRST_BYTE + 256
# Whoever has this in a prompt ends the engine that computes it.
DEADLY = "☠"
_CHARACTERS = (
    "\n"
    + "".join(map(chr, range(32, 127)))
    + "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能"
    + DEADLY
)
SIZE = _FIRST_CHARACTER + len(_CHARACTERS)
_ID_OF_CHARACTER = {character: _FIRST_CHARACTER + index for index, character in enumerate(_CHARACTERS)}
_SPLIT = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")

# What a fake engine says: letters, spaces and Chinese mostly, and characters that take several tokens.
_SAID = "abcdefghijklmnopqrstuvwxyz      ,." + "的一是不了人我在有他这为之大来以个中上们到说国和地也子时"
_SAID_IN_BYTES = "龘€😀ж"


def encode_text(text: str) -> list[int]:
    """Token ids of a text in which special tokens are spelt out."""
    ids: list[int] = []
    for part in _SPLIT.split(text):
        if part in _SPECIAL:
            ids.append(_SPECIAL.index(part))
            continue
        for character in part:
            known = _ID_OF_CHARACTER.get(character)
            ids.extend([known] if known is not None else [_FIRST_BYTE + byte for byte in character.encode()])
    return ids


DEADLY_ID = encode_text(DEADLY)[0]
# The first token of everything that may be said next, and the only way on within a character of several tokens.
SAYABLE = [encode_text(character)[0] for character in _SAID + _SAID_IN_BYTES]
WAY_ON = {tuple(ids[:length]): ids[length] for ids in map(encode_text, _SAID_IN_BYTES) for length in range(1, len(ids))}


def _token(token_id: int) -> str | None:
    if not 0 <= token_id < SIZE:
        return None
    if token_id < _FIRST_BYTE:
        return _SPECIAL[token_id]
    if token_id < _FIRST_CHARACTER:
        return f"<0x{token_id - _FIRST_BYTE:02X}>"
    return _CHARACTERS[token_id - _FIRST_CHARACTER]


@dataclasses.dataclass(frozen=True)
class _AddedToken:
    special: bool = True


class _Decoder:
    """Tells how tokens become text as a tokenizer.json does: bytes where tokens are bytes, then all in one."""

    def __getstate__(self) -> bytes:
        return json.dumps({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}).encode()


class _Rust:
    decoder = _Decoder()
    id_to_token = staticmethod(_token)


class Backend:
    """What shoal's Tokenizer uses of a Hugging Face tokenizer."""

    is_fast = True
    model_max_length = 0
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id = END
    all_special_ids = list(range(_FIRST_BYTE))
    added_tokens_decoder = {id_: _AddedToken() for id_ in range(_FIRST_BYTE)}
    backend_tokenizer = _Rust()
    chat_template = "user, system, assistant: rendered by apply_chat_template below"

    def __len__(self) -> int:
        return SIZE

    def _encode_plus(self) -> None:
        raise NotImplementedError("its name says that encode is not the Rust tokenizer's")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return encode_text(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, **_: Any) -> str:
        data = b""
        for token_id in ids:
            if _FIRST_BYTE <= token_id < _FIRST_CHARACTER:
                data += bytes([token_id - _FIRST_BYTE])
            elif token_id >= _FIRST_BYTE or not skip_special_tokens:
                data += (_token(token_id) or "").encode()
        return data.decode("utf-8", "replace")

    def convert_tokens_to_ids(self, text: str) -> int | None:
        return _SPECIAL.index(text) if text in _SPECIAL else None

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **_: Any,
    ) -> str:
        parts = []
        for message in conversation:
            if f"<|{message['role']}|>" not in _SPECIAL:
                raise ValueError(f"there is no role {message['role']!r}")
            parts.append(f"<|{message['role']}|>{message['content']}")
        text = "<|end|>".join(parts)
        if continue_final_message:
            return text
        return text + "<|end|>" + ("<|assistant|>" if add_generation_prompt else "")


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer(Backend())
