"""This machine itself: processors, memory, limits, its own name; and what a container lets through of it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
from pathlib import Path

import psutil

from shoal import env
from shoal.cluster.doctor.facts import ContainerFacts, Limit, SystemFacts

_SHM = Path("/dev/shm")
_RESOLVE_SECONDS = 3.0
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
_GPUS = Path("/proc/driver/nvidia/gpus")
_NET = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")


def gather_system(*, resolve_name: bool = True) -> SystemFacts:
    """resolve_name: ask what this machine's own name leads to, which a silent name server makes slow."""
    hostname = socket.gethostname()
    addresses, trouble = resolve(hostname) if resolve_name else ([], "")
    memory = psutil.virtual_memory()
    shm = shutil.disk_usage(_SHM) if _SHM.is_dir() else None
    return SystemFacts(
        hostname=hostname,
        host_addresses=addresses,
        resolve_error=trouble,
        num_cpus=os.cpu_count() or 1,
        num_usable_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        shm_bytes=shm.total if shm else 0,
        shm_free_bytes=shm.free if shm else 0,
        limits={name: _limit(number) for name, number in _LIMITS.items()},
        num_gpus=len(list(_GPUS.glob("*"))),
    )


def resolve(name: str) -> tuple[list[str], str]:
    """Addresses of a name, IPv4 first, and why there are none. A name server that is silent costs three seconds."""
    found: list[str] = []
    errors: list[str] = []

    def ask() -> None:
        try:
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found.extend(sorted({str(entry[4][0]).split("%")[0] for entry in entries}, key=lambda each: ":" in each))
        except (OSError, UnicodeError) as error:
            errors.append(getattr(error, "strerror", None) or str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_RESOLVE_SECONDS)
    if not found and not errors:
        return [], f"no name server answers within {_RESOLVE_SECONDS:g} s"
    return list(found), errors[0] if errors else ""


def gather_container(interface: str) -> ContainerFacts:
    """interface: by which others reach this machine."""
    kind = _container()
    return ContainerFacts(
        kind=kind,
        memory_limit_bytes=_memory_limit(),
        cpu_limit=_cpu_limit(),
        is_bridged=bool(kind) and _is_pair_end(interface),
        host_rdma_devices=sorted(path.name for path in _INFINIBAND.glob("*")) if kind else [],
    )


def rdma_devices() -> list[str]:
    """InfiniBand and RoCE devices with an active port that programs here may open."""
    if not any(Path("/dev/infiniband").glob("uverbs*")):
        return []
    active = {path.parents[2].name for path in _INFINIBAND.glob("*/ports/*/state") if "ACTIVE" in _text(path)}
    return sorted(active)


def _container() -> str:
    if env.in_kubernetes():
        return "kubernetes"
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    words = _text(Path("/proc/1/cgroup"))
    if "docker" in words or "containerd" in words:
        return "docker"
    return "container" if "lxc" in words or "libpod" in words else ""


def _is_pair_end(interface: str) -> bool:
    """A virtual pair's end says another interface's number for its link."""
    own, link = (_text(_NET / interface / name).strip() for name in ("ifindex", "iflink"))
    return bool(own) and own != link


def _memory_limit() -> int:
    """Of this process's control group and all above it, of either version; 0: none."""
    limits = []
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name).strip()
            if text.isdecimal() and int(text) < psutil.virtual_memory().total:
                limits.append(int(text))
    return min(limits, default=0)


def _cpu_limit() -> float:
    limits = []
    for folder in _groups("cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdecimal():
            limits.append(int(words[0]) / int(words[1]))
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    return min(limits, default=0.0)


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups that hold this process, the innermost first; inside of a container, the root."""
    root = Path("/sys/fs/cgroup")
    found = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            found.append(folder)
            folder = folder.parent
        found.append(top)
    return found


def _limit(number: int) -> Limit:
    soft, hard = resource.getrlimit(number)
    return Limit(*(-1 if each == resource.RLIM_INFINITY else each for each in (soft, hard)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
