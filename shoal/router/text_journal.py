"""TextJournal: a stream in the OpenAI API as far as it was delivered, and the request that makes another server go on.

Used by foreign.py, whose docstring has the limits.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.protocol import sse
from shoal.router.request import GenerationRequest

_DEFAULT_COMPLETION_TOKENS = 16  # of the OpenAI API, where a completion sets no limit
_STRUCTURED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    tool_calls: msgspec.Raw | None = None
    function_call: msgspec.Raw | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """What the router reads of an event. Everything else is passed on as it is."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class TextJournal:
    """num_tokens: delivered, counted by usage where each event brings it, else by pieces of text. num_other: pieces of
    tool calls and reasoning. known_ending: the finish reason that the client is to be told, where all else was."""

    def __init__(self, request: GenerationRequest) -> None:
        self.num_tokens = 0
        self.num_other = 0
        self.finish_reason: str | None = None
        self.known_ending: str | None = None
        self.usage: Usage | None = None
        self._request = request
        self._text: list[str] = []
        self._trouble: str | None = None
        # What earlier attempts delivered; and what all events of the first one said, for those of later ones.
        self._base_tokens = 0
        self._head: dict[str, Any] | None = None
        self._is_later = False
        # For clients that want the usage: what servers said of the prompt, and whether the client has its event.
        self._num_prompt_tokens = 0
        self._has_told_usage = False

    def begin_attempt(self) -> None:
        self._base_tokens = self.num_tokens
        self._is_later = self._head is not None
        self.usage = None

    def add(self, chunk: Chunk, data: bytes) -> bytes:
        """Take an event in. Returns its data for the client; empty when it tells nothing new."""
        text, closes = "", False
        for choice in chunk.choices:
            delta = choice.delta
            if delta is not None and (_given(delta.tool_calls) or _given(delta.function_call)):
                self._trouble = "it has tool calls"
                self.num_other += 1
            if delta is not None and (delta.reasoning or delta.reasoning_content):
                self._trouble = "it has reasoning text"
                self.num_other += 1
            text += choice.text or (delta.content if delta is not None else None) or ""
            closes = closes or choice.finish_reason is not None
            self.finish_reason = choice.finish_reason or self.finish_reason
        if text:
            self._text.append(text)
        if chunk.usage is not None:
            self.usage = chunk.usage
            self._num_prompt_tokens = max(chunk.usage.prompt_tokens - self._base_tokens, 0)
            self._has_told_usage = not chunk.choices
        if chunk.usage is not None and (text or closes or not chunk.choices):
            # An event without text may count tokens whose text has not come; the client does not have these.
            self.num_tokens = max(self.num_tokens, self._base_tokens + chunk.usage.completion_tokens)
        elif text:
            self.num_tokens += 1
        if self._head is None:
            content = msgspec.json.decode(data)
            self._head = {name: content[name] for name in ("id", "object", "created", "model") if name in content}
        if not self._is_later:
            return data
        if chunk.choices and not text and not closes:
            return b""  # the role once more
        return self._rewritten(data)

    def _rewritten(self, data: bytes) -> bytes:
        """An event of a later attempt as one of the first."""
        content = msgspec.json.decode(data)
        content.update(self._head or {})
        for choice in content.get("choices") or ():
            if isinstance(choice.get("delta"), dict):
                choice["delta"].pop("role", None)
        usage = content.get("usage")
        if isinstance(usage, dict):
            usage["prompt_tokens"] = max(usage.get("prompt_tokens", 0) - self._base_tokens, 0)
            usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._base_tokens
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
            self.usage = Usage(usage["prompt_tokens"], usage["completion_tokens"])
        return msgspec.json.encode(content)

    # --- going on ----------------------------------------------------------------------------------------------------

    def why_not(self) -> str | None:
        """What keeps this request from going on by its text; None when nothing does."""
        fields = self._request.fields
        if self._trouble is not None:
            return self._trouble
        if self._request.num_answers > 1 or (fields.get("best_of") or 1) != 1:
            return "it has several answers"
        if fields.get("logprobs") not in (None, False) or fields.get("top_logprobs") or fields.get("prompt_logprobs"):
            return "it has logprobs"
        if fields.get("echo"):
            return "it has echo"
        if fields.get("return_token_ids"):
            return "it has token ids"
        if fields.get("tools") and fields.get("tool_choice") != "none":
            return "it has tools"
        form = fields.get("response_format")
        if (isinstance(form, dict) and form.get("type") != "text") or any(fields.get(name) for name in _STRUCTURED):
            return "its output is structured"
        if not self._request.is_chat and not isinstance(fields.get("prompt"), str):
            return "its prompt is not one string"
        if self._request.is_chat and not self._can_extend_messages():
            return "it continues a message that is not plain text"
        return None

    @property
    def has_ended(self) -> bool:
        """Whether no server has anything to add."""
        return (self.finish_reason or self.known_ending) is not None or self.remaining_tokens() == 0

    def remaining_tokens(self) -> int | None:
        """Tokens that the request's own limit leaves; None without a limit."""
        limit = self._request.max_tokens
        if limit is None and not self._request.is_chat:
            limit = _DEFAULT_COMPLETION_TOKENS
        return None if limit is None or not self.num_tokens else max(limit - self.num_tokens, 0)

    def continuation(self) -> bytes:
        """The body for the next server."""
        fields = dict(self._request.fields)
        text = "".join(self._text)
        if text and self._request.is_chat:
            messages = list(fields["messages"])
            if fields.get("continue_final_message"):
                messages[-1] = {**messages[-1], "content": messages[-1]["content"] + text}
            else:
                messages.append({"role": "assistant", "content": text})
            fields |= {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        elif text:
            fields["prompt"] += text
        remaining = self.remaining_tokens()
        if remaining is not None:
            name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
            fields[name] = remaining
        if isinstance(fields.get("min_tokens"), int):
            fields["min_tokens"] = max(fields["min_tokens"] - self.num_tokens, 0)
        return msgspec.json.encode(fields)

    def ending(self) -> bytes:
        """The events that are missing of a stream that was cut off just before its end: why it ended, and its usage
        where the client wants that. Of the latter prompt_tokens is 0 when no server has said it."""
        if self._head is None:
            return b""
        events = b""
        if self.finish_reason is None:
            self.finish_reason = self.known_ending or "length"
            choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason}
            choice["delta" if self._request.is_chat else "text"] = {} if self._request.is_chat else ""
            events += self._event({"choices": [choice]})
        options = self._request.fields.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True and not self._has_told_usage:
            self._has_told_usage = True
            usage = {"prompt_tokens": self._num_prompt_tokens, "completion_tokens": self.num_tokens}
            usage["total_tokens"] = sum(usage.values())
            events += self._event({"choices": [], "usage": usage})
        return events

    def _event(self, content: dict[str, Any]) -> bytes:
        return sse.PREFIX + msgspec.json.encode({**(self._head or {}), **content}) + sse.END

    def _can_extend_messages(self) -> bool:
        messages = self._request.fields.get("messages")
        if not isinstance(messages, list) or not messages:
            return False
        last = messages[-1]
        return not self._request.fields.get("continue_final_message") or (
            isinstance(last, dict) and isinstance(last.get("content"), str)
        )


def _given(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw) not in (b"null", b"[]")
