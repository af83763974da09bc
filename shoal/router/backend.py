"""One server behind the router: what it is, how it is, and what is being done there. Owned by the pool."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from random import Random
from typing import Any

from shoal.config.router_settings import BackendSpec
from shoal.router.breaker import BreakerState, CircuitBreaker
from shoal.router.flight import Flight
from shoal.router.policies import BackendView

Clock = Callable[[], float]


@dataclasses.dataclass
class Health:
    """What the probes found. The three are kept apart; `why` says what is missing."""

    alive: bool = False
    progressing: bool = False
    admitting: bool = False
    why: str = "was not asked yet"

    @property
    def good(self) -> bool:
        return self.alive and self.progressing and self.admitting


class Backend:
    """entered: it has answered the golden prompt since it was last out. draining: an operator wants no more requests.

    native: it speaks /internal/v1/continue; None while it did not say. models: what it serves; adapters: those of them
    that are LoRA adapters, with the models that they are of. models_are_old: to be asked for again. last_sign: when
    bytes of an answer last came from it. dead_since: since when probes do not find it alive.
    """

    def __init__(self, spec: BackendSpec, random: Random, clock: Clock = time.monotonic) -> None:
        self.spec = spec
        self.clock = clock
        self.view = BackendView(spec.url, spec.weight)
        self.breaker = CircuitBreaker(random)
        self.health = Health()
        self.entered = False
        self.draining = False
        self.removed = False
        self.was_asked = False
        self.why_not_entered = "has not answered the golden prompt yet"
        self.native: bool | None = {"shoal": True, "openai": False}.get(spec.kind)
        self.models: tuple[str, ...] = spec.models
        self.adapters: dict[str, str] = {}
        self.models_are_old = False
        self.max_lengths: dict[str, int] = {}
        self.flights: set[Flight] = set()
        self.last_sign = 0.0
        self.dead_since = clock()
        # Set to have it probed at once.
        self.suspect: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return self.spec.url

    @property
    def base_models(self) -> tuple[str, ...]:
        return tuple(model for model in self.models if model not in self.adapters)

    @property
    def available(self) -> bool:
        """Whether requests may be sent there, the breaker aside."""
        return self.health.good and self.entered and not self.draining and not self.removed

    def accepts(self, now: float) -> bool:
        return self.available and self.breaker.allows(now)

    def leave(self, why: str) -> None:
        """It is out until it has answered a probe and the golden prompt."""
        self.entered = False
        self.why_not_entered = why

    def why_out(self, now: float) -> str | None:
        """Why no request is sent there; None while they are."""
        if self.draining:
            return "is drained by an operator"
        if not self.health.good:
            return self.health.why
        if not self.entered:
            return self.why_not_entered
        if not self.breaker.allows(now):
            return f"its breaker is {self.breaker.state(now)} after failures"
        return None

    def describe(self, now: float) -> dict[str, Any]:
        """For /router/backends."""
        health, view = self.health, self.view
        return {
            "url": self.url,
            "weight": view.weight,
            "kind": {True: "shoal", False: "openai", None: "unknown"}[self.native],
            "models": list(self.models),
            "available": self.accepts(now),
            "why_out": self.why_out(now),
            "alive": health.alive,
            "progressing": health.progressing,
            "admitting": health.admitting,
            "entered": self.entered,
            "draining": self.draining,
            "breaker": str(self.breaker.state(now)),
            "breaker_opened": self.breaker.num_opened,
            "num_running": view.num_running,
            "outstanding_tokens": view.outstanding_tokens,
            "tokens_per_second": view.speed,
        }

    def is_open(self, now: float) -> bool:
        return self.breaker.state(now) is BreakerState.OPEN
