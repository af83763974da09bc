"""A replica's machine is cut off the network in the middle of its streams, or loses its power. Needs root."""

from __future__ import annotations

import asyncio
import random
import sys
import time

import aiohttp
import pytest

from tests.chaos.cases import make_cases
from tests.chaos.client import Door
from tests.chaos.harness import undisturbed
from tests.chaos.load import Load
from tests.namespaces import Host, Network, connected_hosts, needs_namespaces

pytestmark = needs_namespaces

PORT = 8000
SECRET = "a-secret-of-the-routers"
CASES = make_cases("fake", 32, seed=11)


@pytest.fixture
def network():
    """The router and its clients on node1, a fake server on each other node."""
    with connected_hosts(3) as network:
        front, *others = network.hosts
        for host in others:
            flags = ["--host", host.address, "--port", str(PORT), "--internal-token", SECRET]
            start(host, "tests.router.fakes.native", *flags)
        backends = [argument for host in others for argument in ("--backend", f"http://{host.address}:{PORT}")]
        flags = [
            "--stall-timeout",
            "2",
            "--probe-interval",
            "0.2",
            "--log-level",
            "warning",
            "--internal-token",
            SECRET,
        ]
        start(front, "shoal.cli.main", "router", "--port", str(PORT), *backends, *flags)
        yield network


def start(host: Host, module: str, *arguments: str) -> None:
    host.popen(sys.executable, "-m", module, *arguments, stdin=-3)


async def until_up(http: aiohttp.ClientSession, url: str) -> None:
    deadline = time.monotonic() + 40
    while True:
        try:
            async with http.get(url, timeout=aiohttp.ClientTimeout(2)) as response:
                if response.status == 200:
                    return
        except (TimeoutError, aiohttp.ClientError):
            pass
        assert time.monotonic() < deadline, f"{url} does not come up"
        await asyncio.sleep(0.05)


async def serve_through(network: Network, fault) -> None:
    """Requests run on both servers, the fault strikes, and everybody gets the right answer."""
    front, *others = network.hosts
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        for host in others:
            await until_up(http, f"http://{host.address}:{PORT}/health")
        wanted = await undisturbed(http, f"http://{others[0].address}:{PORT}", CASES, 16)
        url = f"http://127.0.0.1:{PORT}"
        await until_up(http, f"{url}/health")
        load = Load([Door(url)], CASES, wanted, random.Random(3))
        load.start(http, 32)
        await asyncio.sleep(1.0)
        before = {outcome.marker for outcome in load.running.values()}
        assert len(before) == 32
        fault(others[0])
        while before & load.running.keys():
            await asyncio.sleep(0.01)
        num_checked = load.num_checked
        while load.num_checked < num_checked + 32:
            await asyncio.sleep(0.01)
        await load.stop()
    assert not load.failures, "\n".join(load.failures)


@pytest.mark.parametrize("silent", [True, False], ids=["packets vanish", "cable pulled"])
def test_a_node_is_cut_off(network, silent):
    with network.hosts[0].entered():
        asyncio.run(serve_through(network, lambda host: network.cut(host, silent=silent)))


def test_a_node_loses_its_power(network):
    def power_off(host: Host) -> None:
        network.cut(host)
        host.kill_all()

    with network.hosts[0].entered():
        asyncio.run(serve_through(network, power_off))
