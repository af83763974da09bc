"""`shoal node start` and `shoal node stop`: this machine as a node of a cluster."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from shoal import env, network
from shoal.cli.client_options import CLIENT_SECTIONS, NodeStartOptions
from shoal.cli.command import Command, CommandGroup
from shoal.cluster.node import join_command, start_node, stop_node, watch
from shoal.cluster.ray_node import NodePlan
from shoal.config.options import RouterOptions
from shoal.config.sources import SERVE_SECTIONS, warn_about_environment
from shoal.errors import ConfigError
from shoal.log import get_logger
from shoal.network.node_record import NodeRecord

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = get_logger(__name__)


def _start(options: NodeStartOptions) -> int:
    if options.head == (options.address is not None):
        raise ConfigError(
            "say which: `shoal node start --head` begins a cluster, `shoal node start --address HEAD:PORT` joins one"
        )
    if options.dashboard and not options.head:
        raise ConfigError("--dashboard goes with --head: Ray's dashboard is the head's, and shows all nodes")
    _check_resources(options.resources)
    warn_about_environment((*SERVE_SECTIONS, RouterOptions, *CLIENT_SECTIONS))
    token = _make_token(options.token_file) if options.head else network.load_token(options.token_file)
    plan = NodePlan(
        head=options.address,
        token=token,
        port=options.head_port,
        node_ip=options.node_ip,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        resources=options.resources,
        dashboard=options.dashboard,
    )
    with _signals_interrupt():
        record = start_node(plan)
        try:
            _keep_token(token)
            print("\n".join(_describe(record, token)), flush=True)
            if options.block:
                watch(token, lambda line: print(line, file=sys.stderr, flush=True))
                print("The node has ended.")
        except KeyboardInterrupt:
            stop_node()
            print("The node has ended.")
            if not options.block:
                raise
    return 0


def _stop() -> int:
    record = stop_node()
    print("No node runs on this machine." if record is None else f"The node {record.address} has ended.")
    return 0


def _check_resources(text: str | None) -> None:
    try:
        resources = json.loads(text) if text is not None else {}
        good = isinstance(resources, dict) and all(type(amount) in (int, float) for amount in resources.values())
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f'--resources must be JSON with an amount for each name, such as {{"disk": 1}}; got {text!r}')


def _make_token(token_file: str | None) -> str:
    """The head's: the one that is there, else a new one."""
    if token_file is not None:
        return network.create_token(Path(token_file).expanduser())
    return network.load_token() if env.cluster_token() else network.create_token()


def _keep_token(token: str) -> None:
    """Let later commands on this machine find the token by themselves, unless another one lies there."""
    path = network.default_token_path()
    if network.create_token(token=token) != token:
        logger.warning(
            "%s holds another token: later commands here need the same --token-file or SHOAL_CLUSTER_TOKEN", path
        )


def _describe(record: NodeRecord, token: str) -> list[str]:
    if not record.is_head:
        return [f"This machine ({record.address}) is a node of the cluster {record.head}.", "", *_ENDING]
    if network.is_loopback(record.address):
        others = [interface.address for interface in network.interfaces() if not interface.is_loopback]
        why = (
            f"Other machines cannot reach that address; to let them join, start it with --node-ip and one of "
            f"{', '.join(others)}."
            if others
            else "This machine has no other address, so no other can join."
        )
        return [
            f"The cluster is up at {record.head}. {why}",
            "",
            *_ENDING,
        ]
    return [
        f"The cluster is up; this machine ({record.address}) is its head. On each of the others:",
        "",
        f"  {join_command(record, token)}",
        "",
        f"or copy {network.default_token_path()} there (mode 0600) and leave the variable out. Then, on any of them:",
        "",
        "  shoal serve MODEL --distributed-executor-backend ray --tensor-parallel-size N --pipeline-parallel-size M",
        "",
        *_ENDING,
    ]


_ENDING = ["`shoal status` shows the nodes, `shoal node stop` ends this one."]


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, once: what they begin is not to be interrupted by the next."""

    def interrupt(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMAND = CommandGroup(
    name="node",
    description="Make this machine a node of a cluster, for models that need more than one.",
    commands=(
        Command(
            name="node start",
            description="Start a node and return once it is up. With --head it begins a cluster and prints what to "
            "type on the other machines; with --address it joins one.",
            sections=(NodeStartOptions,),
            run=_start,
        ),
        Command(
            name="node stop",
            description="End the node that was started on this machine, and all it runs.",
            sections=(),
            run=_stop,
        ),
    ),
)
