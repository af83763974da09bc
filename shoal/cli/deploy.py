"""`shoal deploy CONFIG.yaml`, `shoal deploy status` and `shoal deploy stop`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import msgspec

from shoal.cli.client_options import CLIENT_SECTIONS, ClusterOptions, DeployOptions, DeployStatusOptions
from shoal.cli.command import Command, CommandGroup
from shoal.cluster.deploy.client import Deployer, Target, connect, end_cluster
from shoal.cluster.deploy.records import DeployStatus, ModelStatus
from shoal.config.deploy_file import read_deploy_file
from shoal.config.options import RouterOptions
from shoal.config.sources import SERVE_SECTIONS, warn_about_environment
from shoal.errors import ConfigError, StartupError

_POLL_SECONDS = 0.5
_NOTHING = "Nothing is deployed here."


@dataclasses.dataclass(frozen=True)
class _DeployGroup(CommandGroup):
    """A group in which what is no command's name is the file of the first one."""

    def select(self, arguments: Sequence[str]) -> tuple[Command | CommandGroup, list[str]]:
        first = arguments[0] if arguments else ""
        if first in ("-h", "--help"):
            return self, [first]
        if first in [command.name.removeprefix(f"{self.name} ") for command in self.commands[1:]]:
            return super().select(arguments)
        return self.commands[0], list(arguments)


def _deploy(options: DeployOptions, cluster: ClusterOptions) -> int:
    if options.deploy_file is None:
        raise ConfigError("which deployment? shoal deploy CONFIG.yaml; `shoal deploy status` shows the one that runs")
    plan = read_deploy_file(options.deploy_file)
    warn_about_environment((*SERVE_SECTIONS, RouterOptions, *CLIENT_SECTIONS))
    with connect(Target(cluster.address, cluster.token_file), begin=True) as deployer:
        assert deployer is not None
        if deployer.began:
            print(f"No cluster runs here; one of this machine alone was begun ({deployer.head}).", flush=True)
        is_new = deployer.status() is None
        deployer.deploy(plan)
        if not options.wait:
            print("The controller has the deployment; `shoal deploy status` shows how far it is.")
            return 0
        status = _wait(deployer)
        failure = _failure(status)
        if failure and is_new:
            _stop_all(deployer)
    if failure and is_new:
        if status.owns_node:
            end_cluster(deployer)
        raise StartupError(f"{failure}. Nothing of the deployment is left")
    if failure:
        raise StartupError(f"{failure}. What ran before stays; `shoal deploy status` shows it")
    print("\n".join(_describe(status)))
    print("`shoal deploy status` shows it again, `shoal deploy stop` ends it.")
    return 0


def _status(options: DeployStatusOptions, cluster: ClusterOptions) -> int:
    with connect(Target(cluster.address, cluster.token_file)) as deployer:
        status = deployer.status() if deployer is not None else None
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(status), indent=2).decode())
    else:
        print(_NOTHING if status is None else "\n".join(_describe(status)))
    return 0 if status is not None else 1


def _stop(cluster: ClusterOptions) -> int:
    with connect(Target(cluster.address, cluster.token_file)) as deployer:
        status = _stop_all(deployer) if deployer is not None else None
    if deployer is None or status is None:
        print(_NOTHING)
        return 0
    ended = end_cluster(deployer) if status.owns_node else False
    print("The deployment has ended" + (", and the cluster that was begun for it." if ended else "."))
    return 0


def _stop_all(deployer: Deployer) -> DeployStatus | None:
    """Returns when nothing is left but the cluster, what it last was; None where there was nothing."""
    deployer.begin_stop()
    said = ""
    while (status := deployer.status()) is not None and not status.stopped:
        said = _tell(said, _progress(status))
        time.sleep(_POLL_SECONDS)
    deployer.remove_controller()
    return status


def _wait(deployer: Deployer) -> DeployStatus:
    """Until nothing is under way any more, or something has failed."""
    said = ""
    while True:
        status = deployer.status()
        if status is None:
            raise StartupError("the deployment was stopped by somebody else")
        if _failure(status) or all(model.settled for model in status.models):
            return status
        said = _tell(said, _progress(status))
        time.sleep(_POLL_SECONDS)


def _failure(status: DeployStatus) -> str:
    failures = [f"{model.name} could not be deployed: {model.failure}" for model in status.models if model.failure]
    return "; ".join(filter(None, [*failures, status.failure]))


def _tell(said: str, line: str) -> str:
    if line != said:
        print(line, flush=True)
    return line


def _progress(status: DeployStatus) -> str:
    """One line: what is waited for."""
    parts = [f"router: {status.router_state}"]
    for model in status.models:
        states = [
            f"{replica.name} {replica.state}" + (f" ({replica.why})" if replica.why else "")
            for replica in model.replicas
            if not replica.in_router or replica.state != "ready"
        ]
        num_in = sum(replica.in_router for replica in model.replicas)
        parts.append(f"{model.name}: {num_in} of {model.wanted} serve" + (f"; {', '.join(states)}" if states else ""))
    return " | ".join(parts)


def _describe(status: DeployStatus) -> list[str]:
    lines = [f"router  {status.router_url or '-'}/v1  {status.router_state}" + (", is being stopped" * status.stopping)]
    if status.failure:
        lines.append(f"  {status.failure}")
    for model in status.models:
        lines += ["", *_describe_model(model)]
    return lines


def _describe_model(model: ModelStatus) -> list[str]:
    how = "as it shall be" if model.settled else "under way"
    lines = [f"{model.name}  {model.wanted} wanted ({model.min} to {model.max}), {how}; {model.why or 'no load yet'}"]
    if model.failure:
        lines.append(f"  the last change was not made: {model.failure}")
    rows = [("replica", "revision", "state", "node", "url", "pid", "up", "restarts", "wait", "run", "KV")]
    for replica in model.replicas:
        state = replica.state + (f" ({replica.why})" if replica.why else "")
        rows.append(
            (
                replica.name,
                replica.revision,
                state,
                replica.node or "-",
                replica.url or "-",
                str(replica.pid or "-"),
                f"{replica.uptime:.0f} s" if replica.uptime is not None else "-",
                str(replica.restarts),
                str(replica.waiting),
                str(replica.running),
                f"{replica.kv_usage:.0%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return lines + [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


COMMAND = _DeployGroup(
    name="deploy",
    description="Replicas of models on a Ray cluster, behind a router: as many as the load needs, replaced one by one "
    "when the file changes.",
    commands=(
        Command(
            name="deploy",
            description="Have on the cluster what the file says: new models come up, changed ones are replaced one "
            "replica at a time, those that the file does not name go. Where there is no cluster, one of this machine "
            "is begun.",
            sections=(DeployOptions, ClusterOptions),
            positional="deploy_file",
            run=_deploy,
        ),
        Command(
            name="deploy status",
            description="Show the models, their replicas, and why there are as many.",
            sections=(DeployStatusOptions, ClusterOptions),
            run=_status,
        ),
        Command(
            name="deploy stop",
            description="End the deployment: running requests finish, then all of it goes.",
            sections=(ClusterOptions,),
            run=_stop,
        ),
    ),
)
