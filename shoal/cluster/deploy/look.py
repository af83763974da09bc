"""What a replica's server says of itself: /readyz, /livez and the three numbers of /metrics that scaling needs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import httpx

from shoal.cluster.deploy.service import Condition

_TIMEOUT_SECONDS = 2.0
# A server that was there and gives no sign for so long is started anew.
_DEAD_SECONDS = 30.0
# "shoal:num_requests_waiting{model_name="x",replica="0"} 3.0", under either prefix.
_SAMPLE = re.compile(
    r"^(?:shoal|vllm):(num_requests_waiting|num_requests_running|kv_cache_usage_perc)(?:\{[^}]*\})? (\S+)", re.MULTILINE
)


def read_metrics(text: str) -> tuple[int, int, float]:
    """Requests that wait and run, over all engines of the server, and the fullest KV cache's share in use.

    Raises ValueError where one of them is missing: it is no metrics page of an engine.
    """
    found: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(text):
        found.setdefault(name, []).append(float(value))
    try:
        return (
            round(sum(found["num_requests_waiting"])),
            round(sum(found["num_requests_running"])),
            max(found["kv_cache_usage_perc"]),
        )
    except KeyError as error:
        raise ValueError(f"/metrics has no {error.args[0]}") from None


class Looker:
    """Looks at one server after another; it remembers since when the present one gives no sign."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._clock = clock
        self._http = httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False, transport=transport)
        self._url = ""
        self._last_sign: float | None = None

    def __call__(self, url: str) -> Condition:
        if url != self._url:
            self._url, self._last_sign = url, None
        try:
            ready = self._http.get(f"{url}/readyz")
            self._last_sign = self._clock()
            if ready.status_code != 200:
                return Condition(why=_message(ready))
            waiting, running, kv_usage = read_metrics(self._http.get(f"{url}/metrics").text)
            return Condition(ready=True, waiting=waiting, running=running, kv_usage=kv_usage)
        except (httpx.HTTPError, ValueError) as error:
            silent = 0.0 if self._last_sign is None else self._clock() - self._last_sign
            why = f"does not answer: {error or type(error).__name__}"
            return Condition(why=why, hopeless=silent > _DEAD_SECONDS)


def _message(response: httpx.Response) -> str:
    """Of OpenAI's error object."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"/readyz answers {response.status_code}"
