"""What a doctor on another machine asks this machine's daemon for: its facts, and its part in measurements."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shoal import network
from shoal.cluster.daemon.heart import echo
from shoal.cluster.daemon.wire import NodeView, Nothing, Service
from shoal.cluster.doctor.facts import LinkFacts, NodeFacts
from shoal.cluster.doctor.gather import gather_node
from shoal.cluster.doctor.measure import measure_link
from shoal.cluster.doctor.responder import Responder
from shoal.cluster.doctor.trial import Outcome, run_ranks
from shoal.cluster.ports import NodePorts
from shoal.cluster.reach import TIMEOUT_SECONDS, probe
from shoal.messages import TrialOrder

_MOST_SECONDS = 600.0
_MOST_TRIAL_SECONDS = 60.0
_MOST_RANKS = 16
_NUM_THREADS = 64


class GatherRequest(msgspec.Struct, frozen=True):
    """model: to look for, None: no model. The rest: see gather_node."""

    model: str | None = None
    load_torch: bool = True
    ask_gpus: bool = True


class Clock(msgspec.Struct, frozen=True):
    """Seconds since 1970."""

    now: float


class OpenRequest(msgspec.Struct, frozen=True):
    """lifetime: seconds after which the responder is gone. tcp: more ports to listen on, where they are free."""

    lifetime: float
    tcp: list[int] = []


class Opened(msgspec.Struct, frozen=True):
    """Of a responder; spare_port: one that is free for a while, for ranks to meet at."""

    port: int
    nonce: bytes
    spare_port: int
    open_tcp: list[int] = []


class MeasureRequest(msgspec.Struct, frozen=True):
    """Of a responder that another node opened; seconds: 0 for the round trip alone."""

    target: str
    port: int
    nonce: bytes
    seconds: float


class ProbeRequest(msgspec.Struct, frozen=True):
    """Addresses, ports and protocols ("tcp", "udp": only those of daemons answer there)."""

    targets: list[tuple[str, int, str]]


class ProbeAnswer(msgspec.Struct, frozen=True):
    """In the order of the request, as shoal.cluster.reach names them."""

    states: list[str]


class TrialRequest(msgspec.Struct, frozen=True):
    """The ranks that run on this node."""

    ranks: list[TrialOrder]
    use_rdma: bool | None = None


class TrialAnswer(msgspec.Struct, frozen=True):
    outcomes: list[Outcome]


def probe_targets(targets: Sequence[tuple[str, int, str]], bind: str, token: str) -> list[str]:
    """All at once, from this machine's address `bind`."""
    if not targets:
        return []

    def one(target: tuple[str, int, str]) -> str:
        address, port, protocol = target
        if protocol == "udp":
            return echo(address, port, token, timeout=TIMEOUT_SECONDS, bind=bind)
        return probe(address, port, bind=bind)

    with ThreadPoolExecutor(min(len(targets), _NUM_THREADS), thread_name_prefix="probe") as pool:
        return list(pool.map(one, targets))


class Responders:
    """Those that are open here, one for each doctor at most: a second one by the same daemon lives beside the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[bytes, Responder] = {}

    def open(self, address: str, request: OpenRequest) -> Opened:
        responder = Responder(address, lifetime=min(request.lifetime, _MOST_SECONDS), tcp=request.tcp)
        with self._lock:
            self._open = {nonce: each for nonce, each in self._open.items() if each.is_open}
            self._open[responder.nonce] = responder
        return Opened(responder.port, responder.nonce, network.free_port(address), responder.open_tcp)

    def close(self, nonce: bytes) -> None:
        with self._lock:
            responder = self._open.pop(nonce, None)
        if responder is not None:
            responder.close()


class CloseRequest(msgspec.Struct, frozen=True):
    nonce: bytes


_responders = Responders()


def _gather(node: NodeView, request: GatherRequest) -> NodeFacts:
    return gather_node(
        head=node.head,
        address=node.address,
        is_head=node.is_head,
        ports=NodePorts(head=network.split_endpoint(node.head)[1]),
        model=request.model,
        load_torch=request.load_torch,
        ask_gpus=request.ask_gpus,
    )


def _clock(_: NodeView, __: Nothing) -> Clock:
    return Clock(time.time())


def _open(node: NodeView, request: OpenRequest) -> Opened:
    return _responders.open(node.address, request)


def _close(_: NodeView, request: CloseRequest) -> Nothing:
    _responders.close(request.nonce)
    return Nothing()


def _measure(node: NodeView, request: MeasureRequest) -> LinkFacts:
    return measure_link(node.address, request.target, request.port, request.nonce, seconds=min(request.seconds, 10.0))


def _probe(node: NodeView, request: ProbeRequest) -> ProbeAnswer:
    return ProbeAnswer(probe_targets(request.targets, node.address, node.token))


def _try(_: NodeView, request: TrialRequest) -> TrialAnswer:
    ranks = [msgspec.structs.replace(rank, timeout=min(rank.timeout, _MOST_TRIAL_SECONDS)) for rank in request.ranks]
    return TrialAnswer(run_ranks(ranks[:_MOST_RANKS], use_rdma=request.use_rdma))


GATHER = Service("doctor.gather", GatherRequest, NodeFacts, _gather)
CLOCK = Service("doctor.clock", Nothing, Clock, _clock, is_slow=False)
OPEN = Service("doctor.open", OpenRequest, Opened, _open)
CLOSE = Service("doctor.close", CloseRequest, Nothing, _close)
MEASURE = Service("doctor.measure", MeasureRequest, LinkFacts, _measure)
PROBE = Service("doctor.probe", ProbeRequest, ProbeAnswer, _probe)
TRY = Service("doctor.try", TrialRequest, TrialAnswer, _try)
DOCTOR_SERVICES = (GATHER, CLOCK, OPEN, CLOSE, MEASURE, PROBE, TRY)
