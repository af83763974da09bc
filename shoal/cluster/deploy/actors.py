"""The actors that Ray places: one a replica and one for the router. Each runs one program on its node, and nothing
else: requests and tokens go straight from the router to the servers. Fleet makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal import env, network
from shoal.cluster.deploy.look import Looker
from shoal.cluster.deploy.records import Launch
from shoal.cluster.deploy.service import Command, Condition, Service

_ROUTER_FILE = "router.yaml"
_ROUTER_SECONDS = 2.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ReplicaActor:
    """`shoal serve` on this node. Its methods return at once."""

    def __init__(self, launch: bytes) -> None:
        self._launch = msgspec.json.decode(launch, type=Launch)
        self._service = Service(self._command, Looker(), self._launch.grace, _node_address())
        self._service.start()

    def report(self) -> bytes:
        return msgspec.json.encode(self._service.report())

    def stop(self) -> None:
        """Begin to end the server: it answers what it has, and takes nothing new."""
        self._service.stop()

    def _command(self, directory: Path) -> Command:
        address = _node_address()
        port = network.free_port(address)
        launch = self._launch
        arguments = [*launch.program, *launch.flags, f"--host={address}", f"--port={port}"]
        environment = _environment(launch)
        if launch.takes_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_own_gpus())
        return Command(arguments, environment, network.format_url(address, port))


class RouterActor:
    """`shoal router` on this node, with a file that `publish` replaces."""

    def __init__(self, launch: bytes, host: str, port: int, admin_key: str | None) -> None:
        self._launch = msgspec.json.decode(launch, type=Launch)
        self._host, self._port = host, port
        self._text = ""
        headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._http = httpx.Client(timeout=_ROUTER_SECONDS, trust_env=False, headers=headers)
        self._service = Service(self._command, self._look, self._launch.grace, _node_address())

    def publish(self, text: str) -> None:
        """Have the router read this from now on; the first one starts it. Its servers' key is in it."""
        if text != self._text:
            self._text = text
            _write_atomically(self._service.directory / _ROUTER_FILE, text)
        if not self._service.started:
            self._service.start()

    def report(self) -> bytes:
        return msgspec.json.encode(self._service.report())

    def backends(self) -> bytes | None:
        """What /router/backends says; None while the router does not answer."""
        return self._ask("GET", "/router/backends")

    def drain(self, url: str) -> bytes | None:
        """Have a server get no new requests. What is under way there; None while the router does not answer."""
        return self._ask("POST", "/router/drain", {"url": url})

    def stop(self) -> None:
        self._service.stop()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes | None:
        url = network.format_url(self._host, self._port)
        try:
            answer = self._http.request(method, url + path, json=body)
        except httpx.HTTPError:
            return None
        return answer.content if answer.status_code == 200 else None

    def _look(self, url: str) -> Condition:
        try:
            answer = self._http.get(f"{network.format_url(self._host, self._port)}/readyz")
        except httpx.HTTPError as error:
            return Condition(why=f"does not answer: {error or type(error).__name__}")
        return Condition(ready=answer.status_code == 200, why="" if answer.status_code == 200 else "takes no requests")

    def _command(self, directory: Path) -> Command:
        file = directory / _ROUTER_FILE
        if not file.exists():  # the directory went with a keeper that was killed
            _write_atomically(file, self._text)
        arguments = [*self._launch.program, "--config", str(file)]
        shown = _node_address() if self._host in ("0.0.0.0", "::", "") else self._host
        return Command(arguments, _environment(self._launch), network.format_url(shown, self._port))


def needs_admin_key(host: str) -> bool:
    """Whether the router takes its own node for another machine: it is asked by an address that is no loopback."""
    return network.format_url(host, 1) not in [network.format_url(each, 1) for each in _LOOPBACK]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def _environment(launch: Launch) -> dict[str, str]:
    """The node's, without what is Ray's and the cluster's key, unless the program joins the cluster by itself."""
    own = env.initial_environment()
    environment = {
        name: value
        for name, value in own.items()
        if not name.startswith("RAY_") and name not in ("SHOAL_CLUSTER_TOKEN", "SHOAL_API_KEY")
    }
    if launch.needs_ray:
        import ray

        environment["RAY_ADDRESS"] = str(ray.get_runtime_context().gcs_address)
        environment |= {name: own[name] for name in own if name.startswith("RAY_AUTH_")}
        if "RAY_AUTH_TOKEN" in own:
            environment["SHOAL_CLUSTER_TOKEN"] = own["RAY_AUTH_TOKEN"]
    return {**environment, **launch.variables}


def _own_gpus() -> list[str]:
    import ray

    return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
