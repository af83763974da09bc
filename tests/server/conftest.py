"""A server for the tests that leave nothing behind on it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.wait_until(server.idle)
