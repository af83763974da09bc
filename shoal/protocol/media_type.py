"""The Content-Type of a request's body: the one that is read, or an error that names it. Server and router use it."""

from __future__ import annotations

from shoal.errors import UnsupportedMediaTypeError

JSON = "application/json"


def media_type_of(content_type: str | None) -> str:
    """Without parameters, in small letters; empty for none."""
    return (content_type or "").split(";")[0].strip().lower()


def is_json(media_type: str) -> bool:
    return media_type == JSON or media_type.endswith("+json")


def check_json(content_type: str | None) -> None:
    """Raises UnsupportedMediaTypeError. Strict, because what browsers send from any page without asking (forms, plain
    text) shall not get in."""
    if not is_json(media_type_of(content_type)):
        raise unsupported(content_type, JSON)


def unsupported(content_type: str | None, wanted: str) -> UnsupportedMediaTypeError:
    found = media_type_of(content_type)[:100] or "of no type"
    return UnsupportedMediaTypeError(f"the body is {found}; send Content-Type: {wanted}")
