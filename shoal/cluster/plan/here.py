"""What is here: this machine's GPUs, or cores, and the nodes of the cluster. Neither torch nor Ray is loaded."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import psutil

from shoal import env, network
from shoal.cluster.plan.devices import Device, Machine, anonymous, cpu, of_gpu
from shoal.cluster.plan.gpus import CUDA_SHARE, MIB, variants
from shoal.config.resolve import num_gpus
from shoal.errors import ConfigError
from shoal.executor import ray_head
from shoal.network.node_record import read_record

_SMI_SECONDS = 20.0
_ACCELERATOR = "accelerator_type:"


def this_machine() -> Machine:
    """Its GPUs as the driver shows them, else its cores."""
    machine = local_gpus()
    if machine is not None:
        return machine
    cores = len(os.sched_getaffinity(0))
    device = cpu(cores, psutil.virtual_memory().total)
    return Machine(num_nodes=1, per_node=1, device=device, text="this machine")


def local_gpus() -> Machine | None:
    """The GPUs that CUDA_VISIBLE_DEVICES lets this process see. None: there are none, or nothing here can say what they
    are. Where they differ, all count as the one with the least memory."""
    if num_gpus() == 0:
        return None
    cards = _ask_nvml() or _ask_smi()
    visible = env.cuda_visible_devices()
    if visible is not None and all(each.isdecimal() for each in visible):
        cards = [cards[int(each)] for each in visible if int(each) < len(cards)]
    elif visible is not None:
        cards = cards[: len(visible)]
    if not cards:
        return None
    name, memory = min(cards, key=lambda card: card[1])
    device = device_of(name, memory)
    if len(set(cards)) > 1:
        note = f"GPUs here differ: all count as {name}, the one with the least memory"
        device = _with_note(device, note)
    return Machine(num_nodes=1, per_node=len(cards), device=device, text="this machine")


def device_of(name: str, memory_bytes: int) -> Device:
    """A card as the driver names it, with the memory that it reports."""
    found = variants(name)
    if not found:
        return anonymous(memory_bytes, name=name)
    nearest = min(found, key=lambda gpu: abs(gpu.memory_mib * MIB - memory_bytes))
    return dataclasses.replace(of_gpu(nearest), memory_bytes=int(memory_bytes * CUDA_SHARE))


def _with_note(device: Device, note: str) -> Device:
    return dataclasses.replace(device, notes=(*device.notes, note))


def _ask_nvml() -> list[tuple[str, int]]:
    """(name, bytes) of each GPU; empty where nvidia-ml-py is not installed, or the driver does not answer it."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        cards = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else str(name)
            cards.append((name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total)))
        return cards
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _ask_smi() -> list[tuple[str, int]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    cards = []
    for line in done.stdout.splitlines():
        name, _, memory = line.rpartition(",")
        if memory.strip().isdecimal():
            cards.append((name.strip(), int(memory) * MIB))
    return cards


def cluster() -> Machine:
    """The nodes of the cluster that this machine is a node of, or that RAY_ADDRESS names.

    Raises ConfigError where there is none, StartupError where its head does not answer.
    """
    ray_head.check_installed()
    record = read_record()
    head = env.ray_address() or (record.head if record else None)
    if head is None or head == "auto":
        raise ConfigError(
            "--cluster: no node runs on this machine. `shoal node start` makes it one; RAY_ADDRESS=HOST:PORT names a "
            "cluster that it is no part of; --gpus plans for machines that are not there yet"
        )
    answer = ray_head.ask_head(head, network.load_token(None))
    return machine_of([node for node in answer.nodes if node.alive], head)


def machine_of(nodes: Sequence[ray_head.Node], head: str) -> Machine:
    """As many equal nodes: with GPUs where there are any; of unequal ones each counts as the least."""
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0) >= 1]
    counted = with_gpus or [*nodes]
    if not counted:
        raise ConfigError(f"--cluster: the cluster of {head} has no node that is alive")
    notes = []
    if with_gpus and len(with_gpus) < len(nodes):
        notes.append(f"{len(nodes) - len(with_gpus)} nodes without a GPU are left out")
    names = tuple(node.address for node in counted)
    if not with_gpus:
        cores = min(int(node.resources.get("CPU", 1)) for node in counted)
        # What Ray hands out is a share of the machine: its own objects have the rest.
        memory = min(
            int(node.resources.get("memory", 0) + node.resources.get("object_store_memory", 0)) for node in counted
        )
        machine = Machine(
            num_nodes=len(counted),
            per_node=1,
            device=cpu(max(cores, 1), memory),
            text=f"cluster of {head}",
            names=names,
        )
    else:
        per_node = min(int(node.resources["GPU"]) for node in counted)
        kinds = sorted({_accelerator(node) for node in counted})
        if len(kinds) > 1 or any(int(node.resources["GPU"]) != per_node for node in counted):
            notes.append(f"nodes differ ({', '.join(kinds)}): each counts with {per_node} of the smallest GPU")
        devices = [device_named(kind) for kind in kinds]
        device = min(devices, key=lambda each: each.memory_bytes)
        machine = Machine(
            num_nodes=len(counted), per_node=per_node, device=device, text=f"cluster of {head}", names=names
        )
    for note in notes:
        machine = _noted(machine, note)
    return machine


def _noted(machine: Machine, note: str) -> Machine:
    return dataclasses.replace(machine, device=_with_note(machine.device, note))


def _accelerator(node: ray_head.Node) -> str:
    """Ray's name of a node's GPU, such as H100."""
    for name in node.resources:
        if name.startswith(_ACCELERATOR):
            return name.removeprefix(_ACCELERATOR)
    return "unknown"


def device_named(name: str) -> Device:
    """A GPU of which the cluster says the name alone; this machine's own say their memory. Raises ConfigError."""
    local = local_gpus()
    if local is not None and (name == "unknown" or variants(name) == variants(local.device.name)):
        return local.device
    found = variants(name)
    if not found:
        raise ConfigError(
            f"--cluster: the nodes' GPUs ({name}) are not known here; say what they are by --gpus, as in 2x4xL20-46GiB"
        )
    return of_gpu(found[0])
