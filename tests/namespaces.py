"""Hosts on one machine: network namespaces joined by a switch, for tests of several machines. Needs root and iproute2.

Each host has an interface eth0 with an address of a subnet of its own, and a host name that resolves to the loopback,
as most distributions write it into /etc/hosts. Nothing leads out. What runs in a host is killed at its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

INTERFACE = "eth0"
ROOT = Path(__file__).parent.parent
_CLONE_NEWNET = 0x40000000
_DEADLINE_SECONDS = 20.0
_JUMBO = 9000
# `ip netns exec` gives the process a mount namespace of its own, so the file below is seen by that process only.
_ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def why_not() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root to include this one"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (Debian: apt-get install iproute2 util-linux)"
    return None


# Skips a test, or with `pytestmark = needs_namespaces` a file, where there can be no namespaces, and says why.
needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


class Host:
    """One namespace. `home` is its users' home directory, empty at first: hosts share no ~/.shoal."""

    def __init__(self, namespace: str, hostname: str, address: str, loopback: str, home: Path) -> None:
        self.namespace = namespace
        self.hostname = hostname
        self.address = address
        self.home = home
        self._hosts_file = home.with_suffix(".hosts")
        home.mkdir()
        self._hosts_file.write_text(f"127.0.0.1 localhost\n{loopback} {hostname}\n")
        self._processes: list[subprocess.Popen[Any]] = []

    def command(self, *command: str) -> list[str]:
        """What runs `command` in this host, from outside; its pid becomes the command's own."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _ENTER, "sh"]
        return [*enter, str(self._hosts_file), self.hostname, *command]

    def popen(self, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start `command` in a session of its own, from the root of the repository. env: added to this process's."""
        options = {"cwd": ROOT, "start_new_session": True, **options}
        environment = {**os.environ, "HOME": str(self.home), **(env or {})}
        process = subprocess.Popen(self.command(*command), env=environment, **options)
        self._processes.append(process)
        return process

    def run(self, *command: str, timeout: float = 60.0, **options: Any) -> str:
        """Run `command` to its end. Returns standard output; a failure raises with both outputs in its text."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process = self.popen(*command, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # children hold the pipes too
            output, errors = process.communicate()
            raise AssertionError(f"{command} took more than {timeout} s:\n{output}\n{errors}") from None
        if process.returncode:
            raise AssertionError(f"{command} ended with {process.returncode}:\n{output}\n{errors}")
        return str(output or "")

    def python(self, code: str, *arguments: str, **options: Any) -> str:
        """Run a piece of Python to its end; returns what it printed."""
        return self.run(sys.executable, "-c", code, *arguments, **options)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread opens inside of the block are the host's; so a client can be the test itself."""
        with open("/proc/thread-self/ns/net") as outside, open(f"/run/netns/{self.namespace}") as inside:
            _set_network_namespace(inside.fileno())
            try:
                yield
            finally:
                _set_network_namespace(outside.fileno())

    def bytes_sent(self) -> int:
        """Bytes that left the interface so far, Ethernet headers counted."""
        return self._statistics("tx")

    def bytes_received(self) -> int:
        return self._statistics("rx")

    def _statistics(self, direction: str) -> int:
        link = json.loads(_ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", INTERFACE))[0]
        return int(link["stats64"][direction]["bytes"])

    def pids(self) -> list[int]:
        """Everything that runs in this host, whoever started it."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def wait_until_empty(self, timeout: float) -> None:
        """Fail unless within `timeout` seconds nothing runs in this host any more; the dead are reaped meanwhile."""
        deadline = time.monotonic() + timeout
        while True:
            for process in self._processes:
                process.poll()
            left = self.pids()
            if not left:
                return
            if time.monotonic() >= deadline:
                raise AssertionError(f"{self.hostname} still runs after {timeout} s: {', '.join(map(_describe, left))}")
            time.sleep(0.05)

    def kill_all(self) -> None:
        """End all that runs here at once, as when the machine loses its power."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._processes:
                process.poll()
            assert time.monotonic() < deadline, f"{self.hostname}: cannot end {', '.join(map(_describe, pids))}"
            time.sleep(0.02)
        for process in self._processes:
            process.wait(_DEADLINE_SECONDS)


class Network:
    """Hosts on one switch, a bridge in a namespace of its own. Made and removed by `connected_hosts`."""

    def __init__(self, num_hosts: int, directory: Path) -> None:
        self.name = f"shoal-{secrets.token_hex(4)}"
        self._switch = f"{self.name}-switch"
        self._cables: list[subprocess.Popen[str]] = []
        subnet = f"10.{random.SystemRandom().randrange(256)}.{random.SystemRandom().randrange(256)}"
        # 127.0.0.1 is what container images and 127.0.1.1 what Debian writes for the machine's own name.
        self.hosts = [
            Host(
                f"{self.name}-{number}",
                f"node{number}",
                f"{subnet}.{number}",
                "127.0.1.1" if number % 2 == 0 else "127.0.0.1",
                directory / f"node{number}",
            )
            for number in range(1, num_hosts + 1)
        ]

    def make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
            peer = ("peer", "name", INTERFACE, "netns", host.namespace)
            _ip("-n", self._switch, "link", "add", self._port(host), "type", "veth", *peer)
            _ip("-n", self._switch, "link", "set", self._port(host), "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")

    def remove(self) -> None:
        for cable in self._cables:
            cable.kill()
            cable.wait()
        existing = _ip("netns", "list")
        for host in self.hosts:
            if host.namespace in existing:
                host.kill_all()
                _ip("netns", "delete", host.namespace)
        if self._switch in existing:
            _ip("netns", "delete", self._switch)

    def cut(self, host: Host, *, silent: bool = True) -> None:
        """Take a host off the network. silent: its interface stays up, and packets vanish, as behind a dead switch;
        else the link goes down, as with the cable pulled."""
        change = ("nomaster",) if silent else ("down",)
        _ip("-n", self._switch, "link", "set", self._port(host), *change)

    def heal(self, host: Host) -> None:
        """Undo `cut`."""
        _ip("-n", self._switch, "link", "set", self._port(host), "master", "bridge", "up")

    def impair(self, host: Host, *, seconds: float = 0.0, loss: float = 0.0, largest: int = 0) -> None:
        """Put a bad cable (see bad_link) between a host and the switch, once: each frame is held for `seconds`, and the
        share `loss` of them lost, in both directions; packets of more than `largest` bytes are lost (0: none).

        Skips the test where there are no TAP devices.
        """
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            pytest.skip("bad links need /dev/net/tun")
        near, far, bridge = (f"{name}-{host.hostname}" for name in ("near", "far", "bridge"))
        command = [sys.executable, "-m", "tests.bad_link", near, far, str(seconds), str(loss), str(largest)]
        cable = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self._cables.append(cable)
        assert cable.stdout is not None and cable.stdout.readline() == "up\n"
        _ip("-n", self._switch, "link", "add", bridge, "type", "bridge")
        for interface, master in ((self._port(host), bridge), (near, bridge), (far, "bridge")):
            _ip("-n", self._switch, "link", "set", interface, "mtu", str(_JUMBO), "master", master, "up")
        _ip("-n", self._switch, "link", "set", bridge, "up")

    def set_mtu(self, host: Host, mtu: int, *, at_switch: int | None = None) -> None:
        """Of the host's interface, and of the switch's port that it is connected to (default: the same)."""
        _ip("-n", host.namespace, "link", "set", INTERFACE, "mtu", str(mtu))
        _ip("-n", self._switch, "link", "set", self._port(host), "mtu", str(at_switch or mtu))

    def add_dead_interface(self, host: Host, name: str, address: str) -> None:
        """Another interface that is up, with an address, and leads nowhere: the other end answers nobody."""
        _ip("-n", host.namespace, "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
        for interface in (name, f"{name}-end"):
            _ip("-n", host.namespace, "link", "set", interface, "up")
        _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", name)

    @staticmethod
    def _port(host: Host) -> str:
        return f"port-{host.hostname}"


@contextlib.contextmanager
def connected_hosts(num_hosts: int) -> Iterator[Network]:
    """A network of so many hosts (node1, node2 … with the addresses 10.x.y.1, 10.x.y.2 …), removed at the end.

    Skips the test where there can be none: not root, no iproute2, or a container that may not make namespaces.
    """
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="shoal-hosts-") as directory:
        network = Network(num_hosts, Path(directory))
        try:
            network.make()
        except subprocess.CalledProcessError as error:
            network.remove()
            if "ermitted" in error.stderr:
                pytest.skip(f"no network namespaces here, though this is root: {error.stderr.strip()}")
            raise AssertionError(f"{' '.join(error.cmd)}: {error.stderr}") from error
        try:
            yield network
        finally:
            network.remove()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _set_network_namespace(descriptor: int) -> None:
    # os.setns comes with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = "(ended)"
    return f"{pid} {command}"
