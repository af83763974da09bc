"""`shoal plan MODEL`: what a model takes, how it can be laid out on a machine, and which layout to take."""

from __future__ import annotations

import json
import sys

from shoal.cli.command import Command
from shoal.cli.plan_options import PlanOptions
from shoal.cluster.plan.as_json import plan_dict
from shoal.cluster.plan.devices import Machine, parse_machine
from shoal.cluster.plan.here import cluster, this_machine
from shoal.cluster.plan.planner import Wish, make_plan
from shoal.cluster.plan.report import print_plan, refusal_text
from shoal.errors import ConfigError


def _run(options: PlanOptions) -> int:
    wish = Wish(
        model=options.model,
        max_model_len=options.max_model_len,
        concurrency=options.concurrency,
        prefer=options.prefer,
        quantization=options.quantization,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        utilization=options.gpu_memory_utilization,
        node_link=options.node_link,
    )
    plan = make_plan(wish, _machine(options))
    if options.json:
        print(json.dumps(plan_dict(plan), indent=2, ensure_ascii=False))
    else:
        print_plan(plan, show_all=options.all)
    if plan.refusal is None:
        return 0
    sys.stdout.flush()
    print(f"shoal: error: {refusal_text(plan)}", file=sys.stderr)
    return 1


def _machine(options: PlanOptions) -> Machine:
    if options.gpus is not None and options.cluster:
        raise ConfigError("--gpus and --cluster both say what the machine is; give one of them")
    if options.gpus is not None:
        return parse_machine(options.gpus)
    return cluster() if options.cluster else this_machine()


COMMAND = Command(
    name="plan",
    description="From a model's config.json alone: bytes of its weights and KV cache, every layout (tensor, pipeline, "
    "data, expert parallel) that fits the machine, with predicted capacity and latency, and the one to take. Nothing "
    "is loaded. Exit code 1 where nothing fits.",
    sections=(PlanOptions,),
    positional="model",
    run=_run,
)
