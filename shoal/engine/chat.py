"""Chat messages as clients send them, in the shape that chat templates expect. Used by engine/tokenizer.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shoal.errors import InvalidRequestError

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def normalize_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with plain text contents. Raises InvalidRequestError for one that no text model can read.

    A content given as a list of parts (OpenAI API) becomes its texts joined by line breaks. The arguments of earlier
    tool calls, JSON text in the API, become objects: templates print them.
    """
    if isinstance(messages, (str, bytes, dict)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of objects with a role and a content; got {type(messages).__name__}", "messages"
        )
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message", "messages")
    return [_normalize(message, index) for index, message in enumerate(messages)]


def _normalize(message: Any, index: int) -> dict[str, Any]:
    param = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidRequestError(
            f"{param} must be an object with a role and a content; got {type(message).__name__}", param
        )
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidRequestError(f"{param} has no role; use system, user, assistant or tool", f"{param}.role")
    result = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        result["content"] = "\n".join(_part_text(part, f"{param}.content[{i}]") for i, part in enumerate(content))
    elif content is None:
        result["content"] = ""
    elif not isinstance(content, str):
        raise InvalidRequestError(
            f"{param}.content must be a string or a list of parts; got {type(content).__name__}", f"{param}.content"
        )
    if result.get("tool_calls"):
        result["tool_calls"] = [_parse_arguments(call, param) for call in result["tool_calls"]]
    return result


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        raise InvalidRequestError(
            f'{param} is of type {kind!r}; this model reads text only: {{"type": "text", "text": "..."}}', param
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{param}.text must be a string; got {type(text).__name__}", f"{param}.text")
    return text


def _parse_arguments(call: Any, param: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequestError(f"{param}.tool_calls: each call needs a function object", f"{param}.tool_calls")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"{param}.tool_calls: the arguments are not JSON ({error})", f"{param}.tool_calls"
        ) from error
    return {**call, "function": {**function, "arguments": parsed}}
