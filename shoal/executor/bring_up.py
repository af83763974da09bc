"""BringUp: workers from their first word to the first step, phase by phase, each with a deadline. DistributedExecutor
runs one.

spawn (every rank says hello, and their facts agree) → link (other hosts' have opened their connections for steps) →
rendezvous (they form their groups) → load → size the KV cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from shoal import env, errors
from shoal.config.engine_config import EngineConfig
from shoal.errors import ShoalError, StartupError
from shoal.executor.failure import Evidence
from shoal.executor.hub import WorkerHub
from shoal.executor.launcher import Launcher
from shoal.log import get_logger
from shoal.messages import (
    AllocateCache,
    StartupProgress,
    WorkerBeat,
    WorkerExited,
    WorkerFailed,
    WorkerHello,
    WorkerLoaded,
    WorkerMessage,
    WorkerProgress,
    WorkerReady,
    WorkerSetup,
)

logger = get_logger(__name__)

# A worker that loads libraries from a slow disk cannot do anything else meanwhile, not even say that it lives.
_LOST_SECONDS = 60.0
# What a rank does until it has met the others: it gets its libraries ready, then it waits for the others.
_SETUP, _RENDEZVOUS = "setup", "rendezvous"
_LINK = "link"


@dataclasses.dataclass
class RankState:
    """What is known of one rank."""

    rank: int
    hello: WorkerHello | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    loaded: WorkerLoaded | None = None
    ready: WorkerReady | None = None


class BringUp:
    """One start of one engine. `states`, `beats` and `describe` are of use afterwards, too."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: Launcher,
        hub: WorkerHub,
        on_progress: Callable[[StartupProgress], None],
    ) -> None:
        self._config, self._launcher, self._hub, self._on_progress = config, launcher, hub, on_progress
        self._timeout = config.parallel.startup_timeout
        self.states = [RankState(rank) for rank in range(config.parallel.world_size)]
        # What each rank said last of its state, and when: until it says so again, nothing else is known of it.
        self.beats: dict[int, tuple[WorkerBeat, float]] = {}
        self._evidence = Evidence(self.describe)

    def run(self) -> dict[str, Any]:
        """Returns facts about the engine, see `Executor.start`. Raises StartupError, or what a worker raised."""
        self._phase("spawn", "start workers", lambda state: state.hello is not None)
        self._compare_facts()
        self._set_up()
        self._phase(_LINK, "link workers", lambda state: state.rank not in self._hub.unconnected)
        self._phase(_RENDEZVOUS, "connect workers", lambda state: state.phase not in (_SETUP, _RENDEZVOUS))
        self._phase("load", "load weights", lambda state: state.loaded is not None)
        num_blocks = min(state.loaded.num_blocks for state in self.states if state.loaded is not None)
        self._log_loading()
        self._hub.order_all(AllocateCache(num_blocks))
        self._phase("size", "size the KV cache", lambda state: state.ready is not None)
        self._hub.release_rings()
        return self._facts(num_blocks)

    def describe(self, rank: int) -> str:
        """How to call a rank: "rank 1 (node-b 10.0.0.4, pid 4711)"."""
        hello = self.states[rank].hello
        if hello is None:
            return self._launcher.describe(rank)
        return f"rank {rank} ({hello.hostname} {hello.address}, pid {hello.pid})"

    # --- phases ------------------------------------------------------------------------------------------------

    def _phase(self, name: str, shown: str, is_done: Callable[[RankState], bool]) -> None:
        """Take in what workers say until all ranks are done with the phase, and none of them has failed since."""
        deadline = time.monotonic() + self._timeout
        self._on_progress(StartupProgress(shown))
        while (
            missing := [state.rank for state in self.states if not is_done(state)]
        ) or self._evidence.seconds_left is not None:
            left = deadline - time.monotonic()
            if missing and left <= 0:
                raise StartupError(self._why_late(name, missing))
            until_verdict = self._evidence.seconds_left
            if until_verdict == 0.0:
                raise self._failure(name)
            for message in self._hub.poll(min(left, 0.5, until_verdict if until_verdict is not None else left)):
                self._take(message)
            for rank, seconds in self._hub.unheard(_LOST_SECONDS).items():
                self._evidence.lost(rank, seconds)

    def _take(self, message: WorkerMessage) -> None:
        match message:
            case WorkerHello(rank, generation):
                if generation == self._config.generation and rank < len(self.states):
                    self.states[rank].hello = message
                    self.states[rank].phase = "hello"
                    self._on_progress(StartupProgress("start workers", self._count("hello"), len(self.states)))
            case WorkerProgress(rank, phase, done, total):
                state = self.states[rank]
                state.phase, state.done, state.total = phase, done, total
                self._show_progress(phase)
            case WorkerLoaded(rank):
                self.states[rank].loaded = message
                self.states[rank].phase = "loaded"
            case WorkerReady(rank):
                self.states[rank].ready = message
                self.states[rank].phase = "ready"
            case WorkerBeat(rank):
                self.beats[rank] = message, time.monotonic()
            case WorkerExited(rank, how):
                self._evidence.exited(rank, how)
            case WorkerFailed(rank, kind, text):
                self._evidence.failed(rank, kind, text)

    def _count(self, field: str) -> int:
        return sum(getattr(state, field) is not None for state in self.states)

    def _show_progress(self, phase: str) -> None:
        """All ranks together: bytes that have been loaded, of those that are known to be loaded."""
        totals = [state for state in self.states if state.total]
        if phase == "load weights" and totals:
            done, total = sum(state.done for state in totals), sum(state.total for state in totals)
            self._on_progress(StartupProgress(phase, done, total))
        elif phase == "warm up":
            self._on_progress(StartupProgress(phase))

    def _compare_facts(self) -> None:
        """Raise StartupError for what must be the same on all ranks and is not, with who has what."""
        hellos = self._hellos()
        names = sorted({name for hello in hellos.values() for name in hello.facts})
        for name in names:
            holders: dict[str, list[int]] = {}
            for rank, hello in hellos.items():
                holders.setdefault(hello.facts.get(name, "none"), []).append(rank)
            if len(holders) > 1:
                found = "; ".join(
                    f"{', '.join(map(self.describe, ranks))}: {value}" for value, ranks in holders.items()
                )
                raise StartupError(f"all ranks must have the same {name}, but they differ: {found}")

    def _hellos(self) -> dict[int, WorkerHello]:
        return {state.rank: state.hello for state in self.states if state.hello is not None}

    def _set_up(self) -> None:
        hub, hellos = self._hub, self._hellos()
        hub.open_channels(hellos, self._config.parallel.output_rank)
        by_host: dict[str, list[int]] = {}
        for rank, hello in hellos.items():
            by_host.setdefault(hello.host_identity, []).append(rank)
        names = {rank: self.describe(rank) for rank in hellos}
        for rank, hello in hellos.items():
            neighbours = by_host[hello.host_identity]
            has_ring = rank in hub.ring_ranks
            is_output = rank == self._config.parallel.output_rank
            setup = WorkerSetup(
                config=self._config.to_json(),
                local_size=self._launcher.num_sharing(len(neighbours)),
                device_index=self._launcher.device_index(rank, neighbours.index(rank)),
                several_hosts=len(by_host) > 1,
                store_address=hellos[0].address,
                store_port=hellos[0].store_port,
                names=names,
                environment=env.shared_variables() if hello.host_identity != hub.host_identity else {},
                ring=hub.ring.address if hub.ring is not None and has_ring else "",
                ring_index=hub.ring_ranks.index(rank) if has_ring else 0,
                ring_size=len(hub.ring_ranks),
                steps=hub.steps_endpoint,
                results=hub.results.address if hub.results is not None and is_output else "",
            )
            self.states[rank].phase = _SETUP
            if not hub.order(rank, setup):
                raise StartupError(f"the connection to {names[rank]} is gone")

    # --- words -------------------------------------------------------------------------------------------------

    def _failure(self, phase: str) -> ShoalError:
        kind, text = self._evidence.cause()
        error_class = getattr(errors, kind, StartupError)
        if kind in ("ConfigError", "ModelError") or error_class is StartupError:
            return error_class(f"{text} (start-up phase {phase!r})" if not kind else text)
        return StartupError(text)

    def _why_late(self, phase: str, missing: list[int]) -> str:
        late = [self.states[rank] for rank in missing]
        if {state.phase for state in late} == {_SETUP, _RENDEZVOUS}:  # some wait for the others
            late = [state for state in late if state.phase == _SETUP]
        here = "; ".join(self._what_it_sees(state) for state in self.states if state not in late) or "none"
        to = f" to {self._hub.steps_endpoint} (does a firewall let its other port pass only?)" if phase == _LINK else ""
        return (
            f"start-up phase {phase!r}: {self._together(late)} did not come{to} within "
            f"{self._timeout:g} s (--startup-timeout); the others: {here}"
        )

    def _together(self, states: list[RankState]) -> str:
        """What they see: "rank 2, 3 (on node 1, which has not come …)" where the same is to be said of several."""
        by_words: dict[str, list[str]] = {}
        for state in states:
            words = self._what_it_sees(state).removeprefix(f"rank {state.rank} ")
            by_words.setdefault(words, []).append(str(state.rank))
        return ", ".join(f"rank {', '.join(ranks)} {words}" for words, ranks in by_words.items())

    def _what_it_sees(self, state: RankState) -> str:
        hello = state.hello
        if hello is None:
            return self.describe(state.rank)
        store = f", store on port {hello.store_port}" if hello.store_port else ""
        return (
            f"rank {state.rank} ({hello.hostname} {hello.address} on {hello.interface}, pid {hello.pid}{store}) in "
            f"phase {state.phase!r}"
        )

    def _log_loading(self) -> None:
        for state in self.states:
            assert state.loaded is not None
            facts = state.loaded.facts
            logger.info(
                "%s loaded %s bytes in %s s; room for %d blocks of KV cache",
                self.describe(state.rank),
                f"{facts.get('weight_bytes', 0):,}",
                facts.get("load_seconds", 0),
                state.loaded.num_blocks,
            )

    def _facts(self, num_blocks: int) -> dict[str, Any]:
        """Of the engine: rank 0's, with what all ranks hold together."""
        per_rank = [
            (state.loaded.facts if state.loaded else {}) | (state.ready.facts if state.ready else {})
            for state in self.states
        ]
        hellos = self._hellos()
        sums = ("weight_bytes", "kv_cache_bytes")
        return {
            **per_rank[0],
            **{name: sum(facts.get(name, 0) for facts in per_rank) for name in sums},
            "load_seconds": max(facts.get("load_seconds", 0.0) for facts in per_rank),
            "full_step_seconds": max(facts.get("full_step_seconds", 0.0) for facts in per_rank),
            "num_blocks": num_blocks,
            "ranks": len(self.states),
            "hosts": list(dict.fromkeys(hello.hostname for hello in hellos.values())),
            "backend": self._config.parallel.backend,
            "weight_bytes_by_rank": [facts.get("weight_bytes", 0) for facts in per_rank],
        }
