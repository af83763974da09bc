"""`shoal status`: the nodes of the cluster."""

from __future__ import annotations

from shoal import env, network
from shoal.cli.client_options import ClusterOptions
from shoal.cli.command import Command
from shoal.errors import ConfigError
from shoal.executor import ray_head
from shoal.network.node_record import read_record


def _run(options: ClusterOptions) -> int:
    ray_head.check_installed()
    record = read_record()
    head = options.address or env.ray_address() or (record.head if record else None)
    if head is None or head == "auto":
        raise ConfigError(
            "no node runs on this machine: `shoal node start` makes it one, and --address HEAD:PORT asks a cluster "
            "that it is no part of"
        )
    answer = ray_head.ask_head(head, network.load_token(options.token_file))
    rows: list[tuple[str, ...]] = [("node", "address", "CPUs", "GPUs", "state")]
    # A machine that was started anew stands in the head's table several times; as what it is now, it does here.
    latest = {node.address: node for node in sorted(answer.nodes, key=lambda node: node.alive)}
    for node in sorted(latest.values(), key=lambda node: (not node.is_head, node.address)):
        state = "alive" if node.alive else "dead"
        amounts = (f"{node.resources.get(name, 0):g}" for name in ("CPU", "GPU"))
        rows.append((node.hostname + (" (head)" if node.is_head else ""), node.address, *amounts, state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


COMMAND = Command(
    name="status",
    description="Show the nodes of the cluster: address, CPUs, GPUs, and whether they are alive.",
    sections=(ClusterOptions,),
    run=_run,
)
