"""What each token id adds to the text: tables id -> text or bytes, with the rules of a Hugging Face decoder.

Read once from a tokenizer by engine/tokenizer.py; the detokenizers of engine/detokenizer.py fold over these tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

# A token's share of the text: str where it is whole characters by itself, bytes where it is a part of one.
Piece = str | bytes


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in byte-level BPE vocabularies (Radford et al. 2019, GPT-2).

    Bytes with a visible Latin-1 character stand for themselves, the others are numbered from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in set(visible))
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRules:
    """How token strings become text.

    byte_level: every character of a token is a byte. Otherwise `replacements` apply to each token in order and, with
    byte_fallback, tokens such as <0x0A> are bytes. strip: this character is taken off the start of the whole text,
    at most strip_count times. drop_in_first: this character vanishes from the first token of all.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: str = ""
    strip_count: int = 0
    drop_in_first: str = ""

    @staticmethod
    def from_decoder(config: dict[str, Any] | None) -> DecoderRules | None:
        """The rules of a `decoder` entry of tokenizer.json; None for a kind that is not a matter of single tokens."""
        if config is None:
            return None
        steps = list(config["decoders"]) if config.get("type") == "Sequence" else [config]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return DecoderRules(byte_level=True)
        replacements: list[tuple[str, str]] = []
        while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
            step = steps.pop(0)
            replacements.append((step["pattern"]["String"], step["content"]))
        byte_fallback = bool(steps) and steps[0]["type"] == "ByteFallback"
        if byte_fallback:
            steps.pop(0)
        kinds = [step["type"] for step in steps]
        if kinds in ([], ["Fuse"]) and (replacements or byte_fallback):
            return DecoderRules(replacements=tuple(replacements), byte_fallback=byte_fallback)
        if kinds == ["Fuse", "Strip"] and steps[1]["stop"] == 0 and len(steps[1]["content"]) == 1:
            return DecoderRules(
                replacements=tuple(replacements),
                byte_fallback=byte_fallback,
                strip=steps[1]["content"],
                strip_count=steps[1]["start"],
            )
        if kinds == ["Metaspace"] and not replacements and not byte_fallback:
            mark = steps[0]["replacement"]
            drops = steps[0].get("prepend_scheme", "always") != "never"
            return DecoderRules(replacements=((mark, " "),), drop_in_first=mark if drops else "")
        return None


class PieceTable(dict[int, Piece]):
    """Token id -> Piece, computed at first use. Ids that are skipped or not in the vocabulary are the empty string."""

    def __init__(self, rules: DecoderRules, token_of: Callable[[int], str | None], skipped: frozenset[int]) -> None:
        super().__init__()
        self.rules = rules
        self._token_of = token_of
        self.skipped = skipped

    def __missing__(self, token_id: int) -> Piece:
        token = None if token_id in self.skipped else self._token_of(token_id)
        piece = "" if token is None else self._piece(token)
        self[token_id] = piece
        return piece

    def _piece(self, token: str) -> Piece:
        if self.rules.byte_level:
            return _whole_or_bytes(_byte_level_bytes(token))
        for pattern, content in self.rules.replacements:
            token = token.replace(pattern, content)
        byte = _fallback_byte(token) if self.rules.byte_fallback else None
        # A byte token is bytes even where it is a whole ASCII character: the run that it stands in decides.
        return token if byte is None else bytes([byte])

    def shows(self, token_id: int) -> bool:
        """Whether the decoder sees this token at all: it is in the vocabulary and not skipped."""
        return token_id not in self.skipped and self._token_of(token_id) is not None

    def first_piece(self, token_id: int) -> Piece:
        """The piece of the token that opens the whole text, where the decoder treats that one differently."""
        mark = self.rules.drop_in_first
        token = self._token_of(token_id)
        if not mark or token is None or token_id in self.skipped:
            return self[token_id]
        return self._piece(token.replace(mark, ""))


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token with characters outside the alphabet: plain text
        return token.encode("utf-8", "replace")


def _fallback_byte(token: str) -> int | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _whole_or_bytes(data: bytes) -> Piece:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data
