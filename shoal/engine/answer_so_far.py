"""AnswerSoFar: what a client already has of an answer that goes on here. Checked by engine/prepare.py, replayed by
engine/streams.py."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.errors import InvalidRequestError
from shoal.types.outputs import FinishReason, TokenLogprobs
from shoal.types.sampling_params import SamplingParams


class AnswerSoFar(msgspec.Struct, kw_only=True):
    """One answer of a continuation, as far as the client has it. All else as in RequestUpdate, over the answer so far.

    num_characters: how much of its text was delivered. finish_reason: of an answer that has ended.
    """

    token_ids: list[int] = []
    num_characters: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def check(self, name: str, index: int, sampling: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> None:
        """Raise InvalidRequestError for what cannot be the beginning of answer `index` to such a request.

        That the text fits the ids is not looked at here: whoever replays them finds it out.
        """
        num_tokens = len(self.token_ids)
        _require(
            _are_ids(self.token_ids, vocab_size), f"{name} holds token ids that are not from 0 to {vocab_size - 1}"
        )
        _require(
            sampling.max_tokens is None or num_tokens <= sampling.max_tokens,
            f"{name} has {num_tokens} tokens; max_tokens and max_model_len allow {sampling.max_tokens}",
        )
        _require(
            self.num_characters >= 0 and self.num_cached_tokens >= 0,
            f"{name} counts {self.num_characters} characters and {self.num_cached_tokens} cached tokens",
        )
        _require(
            self.finish_reason in (None, FinishReason.STOP, FinishReason.LENGTH),
            f"{name} ended with {self.finish_reason}; nothing goes on there",
        )
        wanted = num_tokens if sampling.logprobs is not None else 0
        _check_logprobs(f"{name}: logprobs", self.logprobs or [], wanted, vocab_size)
        wanted, entries = 0, self.prompt_logprobs or []
        if index == 0 and sampling.prompt_logprobs is not None and (entries or num_tokens or self.finish_reason):
            wanted = num_prompt_tokens
        # Position 0 has none.
        _require(not entries or entries[0] is None, f"{name}: prompt_logprobs begin with null")
        _check_logprobs(f"{name}: prompt_logprobs", entries, wanted, vocab_size, first=1)


def _check_logprobs(
    name: str, entries: Sequence[TokenLogprobs | None], wanted: int, vocab_size: int, *, first: int = 0
) -> None:
    _require(len(entries) == wanted, f"{name}: entries for {len(entries)} tokens, where there are {wanted}")
    for entry in entries[first:]:
        well_formed = entry is not None and 0 < len(entry.token_ids) == len(entry.logprobs)
        _require(
            well_formed and entry is not None and _are_ids(entry.token_ids, vocab_size),
            f"{name}: an entry has a log-probability for each of its token ids, from 0 to {vocab_size - 1}",
        )


def _are_ids(token_ids: Sequence[int], vocab_size: int) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"the journal does not fit the request: {message}")
