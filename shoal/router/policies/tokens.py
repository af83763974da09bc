"""Estimates of token counts where there is no tokenizer, learned from what servers count. The router keeps one each."""

from __future__ import annotations

import math

# English text with common tokenizers. Counts as this many bytes of evidence against what is learned.
_BYTES_PER_TOKEN = 4.0
_PRIOR_BYTES = 4096.0
# What was seen this many bytes, or answers, ago counts 1/e as much as what is seen now.
_MEMORY_BYTES = 1_000_000.0
_MEMORY_ANSWERS = 200.0
# Tokens of an answer, before any was seen.
_OUTPUT_TOKENS = 128.0


def estimate_tokens(num_bytes: int, bytes_per_token: float = _BYTES_PER_TOKEN) -> int:
    """Tokens of that many bytes of text, rounded up."""
    return math.ceil(num_bytes / bytes_per_token)


class TokenRatio:
    """Bytes per token of the prompts of one model: a ratio of two sums in which old requests fade."""

    def __init__(self) -> None:
        self._num_bytes = _PRIOR_BYTES
        self._num_tokens = _PRIOR_BYTES / _BYTES_PER_TOKEN

    @property
    def bytes_per_token(self) -> float:
        return self._num_bytes / self._num_tokens

    def estimate(self, num_bytes: int) -> int:
        """Tokens of a prompt of that many bytes."""
        return estimate_tokens(num_bytes, self.bytes_per_token)

    def learn(self, num_bytes: int, num_tokens: int) -> None:
        """A server counted this many tokens in a prompt of that many bytes. Empty ones say nothing."""
        if num_bytes <= 0 or num_tokens <= 0:
            return
        keep = math.exp(-num_bytes / _MEMORY_BYTES)
        self._num_bytes = self._num_bytes * keep + num_bytes
        self._num_tokens = self._num_tokens * keep + num_tokens


class OutputEstimate:
    """How many tokens an answer has: a moving mean, bounded by what the request allows."""

    def __init__(self) -> None:
        self._mean = _OUTPUT_TOKENS
        self._num_seen = 0

    def estimate(self, max_tokens: int | None, num_answers: int = 1) -> int:
        """Tokens of `num_answers` answers together, each of at most `max_tokens` (None: no limit was given)."""
        one = self._mean if max_tokens is None else min(self._mean, max_tokens)
        return math.ceil(one * num_answers)

    def learn(self, num_tokens: int) -> None:
        """One answer had that many tokens."""
        self._num_seen += 1
        self._mean += (num_tokens - self._mean) / min(self._num_seen, _MEMORY_ANSWERS)
