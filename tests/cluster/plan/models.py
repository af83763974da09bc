"""What the tests of planning share: the published configs, plans of them, and machines."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from shoal.cluster.plan.devices import parse_machine
from shoal.cluster.plan.planner import Plan, Wish, make_plan

CONFIGS = Path(__file__).parent / "configs"
MODELS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
MACHINES = ("8xH100-80", "2x4xL20-46GiB", "4xH200", "1x24GB", "3xcpu-16c-32GB")


def path_of(name: str) -> str:
    return str(CONFIGS / name)


def write_config(directory: Path, **values: Any) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(directory)


@functools.lru_cache(maxsize=64)
def plan_of(name: str, machine: str, prefer: str = "throughput", **_: Any) -> Plan:
    return make_plan(Wish(model=path_of(name), prefer=prefer, node_link="10gbe"), parse_machine(machine))
