"""Machines: what `--gpus` says, parsed: nodes, devices a node, and what one device can do.

A device is a GPU; on a machine without one it is the machine, whose cores work for one rank.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from shoal.cluster.plan.gpus import GPUS, Gpu, known_names, variants
from shoal.errors import ConfigError

_FORMS = "2x4xL20-46GiB (nodes × GPUs × name and memory), 8xH100-80, 4xH200, 1x24GB, 3xcpu-16c-32GB"
_CPU = re.compile(r"cpu-(\d+)c-(\d+(?:\.\d+)?)(gib|gb)", re.IGNORECASE)
_MEMORY = re.compile(r"(?:(.*?)[-_ ])?(\d+(?:\.\d+)?)(gib|gb|g)?", re.IGNORECASE)
_RATES = re.compile(r"(\d+(?:\.\d+)?)gb/s(?:,(\d+(?:\.\d+)?)tflops?)?", re.IGNORECASE)
# The layouts of more take minutes to look at.
MOST_NODES, MOST_DEVICES = 256, 2048
_NEAR = 0.12  # of a card's memory, as people round it: 46, 48 and 44.5 are all an L20's

# A core's, measured on two cores of a server with AVX-512 and AMX (12 GB/s, 0.045 TFLOP/s in bf16), and what the
# memory of one machine gives however many cores ask: a plain one has two channels. `@GB/s,TFLOPS` says it better.
CPU_CORE_BANDWIDTH, CPU_MOST_BANDWIDTH, CPU_CORE_RATE = 12e9, 60e9, 0.045e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One rank's. bandwidth in bytes/s, rates in FLOP/s, nvlink and pcie in bytes/s of one direction.

    notes: what was assumed, in sentences.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_rate: float
    fp16_rate: float
    fp8_rate: float = 0.0
    nvlink: float = 0.0
    pcie: float = 31.5e9
    cores: int = 0
    served: bool = True
    notes: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.cores > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes with as many equal devices each. names: the nodes' addresses, where they are known. text: as given."""

    num_nodes: int
    per_node: int
    device: Device
    text: str
    names: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.per_node

    def describe(self) -> str:
        """ "2 nodes of 4 × L20"."""
        if self.device.is_cpu:
            return f"{self.num_nodes} node{'s' if self.num_nodes > 1 else ''} of {self.device.cores} cores"
        each = f"{self.per_node} × {self.device.name}"
        return each if self.num_nodes == 1 else f"{self.num_nodes} nodes of {each}"


def parse_machine(text: str) -> Machine:
    """Raises ConfigError for what is no machine, with the forms that are, and for a GPU that is not known."""
    shape, _, rates = text.strip().partition("@")
    if re.match(r"-\s*\d", shape):
        raise ConfigError(f"--gpus {text!r}: nodes and GPUs are counted from 1; such forms are: {_FORMS}")
    counts, rest = _split_counts(shape)
    if not rest or len(counts) > 2 or 0 in counts or (match := _split_cpu(rest)) and len(counts) > 1:
        raise ConfigError(f"--gpus {text!r} is no machine; such forms are: {_FORMS}")
    numbers = _parse_rates(rates, text) if rates else None
    if not match and re.match(r"cpu(?:-|$)", rest, re.IGNORECASE):
        raise ConfigError(f"--gpus {text!r}: a CPU is given by its cores and memory, such as 3xcpu-16c-32GB")
    num_nodes = counts[0] if len(counts) == 2 or (match and counts) else 1
    if num_nodes > MOST_NODES or math.prod(counts) > MOST_DEVICES:
        raise ConfigError(
            f"--gpus {text!r}: plans are made for up to {MOST_NODES} nodes with {MOST_DEVICES} GPUs in all; plan a "
            "part of it, and serve as many replicas behind `shoal router`"
        )
    if match:
        cores, memory = match
        return Machine(num_nodes=counts[0] if counts else 1, per_node=1, device=cpu(cores, memory, numbers), text=text)
    device = _parse_gpu(rest, numbers, text)
    counts = counts or [1]
    return Machine(num_nodes=counts[0] if len(counts) == 2 else 1, per_node=counts[-1], device=device, text=text)


def _split_counts(text: str) -> tuple[list[int], str]:
    """The numbers in front: "2x4xL20" -> [2, 4], "L20"."""
    counts = []
    while found := re.match(r"(\d+)\s*[x×*]\s*", text, re.IGNORECASE):
        counts.append(int(found[1]))
        text = text[found.end() :]
    return counts, text


def _split_cpu(text: str) -> tuple[int, int] | None:
    match = _CPU.fullmatch(text)
    if match is None or int(match[1]) == 0:
        return None
    return int(match[1]), int(float(match[2]) * (1 << 30 if match[3].lower() == "gib" else 10**9))


def _parse_rates(text: str, source: str) -> tuple[float, float]:
    match = _RATES.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(
            f"--gpus {source!r}: after @ come GB/s and TFLOPS, such as @864GB/s,119TFLOPS; found {text!r}"
        )
    return float(match[1]) * 1e9, float(match[2] or 0) * 1e12


def cpu(cores: int, memory_bytes: int, numbers: tuple[float, float] | None = None) -> Device:
    """numbers: bandwidth in bytes/s, rate in FLOP/s, where they are known."""
    bandwidth, rate = numbers or (min(cores * CPU_CORE_BANDWIDTH, CPU_MOST_BANDWIDTH), 0.0)
    notes: tuple[str, ...] = ()
    if numbers is None:
        notes = (
            f"CPUs differ: {bandwidth / 1e9:.0f} GB/s and {cores * CPU_CORE_RATE / 1e12:.2g} TFLOP/s a machine are "
            f"assumed; cpu-{cores}c-…@200GB/s,2TFLOPS says it better",
        )
    rate = rate or cores * CPU_CORE_RATE
    return Device(
        name="cpu",
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        bf16_rate=rate,
        fp16_rate=0.0,
        cores=cores,
        notes=notes,
    )


