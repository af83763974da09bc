"""Token ids to text, step by step: whatever the steps, the deltas joined are the decode of all ids together.

Used by the fold (engine/journal.py), one detokenizer per answer. Text comes as soon as it cannot change any more: a
character that is not complete yet is held back, so no U+FFFD appears that a later token would have repaired.
"""

from __future__ import annotations

import abc
import codecs
from collections.abc import Callable, Sequence

from shoal.engine.pieces import PieceTable

_REPLACEMENT = "\ufffd"
# A run of byte tokens is held back up to this many bytes; see ByteFallbackDetokenizer.
_MAX_HELD_RUN = 32
# Tokens of context from which a windowed decoder judges spaces.
_WINDOW_CONTEXT = 6


class Detokenizer(abc.ABC):
    """The text of a growing list of token ids, of which the prompt is the unseen beginning."""

    @abc.abstractmethod
    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; return the text that they settle."""

    @abc.abstractmethod
    def flush(self) -> str:
        """The request is over: return what was held back (an incomplete character as U+FFFD)."""


class ByteLevelDetokenizer(Detokenizer):
    """For byte-level BPE (GPT-2, Llama 3, Qwen): the text is the UTF-8 reading of all bytes, wrong ones as U+FFFD.

    An incomplete character at the end of the prompt is completed by the first ids and then belongs to their text.
    """

    def __init__(self, table: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._held = _incomplete_tail(table, prompt_token_ids)
        self._prompt_bytes_held = len(self._held) > 0

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        parts: list[str] = []
        for token_id in token_ids:
            piece = table[token_id]
            if not self._held and type(piece) is str:
                parts.append(piece)
            elif piece:
                parts.append(self._push_bytes(piece.encode() if isinstance(piece, str) else piece))
        return parts[0] if len(parts) == 1 else "".join(parts)

    def _push_bytes(self, data: bytes) -> str:
        if self._prompt_bytes_held:
            self._prompt_bytes_held = False
            if not _may_continue(self._held, data[0]):
                self._held = b""  # broken off in the prompt: not for the output to show
        data = self._held + data
        text, num_consumed = codecs.utf_8_decode(data, "replace", False)
        self._held = data[num_consumed:]
        return text

    def flush(self) -> str:
        text = "" if self._prompt_bytes_held else self._held.decode("utf-8", "replace")
        self._held = b""
        return text


class ByteFallbackDetokenizer(Detokenizer):
    """For SentencePiece-like vocabularies (Llama 2, Mistral, Gemma): tokens are text, rare characters are byte tokens.

    Hugging Face's decoder shows a run of byte tokens as U+FFFD for each byte unless the whole run is valid UTF-8. So a
    run is held back until it ends, breaks, or has 32 bytes. A run that long is a script without tokens of its own, not
    noise; from there on its characters are shown one by one (as SentencePiece does), and a later wrong byte
    replaces itself only.
    """

    def __init__(self, table: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._run = b""
        self._run_broken = False
        self._run_released = False
        self._first = True
        self._num_to_strip = table.rules.strip_count
        self._strip = table.rules.strip
        self._prompt_bytes_held = False
        self._prime(prompt_token_ids)

    def _prime(self, prompt_token_ids: Sequence[int]) -> None:
        if any(self._table.shows(token_id) for token_id in prompt_token_ids):
            self._first = False
        if any(self._table[token_id] for token_id in prompt_token_ids):
            self._num_to_strip = 0
        self._run = _incomplete_tail(self._table, prompt_token_ids)
        self._prompt_bytes_held = len(self._run) > 0

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        parts: list[str] = []
        for token_id in token_ids:
            piece = table[token_id]
            if self._first and table.shows(token_id):
                self._first = False
                piece = table.first_piece(token_id)
            if type(piece) is bytes:
                parts.append(self._push_byte(piece))
                continue
            if (self._run or self._run_broken or self._run_released) and table.shows(token_id):
                parts.append(self._end_run())
            parts.append(piece)  # type: ignore[arg-type]
        text = parts[0] if len(parts) == 1 else "".join(parts)
        return self._without_lead(text) if self._num_to_strip else text

    def _push_byte(self, byte: bytes) -> str:
        if self._prompt_bytes_held:
            self._prompt_bytes_held = False
            if not _may_continue(self._run, byte[0]):
                self._run = b""
        if self._run_broken:
            return _REPLACEMENT
        run = self._run + byte
        if self._run_released:
            text, num_consumed = codecs.utf_8_decode(run, "replace", False)
            self._run = run[num_consumed:]
            return text
        try:
            text, num_consumed = codecs.utf_8_decode(run, "strict", False)
        except UnicodeDecodeError:
            self._run, self._run_broken = b"", True
            return _REPLACEMENT * len(run)
        if len(run) < _MAX_HELD_RUN:
            self._run = run
            return ""
        self._run, self._run_released = run[num_consumed:], True
        return text

    def _end_run(self) -> str:
        run, released = self._run, self._run_released
        if self._prompt_bytes_held:
            run, self._prompt_bytes_held = b"", False
        self._run, self._run_broken, self._run_released = b"", False, False
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return run.decode("utf-8", "replace") if released else _REPLACEMENT * len(run)

    def _without_lead(self, text: str) -> str:
        while self._num_to_strip and text:
            if text[0] != self._strip:
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text

    def flush(self) -> str:
        return self._without_lead(self._end_run())


class WindowDetokenizer(Detokenizer):
    """For every other tokenizer: decodes a short window of ids again with each new one and returns what was added.

    Right wherever a token's text depends on its near neighbours only (WordPiece, tokenizers written in Python).
    decode: ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_shown = 0  # characters of the window's text that were returned, or belong to the prompt
        context = list(prompt_token_ids[-_WINDOW_CONTEXT:])
        # A window that shows nothing would make its first real token look like the start of the text.
        while len(context) < len(prompt_token_ids) and not decode(context).rstrip(_REPLACEMENT):
            context = list(prompt_token_ids[-2 * len(context) :])
        self._ids = context
        self._num_shown = len(decode(context).rstrip(_REPLACEMENT)) if context else 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        settled = text.rstrip(_REPLACEMENT)
        # At most the last 3 bytes can still become a character; U+FFFD further back is there to stay.
        if len(text) - len(settled) > 3:
            settled = text[:-3]
        added = settled[self._num_shown :]
        self._num_shown = max(self._num_shown, len(settled))
        if len(settled) == len(text) and len(self._ids) > 2 * _WINDOW_CONTEXT:
            self._shorten()
        return added

    def _shorten(self) -> None:
        context = self._ids[-_WINDOW_CONTEXT:]
        text = self._decode(context)
        if text.rstrip(_REPLACEMENT):
            self._ids, self._num_shown = context, len(text)

    def flush(self) -> str:
        added = self._decode(self._ids)[self._num_shown :] if self._ids else ""
        self._num_shown += len(added)
        return added


def _incomplete_tail(table: PieceTable, token_ids: Sequence[int]) -> bytes:
    """The bytes of a character that the ids begin but do not end: 0 to 3 bytes."""
    tail = b""
    for token_id in reversed(token_ids):
        piece = table[token_id]
        if isinstance(piece, str):
            if piece:
                break
            continue
        tail = piece + tail
        if len(tail) >= 4:
            break
    _, num_consumed = codecs.utf_8_decode(tail, "replace", False)
    return tail[num_consumed:]


def _may_continue(held: bytes, byte: int) -> bool:
    """Whether `byte` goes on with the incomplete character `held`."""
    try:
        codecs.utf_8_decode(held + bytes([byte]), "strict", False)
    except UnicodeDecodeError:
        return False
    return True
