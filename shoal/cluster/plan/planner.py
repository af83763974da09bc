"""A plan: a model's bytes, a machine, every layout that fits, the one to take. `shoal plan` and `shoal serve` ask."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from shoal.cluster.plan import DEFAULT_CONCURRENCY, DEFAULT_MAX_MODEL_LEN
from shoal.cluster.plan.candidates import Candidate, survey
from shoal.cluster.plan.choice import Choice, choose
from shoal.cluster.plan.commands import commands, obstacles
from shoal.cluster.plan.devices import Device, Machine
from shoal.cluster.plan.families import read_shape
from shoal.cluster.plan.formats import Quantization
from shoal.cluster.plan.links import Links, links_of
from shoal.cluster.plan.memory import ITEMSIZES, Load
from shoal.cluster.plan.placement import Rejection
from shoal.cluster.plan.shape import ModelShape
from shoal.cluster.plan.smallest import capacity, smallest_machines
from shoal.config.cache_dtypes import check_cache_dtype
from shoal.config.options import EMBEDDED_MODEL, SchedulerOptions
from shoal.config.resolve import resolve_limits, resolve_max_model_len
from shoal.errors import ConfigError

_DEFAULT_NUM_SEQS = {"cpu": 64, "cuda": 256}
# More in one step of one replica help no more, and cost memory.
_MOST_NUM_SEQS = 1024
_LONGER = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked. None: the default. model: as `shoal serve` takes it, or a config.json."""

    model: str
    max_model_len: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    prefer: str = "throughput"
    quantization: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    utilization: float = 0.9
    node_link: str | None = None
    deterministic: bool | None = None
    scheduler: SchedulerOptions = SchedulerOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Nothing fits. closest: the layout that lacks least, and what it lacks. machines: the smallest that would do, with
    the requests of full length that each holds. shorter: a max_model_len with which something fits here."""

    closest: Rejection | None
    machines: tuple[tuple[Machine, int], ...]
    shorter: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    wish: Wish
    shape: ModelShape
    quantization: Quantization | None
    machine: Machine
    links: Links
    load: Load
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    choice: Choice | None
    refusal: Refusal | None
    notes: tuple[str, ...]
    obstacles: tuple[str, ...]

    def commands(self) -> list[str]:
        """Of the choice; none without one, or where Shoal does not run."""
        if self.choice is None or not self.machine.device.served:
            return []
        layout = self.choice.candidate.layout
        model = self.wish.model
        if Path(model).name == "config.json":
            model = str(Path(model).parent)
        # What the engine settles by itself on a CPU needs no flag.
        is_settled = self.wish.dtype == "auto" and self.machine.device.is_cpu
        dtype = self.load.dtype if is_settled else self.shape.config.dtype
        return commands(model, layout, self.load, self.machine, checkpoint_dtype=dtype)


def make_plan(wish: Wish, machine: Machine) -> Plan:
    """Raises ModelError for the model, ConfigError for what contradicts it or is not known."""
    shape, quantization = read_shape(wish.model, wish.quantization)
    deterministic = wish.deterministic
    if deterministic is None:
        deterministic = machine.device.is_cpu and wish.model == EMBEDDED_MODEL
    notes: list[str] = [*machine.device.notes]
    load = _load(wish, shape, machine.device, deterministic, notes)
    links = links_of(machine, wish.node_link)
    notes += links.notes
    if quantization is not None and quantization.is_assumed:
        notes.append(f"the checkpoint is not quantized: planned as if it were ({quantization.config.describe()})")
    if not machine.device.served:
        notes.append(f"Shoal does not run on {machine.device.name}: the figures are arithmetic")
    candidates, rejected = survey(shape, machine, links, load, deterministic=deterministic)
    usual = _DEFAULT_NUM_SEQS["cpu" if machine.device.is_cpu else "cuda"]
    if not candidates and wish.scheduler.max_num_seqs is None and load.num_seqs > usual:
        # Larger steps than the engine's own were for the load; where their graphs and logits leave no room, it waits.
        smaller = dataclasses.replace(wish, scheduler=dataclasses.replace(wish.scheduler, max_num_seqs=usual))
        load = _load(smaller, shape, machine.device, deterministic, notes)
        candidates, rejected = survey(shape, machine, links, load, deterministic=deterministic)
    choice = choose(candidates, load, wish.prefer, machine)
    if choice is not None and not choice.holds_load:
        notes.append(
            f"no layout holds {load.concurrency} requests of {load.max_model_len} tokens at a time; this one holds "
            f"{choice.candidate.capacity}, and others wait"
            + ("; --kv-cache-memory gives the cache more than its default on CPUs" if machine.device.is_cpu else "")
        )
    refusal = None if choice is not None else _refuse(shape, machine, load, rejected, deterministic)
    layout = None if choice is None else choice.candidate.layout
    return Plan(
        wish=wish,
        shape=shape,
        quantization=quantization,
        machine=machine,
        links=links,
        load=load,
        candidates=tuple(candidates),
        rejected=tuple(rejected),
        choice=choice,
        refusal=refusal,
        notes=tuple(dict.fromkeys(notes)),
        obstacles=tuple(obstacles(shape.config.architecture, layout)),
    )


def _load(wish: Wish, shape: ModelShape, device: Device, deterministic: bool, notes: list[str]) -> Load:
    kind = "cpu" if device.is_cpu else "cuda"
    own = shape.config.max_position_embeddings
    wanted = wish.max_model_len
    max_model_len = resolve_max_model_len(min(DEFAULT_MAX_MODEL_LEN, own) if wanted is None else wanted, shape.config)
    if wanted is None and max_model_len < own:
        notes.append(f"sequences of up to {max_model_len} tokens; the model takes {own} (--max-model-len)")
    scheduler = wish.scheduler
    if scheduler.max_num_seqs is None and wish.concurrency > _DEFAULT_NUM_SEQS[kind]:
        scheduler = dataclasses.replace(scheduler, max_num_seqs=min(wish.concurrency, _MOST_NUM_SEQS))
    seqs, tokens = resolve_limits(scheduler, kind, max_model_len)
    dtype = _dtype(wish, shape, device, deterministic, notes)
    check_cache_dtype(wish.kv_cache_dtype, dtype)
    kv_dtype = dtype if wish.kv_cache_dtype == "auto" else wish.kv_cache_dtype
    return Load(
        max_model_len=max_model_len,
        concurrency=wish.concurrency,
        dtype=dtype,
        kv_dtype=kv_dtype,
        utilization=wish.utilization,
        num_seqs=seqs,
        num_batched_tokens=tokens,
    )


def _dtype(wish: Wish, shape: ModelShape, device: Device, deterministic: bool, notes: list[str]) -> str:
    """As the engine settles it: no float16 on a CPU, no bfloat16 on a card without it."""
    dtype = wish.dtype
    if dtype != "auto":
        if dtype not in ITEMSIZES:
            raise ConfigError(f"dtype {dtype!r} is not known; known: float32, bfloat16, float16")
        if dtype == "float16" and device.is_cpu:
            raise ConfigError("dtype float16 does not run on the CPU; bfloat16 and float32 do")
        if dtype == "bfloat16" and not device.bf16_rate:
            raise ConfigError(f"{device.name} has no bfloat16; float16 and float32 work there")
        return dtype
    if deterministic and device.is_cpu and wish.model == EMBEDDED_MODEL:
        return "float32"
    dtype = shape.config.dtype
    if dtype == "float16" and device.is_cpu:
        notes.append("the checkpoint is float16, which does not run on the CPU: planned in bfloat16")
        return "bfloat16"
    if dtype == "bfloat16" and not device.bf16_rate:
        notes.append(f"{device.name} has no bfloat16: planned in float16")
        return "float16"
    return dtype


def _refuse(shape: ModelShape, machine: Machine, load: Load, rejected: list[Rejection], deterministic: bool) -> Refusal:
    machines = smallest_machines(shape, machine, load, deterministic=deterministic)
    held = tuple((each, capacity(shape, each, load, deterministic=deterministic)) for each in machines)
    shorter = None
    for length in _LONGER:
        if length < load.max_model_len and shorter is None:
            less = dataclasses.replace(load, max_model_len=length)
            if capacity(shape, machine, less, deterministic=deterministic):
                shorter = length
    return Refusal(closest=_closest(rejected), machines=held, shorter=shorter)


def _closest(rejected: list[Rejection]) -> Rejection | None:
    """Of those that were refused for memory: the one over the most ranks of one replica."""
    tried = [each for each in rejected if each.reason.startswith("a rank has")]
    return max(
        tried, key=lambda each: (each.tensor_size * each.pipeline_size, each.tensor_size, -each.data_size), default=None
    )
