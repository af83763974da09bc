"""The header x-shoal-deadline: how long a request may go without progress. Read by the server and by the router."""

from __future__ import annotations

import math

from shoal.errors import InvalidRequestError

DEADLINE_HEADER = "x-shoal-deadline"


def read_deadline(text: str | None, default: float) -> float:
    """Seconds. Raises InvalidRequestError for what is not a number above 0."""
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(f"{DEADLINE_HEADER} must be a number of seconds above 0; got {text[:80]!r}")
    return seconds
