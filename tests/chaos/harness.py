"""The chaos run: replicas, a router, a load of mixed requests without a pause, and one fault after the other.

Every answer must equal that of an undisturbed server, which was asked first. The harness knows the router by its HTTP
alone; whom a fault touches it sees on the links between router and replicas, which are its own.
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

from tests.chaos import leaks, records
from tests.chaos.cases import Case, make_cases
from tests.chaos.client import Outcome, difference, send
from tests.chaos.faults import ALL_KINDS, FAULTS, STRIKES_NEW_REQUESTS, Scene
from tests.chaos.processes import FakeReplica, RealReplica, Replica, Router
from tests.chaos.records import FaultRecord
from tests.router.fakes.vocabulary import encode_text

_CLIENT_SECONDS = 150.0
_UNTIL_BACK_SECONDS = 90.0
_MOST_FAILURES_A_FAULT = 5
_WHOLE_TEXTS = encode_text("abcdefghijklmnopqrstuvwxyz ,.的一是不了人我在有他这为之大来以")
_SHARE_SECONDS = 3.0
_AFTER_FAILURE_SECONDS = 0.2
# Tokens that come so soon after a fault may have left the replica before it.
_ON_ITS_WAY_SECONDS = 0.1
# real: shoal-tiny. fake: no model. foreign: the same with the face of vLLM. mixed: one of each of these two.
ENGINES = ("fake", "real", "foreign", "mixed")


@dataclasses.dataclass(frozen=True)
class Plan:
    """engine: of the replicas, one of ENGINES. kinds: which faults; all of them take turns in an order from the seed.

    with_router: False leaves it out, with one replica and no fault but "calm": so the harness itself is tried. pause:
    most seconds of calm before a fault. router_flags: more flags of `shoal router`.
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


