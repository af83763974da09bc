"""The chaos run: replicas, routers, a load of mixed requests without a pause, and one fault after the other.

Every answer must equal that of an undisturbed server, which was asked first. The harness knows routers by their HTTP
alone; whom a fault touches it sees on the links between routers and replicas, which are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import aiohttp

from shoal.network import free_port
from tests.chaos import leaks, records
from tests.chaos.cases import Case, make_cases
from tests.chaos.client import Door, Outcome, send
from tests.chaos.faults import ALL_KINDS, FAULTS, ROUTER_KINDS, STRIKES_NEW_REQUESTS, Scene
from tests.chaos.load import Load
from tests.chaos.processes import IMPATIENT, KEPT_SECONDS, FakeReplica, Program, RealReplica, Replica, Router
from tests.chaos.records import FaultRecord
from tests.router.fakes.vocabulary import encode_text

_CLIENT_SECONDS = 150.0
_UNTIL_BACK_SECONDS = 90.0
_MOST_FAILURES_A_FAULT = 5
_WHOLE_TEXTS = encode_text("abcdefghijklmnopqrstuvwxyz ,.的一是不了人我在有他这为之大来以")
_SHARE_SECONDS = 3.0
# Tokens that come so soon after a fault may have left the replica before it.
_ON_ITS_WAY_SECONDS = 0.1
# real: shoal-tiny. fake: no model. foreign: the same with the face of vLLM. mixed: one of each of these two.
ENGINES = ("fake", "real", "foreign", "mixed")


@dataclasses.dataclass(frozen=True)
class Plan:
    """engine: of the replicas, one of ENGINES. kinds: which faults; all of them take turns in an order from the seed.

    with_router: False leaves it out, with one replica and no fault but "calm": so the harness itself is tried. pause:
    most seconds of calm before a fault. router_flags: more flags of `shoal router`. Kinds that strike routers or
    clients have two routers started, and requests with keys among the others.
    """

    engine: str = "fake"
    num_faults: int = 12
    kinds: Sequence[str] = ALL_KINDS
    seed: int = 0
    num_replicas: int = 2
    concurrency: int = 64
    num_cases: int = 96
    max_tokens: int = 48
    pace: float = 50.0
    pause: float = 1.0
    with_router: bool = True
    router_flags: Sequence[str] = ()

    @property
    def num_routers(self) -> int:
        if not self.with_router:
            return 0
        return 2 if ROUTER_KINDS & set(self.kinds) else 1


@dataclasses.dataclass
class Result:
    records: list[FaultRecord]
    leaks: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.leaks and not any(record.failures for record in self.records)

    def summary(self) -> str:
        return records.summary(self.records, self.leaks) + f" in {self.seconds:.0f} s"


async def run(plan: Plan, *, file: Path | None = None, tell: Callable[[str], None] = lambda text: None) -> Result:
    """All faults of the plan, but for those that `file` has records of already. tell: takes a line after each fault."""
    began = time.monotonic()
    done = records.read(file) if file is not None else []
    token = secrets.token_hex(8)
    footprint = leaks.Footprint()
    directory = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    scratch = directory / "tmp"
    scratch.mkdir()
    own: list[FaultRecord] = []
    try:
        async with scene(plan, directory, {leaks.VARIABLE: token, "TMPDIR": str(scratch)}) as (replicas, routers):
            left = await _run_faults(plan, replicas, routers, len(done), own, file, tell)
            left += strays(token, [*replicas, *routers])
        left += [f"process {one}" for one in await asyncio.to_thread(leaks.wait_until_gone, token, 15)]
        left += footprint.leaked()
        left += [f"file {path}" for path in sorted(scratch.rglob("*")) if not path.is_dir()]
    except BaseException:
        tell(f"the logs are in {directory}")
        raise
    result = Result([*done, *own], left, time.monotonic() - began)
    if result.ok:
        shutil.rmtree(directory)
    else:
        tell(f"the logs are in {directory}")
    return result


@contextlib.asynccontextmanager
async def scene(
    plan: Plan, directory: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[list[Replica], list[Router]]]:
    """The replicas and the routers of a plan, up and running."""
    replicas: list[Replica] = []
    routers: list[Router] = []
    try:
        for number in range(plan.num_replicas):
            replicas.append(_make_replica(plan, number, directory, environment))
        for replica in replicas:
            replica.start()
            await replica.link.start()
        for replica in replicas:
            await replica.until_up()
        ports = [free_port() for _ in range(plan.num_routers)]
        for number, port in enumerate(ports):
            peers = [other for other in ports if other != port]
            name = f"router{number}"
            routers.append(Router(name, port, peers, replicas, directory, environment, *_router_flags(plan)))
            routers[-1].start()
        for router in routers:
            await router.until_up()
        for router in routers:
            await router.until_peers_know()
        yield replicas, routers
    finally:
        for program in (*routers, *replicas):
            await program.end()
        for replica in replicas:
            await replica.link.close()


def _router_flags(plan: Plan) -> list[str]:
    # One that is told to end leaves most of its requests to the other one.
    return [*(("--shutdown-timeout", "0.5") if plan.num_routers > 1 else ()), *plan.router_flags]


def _make_replica(plan: Plan, number: int, directory: Path, environment: dict[str, str]) -> Replica:
    """Of Shoal's servers every second one hands its requests on when it ends; the others let them finish."""
    name = f"replica{number}"
    foreign = plan.engine == "foreign" or (plan.engine == "mixed" and number % 2 == 1)
    flags = IMPATIENT if number % 2 == 1 and not foreign else ()
    if plan.engine == "real":
        return RealReplica(name, directory, environment, *flags)
    kind = "foreign" if foreign else "native"
    return FakeReplica(name, directory, environment, *flags, pace=plan.pace, kind=kind)


