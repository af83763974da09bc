"""Requests and tokens per minute of each key: token buckets that refill steadily. Pure: every call takes the time."""

from __future__ import annotations

import dataclasses

from shoal.errors import RateLimitedError
from shoal.router.admission.keys import ApiKey

_SECONDS = 60.0


class _Bucket:
    """Holds up to a minute's worth; may be in debt after a request that cost more than was estimated."""

    __slots__ = ("_level", "_per_minute", "_then")

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._level = per_minute
        self._then = now

    def refill(self, per_minute: float, now: float) -> None:
        """Up to now, as it was; from now on at this rate, which may be another after a change of the keys' file."""
        # A clock that steps back must not take anything away.
        elapsed = max(now - self._then, 0.0)
        self._then = max(now, self._then)
        self._level = min(self._level + elapsed * self._per_minute / _SECONDS, per_minute)
        self._per_minute = per_minute

    def seconds_until(self, amount: float) -> float:
        """0 when there is enough. What is more than a minute's worth waits for a full bucket, and leaves a debt."""
        missing = min(amount, self._per_minute) - self._level
        # What is left by rounding is no reason to wait.
        return missing / self._per_minute * _SECONDS if missing > 1e-9 * self._per_minute else 0.0

    def take(self, amount: float) -> None:
        """A negative amount gives back."""
        self._level = min(self._level - amount, self._per_minute)


@dataclasses.dataclass(slots=True)
class Charge:
    """What a request was charged; goes back to `correct` once."""

    key: ApiKey
    num_tokens: int
    corrected: bool = False


class RateLimits:
    """The buckets of all keys that have limits. One per router process: several processes each allow the full limit."""

    def __init__(self) -> None:
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}

    def charge(self, key: ApiKey, num_tokens: int, now: float) -> Charge:
        """One request of an estimated number of tokens, prompt and answer.

        Raises RateLimitedError with `retry_after`, and charges nothing, when it is too much now.
        """
        requests = _bucket(self._requests, key.name, key.requests_per_minute, now)
        tokens = _bucket(self._tokens, key.name, key.tokens_per_minute, now)
        if requests is not None and (wait := requests.seconds_until(1)):
            raise _limited(key, f"{key.requests_per_minute:g} requests", wait)
        if tokens is not None and (wait := tokens.seconds_until(num_tokens)):
            raise _limited(key, f"{key.tokens_per_minute:g} tokens", wait)
        if requests is not None:
            requests.take(1)
        if tokens is not None:
            tokens.take(num_tokens)
        return Charge(key, num_tokens)

    def correct(self, charge: Charge, num_tokens: int, now: float) -> None:
        """It has ended, with that many tokens in truth (0: nothing was computed). A second call changes nothing."""
        if charge.corrected:
            return
        charge.corrected = True
        tokens = _bucket(self._tokens, charge.key.name, charge.key.tokens_per_minute, now)
        if tokens is not None:
            tokens.take(num_tokens - charge.num_tokens)


def _bucket(buckets: dict[str, _Bucket], name: str, per_minute: float | None, now: float) -> _Bucket | None:
    if per_minute is None:
        return None
    bucket = buckets.get(name)
    if bucket is None:
        bucket = buckets[name] = _Bucket(per_minute, now)
    bucket.refill(per_minute, now)
    return bucket


def _limited(key: ApiKey, limit: str, wait: float) -> RateLimitedError:
    return RateLimitedError(
        f"the API key {key.name!r} is limited to {limit} per minute; try again in {wait:.1f} seconds", retry_after=wait
    )
