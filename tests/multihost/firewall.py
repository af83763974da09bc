"""A firewall for a host of namespaces, out of routing rules (iproute2 alone): what comes in to some ports vanishes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from tests.namespaces import INTERFACE, Host

Range = tuple[str, int, int]  # protocol, first, last


def close(host: Host, dropped: Sequence[Range], *, source: Host, but_for: Sequence[Range] = ()) -> None:
    """Drop what `source` sends to these ports of `host`, but for some."""
    # The table of local addresses comes first otherwise, and lets all in.
    _rule(host, "add", "pref", "100", "lookup", "local")
    _rule(host, "del", "pref", "0")
    for preference, rules, action in ((10, but_for, ("lookup", "local")), (20, dropped, ("blackhole",))):
        for protocol, first, last in rules:
            what = ("from", source.address, "iif", INTERFACE, "ipproto", protocol, "dport", f"{first}-{last}")
            _rule(host, "add", "pref", str(preference), *what, *action)


def open_again(host: Host) -> None:
    """Undo all of `close`."""
    _rule(host, "add", "pref", "0", "lookup", "local")
    for preference in ("10", "20", "100"):
        while subprocess.run(_command(host, "del", "pref", preference), capture_output=True).returncode == 0:
            pass


def _rule(host: Host, *arguments: str) -> None:
    subprocess.run(_command(host, *arguments), check=True)


def _command(host: Host, *arguments: str) -> list[str]:
    return ["ip", "-n", host.namespace, "rule", *arguments]
