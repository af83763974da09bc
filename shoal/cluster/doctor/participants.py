"""Who takes part in a survey of a cluster: this machine, and others through their daemons. `survey` drives them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Protocol

from shoal import network
from shoal.checksum import SumCache, hash_tree
from shoal.cluster.daemon.client import ask
from shoal.cluster.daemon.heart import answering_echoes
from shoal.cluster.daemon.wire import Nothing, RequestType, ResponseType, Service
from shoal.cluster.doctor import services
from shoal.cluster.doctor.facts import LinkFacts, NodeFacts
from shoal.cluster.doctor.gather import gather_node
from shoal.cluster.doctor.measure import measure_link
from shoal.cluster.doctor.responder import Responder
from shoal.cluster.doctor.trial import Outcome, run_ranks
from shoal.cluster.ports import NodePorts
from shoal.cluster.verify.nodes import NodeHashing
from shoal.config.model_path import resolve_model_path
from shoal.errors import ConfigError, NodeError
from shoal.messages import TrialOrder

_GATHER_SECONDS = 120.0
_QUICK_SECONDS = 30.0
_ASK_SECONDS = 15.0
_NUM_CLOCK_SAMPLES = 2


class Participant(Protocol):
    """One machine. All methods may raise ShoalError, where they ask another machine; none takes for ever."""

    address: str
    is_head: bool
    # Whether a node runs there, which holds its ports.
    is_node: bool

    def gather(self, request: services.GatherRequest) -> NodeFacts: ...

    def clock(self) -> tuple[float, float] | None:
        """How far that machine's clock is ahead of this one's, and the round trip; None for this machine itself."""

    def open(self, tcp: Sequence[int], lifetime: float) -> services.Opened:
        """A responder; `close` ends it."""

    def close(self) -> None: ...

    def probe(self, targets: Sequence[tuple[str, int, str]]) -> list[str]:
        """States (shoal.cluster.reach) of addresses' ports, seen from there; "udp" is answered by daemons alone."""

    def measure(self, target: str, opened: services.Opened, seconds: float) -> LinkFacts: ...

    def run_ranks(self, ranks: Sequence[TrialOrder], use_rdma: bool | None, timeout: float) -> list[Outcome]: ...

    def sums(self, model: str) -> dict[str, str]:
        """SHA-256 sums of a model's files, by name; takes as long as reading them does."""


class Here:
    """This machine."""

    def __init__(
        self,
        *,
        head: str | None,
        address: str | None,
        is_head: bool,
        is_node: bool,
        ports: NodePorts,
        token: str,
    ) -> None:
        """head: HOST:PORT of the cluster. address: of the node that runs here, None: as the network says. token: "" for
        a machine alone."""
        self.is_head, self.is_node, self._token = is_head, is_node, token
        self._head, self._ports = head, ports
        self._given = address
        self.address = address or _own_address(head)
        self._responder: Responder | None = None
        self._echoes = contextlib.ExitStack()

    def gather(self, request: services.GatherRequest) -> NodeFacts:
        return gather_node(
            head=self._head,
            address=self._given,
            is_head=self.is_head or self._head is None,
            ports=self._ports,
            model=request.model,
            load_torch=request.load_torch,
            ask_gpus=request.ask_gpus,
        )

    def clock(self) -> tuple[float, float] | None:
        return None

    def open(self, tcp: Sequence[int], lifetime: float) -> services.Opened:
        responder = self._responder = Responder(self.address, lifetime=lifetime, tcp=tcp)
        if not self.is_node and self._token:
            self._echoes.enter_context(answering_echoes(self.address, self._ports.daemon, self._token))
        return services.Opened(responder.port, responder.nonce, network.free_port(self.address), responder.open_tcp)

    def close(self) -> None:
        self._echoes.close()
        if self._responder is not None:
            self._responder.close()
            self._responder = None

    def probe(self, targets: Sequence[tuple[str, int, str]]) -> list[str]:
        return services.probe_targets(targets, self.address, self._token)

    def measure(self, target: str, opened: services.Opened, seconds: float) -> LinkFacts:
        return measure_link(self.address, target, opened.port, opened.nonce, seconds=seconds)

    def run_ranks(self, ranks: Sequence[TrialOrder], use_rdma: bool | None, timeout: float) -> list[Outcome]:
        return run_ranks(ranks, use_rdma=use_rdma)

    def sums(self, model: str) -> dict[str, str]:
        root = resolve_model_path(model)
        cache = SumCache(root)
        return dict(hash_tree(root, cache=cache).sums)


class There:
    """Another machine, by its daemon at `endpoint` (HOST:PORT)."""

    is_node = True

    def __init__(self, address: str, endpoint: str, token: str, *, is_head: bool) -> None:
        self.address, self.is_head = address, is_head
        self._endpoint, self._token = endpoint, token
        self._nonce: bytes | None = None

    def gather(self, request: services.GatherRequest) -> NodeFacts:
        return self._ask(services.GATHER, request, _GATHER_SECONDS if request.load_torch else _QUICK_SECONDS)

    def clock(self) -> tuple[float, float] | None:
        """The sample that took least says most: its error is half of what it took."""
        samples = []
        for _ in range(_NUM_CLOCK_SAMPLES):
            start = time.time()
            began = time.monotonic()
            now = self._ask(services.CLOCK, Nothing(), _ASK_SECONDS).now
            trip = time.monotonic() - began
            samples.append((trip, now - (start + trip / 2)))
        trip, offset = min(samples)
        return offset, trip

    def open(self, tcp: Sequence[int], lifetime: float) -> services.Opened:
        opened = self._ask(services.OPEN, services.OpenRequest(lifetime, list(tcp)), _ASK_SECONDS)
        self._nonce = opened.nonce
        return opened

    def close(self) -> None:
        if self._nonce is not None:
            self._ask(services.CLOSE, services.CloseRequest(self._nonce), _ASK_SECONDS)
            self._nonce = None

    def probe(self, targets: Sequence[tuple[str, int, str]]) -> list[str]:
        return self._ask(services.PROBE, services.ProbeRequest(list(targets)), 2 * _ASK_SECONDS).states

    def measure(self, target: str, opened: services.Opened, seconds: float) -> LinkFacts:
        request = services.MeasureRequest(target, opened.port, opened.nonce, seconds)
        return self._ask(services.MEASURE, request, 4 * seconds + 3 * _ASK_SECONDS)

    def run_ranks(self, ranks: Sequence[TrialOrder], use_rdma: bool | None, timeout: float) -> list[Outcome]:
        return self._ask(services.TRY, services.TrialRequest(list(ranks), use_rdma), timeout).outcomes

    def sums(self, model: str) -> dict[str, str]:
        hashing = NodeHashing({self.address: self._endpoint}, self._token, model)
        found = hashing.run(lambda _: None)
        if self.address not in found:
            raise NodeError(f"{model} was not hashed: {hashing.errors[self.address]}", reason="failed")
        return dict(found[self.address].sums)

    def _ask(self, service: Service[RequestType, ResponseType], request: RequestType, timeout: float) -> ResponseType:
        return ask(self._endpoint, self._token, service, request, timeout=timeout)


def _own_address(head: str | None) -> str:
    """ "" where none can be told: the facts say why."""
    try:
        return network.host_address(network.split_endpoint(head)[0] if head else None)
    except ConfigError:
        return ""
