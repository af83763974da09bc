"""What `shoal node start` leaves behind on a machine: which cluster it joined, and what it started.

Node commands write and remove it; a launcher reads it to find the cluster of this machine. One per network namespace,
since several may share a home directory and each is a machine of its own to the others.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from shoal import env

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process, and when it started (clock ticks since the boot): a reused pid has another start."""

    pid: int
    started: int


class NodeRecord(msgspec.Struct, frozen=True):
    """A node of a cluster on this machine.

    head: HOST:PORT of the cluster. address: of this node. processes: Ray's lasting ones, of the session `session`,
    whose leader has ended. directory: of Ray's sockets, and of logs. boot: identifies the machine's last boot. daemon:
    the node's; None before it is started, and from when the node is being ended. owner: the `shoal serve` that started
    the node and ends it with itself; None where `shoal node` did.
    """

    head: str
    address: str
    is_head: bool
    session: int
    processes: list[ProcessRecord]
    directory: str
    boot: str
    daemon: ProcessRecord | None = None
    owner: ProcessRecord | None = None


def record_path() -> Path:
    """~/.shoal/nodes/, with a name for this machine and network namespace."""
    network = os.stat("/proc/self/ns/net").st_ino
    return Path.home() / ".shoal" / "nodes" / f"{socket.gethostname()}-{network}.json"


def boot_identity() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def read_record() -> NodeRecord | None:
    """The node of this machine; None where there is none, or where it did not survive a reboot."""
    try:
        record = msgspec.json.decode(record_path().read_bytes(), type=NodeRecord)
    except (OSError, msgspec.DecodeError):
        return None
    return record if record.boot == boot_identity() else None


def is_node() -> bool:
    """Whether this machine is known to be a node of a Ray cluster: by RAY_ADDRESS, or by `shoal node start`."""
    return env.ray_address() is not None or read_record() is not None


def write_record(record: NodeRecord) -> None:
    path = record_path()
    for directory in (path.parent.parent, path.parent):  # `parents=True` would not heed the mode for the first
        directory.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(path)


def remove_record() -> None:
    record_path().unlink(missing_ok=True)
