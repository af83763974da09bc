"""The faults of the chaos runs: whom each strikes, how it begins, how it ends. The same on every kind of engine."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

from tests.chaos.client import Outcome
from tests.chaos.processes import Replica, Router


@dataclasses.dataclass
class Scene:
    """Where a fault happens: one replica among several, behind one or two routers, and whom it touches.

    router: the one that faults of routers strike. touched: the requests that the victim has.
    """

    victim: Replica
    replicas: Sequence[Replica]
    routers: Sequence[Router]
    router: Router | None
    rng: random.Random
    touched: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)


async def _nothing(scene: Scene) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Fault:
    """begin: it happens. end: what an operator does about it once all requests that it touched have ended.

    strikes: "replica", "router", or "clients", whose own connections break.
    """

    text: str
    begin: Callable[[Scene], Awaitable[None]]
    end: Callable[[Scene], Awaitable[None]] = _nothing
    strikes: str = "replica"


# --- of replicas -----------------------------------------------------------------------------------------------------


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
    await _drain_at_all(scene, scene.victim)


async def _take_back(scene: Scene) -> None:
    await _drain_at_all(scene, scene.victim, back=True)


async def _drain_at_all(scene: Scene, replica: Replica, *, back: bool = False) -> None:
    for router in scene.routers:
        await router.drain(replica, back=back)


async def _restart(scene: Scene) -> None:
    scene.victim.terminate()
    await scene.victim.until_ended(90)


async def _begin_roll(scene: Scene) -> None:
    await _take_out(scene, scene.victim)


async def _take_out(scene: Scene, replica: Replica) -> None:
    """Drained at the routers, and told to end while its requests still run there."""
    await _drain_at_all(scene, replica)
    await asyncio.sleep(scene.rng.uniform(0, 0.5))
    replica.terminate()


async def _finish_roll(scene: Scene) -> None:
    """The victim's turn ends, then each other replica has its own."""
    await _put_back(scene, scene.victim)
    for replica in scene.replicas:
        if replica is not scene.victim:
            await _take_out(scene, replica)
            await _put_back(scene, replica)


async def _put_back(scene: Scene, replica: Replica) -> None:
    """A new process, taken in by every router, and at work before the next replica's turn."""
    await replica.until_ended(90)
    replica.start()
    await replica.until_up()
    num_seen = len(replica.link.seen)
    await _drain_at_all(scene, replica, back=True)
    await replica.until(lambda: len(replica.link.seen) > num_seen, 90, "was given no request after its restart")


# --- of routers and clients ------------------------------------------------------------------------------------------


def _struck(scene: Scene) -> Router:
    assert scene.router is not None and len(scene.routers) > 1
    return scene.router


async def _kill_router(scene: Scene) -> None:
    router = _struck(scene)
    router.door.begin_to_break()
    router.kill_all()


async def _end_router(scene: Scene) -> None:
    """It refuses new requests and lets running ones finish, as long as its --shutdown-timeout says."""
    router = _struck(scene)
    router.door.begin_to_break()
    router.terminate()


async def _stop_router(scene: Scene) -> None:
    router = _struck(scene)
    router.door.begin_to_break()
    router.psutil().suspend()
    router.door.stopped = True


async def _start_router_again(scene: Scene) -> None:
    router = _struck(scene)
    await router.until_ended(90)
    router.start()
    await _until_routers_are_whole(scene)


async def _let_router_go_on(scene: Scene) -> None:
    router = _struck(scene)
    router.psutil().resume()
    router.door.stopped = False
    await _until_routers_are_whole(scene)


async def _until_routers_are_whole(scene: Scene) -> None:
    """All of them are up, and know what the others have: from here on the next one may be lost."""
    for router in scene.routers:
        await router.until_up()
    for router in scene.routers:
        await router.until_peers_know()
    _struck(scene).door.breaking = False


async def _cut_clients(scene: Scene) -> None:
    for outcome in scene.touched.values():
        outcome.cut()


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
    "restart": Fault("SIGTERM of a server, and a new one", _restart, _start_again),
    "rolling_restart": Fault("every server in turn: drained, SIGTERM, a new one", _begin_roll, _finish_roll),
    "kill_router": Fault("SIGKILL of a router", _kill_router, _start_router_again, "router"),
    "restart_router": Fault("SIGTERM of a router, and a new one", _end_router, _start_router_again, "router"),
    "stop_router": Fault("SIGSTOP of a router", _stop_router, _let_router_go_on, "router"),
    "cut_clients": Fault("clients' connections break", _cut_clients, strikes="clients"),
}
ALL_KINDS = tuple(kind for kind in FAULTS if kind != "calm")
# Where clients come back: these need two routers, of which each knows what the other one has.
ROUTER_KINDS = frozenset(kind for kind, fault in FAULTS.items() if fault.strikes != "replica")
# Faults that strike only what comes after them: they are left in place for a while.
STRIKES_NEW_REQUESTS = frozenset({"error", "hang"})
