"""A request's bytes to a checked body, or one InvalidRequestError that says what is wrong. Called by the server."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import ValidationError

from shoal.errors import InvalidRequestError
from shoal.protocol.fields import RequestBody, StreamOptions
from shoal.protocol.neutral import check_extra_fields

Body = TypeVar("Body", bound=RequestBody)
_SHOWN_CHARACTERS = 80
# Fields of several forms, for which pydantic gives one error a form.
_FORMS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "input": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "text_1": "a string or a list of strings",
    "text_2": "a string or a list of strings",
    "queries": "a string or a list of strings",
    "documents": "a list of strings, or of objects with a text",
}
_STREAM_OPTIONS = tuple(StreamOptions.model_fields)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """Raises InvalidRequestError: not JSON, not an object, a field missing, of a wrong type, or not known."""
    if not data.strip():
        raise InvalidRequestError("the body is empty; send a JSON object")
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _translate(kind, error) from None
    check_extra_fields(body.model_extra, kind.model_fields, kind.neutral)
    return body


def _translate(kind: type[RequestBody], error: ValidationError) -> InvalidRequestError:
    found: Any = error.errors(include_url=False)
    first = found[0]
    location: tuple[str | int, ...] = first["loc"]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not location:
        return InvalidRequestError("the body must be a JSON object")
    name = str(location[0])
    if first["type"] == "missing":
        return InvalidRequestError(f"{_path(location)} is missing", _path(location), "missing_parameter")
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(_unknown_option(location), _path(location), "unknown_parameter")
    if name in _FORMS and len(found) > 1:
        return InvalidRequestError(f"{name} must be {_FORMS[name]}", name, "invalid_type")
    path = _path(location)
    message = str(first["msg"])
    wanted = message.removeprefix("Input should be ")
    said = f"{path} must be {wanted}" if wanted != message else f"{path}: {message}"
    return InvalidRequestError(f"{said}; got {_shown(first['input'])}", path, "invalid_type")


def _unknown_option(location: tuple[str | int, ...]) -> str:
    near = difflib.get_close_matches(str(location[-1]), _STREAM_OPTIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    return f"{_path(location)} is not known here; {hint}"


def _path(location: tuple[str | int, ...]) -> str:
    path = str(location[0])
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path[:200]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
