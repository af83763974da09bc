"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from shoal.errors import InvalidRequestError
from shoal.protocol.fields import GenerationBody, Objects, check_num_logprobs
from shoal.protocol.neutral import CHAT_NEUTRAL, Neutral
from shoal.types.sampling_params import SamplingParams

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatCompletionRequest(GenerationBody):
    """The OpenAI API's chat completion, with vLLM's additions."""

    neutral: ClassVar[Mapping[str, Neutral]] = CHAT_NEUTRAL

    messages: Objects
    max_completion_tokens: int | None = Field(None, description="The same as max_tokens, by its newer name.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, description="Likeliest tokens to list at each position; needs logprobs.")

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="The answer goes on where the last message ends.")
    chat_template: str | None = Field(None, description="A Jinja template in place of the model's.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the template.")

    def to_sampling_params(self, model_defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises InvalidRequestError, naming the field."""
        return self.sampling_params(model_defaults, max_tokens=self._max_tokens(), logprobs=self._logprobs())

    def _max_tokens(self) -> int | None:
        given = {value for value in (self.max_tokens, self.max_completion_tokens) if value is not None}
        if len(given) > 1:
            raise InvalidRequestError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) are two "
                "names of one limit; give one of them",
                "max_tokens",
            )
        for value in given:
            if value < 1:
                name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
                raise InvalidRequestError(f"{name} must be 1 or more; got {value}", name)
            return value
        return None

    def _logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
            return None
        if self.top_logprobs is not None:
            check_num_logprobs("top_logprobs", self.top_logprobs)
        return self.top_logprobs or 0


def prepare_messages(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages with roles that this chat template (its Jinja text) understands.

    "developer" is the newer name of "system": it becomes that where the template does not know it. Raises
    InvalidRequestError for a role that neither the API nor the template knows.
    """
    result = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if isinstance(role, str) and role not in KNOWN_ROLES and role not in template:
            raise InvalidRequestError(
                f"messages[{index}].role is {role[:50]!r}; it must be one of {', '.join(KNOWN_ROLES)}",
                f"messages[{index}].role",
            )
        if role == "developer" and "developer" not in template:
            message = {**message, "role": "system"}
        result.append(message)
    return result
