"""Checks the token ids of SamplingParams against the model's vocabulary. Called where a request is accepted."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.errors import InvalidRequestError
from shoal.types.quoted import quoted
from shoal.types.sampling_params import SamplingParams


def validate_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequestError, naming the field, for an id outside [0, vocab_size) or where no token may be chosen.

    Covers logit_bias, allowed_token_ids, bad_words_token_ids and stop_token_ids. What min_tokens suppresses counts as
    not allowed: with `allowed_token_ids` of nothing but end tokens, there would be nothing to choose before the end.
    """
    _check_range("logit_bias", params.logit_bias or (), vocab_size)
    _check_range("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_range("bad_words_token_ids", params.bad_words_token_ids or (), vocab_size)
    _check_range("stop_token_ids", params.stop_token_ids or (), vocab_size)
    banned = set(params.bad_words_token_ids or ())
    reason = "bad_words_token_ids"
    if params.min_tokens > 0:
        banned.update(params.stop_token_ids or ())
        banned.update(token_id for token_id in params.eos_token_ids if 0 <= token_id < vocab_size)
        reason = "bad_words_token_ids, and by min_tokens the stop and end tokens,"
    if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
        raise InvalidRequestError(
            f"allowed_token_ids leaves no token to choose: {reason} rule out {_shown(params.allowed_token_ids)}, "
            "all that is allowed; allow at least one token that is not ruled out",
            param="allowed_token_ids",
        )
    if len(banned) >= vocab_size:
        raise InvalidRequestError(
            f"{reason} rule out the whole vocabulary of {vocab_size} tokens; leave at least one",
            param="bad_words_token_ids",
        )


def _check_range(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field} must hold token ids of this model, integers from 0 to {vocab_size - 1}; "
                f"got {quoted(token_id)}",
                param=field,
            )


def _shown(token_ids: list[int]) -> str:
    head = ", ".join(str(token_id) for token_id in token_ids[:5])
    return f"[{head}, … {len(token_ids)} ids]" if len(token_ids) > 5 else f"[{head}]"
