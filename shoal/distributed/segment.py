"""Memory that processes of one host share: an anonymous file, which others open through its owner's /proc.

It has no name in any directory, so it is gone with the last process that maps it, even after kill -9.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from pathlib import Path


class Segment:
    """`memory` is mapped for reading and writing. `address` works for this user's processes until `release`."""

    def __init__(self, descriptor: int, address: str) -> None:
        self._descriptor: int | None = descriptor
        self.address = address
        self.memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, num_bytes: int, name: str) -> Segment:
        """A segment of zeros; pages that are never touched cost nothing. `name` shows in /proc only."""
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        return cls(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}")

    @classmethod
    def open(cls, address: str) -> Segment:
        """The segment that another process created. OSError if that process is gone, or not visible from here."""
        segment = cls(os.open(address, os.O_RDWR | os.O_CLOEXEC), address)
        segment.release()
        return segment

    def release(self) -> None:
        """Nobody else needs to open it here any more: close the file, keep the memory."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        # The constructor may have failed before there was a descriptor.
        if getattr(self, "_descriptor", None) is not None:
            with contextlib.suppress(OSError):
                self.release()


def host_identity() -> str:
    """Equal for processes that can share memory through `Segment`: one kernel, one network, one view of processes.

    Two network namespaces of one machine count as two hosts: they stand for machines that reach each other by network.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [boot.read_text().strip() if boot.exists() else socket.gethostname(), str(os.getuid())]
    for namespace in ("net", "pid", "user"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{namespace}"))
    return " ".join(parts)
