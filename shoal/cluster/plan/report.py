"""A plan as tables and sentences for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.cluster.plan.as_json import cache_dict, weights_dict
from shoal.cluster.plan.candidates import Candidate
from shoal.cluster.plan.choice import family_of
from shoal.cluster.plan.memory import Load
from shoal.cluster.plan.planner import Plan

_WIDTH, _NARROW = 150, 90
_MOST_ROWS = 12
_NAMES = {
    "mlp": "MLP",
    "shared_experts": "shared experts",
    "scales": "quantization: scales",
    "zeros": "quantization: zeros",
    "g_idx": "quantization: g_idx",
}


@dataclasses.dataclass(frozen=True)
class _Column:
    """is_always: shown on narrow terminals too."""

    title: str
    show: Callable[[Candidate, Load], str]
    is_always: bool = True


def _gib(size: int) -> str:
    return f"{size / 2**30:.{1 if size >= 10 << 30 else 2}f}"


def _loaded(candidate: Candidate, load: Load) -> str:
    fewer = "*" if candidate.prediction.running < load.concurrency else ""
    return f"{1e3 * candidate.prediction.decode_loaded:.3g}{fewer}"


# GiB of the fullest rank; tokens and requests of all replicas; milliseconds and rates as predicted.
_COLUMNS = (
    _Column("TP", lambda each, _: f"{each.layout.tensor_size}{'⇄' if each.layout.tensor_nodes > 1 else ''}"),
    _Column("PP", lambda each, _: str(each.layout.pipeline_size)),
    _Column("DP", lambda each, _: str(each.layout.data_size)),
    _Column("EP", lambda each, _: str(each.layout.expert_size or "–")),
    _Column("weights GiB", lambda each, _: _gib(each.memory.weights)),
    _Column("activa- tions", lambda each, _: _gib(each.memory.activations), False),
    _Column("graphs, CUDA", lambda each, _: _gib(each.memory.graphs + each.memory.overhead), False),
    _Column("KV cache", lambda each, _: _gib(each.cache_bytes)),
    _Column("left", lambda each, _: _gib(each.left_bytes), False),
    _Column("tokens", lambda each, _: f"{each.cache_tokens:,}", False),
    _Column("requests", lambda each, _: str(each.capacity)),
    _Column("ms/token alone", lambda each, _: f"{1e3 * each.prediction.decode_alone:.3g}"),
    _Column("of {}", _loaded),
    _Column("tok/s", lambda each, _: f"{each.prediction.output_rate:,.0f}"),
    _Column("first token ms", lambda each, _: f"{1e3 * each.prediction.first_token:,.0f}"),
    _Column("prefill tok/s", lambda each, _: f"{each.prediction.prefill_rate:,.0f}", False),
)


def print_plan(plan: Plan, *, show_all: bool = False, file: IO[str] | None = None) -> None:
    """Memory, layouts, the choice and its commands; file: where to, standard output by default."""
    console = Console(soft_wrap=True, file=file)
    width = console.width if console.is_terminal else _WIDTH
    console.print(_memory_table(plan), width=width)
    if plan.candidates:
        _print_layouts(console, plan, show_all, width)
        hidden = len(plan.candidates) - _MOST_ROWS
        if hidden > 0 and not show_all:
            _say(console, f"{hidden} more layouts fit; --all shows them.")
    _say(console, "")
    for note in plan.notes:
        _say(console, f"note: {note}")
    for obstacle in plan.obstacles:
        _say(console, f"note: {obstacle}")
    if plan.choice is not None:
        _say(console, "")
        _say(console, f"Choice: {plan.choice.candidate.layout.name}. {plan.choice.reason}", style="bold")
        for command in plan.commands():
            _say(console, f"  {command}")


def _print_layouts(console: Console, plan: Plan, show_all: bool, width: int) -> None:
    table = _layout_table(plan, show_all, wide=width >= _WIDTH)
    Console(width=max(width, _NARROW), file=console.file, no_color=console.no_color).print(table)


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style))


def _memory_table(plan: Plan) -> Table:
    config, weights, cache = plan.shape.config, weights_dict(plan), cache_dict(plan)
    quantization = "" if plan.quantization is None else f", {plan.quantization.config.describe()}"
    parameters = plan.shape.num_parameters / 1e9
    title = f"{config.architecture}, {parameters:.3g} B parameters, {plan.load.dtype}{quantization}"
    if plan.shape.num_experts:
        title += f", {plan.shape.num_active_parameters / 1e9:.3g} B active"
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")

    def row(name: str, size: int, style: str = "") -> None:
        table.add_row(Text(name, style=style), Text(_size(size), style=style), Text(f"{size:,} bytes", style=style))

    for name, size in weights["components"].items():
        row(_NAMES.get(name, name), size)
    if plan.shape.is_tied:
        table.add_row(Text("head"), Text("tied"), Text("the embedding's"))
    row("weights", weights["total_bytes"], "bold")
    if weights["not_loaded_bytes"]:
        row("in the checkpoint, not loaded (MTP)", weights["not_loaded_bytes"])
    table.add_section()
    row(f"KV cache of a token ({cache['dtype']})", cache["bytes_per_token"])
    row(f"KV cache of {cache['requests']} × {cache['tokens_per_request']} tokens", cache["load_bytes"], "bold")
    if cache["window_bytes"] < cache["load_bytes"]:
        row("  of it within sliding windows", cache["window_bytes"])
    return table


def _size(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B"


def _layout_table(plan: Plan, show_all: bool, *, wide: bool) -> Table:
    load, device = plan.load, plan.machine.device
    between = f", {plan.links.between.name} between them" if plan.machine.num_nodes > 1 else ""
    inside = "" if plan.machine.per_node == 1 else f", {plan.links.inside.name} inside"
    title = f"{plan.machine.describe()}, {device.memory_bytes / 2**30:.1f} GiB each{inside}{between}"
    table = Table(title=Text(title), title_justify="left")
    columns = [column for column in _COLUMNS if wide or column.is_always]
    table.add_column("")
    for column in columns:
        table.add_column(column.title.format(load.concurrency), justify="right")
    chosen = None if plan.choice is None else plan.choice.candidate
    for candidate in shown(plan, show_all):
        mark = "→" if candidate is chosen else ""
        cells = (mark, *(column.show(candidate, load) for column in columns))
        table.add_row(*cells, style="bold" if candidate is chosen else "")
    if any(each.prediction.running < load.concurrency for each in shown(plan, show_all)):
        table.caption = "* with as many requests as the cache holds; ⇄ a tensor-parallel group reaches over nodes"
        table.caption_justify = "left"
    return table


def shown(plan: Plan, show_all: bool) -> Sequence[Candidate]:
    """The choice first, then by the rules' order and what is preferred; GiB of the fullest rank."""
    chosen = None if plan.choice is None else plan.choice.candidate

    def order(candidate: Candidate) -> tuple[bool, bool, float]:
        predicted = candidate.prediction
        figure = predicted.decode_alone if plan.wish.prefer == "latency" else -predicted.output_rate
        return candidate is not chosen, candidate.capacity < plan.load.concurrency, figure

    ordered = sorted(plan.candidates, key=lambda each: (*order(each), family_of(each)))
    return ordered if show_all else ordered[:_MOST_ROWS]


def refusal_text(plan: Plan) -> str:
    """Why nothing fits and what would do, as one error message."""
    refusal, weights = plan.refusal, weights_dict(plan)
    assert refusal is not None, "asked only where nothing fits"
    total = plan.machine.num_devices * plan.machine.device.memory_bytes
    text = (
        f"nothing fits: the weights are {weights['total_bytes'] / 2**30:.1f} GiB, one request of "
        f"{plan.load.max_model_len} tokens {cache_dict(plan)['bytes_per_request'] / 2**30:.2f} GiB, and "
        f"{plan.machine.describe()} {'has' if plan.machine.num_nodes == 1 else 'have'} {total / 2**30:.1f} GiB in all"
    )
    if refusal.closest is not None:
        near = refusal.closest
        text += f". With TP {near.tensor_size} × PP {near.pipeline_size} {near.reason}"
    options = [f"{machine.describe()} ({held} such requests)" for machine, held in refusal.machines]
    if options:
        text += f". The smallest that would do: {', or '.join(options)}"
    if refusal.shorter is not None:
        text += f". Here --max-model-len {refusal.shorter} fits"
    if plan.quantization is None:
        text += ". --quantization gptq or fp8 shows what a quantized checkpoint would take"
    return text
