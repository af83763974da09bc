"""The choice among layouts that fit, by the rules that people know, and the reason in a sentence.

Fits one device: replicas (data parallel). Fits one node: tensor parallel inside it. Beyond: pipeline stages between
nodes, as few as hold the load. Experts lie whole on their ranks. Within the rule the prediction decides.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from shoal.cluster.plan.candidates import Candidate
from shoal.cluster.plan.devices import Machine
from shoal.cluster.plan.memory import Load
from shoal.config.sizes import format_size


class Family(enum.IntEnum):
    """In the order in which they are preferred."""

    REPLICAS = 0
    TENSOR_IN_NODE = 1
    STAGES_IN_NODE = 2
    STAGES_OVER_NODES = 3
    TENSOR_OVER_NODES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    candidate: Candidate
    reason: str
    holds_load: bool


def family_of(candidate: Candidate) -> Family:
    layout = candidate.layout
    if layout.tensor_nodes > 1 or (layout.shares_experts and layout.expert_nodes > 1):
        return Family.TENSOR_OVER_NODES
    if layout.way == "ray" and layout.pipeline_size > 1:
        return Family.STAGES_OVER_NODES
    if layout.pipeline_size > 1:
        return Family.STAGES_IN_NODE
    return Family.REPLICAS if layout.engine_ranks == 1 else Family.TENSOR_IN_NODE


def choose(candidates: Sequence[Candidate], load: Load, prefer: str, machine: Machine) -> Choice | None:
    """prefer: "latency" (of a request alone) or "throughput" (of the load). None: nothing fits."""
    if not candidates:
        return None
    holding = [candidate for candidate in candidates if candidate.capacity >= load.concurrency]
    if not holding:
        most = max(candidate.capacity for candidate in candidates)
        # The rules count, unless they hold less than half of what could be held.
        pool = [candidate for candidate in candidates if 2 * candidate.capacity >= most]
    elif prefer == "latency":
        inside = [candidate for candidate in holding if family_of(candidate) < Family.TENSOR_OVER_NODES]
        best = min(inside or holding, key=lambda each: (each.prediction.decode_alone, -each.prediction.output_rate))
        return Choice(candidate=best, reason=_latency_reason(best, candidates, machine), holds_load=True)
    else:
        pool = holding
    family = min(family_of(candidate) for candidate in pool)
    pool = [candidate for candidate in pool if family_of(candidate) is family]
    if family >= Family.STAGES_IN_NODE:
        fewest = min(candidate.layout.pipeline_size for candidate in pool)
        pool = [candidate for candidate in pool if candidate.layout.pipeline_size == fewest]
    if family is not Family.REPLICAS:
        pool = [candidate for candidate in pool if candidate.layout.shares_experts] or pool
    best = min(pool, key=lambda each: _order(each, prefer))
    return Choice(candidate=best, reason=_reason(best, candidates, load, machine), holds_load=bool(holding))


def _order(candidate: Candidate, prefer: str) -> tuple[float, float, int]:
    prediction = candidate.prediction
    if prefer == "latency":
        return prediction.decode_alone, -prediction.output_rate, candidate.layout.num_ranks
    return -prediction.output_rate, prediction.decode_alone, candidate.layout.num_ranks


def _latency_reason(best: Candidate, candidates: Sequence[Candidate], machine: Machine) -> str:
    milliseconds = 1e3 * best.prediction.decode_alone
    text = f"Latency is preferred, and {best.layout.name} is predicted to give a token alone in {milliseconds:.3g} ms"
    others = [each for each in candidates if family_of(each) is Family.REPLICAS]
    if others and best not in others:
        alone = 1e3 * min(each.prediction.decode_alone for each in others)
        text += f", where one {_device(machine)} takes {alone:.3g} ms"
    return text + "."


def _reason(best: Candidate, candidates: Sequence[Candidate], load: Load, machine: Machine) -> str:
    layout, device = best.layout, _device(machine)
    family = family_of(best)
    size = best.memory.weights
    weights = f"{f'{size / 2**30:.1f} GiB' if size >= 2**30 else format_size(size)} of weights"
    what = {
        Family.REPLICAS: (
            f"A whole model ({weights}) fits one {device}"
            + (
                f", so each of {layout.data_size} holds a replica of its own and none waits for another"
                if layout.data_size > 1
                else ", so nothing has to be split"
            )
        ),
        Family.TENSOR_IN_NODE: (
            f"{_not_one(candidates, Family.REPLICAS, load, device)}; {layout.engine_ranks} of one node "
            f"do: tensor parallel inside the node, where links are quick"
        ),
        Family.STAGES_IN_NODE: (
            f"{_not_one(candidates, Family.REPLICAS, load, device)}; no tensor-parallel degree that the model can "
            f"be cut into does in one node: {layout.pipeline_size} pipeline stages share it"
        ),
        Family.STAGES_OVER_NODES: (
            f"{_not_one(candidates, Family.TENSOR_IN_NODE, load, 'node')}: {layout.pipeline_size} pipeline stages, "
            "since between nodes they send little"
            + (f", each tensor parallel over {layout.tensor_size} of a node" if layout.tensor_size > 1 else "")
        ),
        Family.TENSOR_OVER_NODES: (
            "No layout keeps a tensor-parallel group inside a node and holds this: groups reach over "
            f"{max(layout.tensor_nodes, layout.expert_nodes)} nodes, and every layer waits for the network"
        ),
    }[family]
    if family not in (Family.REPLICAS,) and layout.shares_experts:
        what += f"; its experts lie whole on {layout.expert_size} ranks"
    if layout.data_size > 1 and family is not Family.REPLICAS and not layout.in_lockstep:
        what += f"; {layout.data_size} such replicas"
    return what + "."


def _not_one(candidates: Sequence[Candidate], family: Family, load: Load, device: str) -> str:
    """ "No single L20 holds the model": or it does, but not the load."""
    smaller = [each.capacity // each.layout.data_size for each in candidates if family_of(each) <= family]
    if not smaller:
        return f"No single {device} holds the model"
    return f"The model fits one {device}, though not with the cache of {load.concurrency} requests of full length"


def _device(machine: Machine) -> str:
    return "machine" if machine.device.is_cpu else machine.device.name
