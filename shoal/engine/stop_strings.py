"""Finds stop strings in text that grows piece by piece, and holds back what may still become one. Used by the fold."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one answer for its stop strings."""

    def __init__(self, strings: Sequence[str], keep_in_text: bool) -> None:
        """keep_in_text: the stop string itself is shown; otherwise the text ends before it."""
        self._strings = list(strings)
        self._keep_in_text = keep_in_text
        # No text ends in the middle of a stop string unless its last character is one of these.
        self._beginnings = frozenset(character for string in strings for character in string[:-1])
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Add text; return what can be shown, and the stop string if one is complete: then the answer is over.

        Of several the one that begins first counts. Without may_stop, stop strings that end in `text` are plain text.
        """
        if not text:
            return "", None
        num_old = len(self._held)
        text = self._held + text
        if may_stop:
            found = self._find(text, num_old)
            if found is not None:
                start, string = found
                self._held = ""
                return text[: start + len(string) if self._keep_in_text else start], string
        num_held = self._num_to_hold(text)
        if num_held == 0:
            self._held = ""
            return text, None
        self._held = text[-num_held:]
        return text[:-num_held], None

    def _find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Where the first stop string starts among those that end after `num_old` characters."""
        best: tuple[int, str] | None = None
        for string in self._strings:
            start = text.find(string, max(0, num_old - len(string) + 1))
            if start >= 0 and (best is None or start < best[0]):
                best = (start, string)
        return best

    def _num_to_hold(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a stop string, but not a whole one."""
        if text[-1] not in self._beginnings:
            return 0
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest

    def flush(self) -> str:
        """The answer is over without a stop string: what was held back is plain text."""
        held, self._held = self._held, ""
        return held
