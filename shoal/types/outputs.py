"""What comes back for a request: token by token inside the engine, whole for the user."""

from __future__ import annotations

import enum

import msgspec


class FinishReason(enum.StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len reached
    ABORT = "abort"  # the client went away or asked for the end
    ERROR = "error"  # the engine could not go on


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the top ones, highest first.

    token_ids[0] is the token itself (sampled, or the prompt's); `rank` is its 1-based rank in the vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class Logprob(msgspec.Struct):
    """Log-probability of one token, as users see it: natural log, 1-based rank, the token's text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct):
    """One of the `n` answers to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct):
    """A prompt and its answers, in the shape that vLLM's users know."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0


class RequestUpdate(msgspec.Struct):
    """News of one answer of one request, after detokenizing: what streams are made of.

    text: new text, whole UTF-8 characters only, nothing that may still turn out to be a stop string.
    token_ids / logprobs: new tokens (those whose text is still held back too). The update with a finish_reason is
    the last of its `index`. prompt_logprobs (once, on the first update of index 0) has None for position 0.
    lost: beside an error: the engine core that worked on it is gone, and another one can do it.
    pooled: the vector or the scores of a pooling request, as of TokenDelta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    lost: bool = False
    pooled: bytes | None = None