def _parse_gpu(text: str, numbers: tuple[float, float] | None, source: str) -> Device:
    name, memory, unit = text, None, ""
    match = _MEMORY.fullmatch(text)
    # "RTX-4090" ends in no size: it is a name as a whole.
    if match is not None and (variants(match[1] or "") or not variants(text)):
        name, memory, unit = match[1] or "", float(match[2]), (match[3] or "").lower()
    if memory == 0:
        raise ConfigError(f"--gpus {source!r}: a GPU without memory; such forms are: {_FORMS}")
    if not name:
        if memory is None or not unit:
            raise ConfigError(f"--gpus {source!r} is no machine; such forms are: {_FORMS}")
        return anonymous(int(memory * (1 << 30 if unit == "gib" else 10**9)), numbers)
    found = variants(name)
    size = None if memory is None else int(memory * (1 << 30 if unit == "gib" else 10**9))
    if not found:
        return _unknown(name, size, numbers, source)
    if memory is None:
        return of_gpu(found[0], note=_which_variant(found), numbers=numbers)
    return _of_size(found, memory, unit, size or 0, numbers, source)


def _which_variant(found: list[Gpu]) -> str:
    if len(found) == 1:
        return ""
    first, *others = found
    names = ", ".join(f"{gpu.name}-{gpu.nominal_gb}" for gpu in others)
    return f"{first.name} is taken as the one with {first.nominal_gb} GB; {names} says otherwise"


def _of_size(
    found: list[Gpu], memory: float, unit: str, size: int, numbers: tuple[float, float] | None, source: str
) -> Device:
    """The card whose memory it is, as people round it; else (a slice of a card) with exactly that memory."""
    nearest = min(found, key=lambda gpu: min(abs(gpu.nominal_gb - memory), abs(gpu.memory_mib / 1024 - memory)))
    away = min(abs(nearest.nominal_gb - memory) / memory, abs(nearest.memory_mib / 1024 - memory) / memory)
    if away <= _NEAR:
        note = ""
        if unit == "gib" and abs(nearest.memory_bytes - size) > size // 100:
            note = (
                f"CUDA reports {nearest.memory_bytes / 2**30:.1f} GiB of the {memory:g} GiB of {nearest.name}: "
                "that is counted with"
            )
        return of_gpu(nearest, note=note, numbers=numbers)
    if size > nearest.memory_bytes:
        sizes = " and ".join(f"{gpu.nominal_gb} GB" for gpu in found)
        raise ConfigError(f"--gpus {source!r}: {nearest.name} has {sizes}, not {memory:g}")
    note = f"{memory:g} GB of {nearest.name}: counted as a slice with this memory and the whole card's speed"
    return dataclasses.replace(of_gpu(nearest, note=note, numbers=numbers), memory_bytes=size)


def of_gpu(gpu: Gpu, *, note: str = "", numbers: tuple[float, float] | None = None) -> Device:
    """A card of the table; numbers: other speeds than its own."""
    bandwidth, rate = numbers or (gpu.bandwidth * 1e9, 0.0)
    return Device(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        bandwidth=bandwidth,
        bf16_rate=rate or gpu.bf16 * 1e12,
        fp16_rate=rate or gpu.fp16 * 1e12,
        fp8_rate=gpu.fp8 * 1e12,
        nvlink=gpu.nvlink * 1e9,
        pcie=gpu.pcie * 1e9,
        served=gpu.served,
        notes=(note,) if note else (),
    )


def _unknown(name: str, size: int | None, numbers: tuple[float, float] | None, source: str) -> Device:
    if size is None or numbers is None or not numbers[1]:
        near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--gpus {source!r}: the GPU {name!r} is not known. {hint}Known: {', '.join(known_names())}. Of another "
            f"one give memory, bandwidth and rate: {name}-48GiB@864GB/s,119TFLOPS"
        )
    return _plain(name, size, *numbers)


def _plain(name: str, size: int, bandwidth: float, rate: float, *notes: str) -> Device:
    return Device(name=name, memory_bytes=size, bandwidth=bandwidth, bf16_rate=rate, fp16_rate=rate, notes=notes)


def anonymous(size: int, numbers: tuple[float, float] | None = None, name: str = "") -> Device:
    """A GPU of which the memory alone is known: as fast as the slowest known one that has as much and bfloat16."""
    like = min(
        (gpu for gpu in GPUS if gpu.bf16 and gpu.nominal_gb * 1e9 >= 0.9 * size),
        key=lambda gpu: (gpu.nominal_gb > 1.5 * size / 1e9, gpu.bandwidth),
        default=min((gpu for gpu in GPUS if gpu.bf16), key=lambda gpu: -gpu.nominal_gb),
    )
    shown = name or f"GPU of {size / 1e9:.0f} GB"
    if numbers is not None:
        return _plain(shown, size, numbers[0], numbers[1] or like.bf16 * 1e12)
    note = (
        f"{shown}: its speed is not known, that of {like.name} is assumed ({like.bandwidth:g} GB/s, {like.bf16:g} "
        "TFLOP/s); a name, or @GB/s,TFLOPS, says it better"
    )
    return dataclasses.replace(_plain(shown, size, like.bandwidth * 1e9, like.bf16 * 1e12, note), pcie=like.pcie * 1e9)