class Load:
    """Clients that send one case after the other, and compare every answer with the undisturbed one."""

    def __init__(self, url: str, cases: Sequence[Case], wanted: dict[int, dict], rng: random.Random) -> None:
        self._url, self._cases, self._wanted, self._rng = url, cases, wanted, rng
        self.running: dict[str, Outcome] = {}
        self.failures: list[str] = []
        self.num_checked = 0
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, http: aiohttp.ClientSession, concurrency: int) -> None:
        self._tasks = [asyncio.create_task(self._client(http)) for _ in range(concurrency)]

    async def stop(self) -> None:
        """No new requests; those that run end as they do."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, http: aiohttp.ClientSession) -> None:
        while not self._stopping:
            case = self._rng.choice(self._cases)
            marker = f"chaos-{secrets.token_hex(6)}"
            outcome = self.running[marker] = Outcome(case, marker, time.monotonic())
            await send(http, self._url, case, marker, outcome)
            del self.running[marker]
            if not self._check(outcome):
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    def _check(self, outcome: Outcome) -> bool:
        self.num_checked += 1
        case = outcome.case
        fault = outcome.fault
        if fault is None:
            assert outcome.content is not None
            fault = difference(outcome.content, self._wanted[case.number])
        if fault is not None:
            how = "stream" if case.streams else "plain"
            self.failures.append(f"case {case.number} ({how} {case.path}, {outcome.marker}): {fault}")
        return fault is None


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
        async with scene(plan, directory, {leaks.VARIABLE: token, "TMPDIR": str(scratch)}) as (replicas, router):
            left = await _run_faults(plan, replicas, router, len(done), own, file, tell)
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
) -> AsyncIterator[tuple[list[Replica], Router | None]]:
    """The replicas and the router of a plan, up and running."""
    replicas: list[Replica] = []
    router: Router | None = None
    try:
        for number in range(plan.num_replicas):
            replicas.append(_make_replica(plan, number, directory, environment))
        for replica in replicas:
            replica.start()
            await replica.link.start()
        for replica in replicas:
            await replica.until_up()
        if plan.with_router:
            router = Router(replicas, directory, environment, *plan.router_flags)
            router.start()
            await router.until_up()
        yield replicas, router
    finally:
        for program in filter(None, (router, *replicas)):
            await program.end()
        for replica in replicas:
            await replica.link.close()


def _make_replica(plan: Plan, number: int, directory: Path, environment: dict[str, str]) -> Replica:
    name = f"replica{number}"
    if plan.engine == "real":
        return RealReplica(name, directory, environment)
    foreign = plan.engine == "foreign" or (plan.engine == "mixed" and number % 2 == 1)
    return FakeReplica(name, directory, environment, pace=plan.pace, kind="foreign" if foreign else "native")


async def _run_faults(
    plan: Plan,
    replicas: list[Replica],
    router: Router | None,
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
        url = router.url if router is not None else replicas[0].link.url
        load = Load(url, cases, wanted, random.Random(f"load {plan.seed} {num_done}"))
        load.start(http, plan.concurrency)
        try:
            for number in range(num_done, plan.num_faults):
                record = await _one_fault(plan, number, replicas, router, load)
                own.append(record)
                records.append(file, record)
                tell(_line(record))
        finally:
            num_told = len(load.failures)
            await load.stop()
    return [f"after the last fault: {failure}" for failure in load.failures[num_told:]] + await _in_use(replicas)


async def undisturbed(
    http: aiohttp.ClientSession, url: str, cases: Sequence[Case], concurrency: int
) -> dict[int, dict]:
    """The right answers, by the number of the case. Raises RuntimeError where a server without faults has none."""
    slots = asyncio.Semaphore(concurrency)

    async def ask(case: Case) -> Outcome:
        async with slots:
            outcome = Outcome(case, "undisturbed", time.monotonic())
            await send(http, url, case, outcome.marker, outcome)
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
    plan: Plan, number: int, replicas: list[Replica], router: Router | None, load: Load
) -> FaultRecord:
    rng = random.Random(f"fault {plan.seed} {number}")
    kind = kind_of(plan, number)
    victim = rng.choice(replicas)
    scene, fault = Scene(victim, router, rng), FAULTS[kind]
    checked_before, failures_before = load.num_checked, len(load.failures)
    record = FaultRecord(number=number, kind=kind, engine=plan.engine, seed=plan.seed, victim=victim.name)
    await asyncio.sleep(rng.uniform(0.2, 1.0) * plan.pause)
    try:
        await _until(lambda: bool(_carried(victim, load)), _UNTIL_BACK_SECONDS, f"{victim.name} was given no request")
        with contextlib.suppress(TimeoutError):  # better with its share of the requests
            share = plan.concurrency // (2 * plan.num_replicas)
            await _until(lambda: len(_carried(victim, load)) >= share, _SHARE_SECONDS, "")
        touched = {marker: load.running[marker] for marker in _carried(victim, load)}
        struck = time.monotonic()
        await fault.begin(scene)
        if kind in STRIKES_NEW_REQUESTS:
            there, num_struck = set(victim.link.seen), victim.link.num_struck
            with contextlib.suppress(TimeoutError):
                await _until(lambda: victim.link.num_struck >= num_struck + 3, 5, "")
            touched = {marker: load.running[marker] for marker in _carried(victim, load) - there}
        await _until(
            lambda: all(outcome.ended is not None for outcome in touched.values()),
            _CLIENT_SECONDS + 10,
            "requests that the fault touched did not end",
        )
        _measure(record, struck, touched, [replica for replica in replicas if replica is not victim])
        healed = time.monotonic()
        await fault.end(scene)
        num_seen = len(victim.link.seen)
        await _until(lambda: len(victim.link.seen) > num_seen, _UNTIL_BACK_SECONDS, f"{victim.name} did not come back")
        record.back = round(time.monotonic() - healed, 3)
    except (TimeoutError, RuntimeError) as error:
        record.failures.append(f"{error}")
    record.checked = load.num_checked - checked_before
    new = load.failures[failures_before:]
    record.failures += new[:_MOST_FAILURES_A_FAULT]
    if len(new) > _MOST_FAILURES_A_FAULT:
        record.failures.append(f"… {len(new)} failed requests in all")
    return record


def _carried(victim: Replica, load: Load) -> set[str]:
    return victim.link.carried & load.running.keys()


def _measure(record: FaultRecord, struck: float, touched: dict[str, Outcome], others: Sequence[Replica]) -> None:
    record.carried = len(touched)
    record.moved = sum(any(marker in other.link.seen for other in others) for marker in touched)
    waits = [wait for outcome in touched.values() if (wait := _wait_of(outcome, struck)) is not None]
    record.next_token = [round(wait, 4) for wait in waits]


def _wait_of(outcome: Outcome, struck: float) -> float | None:
    """Seconds from the fault to the next token of a stream; None for one that had nothing more to get.

    What was on its way already is no sign that the stream goes on: the wait is the longest that begins at the fault.
    """
    began = max(struck, outcome.started)
    times = [when for when in outcome.times if when > began]
    if not outcome.case.streams or not times:
        return None
    waits = [
        (after - before, after)
        for before, after in itertools.pairwise([began, *times])
        if before <= began + _ON_ITS_WAY_SECONDS
    ]
    return max(waits)[1] - began


async def _until(condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {timeout:g} s")
        await asyncio.sleep(0.005)


async def _in_use(replicas: Sequence[Replica]) -> list[str]:
    """What is left of requests in the engines a while after the last one ended."""
    left: list[str] = []
    for _ in range(50):
        left = [one for replica in replicas for one in await replica.in_use()]
        if not left:
            break
        await asyncio.sleep(0.2)
    return left


def _line(record: FaultRecord) -> str:
    waits = sorted(record.next_token)
    wait = f"next token after {waits[len(waits) // 2]:.2f} s (worst {waits[-1]:.2f})" if waits else "no stream waited"
    back = "" if record.back is None else f", back after {record.back:.1f} s"
    state = "ok" if not record.failures else f"FAILED: {record.failures[0]}"
    return (
        f"{record.number:4} {record.kind:12} on {record.victim}: {record.carried} requests there, "
        f"{record.moved} moved, {wait}{back}, {record.checked} checked: {state}"
    )
