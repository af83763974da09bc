"""The servers behind the router, by their URLs: who serves a model and may be sent a request now. No sockets.

Settings come in through `apply`; health.py and the attempts change single backends and call `changed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from random import Random

from shoal.config.router_settings import BackendSpec
from shoal.errors import NotFoundError
from shoal.router.backend import Backend, Clock
from shoal.router.policies import Policy, RequestView


class Pool:
    """Backends in the order in which they were named."""

    def __init__(self, policy: Policy, random: Random | None = None, clock: Clock = time.monotonic) -> None:
        self.policy = policy
        self.aliases: Mapping[str, str] = {}
        self.clock = clock
        self._random = random or Random()
        self._backends: dict[str, Backend] = {}
        # Gone from the settings, but with requests under way.
        self._leaving: set[Backend] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._backends.values())

    def __len__(self) -> int:
        return len(self._backends)

    def get(self, url: str) -> Backend | None:
        return self._backends.get(url)

    def apply(self, specs: Sequence[BackendSpec], aliases: Mapping[str, str]) -> tuple[list[Backend], list[Backend]]:
        """Have these backends from now on. Returns (new ones, ones that are gone); what runs on the latter finishes.

        A new weight changes a backend in place; whatever else is different makes it a new one.
        """
        old, self._backends = self._backends, {}
        added = []
        for spec in specs:
            backend = old.pop(spec.url, None)
            if backend is not None and _same_server(backend.spec, spec):
                backend.spec = spec
                backend.view.weight = spec.weight
            else:
                if backend is not None:
                    old[spec.url] = backend
                backend = Backend(spec, self._random, self.clock)
                added.append(backend)
            self._backends[spec.url] = backend
        for backend in old.values():
            backend.removed = True
            self._leaving.add(backend)
            self.policy.removed(backend.url)
        self.aliases = dict(aliases)
        self.changed()
        return added, list(old.values())

    def with_flights(self) -> list[Backend]:
        """All on which requests are under way, those too that are gone from the settings."""
        self._leaving = {backend for backend in self._leaving if backend.flights}
        return [*self, *self._leaving]

    def use_policy(self, policy: Policy) -> None:
        """For requests that come; those under way end with the one they began with."""
        self.policy = policy

    # --- models ----------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The names that may be asked for: of all servers, and the aliases of these."""
        names = dict.fromkeys(model for backend in self for model in backend.models)
        names.update(dict.fromkeys(alias for alias, model in self.aliases.items() if model in names))
        return list(names)

    def resolve(self, name: str | None) -> str:
        """The servers' own name of the model that a request asks for. Raises NotFoundError, naming what there is."""
        names = self.models()
        if name is None:
            own = {self.aliases.get(model, model) for model in names}
            if len(own) == 1:
                return own.pop()
            raise NotFoundError(f"name a model; there is {_listed(names)}", "model", "model_not_found")
        model = self.aliases.get(name, name)
        if not any(model in backend.models for backend in self):
            raise NotFoundError(
                f"the model {name[:200]!r} is not served here; there is {_listed(names)}", "model", "model_not_found"
            )
        return model

    # --- choosing --------------------------------------------------------------------------------------------------

    def candidates(self, model: str, excluded: Collection[Backend] = (), native: bool | None = None) -> list[Backend]:
        """Who may be sent a request for this model now. native: only those that speak frames, or only the others."""
        now = self.clock()
        return [
            backend
            for backend in self
            if model in backend.models
            and backend not in excluded
            and (native is None or backend.native is native)
            and backend.accepts(now)
        ]

    def why_out(self, backends: Iterable[Backend]) -> str:
        """Of those that are sent no requests: which they are, and why."""
        now = self.clock()
        return "; ".join(f"{backend.url} {why}" for backend in backends if (why := backend.why_out(now)))

    def serving(self, model: str) -> list[Backend]:
        """All that have this model, be they there or not."""
        return [backend for backend in self if model in backend.models]

    def pick(self, request: RequestView, candidates: Sequence[Backend]) -> Backend:
        """The policy's choice among one or more."""
        if len(candidates) == 1:
            return candidates[0]
        return candidates[self.policy.pick(request, [backend.view for backend in candidates])]

    def seconds_until_trial(self, model: str) -> float | None:
        """When the first breaker lets a request through to a server that is well otherwise; None when none will."""
        now = self.clock()
        waits = [
            backend.breaker.seconds_until_trial(now)
            for backend in self
            if model in backend.models and backend.available and backend.is_open(now)
        ]
        return min(waits, default=None)

    # --- waiting ---------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Wake those who wait for a backend."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_change(self, seconds: float) -> None:
        """Until something has changed, at most so long."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=seconds)
        finally:
            self._waiters.discard(waiter)


def _same_server(one: BackendSpec, other: BackendSpec) -> bool:
    return (one.api_key, one.models, one.kind) == (other.api_key, other.models, other.kind)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none yet: no server has answered so far"
