"""The body of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from shoal.errors import InvalidRequestError
from shoal.protocol.fields import GenerationBody, GiveUpEarly, Strings, TokenIds, check_num_logprobs
from shoal.types.sampling_params import SamplingParams

_DEFAULT_MAX_TOKENS = 16
Prompts = str | Strings | TokenIds | Annotated[list[TokenIds], GiveUpEarly()]


class CompletionRequest(GenerationBody):
    """The OpenAI API's completion, with vLLM's additions."""

    prompt: Prompts = Field(description="Text or token ids, or a list of either for several prompts.")
    echo: bool | None = Field(None, description="The answer's text begins with the prompt's.")
    logprobs: int | None = Field(None, description="Likeliest tokens to list at each position, up to 20.")
    best_of: int | None = Field(None, description="Only n: answers are not ranked.")
    suffix: str | None = Field(None, description="Not supported: text is not inserted.")

    def prompts(self) -> Sequence[str | list[int]]:
        """One or more prompts. Raises InvalidRequestError for none."""
        prompt: Any = self.prompt
        if not prompt and not isinstance(prompt, str):
            raise InvalidRequestError("prompt is an empty list; send at least one prompt", "prompt")
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise InvalidRequestError for what completions do not do."""
        self.check_stream_options()
        if self.suffix:
            raise InvalidRequestError("suffix is not supported: models here continue text; leave it out", "suffix")
        if self.best_of is not None and self.best_of != self.num_answers:
            raise InvalidRequestError(
                f"best_of must equal n ({self.num_answers}) or be left out: answers are not ranked; got {self.best_of}",
                "best_of",
            )
        if self.logprobs is not None:
            check_num_logprobs("logprobs", self.logprobs)
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens must be 1 or more (0 only with echo); got 0", "max_tokens")

    @property
    def only_echo(self) -> bool:
        """max_tokens 0 with echo: the prompt's own log-probabilities are wanted, no answer."""
        return bool(self.echo) and self.max_tokens == 0

    def to_sampling_params(self, model_defaults: Mapping[str, object]) -> SamplingParams:
        """For `only_echo` one token is generated, which is not for the client. Raises InvalidRequestError."""
        max_tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.only_echo:
            max_tokens = 1
        params = self.sampling_params(model_defaults, max_tokens=max_tokens, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None and params.prompt_logprobs is None:
            params = params.clone(prompt_logprobs=self.logprobs)
        return params
