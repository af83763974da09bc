"""What was seen of machines and of the ways between them. Gathering fills these, checks read them, sockets carry them.

Nothing here decides: a check makes findings of facts, so a test makes facts by hand. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import msgspec


class TorchFacts(msgspec.Struct, frozen=True):
    """What torch says of itself. state: "ok", "missing" or "broken" (reason). cuda: of the build, "" for a CPU build.

    nccl: "" where the build has none. cuda_reason: why CUDA does not work, where the build has it.
    """

    state: str = "missing"
    reason: str = ""
    version: str = ""
    cuda: str = ""
    nccl: str = ""
    cuda_usable: bool = False
    cuda_reason: str = ""
    num_devices: int = 0
    has_gloo: bool = False


class VersionFacts(msgspec.Struct, frozen=True):
    """packages: what is installed, by name; None where it is not. driver_cuda: the newest CUDA that the driver runs."""

    shoal: str = ""
    python: str = ""
    packages: dict[str, str | None] = {}
    torch: TorchFacts = TorchFacts()
    driver: str = ""
    driver_cuda: str = ""


class GpuProcess(msgspec.Struct, frozen=True):
    """name: "" where the process is outside of this container. is_shoal: a rank of a model that Shoal runs here."""

    pid: int
    name: str
    used_bytes: int
    is_shoal: bool = False


class Gpu(msgspec.Struct, frozen=True):
    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    processes: list[GpuProcess] = []


class GpuLink(msgspec.Struct, frozen=True):
    """kind: as nvidia-smi names it: NV18, PIX, PXB, PHB, NODE, SYS."""

    first: int
    second: int
    kind: str


class GpuFacts(msgspec.Struct, frozen=True):
    """state: "ok", "none" (no GPU and no driver) or "broken" (reason). visible: CUDA_VISIBLE_DEVICES, None: not set."""

    state: str = "none"
    reason: str = ""
    gpus: list[Gpu] = []
    links: list[GpuLink] = []
    visible: list[str] | None = None


class Limit(msgspec.Struct, frozen=True):
    """A resource limit of processes started from here; -1 is unlimited."""

    soft: int
    hard: int


class SystemFacts(msgspec.Struct, frozen=True):
    """host_addresses: what the machine's own name resolves to. shm_*: of /dev/shm, 0 where there
    is none. num_gpus: that the driver lists, whether or not they can be used."""

    hostname: str = ""
    host_addresses: list[str] = []
    resolve_error: str = ""
    num_cpus: int = 0
    num_usable_cpus: int = 0
    memory_bytes: int = 0
    available_bytes: int = 0
    shm_bytes: int = 0
    shm_free_bytes: int = 0
    limits: dict[str, Limit] = {}
    num_gpus: int = 0


class InterfaceFacts(msgspec.Struct, frozen=True):
    """speed_mbits: 0 where the system does not know. kind: "physical", "virtual" or "loopback"."""

    name: str
    addresses: list[str]
    mtu: int
    speed_mbits: int
    kind: str


class WayFacts(msgspec.Struct, frozen=True):
    """Whether the head answers a connection that begins at one of this machine's addresses.

    state: "open", "refused", "dropped" or "unreachable": the first two mean that packets go there and back.
    """

    address: str
    interface: str
    state: str


class NetworkFacts(msgspec.Struct, frozen=True):
    """address: what others are told, on `interface`, and why. error: why there is none. named: the variable that chose
    it ("GLOO_SOCKET_IFNAME=eth0"). ways: to `head`, one for each address. rdma_devices: InfiniBand or RoCE. variables:
    that decide about networks.
    """

    interfaces: list[InterfaceFacts] = []
    address: str = ""
    interface: str = ""
    why: str = ""
    named: str = ""
    error: str = ""
    head: str = ""
    ways: list[WayFacts] = []
    rdma_devices: list[str] = []
    variables: dict[str, str] = {}


class PortUse(msgspec.Struct, frozen=True):
    """A port that is needed here. state: "free", "ours" (this machine's own node holds it) or "taken" (by `holder`)."""

    name: str
    port: int
    protocol: str
    state: str
    holder: str = ""


class ContainerFacts(msgspec.Struct, frozen=True):
    """kind: "", "docker", "podman", "kubernetes" or "container". Limits: of the cgroup, 0 where there is none.

    is_bridged: the interface that others reach this machine at is one end of a pair whose other end the host holds.
    """

    kind: str = ""
    memory_limit_bytes: int = 0
    cpu_limit: float = 0.0
    is_bridged: bool = False
    host_rdma_devices: list[str] = []


class ModelFile(msgspec.Struct, frozen=True):
    """expected_bytes: what its header says, -1 where it says nothing. problem: why it cannot be used. sha256: ""
    while it is not taken."""

    name: str
    size: int
    expected_bytes: int = -1
    problem: str = ""
    sha256: str = ""


class ModelFacts(msgspec.Struct, frozen=True):
    """A model on one machine. name: as it was given. path: "" where there is none (error).

    files: all of it; weights: names of those that a loader reads. missing: named by the index, and not there.
    strays: tensors that the index puts into a file which does not have them.
    """

    name: str
    path: str = ""
    error: str = ""
    files: list[ModelFile] = []
    missing: list[str] = []
    strays: list[str] = []
    weights: list[str] = []
    weight_bytes: int = 0


class NodeFacts(msgspec.Struct, frozen=True):
    """All of one machine."""

    hostname: str
    address: str
    versions: VersionFacts = VersionFacts()
    gpus: GpuFacts = GpuFacts()
    system: SystemFacts = SystemFacts()
    network: NetworkFacts = NetworkFacts()
    ports: list[PortUse] = []
    container: ContainerFacts = ContainerFacts()
    model: ModelFacts | None = None

    @property
    def name(self) -> str:
        """ "node1 (10.0.0.1)": for messages."""
        return f"{self.hostname} ({self.address})" if self.address else self.hostname

    @property
    def usable_memory_bytes(self) -> int:
        """What processes may have of the memory: of a container, its limit."""
        limit = self.container.memory_limit_bytes
        return min(limit, self.system.memory_bytes) if limit else self.system.memory_bytes


class PortReach(msgspec.Struct, frozen=True):
    """Whether a port of `target` answers `source` (names of nodes). state: "open", "refused", "dropped", "unreachable".

    is_held: something listens there as far as is known; then "refused" is a fault too.
    """

    source: str
    target: str
    name: str
    port: int
    protocol: str
    state: str
    is_held: bool = True


class ClockFacts(msgspec.Struct, frozen=True):
    """offset_seconds: that node's clock less this one's, give or take half of round_trip_seconds."""

    node: str
    offset_seconds: float
    round_trip_seconds: float


# In a link's error: large packets do not pass, or too few of any size.
STALLS, LOST = "stalls", "lost on the way"


class LinkFacts(msgspec.Struct, frozen=True):
    """What was measured from `source` to `target` (addresses).

    num_sent, num_arrived, num_answered: datagrams of a train, as counted at the sender, the target and, of their
    answers, the sender again. mtu: of the sender's interface. largest_packet: bytes of the largest IP packet that
    arrived, of those that the interface sends whole. bandwidth 0: not measured (quick), or nothing came through (error,
    or packets are lost).
    """

    source: str
    target: str
    error: str = ""
    round_trip_seconds: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    num_sent: int = 0
    num_arrived: int = 0
    num_answered: int = 0
    mtu: int = 0
    largest_packet: int = 0


class CollectiveFacts(msgspec.Struct, frozen=True):
    """An all-reduce that was tried. backend: "gloo" or "nccl". state: "ok", "failed" or "skipped" (reason).

    nodes: names of those who took part. seconds: for one all-reduce of num_bytes. transport: what NCCL said it took.
    """

    backend: str
    state: str
    nodes: list[str] = []
    reason: str = ""
    num_ranks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""


class LayoutFacts(msgspec.Struct, frozen=True):
    """What a plan says. state: "fits" (text: which layout), "none" (why, and what would do) or "unknown" (why not)."""

    state: str
    text: str


class ClusterFacts(msgspec.Struct, frozen=True):
    """Several machines, and what is between them. silent: nodes that gave no facts, and why, by name."""

    nodes: list[NodeFacts]
    silent: dict[str, str] = {}
    clocks: list[ClockFacts] = []
    reach: list[PortReach] = []
    links: list[LinkFacts] = []
    collectives: list[CollectiveFacts] = []
    layout: LayoutFacts | None = None
