"""Keeps a router's file in step with the servers behind a headless Service: `python -m shoal.cluster.k8s.backends`.

Runs beside the router, which reads its file each second and finds out for itself how the servers are. It asks the DNS
alone, so it needs no rights in the cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from shoal import log, network
from shoal.errors import ConfigError

_PERIOD_SECONDS = 2.0

logger = log.get_logger(__name__)

Resolve = Callable[[str, int], list[str]]


def addresses_of(name: str, port: int) -> list[str]:
    """Every address that the DNS has for a name now, sorted; none where it has no such name."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        logger.debug("%s: %s", name, error)
        return []
    return sorted({str(entry[4][0]) for entry in found})


def router_file(addresses: Iterable[str], port: int) -> str:
    """What `shoal router --config` takes."""
    lines = [f"  - {network.format_url(address, port)}" for address in addresses]
    return "\n".join(["backends:", *lines]) + "\n"


class BackendFile:
    """The file, and what it says. An answer without addresses changes nothing: servers that are gone harm nobody, since
    the router leaves out who does not answer, but a router without any has nothing to wait for."""

    def __init__(self, name: str, port: int, path: Path, resolve: Resolve = addresses_of) -> None:
        self._name, self._port, self._path, self._resolve = name, port, path, resolve
        self._written = ""

    def refresh(self) -> bool:
        """Ask once; whether the file changed."""
        addresses = self._resolve(self._name, self._port)
        text = router_file(addresses, self._port)
        if not addresses or text == self._written:
            return False
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)
        self._written = text
        logger.info("%d servers: %s", len(addresses), ", ".join(addresses))
        return True


def main(arguments: list[str] | None = None) -> int:
    """NAME PORT FILE, until SIGTERM."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 3 or not given[1].isdecimal():
        raise ConfigError("usage: python -m shoal.cluster.k8s.backends NAME PORT FILE")
    log.configure()
    file = BackendFile(given[0], int(given[1]), Path(given[2]))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set():
        file.refresh()
        stop.wait(_PERIOD_SECONDS)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))