async def _run_faults(
    plan: Plan,
    replicas: list[Replica],
    routers: list[Router],
    num_done: int,
    own: list[FaultRecord],
    file: Path | None,
    tell: Callable[[str], None],
) -> list[str]:
    by_text = _WHOLE_TEXTS if plan.engine == "foreign" else ()
    cases = make_cases(replicas[0].model, plan.num_cases, plan.seed, max_tokens=plan.max_tokens, by_text=by_text)
    timeout = aiohttp.ClientTimeout(total=_CLIENT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as http:
        wanted = await undisturbed(http, replicas[0].url, cases, plan.concurrency)
        doors = [router.door for router in routers] or [Door(replicas[0].link.url)]
        rng = random.Random(f"load {plan.seed} {num_done}")
        load = Load(doors, cases, wanted, rng, with_keys=plan.num_routers > 1)
        load.start(http, plan.concurrency)
        try:
            for number in range(num_done, plan.num_faults):
                record = await _one_fault(plan, number, replicas, routers, load)
                own.append(record)
                records.append(file, record)
                tell(_line(record))
        finally:
            num_told = len(load.failures)
            await load.stop()
    left = [f"after the last fault: {failure}" for failure in load.failures[num_told:]]
    return left + await in_use(replicas, 10) + await in_use(routers, KEPT_SECONDS + 10)


async def undisturbed(
    http: aiohttp.ClientSession, url: str, cases: Sequence[Case], concurrency: int
) -> dict[int, dict]:
    """The right answers, by the number of the case. Raises RuntimeError where a server without faults has none."""
    slots = asyncio.Semaphore(concurrency)

    async def ask(case: Case) -> Outcome:
        async with slots:
            outcome = Outcome(case, "undisturbed", time.monotonic())
            await send(http, [Door(url)], outcome)
            return outcome

    outcomes = await asyncio.gather(*map(ask, cases))
    for outcome in outcomes:
        if outcome.content is None:
            raise RuntimeError(f"case {outcome.case.number} fails without a fault: {outcome.fault} ({outcome.case})")
    return {outcome.case.number: outcome.content for outcome in outcomes if outcome.content is not None}


def kind_of(plan: Plan, number: int) -> str:
    """Which fault is the number-th: every kind once before any comes again."""
    turn, place = divmod(number, len(plan.kinds))
    order = list(plan.kinds)
    random.Random(f"order {plan.seed} {turn}").shuffle(order)
    return order[place]


async def _one_fault(
    plan: Plan, number: int, replicas: list[Replica], routers: list[Router], load: Load
) -> FaultRecord:
    rng = random.Random(f"fault {plan.seed} {number}")
    kind = kind_of(plan, number)
    fault = FAULTS[kind]
    victim, router = rng.choice(replicas), rng.choice(routers) if routers else None
    scene = Scene(victim, replicas, routers, router, rng)
    target = _Target(scene, fault.strikes, load)
    checked_before, failures_before = load.num_checked, len(load.failures)
    record = FaultRecord(number=number, kind=kind, engine=plan.engine, seed=plan.seed, victim=target.name)
    await asyncio.sleep(rng.uniform(0.2, 1.0) * plan.pause)
    try:
        if kind in ROUTER_KINDS:  # the promise is to requests with a key
            load.keys_only = True
            await _until(
                lambda: all(outcome.way != "plain" for outcome in load.running.values()),
                _CLIENT_SECONDS + 10,
                "requests without a key did not end",
            )
        await _until(lambda: bool(target.carried()), _UNTIL_BACK_SECONDS, f"{target.name} was given no request")
        with contextlib.suppress(TimeoutError):  # better with its share of the requests
            share = plan.concurrency // (2 * plan.num_replicas)
            await _until(lambda: len(target.carried()) >= share, _SHARE_SECONDS, "")
        touched = scene.touched = {marker: load.running[marker] for marker in target.carried()}
        struck = time.monotonic()
        await fault.begin(scene)
        begun = time.monotonic()
        if kind in STRIKES_NEW_REQUESTS:
            there, num_struck = set(victim.link.seen), victim.link.num_struck
            with contextlib.suppress(TimeoutError):
                await _until(lambda: victim.link.num_struck >= num_struck + 3, 5, "")
            touched = {marker: load.running[marker] for marker in target.carried() - there}
        await _until(
            lambda: all(outcome.ended is not None for outcome in touched.values()),
            _CLIENT_SECONDS + 10,
            "requests that the fault touched did not end",
        )
        _measure(record, struck, begun, touched, target)
        healed = time.monotonic()
        await fault.end(scene)
        load.keys_only = False
        num_given = target.num_given
        await _until(lambda: target.num_given > num_given, _UNTIL_BACK_SECONDS, f"{target.name} did not come back")
        record.back = round(time.monotonic() - healed, 3)
    except (TimeoutError, RuntimeError) as error:
        record.failures.append(f"{error}")
    finally:
        load.keys_only = False
    record.checked = load.num_checked - checked_before
    new = load.failures[failures_before:]
    record.failures += new[:_MOST_FAILURES_A_FAULT]
    if len(new) > _MOST_FAILURES_A_FAULT:
        record.failures.append(f"… {len(new)} failed requests in all")
    return record


class _Target:
    """Whom a fault strikes: the replica, the router, or half of the clients."""

    def __init__(self, scene: Scene, strikes: str, load: Load) -> None:
        self._scene, self._strikes, self._load = scene, strikes, load
        assert strikes == "replica" or scene.router is not None

    @property
    def name(self) -> str:
        scene = self._scene
        if self._strikes == "router" and scene.router is not None:
            return scene.router.name
        return scene.victim.name if self._strikes == "replica" else "clients"

    def carried(self) -> set[str]:
        """The markers of the requests that it has."""
        scene, running = self._scene, self._load.running
        if self._strikes == "replica":
            return scene.victim.link.carried & running.keys()
        if self._strikes == "clients":
            return {marker for marker in running if int(marker[-1], 16) % 2}
        assert scene.router is not None
        return {marker for marker, outcome in running.items() if outcome.door is scene.router.door}

    @property
    def num_given(self) -> int:
        """So many requests came to it; for a router: were answered by it."""
        scene = self._scene
        if self._strikes == "replica":
            return len(scene.victim.link.seen)
        return sum(router.door.num_answers for router in scene.routers if router is scene.router)

    def moved(self, struck: float, touched: dict[str, Outcome]) -> int:
        """How many another replica, or another connection of their client, went on with since then."""
        if self._strikes != "replica":
            return sum(outcome.num_resumed > 0 for outcome in touched.values())
        others = [replica for replica in self._scene.replicas if replica is not self._scene.victim]
        return sum(any(other.link.seen.get(marker, 0.0) > struck for other in others) for marker in touched)


def _measure(record: FaultRecord, struck: float, begun: float, touched: dict[str, Outcome], target: _Target) -> None:
    record.carried = len(touched)
    record.moved = target.moved(struck, touched)
    waits = [wait for outcome in touched.values() if (wait := wait_of(outcome, struck, begun)) is not None]
    record.next_token = [round(wait, 4) for wait in waits]


def wait_of(outcome: Outcome, struck: float, begun: float) -> float | None:
    """Seconds from the fault to the next token of a stream; None for one that had nothing more to get.

    The fault happened between these two times. What came until shortly after them may have been on its way already, and
    is no sign that the stream goes on: the wait is the longest that begins by then.
    """
    began = max(struck, outcome.started)
    times = [when for when in outcome.times if when > began]
    if not outcome.case.streams or not times:
        return None
    latest = max(begun, began) + _ON_ITS_WAY_SECONDS
    return max(after - before for before, after in itertools.pairwise([began, *times]) if before <= latest)


async def _until(condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {timeout:g} s")
        await asyncio.sleep(0.005)


async def in_use(programs: Sequence[Replica | Router], timeout: float) -> list[str]:
    """What is left of requests in engines or routers a while after the last one ended."""
    deadline = time.monotonic() + timeout
    while True:
        left = [one for program in programs for one in await program.in_use()]
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def strays(token: str, programs: Sequence[Program]) -> list[str]:
    """Processes of the run that belong to none of its programs any more."""
    own = {process.pid for program in programs for process in (program.psutil(), *program.descendants())}
    return [f"stray process {one}" for one in leaks.processes_of(token) if int(one.split()[0]) not in own]


def _line(record: FaultRecord) -> str:
    waits = sorted(record.next_token)
    wait = f"next token after {waits[len(waits) // 2]:.2f} s (worst {waits[-1]:.2f})" if waits else "no stream waited"
    back = "" if record.back is None else f", back after {record.back:.1f} s"
    state = "ok" if not record.failures else f"FAILED: {record.failures[0]}"
    return (
        f"{record.number:4} {record.kind:15} on {record.victim}: {record.carried} requests there, "
        f"{record.moved} moved, {wait}{back}, {record.checked} checked: {state}"
    )
