"""Fields that chat.py and completions.py have in common, and their way into SamplingParams.

Pydantic checks types, strictly: no number is made of a string. SamplingParams checks ranges. None means "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

from shoal.errors import InvalidRequestError
from shoal.protocol.neutral import COMMON_NEUTRAL, Neutral
from shoal.types.sampling_params import MAX_LOGPROBS, SamplingParams


class GiveUpEarly(FailFast):
    """A list is given up at its first wrong entry: millions of errors are of no use to anybody."""

    __hash__ = object.__hash__  # a union of types wants it, pydantic's own class has none


TokenIds = Annotated[list[int], GiveUpEarly()]
Strings = Annotated[list[str], GiveUpEarly()]
Objects = Annotated[list[dict[str, Any]], GiveUpEarly()]

# Fields whose name here is the name in SamplingParams.
_SAME_NAME = (
    "n", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids",
    "bad_words_token_ids",
)  # fmt: skip
# Of these the model's generation_config.json may hold other defaults.
_WITH_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class RequestBody(BaseModel):
    """A JSON body. Fields beyond the declared ones are in `neutral`, or the request is refused."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    neutral: ClassVar[Mapping[str, Neutral]] = {}

    model: str | None = Field(None, description="A name that /v1/models lists; default: the first of them.")


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="One more chunk at the end, with the counts of tokens.")
    continuous_usage_stats: bool | None = Field(None, description="The counts so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description="Only false: chunks are never padded.")


class GenerationBody(RequestBody):
    """What chat and completions share: the OpenAI API's parameters, then vLLM's additions."""

    neutral: ClassVar[Mapping[str, Neutral]] = COMMON_NEUTRAL

    max_tokens: int | None = Field(None, description="Most tokens of an answer.")
    temperature: float | None = Field(None, description="0 takes the likeliest token; above, chance grows.")
    top_p: float | None = None
    n: int | None = Field(None, description="Answers per prompt.")
    stop: str | Strings | None = Field(None, description="Strings that end the answer.")
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id (as a string) to a value in [-100, 100].")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words_token_ids: TokenIds | None = Field(None, description="Tokens that are never chosen.")
    prompt_logprobs: int | None = Field(None, description="Top log-probabilities per prompt token; not with stream.")
    add_special_tokens: bool | None = Field(None, description="Whether the tokenizer adds its own beginning and end.")
    priority: int | None = Field(None, description="Lower goes first, with --scheduling-policy priority.")
    return_token_ids: bool | None = Field(None, description="Also return the token ids of prompt and answer.")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_answers(self) -> int:
        return 1 if self.n is None else self.n

    def check_stream_options(self) -> None:
        """Raise InvalidRequestError for options of a stream that does not take place, or that cannot be had."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only for streams; set stream to true too", "stream_options")
        if options is not None and options.include_obfuscation:
            raise InvalidRequestError(
                "stream_options.include_obfuscation is not supported; leave it out or set it to false",
                "stream_options.include_obfuscation",
            )
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequestError(
                "stream_options.continuous_usage_stats needs include_usage to be true too",
                "stream_options.continuous_usage_stats",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs is not available in a stream; set stream to false", "prompt_logprobs"
            )

    def sampling_params(
        self, model_defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Raises InvalidRequestError, naming the field, for a value out of range."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME_NAME}
        for name in _WITH_MODEL_DEFAULTS:
            value = getattr(self, name)
            given[name] = model_defaults.get(name) if value is None else value
        given["logit_bias"] = _biases(self.logit_bias)
        if self.prompt_logprobs is not None:
            check_num_logprobs("prompt_logprobs", self.prompt_logprobs)
            given["prompt_logprobs"] = self.prompt_logprobs
        values = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **values)


def check_num_logprobs(name: str, value: int) -> None:
    """Raise InvalidRequestError for a number out of range. The whole vocabulary (-1) is for offline use only."""
    if not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequestError(f"{name} must be from 0 to {MAX_LOGPROBS}; got {value}", name)


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    biases = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal()):
            raise InvalidRequestError(f"logit_bias: {key[:50]!r} is no token id such as 42", "logit_bias")
        biases[int(key)] = value
    return biases
