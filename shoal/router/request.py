"""What the router understands of a client's request: as little as it needs. The servers check the rest."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.errors import InvalidRequestError
from shoal.protocol.media_type import check_json

GENERATING_PATHS = ("/v1/chat/completions", "/v1/completions")
SESSION_HEADER = "x-session-id"
_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(kw_only=True)
class GenerationRequest:
    """A POST to /v1/chat/completions or /v1/completions.

    body: JSON for the servers, with their own name of the model. fields: the same, parsed. seed: for a request that
    brings none. arrived: when all of it was here (time.monotonic). deadline: seconds that it may be without progress.
    """

    path: str
    request_id: str
    body: bytes
    fields: dict[str, Any]
    model: str
    deadline: float
    authorization: str | None = None
    seed: int = dataclasses.field(default_factory=lambda: secrets.randbelow(_LARGEST_SEED))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    arrived: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def is_chat(self) -> bool:
        return self.path == GENERATING_PATHS[0]

    @property
    def stream(self) -> bool:
        return self.fields.get("stream") is True

    @property
    def num_answers(self) -> int:
        """Answers to each prompt; 1 for what is no number (the server will say so)."""
        given = self.fields.get("n")
        return given if isinstance(given, int) and given > 0 else 1

    @property
    def max_tokens(self) -> int | None:
        """The limit that the request sets for an answer, if it sets one."""
        for name in ("max_completion_tokens", "max_tokens"):
            given = self.fields.get(name)
            if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
                return given
        return None


def parse_object(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises UnsupportedMediaTypeError, or InvalidRequestError for anything else."""
    check_json(headers.get("content-type"))
    if not body.strip():
        raise InvalidRequestError("the body is empty; send a JSON object")
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return fields


def model_name(fields: Mapping[str, Any]) -> str | None:
    """The model that a request asks for, if it says. Raises InvalidRequestError for what is no name."""
    name = fields.get("model")
    if name is not None and not isinstance(name, str):
        raise InvalidRequestError(f"model must be a string; got {str(name)[:80]}", "model", "invalid_type")
    return name


def with_model(fields: dict[str, Any], body: bytes, model: str) -> bytes:
    """The body with the servers' own name of the model."""
    if fields.get("model", model) == model:
        return body
    fields["model"] = model
    return msgspec.json.encode(fields)


def session_of(headers: Mapping[str, str], fields: Mapping[str, Any]) -> str | None:
    """What ties requests of one conversation together: the header x-session-id, or the body's `user`."""
    user = fields.get("user")
    return headers.get(SESSION_HEADER) or (user if isinstance(user, str) and user else None)
