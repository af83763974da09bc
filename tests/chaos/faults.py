"""The faults of the chaos runs: how each begins, how it ends, and on what kind of engine it can be had."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Mapping

from tests.chaos.processes import Replica, Router


@dataclasses.dataclass
class Scene:
    """Where a fault happens: one replica among several behind a router."""

    victim: Replica
    router: Router | None
    rng: random.Random


async def _nothing(scene: Scene) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Fault:
    """begin: it happens. end: what an operator does about it once all requests that it touched have ended."""

    text: str
    begin: Callable[[Scene], Awaitable[None]]
    end: Callable[[Scene], Awaitable[None]] = _nothing


async def _kill_worker(scene: Scene) -> None:
    await scene.victim.break_engine(scene.rng, core=False)


async def _kill_core(scene: Scene) -> None:
    await scene.victim.break_engine(scene.rng, core=True)


async def _kill_server(scene: Scene) -> None:
    scene.victim.kill_all()


async def _start_again(scene: Scene) -> None:
    scene.victim.start()
    await scene.victim.until_up()


async def _stop_worker(scene: Scene) -> None:
    await scene.victim.stop_engine(scene.rng)


async def _mend_worker(scene: Scene) -> None:
    await scene.victim.mend_engine()
    await scene.victim.until_up()


async def _stop_server(scene: Scene) -> None:
    scene.victim.psutil().suspend()


async def _let_server_go_on(scene: Scene) -> None:
    scene.victim.psutil().resume()
    await scene.victim.until_up()


def _set_link(mode: str) -> Callable[[Scene], Awaitable[None]]:
    async def begin(scene: Scene) -> None:
        scene.victim.link.set_mode(mode)

    return begin


async def _drain(scene: Scene) -> None:
    assert scene.router is not None
    await scene.router.drain(scene.victim)


async def _take_back(scene: Scene) -> None:
    assert scene.router is not None
    await scene.router.drain(scene.victim, back=True)


async def _restart(scene: Scene) -> None:
    """As a rolling restart does it with each replica in turn: SIGTERM, wait, start."""
    scene.victim.terminate()
    await scene.victim.until_ended(90)


FAULTS: Mapping[str, Fault] = {
    "calm": Fault("nothing", _nothing),
    "kill_worker": Fault("SIGKILL of a worker", _kill_worker),
    "kill_core": Fault("SIGKILL of an engine core", _kill_core),
    "kill_server": Fault("SIGKILL of a server with all its children", _kill_server, _start_again),
    "stop_worker": Fault("SIGSTOP of a worker", _stop_worker, _mend_worker),
    "stop_server": Fault("SIGSTOP of a server", _stop_server, _let_server_go_on),
    "link_dropped": Fault("a link that drops everything", _set_link("dropped"), _set_link("open")),
    "link_reset": Fault("a link whose connections are reset", _set_link("reset"), _set_link("open")),
    "error": Fault("a replica that answers 500", _set_link("error"), _set_link("open")),
    "hang": Fault("a replica that accepts and never answers", _set_link("hang"), _set_link("open")),
    "half_event": Fault("a replica that sends half an event and closes", _set_link("half_event"), _set_link("open")),
    "drain": Fault("a drain through the router", _drain, _take_back),
    "restart": Fault("a replica's turn in a rolling restart", _restart, _start_again),
}
# Faults that strike only what comes after them: they are left in place for a while.
ALL_KINDS = tuple(kind for kind in FAULTS if kind != "calm")
STRIKES_NEW_REQUESTS = frozenset({"error", "hang"})
