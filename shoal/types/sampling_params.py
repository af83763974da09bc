"""SamplingParams: how tokens are chosen and when a request ends. Names and meaning as in vLLM and the OpenAI API."""

from __future__ import annotations

import copy
import math
from typing import Any

import msgspec

from shoal.errors import InvalidRequestError
from shoal.types.quoted import quoted

MAX_LOGPROBS = 20
MAX_ANSWERS = 128
_SAMPLING_EPSILON = 1e-5
_INTEGER_FIELDS = ("n", "top_k", "seed", "min_tokens", "max_tokens", "logprobs", "prompt_logprobs")
_OPTIONAL_FIELDS = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_NUMBER_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_BOOLEAN_FIELDS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_TOKEN_ID_FIELDS = ("stop_token_ids", "allowed_token_ids", "bad_words_token_ids", "eos_token_ids")
_CONTAINER_FIELDS = ("logit_bias", "stop", *_TOKEN_ID_FIELDS)


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Parameters of one request.

    n: answers per prompt; answer i draws from hash(seed, i).
    temperature: 0 is greedy; above, logits are divided by it.
    top_p: nucleus mass in (0, 1]; top_k: 0 or -1 is off; min_p: relative to the top probability, in [0, 1].
    repetition_penalty: > 0, over prompt and output (Keskar et al. 2019, CTRL); presence_penalty and
    frequency_penalty: in [-2, 2], over the output (OpenAI API).
    logit_bias: token id -> value in [-100, 100], added to the logits.
    seed: any integer; None draws one.
    stop: strings that end the request, cut from the text unless include_stop_str_in_output.
    stop_token_ids: ids that end it; ignore_eos: the model's own end tokens do not end it.
    min_tokens: no end token or stop before that many; max_tokens: None is what fits in max_model_len.
    logprobs: number of top log-probabilities per output token (0: of the sampled one only; -1: the vocabulary);
    prompt_logprobs: the same for the prompt.
    allowed_token_ids: nothing else may be sampled; bad_words_token_ids: single tokens that may not.
    detokenize / skip_special_tokens / spaces_between_special_tokens: how text is made of ids.
    Raises InvalidRequestError, naming the field, for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    # Filled by whoever accepts the request: the model's own end tokens (empty with ignore_eos).
    eos_token_ids: list[int] = []

    def __post_init__(self) -> None:
        self.validate()

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again. Lists and dicts are copied too, not shared."""
        own = {field: copy.copy(getattr(self, field)) for field in _CONTAINER_FIELDS}
        return msgspec.structs.replace(self, **(own | changes))

    @property
    def greedy(self) -> bool:
        return self.temperature < _SAMPLING_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self) -> None:
        """Raise InvalidRequestError for the first field of a wrong type or out of range."""
        self._validate_types()
        _check(1 <= self.n <= MAX_ANSWERS, "n", self.n, f"an integer from 1 to {MAX_ANSWERS}")
        _check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (off), or a positive integer")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "from -2 to 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "from -2 to 2")
        for token_id, bias in (self.logit_bias or {}).items():
            _check(token_id >= 0 and -100 <= bias <= 100, "logit_bias", {token_id: bias}, "values from -100 to 100")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        if self.max_tokens is not None:
            _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
            limit = f"at most max_tokens ({self.max_tokens})"
            _check(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, limit)
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None:
                _check(-1 <= value <= MAX_LOGPROBS, field, value, f"from 0 to {MAX_LOGPROBS}, or -1 for all")
        _check(all(self.stop_strings), "stop", self.stop, "strings that are not empty")
        if self.allowed_token_ids is not None:
            _check(len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "at least one token id")

    def _validate_types(self) -> None:
        for field in _INTEGER_FIELDS:
            value = getattr(self, field)
            absent = value is None and field in _OPTIONAL_FIELDS
            _check(absent or _is_integer(value), field, value, "an integer")
            # A seed may have any size: it is reduced to 64 bits where the request is accepted.
            _check(absent or field == "seed" or abs(value) < 2**63, field, value, "an integer of at most 63 bits")
        for field in _NUMBER_FIELDS:
            _check(_is_number(getattr(self, field)), field, getattr(self, field), "a finite number")
        for field in _BOOLEAN_FIELDS:
            _check(isinstance(getattr(self, field), bool), field, getattr(self, field), "true or false")
        for field in _TOKEN_ID_FIELDS:
            token_ids = getattr(self, field)
            well_formed = isinstance(token_ids, (list, tuple)) and all(map(_is_integer, token_ids))
            absent = token_ids is None and field != "eos_token_ids"
            _check(absent or well_formed, field, token_ids, "a list of token ids (integers)")
        stop = self.stop if isinstance(self.stop, (list, tuple)) else [] if self.stop is None else [self.stop]
        _check(all(isinstance(item, str) for item in stop), "stop", self.stop, "a string or a list of strings")
        bias = self.logit_bias
        _check(bias is None or isinstance(bias, dict), "logit_bias", bias, "a dict of token id to number")
        for token_id, value in (bias or {}).items():
            well_formed = _is_integer(token_id) and _is_number(value)
            _check(well_formed, "logit_bias", {token_id: value}, "a dict of token id (an integer) to a finite number")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """A finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check(condition: bool, field: str, found: object, wanted: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{field} must be {wanted}; got {quoted(found)}", param=field)
