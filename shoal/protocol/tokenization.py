"""The bodies of /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import Field

from shoal.errors import InvalidRequestError
from shoal.protocol.fields import Objects, RequestBody, TokenIds


class TokenizeRequest(RequestBody):
    """A text (`prompt`) or a conversation (`messages`), and how to tokenize it."""

    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise InvalidRequestError unless there is either a prompt or messages."""
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise InvalidRequestError(f"send either prompt or messages; the body has {found}", "prompt")
        if self.messages is None:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(f"{name} is for messages; a prompt is tokenized as it is", name)


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    tokens: TokenIds


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    prompt: str
