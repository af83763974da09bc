"""A plan as JSON: bytes are exact integers, times seconds, rates tokens a second."""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.cluster.plan.candidates import Candidate
from shoal.cluster.plan.links import Link
from shoal.cluster.plan.memory import component_bytes, request_tokens, seen_cache_bytes, sum_bytes, token_cache_bytes
from shoal.cluster.plan.placement import Layout, Rejection
from shoal.cluster.plan.planner import Plan


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan."""
    choice = plan.choice
    return {
        "model": _model(plan),
        "weights": weights_dict(plan),
        "kv_cache": cache_dict(plan),
        "load": dataclasses.asdict(plan.load)
        | {"context_of_predictions": plan.load.context, "prompt_of_first_token": plan.load.prompt},
        "machine": _machine(plan),
        "layouts": [candidate_dict(each) for each in plan.candidates],
        "rejected": [_rejection(each) for each in plan.rejected],
        "choice": None
        if choice is None
        else candidate_dict(choice.candidate)
        | {"reason": choice.reason, "holds_load": choice.holds_load, "commands": plan.commands()},
        "refusal": _refusal(plan),
        "notes": list(plan.notes),
        "not_served": list(plan.obstacles),
    }


def _model(plan: Plan) -> dict[str, Any]:
    config, quantization = plan.shape.config, plan.quantization
    return {
        "path": config.path,
        "architecture": config.architecture,
        "dtype": plan.load.dtype,
        "quantization": None if quantization is None else quantization.config.describe(),
        "parameters": plan.shape.num_parameters,
        "active_parameters": plan.shape.num_active_parameters,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "experts": plan.shape.num_experts,
        "tied_head": plan.shape.is_tied,
    }


def weights_dict(plan: Plan) -> dict[str, Any]:
    """total_bytes: what is loaded. not_loaded_bytes: a layer of the checkpoint that predicts a second token."""
    components = component_bytes(plan.shape.parts(), plan.load.itemsize)
    return {
        "total_bytes": sum(components.values()),
        "components": components,
        "not_loaded_bytes": sum_bytes(plan.shape.apart, plan.load.itemsize),
    }


def cache_dict(plan: Plan) -> dict[str, Any]:
    """Of the whole model, on one rank that has all of it. window_bytes: what sliding windows let be seen of the load;
    the engine keeps the rest too."""
    load, layers = plan.load, plan.shape.layers
    token = token_cache_bytes(layers, load.kv_itemsize)
    tokens = request_tokens(load)
    return {
        "dtype": load.kv_dtype,
        "bytes_per_token": token,
        "requests": load.concurrency,
        "tokens_per_request": tokens,
        "bytes_per_request": token * tokens,
        "load_bytes": token * tokens * load.concurrency,
        "window_bytes": seen_cache_bytes(layers, load.kv_itemsize, tokens) * load.concurrency,
    }


def _machine(plan: Plan) -> dict[str, Any]:
    machine = plan.machine
    return {
        "given": machine.text,
        "nodes": machine.num_nodes,
        "devices_per_node": machine.per_node,
        "names": list(machine.names),
        "device": {name: value for name, value in dataclasses.asdict(machine.device).items() if name != "notes"},
        "link_inside": _link(plan.links.inside),
        "link_between": _link(plan.links.between) if machine.num_nodes > 1 else None,
    }


def _link(link: Link) -> dict[str, Any]:
    return dataclasses.asdict(link)


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_parallel_size": layout.tensor_size,
        "pipeline_parallel_size": layout.pipeline_size,
        "data_parallel_size": layout.data_size,
        "expert_parallel": layout.shares_experts,
        "expert_ranks": layout.expert_size,
        "layer_partition": list(layout.partition),
        "nodes": layout.num_nodes,
        "nodes_of_a_tensor_group": layout.tensor_nodes,
        "way": layout.way,
    }


def candidate_dict(candidate: Candidate) -> dict[str, Any]:
    """A layout that fits. Bytes are of its fullest rank; tokens and requests of all replicas together."""
    memory = candidate.memory
    return _layout(candidate.layout) | {
        "memory": {
            "budget_bytes": memory.budget,
            "weight_bytes": memory.weights,
            "activation_bytes": memory.activations,
            "graph_bytes": memory.graphs,
            "overhead_bytes": memory.overhead,
            "cache_bytes": candidate.cache_bytes,
            "left_bytes": candidate.left_bytes,
        },
        "cache_tokens": candidate.cache_tokens,
        "capacity_requests": candidate.capacity,
        "prediction": dataclasses.asdict(candidate.prediction),
    }


def _rejection(rejection: Rejection) -> dict[str, Any]:
    return {
        "tensor_parallel_size": rejection.tensor_size,
        "pipeline_parallel_size": rejection.pipeline_size,
        "data_parallel_size": rejection.data_size,
        "expert_parallel": rejection.shares_experts,
        "reason": rejection.reason,
    }


def _refusal(plan: Plan) -> dict[str, Any] | None:
    refusal = plan.refusal
    if refusal is None:
        return None
    return {
        "closest": None if refusal.closest is None else _rejection(refusal.closest),
        "smallest_machines": [
            {
                "nodes": machine.num_nodes,
                "devices_per_node": machine.per_node,
                "device": machine.device.name,
                "memory_bytes": machine.num_devices * machine.device.memory_bytes,
                "capacity_requests": held,
            }
            for machine, held in refusal.machines
        ],
        "max_model_len_that_fits": refusal.shorter,
    }
