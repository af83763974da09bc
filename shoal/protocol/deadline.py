"""The header x-shoal-deadline: how long a request may go without progress. Read by the server and by the router."""

from __future__ import annotations

import re

from shoal.errors import InvalidRequestError

DEADLINE_HEADER = "x-shoal-deadline"
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def read_deadline(text: str | None, default: float) -> float:
    """Seconds. text: the header's value; of several headers, all values. Raises InvalidRequestError for what is not one
    plain number above 0."""
    if text is None:
        return default
    seconds = float(text) if _NUMBER.fullmatch(text) else 0.0
    if not seconds > 0:
        raise InvalidRequestError(
            f"{DEADLINE_HEADER} must be one number of seconds above 0, such as 20 or 0.5; got {text[:80]!r}"
        )
    return seconds
