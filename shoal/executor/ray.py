"""RayLauncher: ranks on the nodes of a Ray cluster. Ray chooses nodes, starts an actor a rank and sees it end; steps
never go through Ray. The registry makes it for `ray`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from shoal import env, network
from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import num_gpus
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head
from shoal.executor.launcher import Launcher, OnExit, WorkerLink
from shoal.executor.ray_actor import WorkerActor
from shoal.executor.ray_join import clusters_here, find_token, first_line, join, own_address, translated
from shoal.executor.ray_placement import NodeRoom, describe_room, place_ranks
from shoal.log import get_logger
from shoal.network.node_record import read_record

# Resources of an engine that has just ended come back within this.
_RELEASE_SECONDS = 5.0
_RETRY_SECONDS = 0.25
# A group is placed at once, or another engine was quicker: then what is free is looked at anew.
_PLACE_SECONDS = 5.0
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.5
# A trace of a node's own resource, which Ray gives each node by its address, holds a bundle there.
_PIN = 0.001
_NO_CLUSTER = (
    "there is no cluster here to spread the model over. `shoal node start --head` on one machine begins one, and "
    "`shoal node start --address HEAD:PORT` on the others joins it (RAY_ADDRESS=HEAD:PORT names one that is up)"
)

logger = get_logger(__name__)


class RayLauncher(Launcher):
    """`listen_address` joins the cluster and looks for room; `stop` leaves it."""

    def __init__(self, config: EngineConfig) -> None:
        self._parallel = config.parallel
        self._resource = "GPU" if config.device == "cuda" else "CPU"
        self._head = ""
        self._token: str | None = None
        self._joined = False
        self._group: Any = None
        self._actors: list[Any] = []
        self._places: list[NodeRoom] = []
        self._num_nodes = 1
        self._watcher: threading.Thread | None = None
        self._head_watch: ray_head.HeadWatch | None = None
        self._head_is_gone = False
        self._stopping = threading.Event()
        self._ended: set[int] = set()
        self._all_ended = threading.Event()
        self._lock = threading.Lock()

    # --- the cluster -----------------------------------------------------------------------------------------------

    def listen_address(self) -> str:
        self._head = self._find_head()
        ray_head.check_installed()
        self._token = find_token(self._head, self._parallel.token_file)
        answer = ray_head.ask_head(self._head, self._token)
        ray_head.check_versions(self._head, answer)
        self._driver = own_address(self._head, answer)
        try:
            join(self._head, self._token, self._driver, namespace=f"shoal-{secrets.token_hex(8)}")
            self._joined = True
            self._find_room()
        except BaseException:
            self.stop(0.0)
            raise
        return network.host_address(network.split_endpoint(self._head)[0])

    def token(self) -> str:
        """The cluster's; for a cluster that has none of ours, one of this engine's own, which its actors are told."""
        if self._token is None:
            self._token = secrets.token_hex(32)
        return self._token

    def _find_head(self) -> str:
        """HOST:PORT: RAY_ADDRESS, else the cluster of the node that was started here, else one that Ray knows of."""
        named = env.ray_address()
        if named is not None and "://" in named:
            raise ConfigError(
                f"RAY_ADDRESS={named} is a gateway for remote clients; an engine runs on a node of its cluster: "
                "RAY_ADDRESS=HEAD:PORT names it by its head"
            )
        if named is not None and named != "auto":
            return network.format_endpoint(*network.split_endpoint(named, ray_head.DEFAULT_PORT))
        record = read_record()
        if record is not None:
            return record.head
        ray_head.check_installed()
        found = clusters_here()
        if not found:
            num_here = num_gpus() if self._resource == "GPU" else os.cpu_count()
            raise StartupError(
                f"{self._parallel.world_size * self._parallel.data_size} ranks want a {self._resource} each, this host "
                f"has {num_here}, and {_NO_CLUSTER}"
            )
        if len(found) > 1:
            raise StartupError(
                f"several Ray clusters run here: {', '.join(sorted(found))}; RAY_ADDRESS=HEAD:PORT says which"
            )
        return found.pop()

    # --- room ------------------------------------------------------------------------------------------------------

    def _find_room(self) -> list[NodeRoom]:
        """The node of each rank. StartupError at once where the cluster is too small, and soon where it is full."""
        deadline = time.monotonic() + _RELEASE_SECONDS
        while True:
            nodes = self._look()
            self._num_nodes = max(1, sum(1 for node in nodes if node.total))
            places = place_ranks(nodes, self._parallel, self._driver)
            if places is not None:
                self._places = places
                return places
            too_small = sum(node.total for node in nodes) < self._parallel.world_size
            if too_small or time.monotonic() >= deadline:
                raise StartupError(self._no_room(nodes))
            time.sleep(_RETRY_SECONDS)

    def _look(self) -> list[NodeRoom]:
        import ray

        with ray_head.private_names():
            from ray._private.state import available_resources_per_node

        with translated(f"the cluster {self._head} does not answer"):
            nodes, free = ray.nodes(), available_resources_per_node()
        return [
            NodeRoom(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                hostname=node["NodeManagerHostname"],
                free=int(free.get(node["NodeID"], {}).get(self._resource, 0)),
                total=int(node["Resources"].get(self._resource, 0)),
            )
            for node in nodes
            if node["Alive"]
        ]

    def _no_room(self, nodes: Sequence[NodeRoom]) -> str:
        parallel = self._parallel
        return (
            f"the cluster {self._head} has no room for {parallel.world_size} ranks (tensor_parallel_size "
            f"{parallel.tensor_size} × pipeline_parallel_size {parallel.pipeline_size}), each of which takes one "
            f"{self._resource}: {describe_room(nodes, self._resource)}. `shoal node start --address {self._head}` on "
            "another machine adds to it"
        )

    def _reserve(self) -> None:
        """A placement group of one bundle a rank, each held to its node; another engine may be quicker now and then."""
        from ray.util import placement_group, remove_placement_group

        deadline = time.monotonic() + self._parallel.startup_timeout
        while time.monotonic() < deadline:
            places = self._find_room()
            bundles = [{self._resource: 1.0, f"node:{node.address}": _PIN} for node in places]
            group = placement_group(bundles, strategy="PACK")
            if group.wait(_PLACE_SECONDS):
                self._group = group
                return
            remove_placement_group(group)
        raise StartupError(
            f"Ray did not give this engine its {self._resource}s within {self._parallel.startup_timeout:g} s "
            "(--startup-timeout); other engines that start now take them first"
        )

    # --- workers ---------------------------------------------------------------------------------------------------

    def start(self, link: WorkerLink, on_exit: OnExit) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        with translated("Ray cannot start the workers"):
            self._reserve()
            make = ray.remote(WorkerActor)
            for rank in range(self._parallel.world_size):
                options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if self._resource == "GPU" else {"num_cpus": 1}
                strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
                self._actors.append(
                    make.options(**options, max_restarts=0, max_concurrency=8, scheduling_strategy=strategy).remote()
                )
            places = self._ask_all("place", [() for _ in self._actors])
            shared = env.shared_variables()
            calls = []
            for rank, devices in enumerate(self._devices(places)):
                variables = shared | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
                calls.append((link.command(rank)[1:], link.token, variables))
            self._ask_all("start", calls)
        self._watcher = threading.Thread(target=self._watch, args=(on_exit,), name="ray-watch", daemon=True)
        self._watcher.start()
        host, port = network.split_endpoint(self._head)
        endpoint = network.format_endpoint(network.resolve_head(host), port)
        self._head_watch = ray_head.HeadWatch(self._head, endpoint, lambda how: self._lose_head(on_exit, how))

    def _lose_head(self, on_exit: OnExit, how: str) -> None:
        """Ray would end every process of the cluster soon: the engine ends before that, with a reason."""
        self._head_is_gone = True
        for rank in range(len(self._actors)):
            if rank not in self._ended and not self._stopping.is_set():
                on_exit(rank, f"must end, as the head of its Ray cluster is gone: {how}")

    def _ask_all(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One call of each actor; StartupError names those that did not answer in time."""
        import ray

        references = [getattr(actor, method).remote(*call) for actor, call in zip(self._actors, calls, strict=True)]
        _, late = ray.wait(references, num_returns=len(references), timeout=self._parallel.startup_timeout)
        if late:
            missing = ", ".join(self.describe(rank) for rank, each in enumerate(references) if each in late)
            raise StartupError(
                f"the actors of {missing} did not come up within {self._parallel.startup_timeout:g} s "
                "(--startup-timeout); Ray's logs on those nodes say more"
            )
        return list(ray.get(references))

    def _devices(self, places: Sequence[dict[str, Any]]) -> list[str]:
        """CUDA_VISIBLE_DEVICES of each rank: all that this engine has on the rank's node, of which a rank takes the one
        at its local rank; so those of one node reach each other's memory. "" without GPUs."""
        by_node: dict[str, list[str]] = {}
        for node, place in zip(self._places, places, strict=True):
            by_node.setdefault(node.node_id, []).extend(map(str, place["gpus"]))
        joined = {
            node: ",".join(sorted(gpus, key=lambda gpu: (not gpu.isdecimal(), int(gpu) if gpu.isdecimal() else 0, gpu)))
            for node, gpus in by_node.items()
        }
        return [joined[node.node_id] for node in self._places]

    def describe(self, rank: int) -> str:
        if not self._places:
            return f"rank {rank} (not placed)"
        node = self._places[rank]
        return f"rank {rank} (on {node.hostname}, {node.address})"

    def num_sharing(self, local_size: int) -> int:
        """Replicas spread over the nodes as ranks do; where exactly the others' went is not known here."""
        num_ranks = self._parallel.world_size * self._parallel.data_size
        return max(local_size, -(-num_ranks // self._num_nodes))

    def _watch(self, on_exit: OnExit) -> None:
        """Wait for what the actors say: output, and ends."""
        import ray

        waiting: dict[Any, tuple[str, int]] = {}
        for rank, actor in enumerate(self._actors):
            waiting[actor.wait.remote()] = "wait", rank
            waiting[actor.output.remote()] = "output", rank
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_SECONDS)
            for reference in ready:
                kind, rank = waiting.pop(reference)
                try:
                    said = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if kind == "wait":
                        self._report(on_exit, rank, f"died with its Ray actor: {_gist(error)}")
                    continue
                if kind == "wait":
                    self._report(on_exit, rank, said)
                elif said is not None:
                    print("\n".join(said), file=sys.stderr, flush=True)
                    waiting[self._actors[rank].output.remote()] = "output", rank

    def _report(self, on_exit: OnExit, rank: int, how: str) -> None:
        with self._lock:
            self._ended.add(rank)
            if len(self._ended) == len(self._actors):
                self._all_ended.set()
        if not self._stopping.is_set():
            on_exit(rank, how)

    # --- the end ---------------------------------------------------------------------------------------------------

    def stop(self, grace_seconds: float) -> None:
        self._stopping.set()
        if self._head_watch is not None:
            self._head_watch.stop()
        if not self._joined:
            return
        self._joined = False
        import ray

        if self._watcher is not None:
            self._all_ended.wait(grace_seconds)
        with contextlib.suppress(ray.exceptions.RayError):
            # What a node that is cut off does not answer is not waited for; its worker ends by its own deadline.
            alive = [actor for rank, actor in enumerate(self._actors) if rank not in self._ended]
            ray.wait([each.kill.remote(self._head_is_gone) for each in alive] or [ray.put(None)],
                     num_returns=len(alive) or 1, timeout=_KILL_SECONDS)  # fmt: skip
            if self._head_is_gone:
                return  # all below would wait for it; the actors end by themselves, and this process does in a moment
            if self._watcher is not None:
                self._watcher.join(_KILL_SECONDS)
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        ray.shutdown()


def _gist(error: BaseException) -> str:
    """The line that gives the reason, if there is one: Ray's messages begin with the actor's class, id and so on, and
    end with what may have been."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if "because" in line), first_line(error))
    return re.sub(r" Some common causes include: .*| Node Id: \w+$", "", line).rstrip(".")
