"""What `shoal node start` says of the node that it started."""

from __future__ import annotations

import pytest

from shoal import network
from shoal.cli import node
from shoal.network.node_record import NodeRecord

_LOOPBACK = network.Interface("lo", "127.0.0.1")


def said(monkeypatch: pytest.MonkeyPatch, *interfaces: network.Interface) -> str:
    monkeypatch.setattr("shoal.network.interfaces", lambda: [_LOOPBACK, *interfaces])
    record = NodeRecord(
        head="127.0.0.1:6379", address="127.0.0.1", is_head=True, session=1, processes=[], directory="", boot=""
    )
    return node._describe(record, "token")[0]


def test_a_head_at_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "This machine has no other address" in said(monkeypatch)
    text = said(monkeypatch, network.Interface("eth0", "10.0.0.2"))
    assert "no other address" not in text and "--node-ip and one of 10.0.0.2" in text
