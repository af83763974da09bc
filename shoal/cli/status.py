"""`shoal status`: the nodes of the cluster, what they have, what runs there, and when they were last heard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import msgspec

from shoal import env, network
from shoal.cli.client_options import ClusterOptions, StatusOptions
from shoal.cli.command import Command
from shoal.cluster.daemon.reports import NodeReport, RankProgress
from shoal.cluster.overview import NodeStatus, Overview, look
from shoal.config.sizes import format_size
from shoal.errors import ConfigError, ShoalError
from shoal.executor.ray_head import DEFAULT_PORT
from shoal.network.node_record import read_record

_WATCH_SECONDS = 2.0
_CLEAR = "\033[H\033[2J"
_COLUMNS = ("node", "address", "CPUs", "GPUs", "state", "Ray", "heard", "free CPUs", "free GPUs", "memory used", "load")


def _run(cluster: ClusterOptions, options: StatusOptions) -> int:
    record = read_record()
    head = cluster.address or env.ray_address() or (record.head if record else None)
    if head is None or head == "auto":
        raise ConfigError(
            "no node runs on this machine: `shoal node start` makes it one, and --address HEAD:PORT asks a cluster "
            "that it is no part of"
        )
    head = network.format_endpoint(*network.split_endpoint(head, DEFAULT_PORT))
    token = network.load_token(cluster.token_file)
    own = record if record is not None and _is_same(record.head, head) else None
    if not options.watch:
        print(_show(look(head, token, own), as_json=options.json))
        return 0
    while True:
        try:
            shown = _show(look(head, token, own), as_json=options.json)
        except ShoalError as error:  # it may be back the next time
            shown = f"shoal: error: {error}"
        print(_CLEAR + shown if sys.stdout.isatty() else shown, flush=True)
        time.sleep(_WATCH_SECONDS)


def _is_same(recorded: str, head: str) -> bool:
    host, port = network.split_endpoint(head)
    return recorded in (head, network.format_endpoint(network.resolve_head(host), port))


def _show(overview: Overview, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(msgspec.to_builtins(overview), ensure_ascii=False)
    return "\n".join(describe(overview))


def describe(overview: Overview) -> Iterator[str]:
    """The lines: notes, a table with a line a node, and what is on each."""
    for note in overview.notes:
        yield f"! {note}"
    rows = [_COLUMNS, *(_row(node) for node in overview.nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for node in overview.nodes:
        details = list(_details(node))
        if details:
            yield ""
            yield f"{node.hostname} ({node.address})"
            yield from (f"  {line}" for line in details)


def _row(node: NodeStatus) -> tuple[str, ...]:
    report = node.report
    memory = "–"
    if report is not None:
        used = report.memory_total - report.memory_available
        memory = f"{format_size(used)} of {format_size(report.memory_total)}"
    heard = node.seconds_since_heartbeat
    return (
        node.hostname + (" (head)" if node.is_head else ""),
        node.address,
        *(f"{node.total.get(name, 0):g}" if node.total else "–" for name in ("CPU", "GPU")),
        node.state,
        {True: "up", False: "down", None: "–"}[node.is_ray_alive],
        "never" if heard is None else f"{heard:.1f} s",
        *(f"{node.free.get(name, 0):g}" if node.total else "–" for name in ("CPU", "GPU")),
        memory,
        f"{report.load:g}" if report is not None else "–",
    )


def _details(node: NodeStatus) -> Iterator[str]:
    if node.trouble:
        yield f"trouble: {node.trouble}"
    if node.num_flaps or node.num_restarts:
        yield f"was silent and back {node.num_flaps} times, started anew {node.num_restarts} times"
    peer, report = node.last_known, node.report
    if report is not None:
        yield from _of_report(report)
    elif peer is not None:
        yield "versions: " + ", ".join(f"{name} {version}" for name, version in sorted(peer.versions.items()))
        yield from (f"last known: {line}" for line in _ranks(peer.ranks, peer.num_ranks))


def _of_report(report: NodeReport) -> Iterator[str]:
    for interface in report.interfaces:
        speed = f"{interface.speed / 1000:g} Gb/s" if interface.speed else "speed unknown"
        used = ", used by the cluster" if interface.name == report.interface else ""
        addresses = " ".join(interface.addresses) or "no address"
        yield f"{interface.name}: {addresses}, {speed}, MTU {interface.mtu}{used}"
    yield f"{report.num_cpus} CPUs, {format_size(report.memory_total)} of memory"
    for gpu in report.gpus:
        yield f"GPU {gpu.index}: {gpu.name}, {format_size(gpu.memory_used)} of {format_size(gpu.memory_total)} used"
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    for server in report.servers:
        ports = f", port {', '.join(map(str, server.ports))}" if server.ports else ""
        yield f"{' '.join(filter(None, (server.kind, server.model)))} (pid {server.pid}{ports}, {server.seconds:.0f} s)"
    yield from _ranks(report.ranks, len(report.ranks))


def _ranks(ranks: list[RankProgress], num_ranks: int) -> Iterator[str]:
    for rank in sorted(ranks, key=lambda rank: (rank.rank, rank.pid)):
        yield (
            f"rank {rank.rank} of {rank.world_size} (pid {rank.pid}): step {rank.step}, {rank.phase}, "
            f"{rank.seconds:.1f} s since it moved"
        )
    if num_ranks > len(ranks):
        yield f"and {num_ranks - len(ranks)} more ranks"


COMMAND = Command(
    name="status",
    description="Show the nodes of the cluster: addresses, interfaces, CPUs, memory, GPUs, versions, what is free, "
    "what runs there, and when they were last heard.",
    sections=(ClusterOptions, StatusOptions),
    run=_run,
)
