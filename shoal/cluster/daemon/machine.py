"""What this machine has: interfaces, memory, GPUs, versions. For `NodeReport`; needs neither torch nor Ray, and asks
NVIDIA's library (nvidia-ml-py) or nvidia-smi where there is one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import platform
import shutil
import socket
import subprocess
from typing import Any

import psutil

from shoal.cluster.daemon.reports import GpuReport, InterfaceReport
from shoal.log import get_logger
from shoal.version import __version__

_PACKAGES = ("ray", "torch")
_SMI_SECONDS = 10.0
_MEBIBYTE = 1 << 20

logger = get_logger(__name__)


@functools.cache
def versions() -> dict[str, str]:
    """Of what must be the same on all nodes, as far as it is installed; nothing is loaded for it."""
    found = {"shoal": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def interfaces() -> list[InterfaceReport]:
    """Those that are up, the loopback left out."""
    addresses = psutil.net_if_addrs()
    return [
        InterfaceReport(
            name,
            [
                entry.address.split("%")[0]
                for entry in addresses.get(name, [])
                if entry.family in (socket.AF_INET, socket.AF_INET6)
            ],
            stats.speed,
            stats.mtu,
        )
        for name, stats in sorted(psutil.net_if_stats().items())
        if stats.isup and name != "lo"
    ]


def gpus() -> list[GpuReport]:
    """All that the driver shows; none where there is no driver, or it does not answer."""
    try:
        return _gpus_of_library(importlib.import_module("pynvml"))
    except ImportError:
        return _gpus_of_program()


def _gpus_of_library(library: Any) -> list[GpuReport]:
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        logger.debug("no GPUs: %s", error)
        return []
    try:
        found = []
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            name, memory = library.nvmlDeviceGetName(handle), library.nvmlDeviceGetMemoryInfo(handle)
            name = name.decode() if isinstance(name, bytes) else name
            found.append(GpuReport(index, name, int(memory.total), int(memory.used)))
        return found
    except library.NVMLError as error:
        logger.warning("the NVIDIA driver does not answer: %s", error)
        return []
    finally:
        library.nvmlShutdown()


def _gpus_of_program() -> list[GpuReport]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("nvidia-smi does not answer: %s", error)
        return []
    if done.returncode != 0:
        logger.debug("no GPUs: %s", (done.stderr or done.stdout).strip())
        return []
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[GpuReport]:
    """Lines such as "0, NVIDIA H200, 143771, 2": mebibytes. What a card does not tell ("[N/A]") counts as 0."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= 4 and cells[0].isdecimal():
            total, used = (int(cell) * _MEBIBYTE if cell.isdecimal() else 0 for cell in cells[-2:])
            found.append(GpuReport(int(cells[0]), ", ".join(cells[1:-2]), total, used))
    return found
